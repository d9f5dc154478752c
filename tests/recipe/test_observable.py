"""Every recipe key has an effect: changed alone, it changes an output of the program.

`CHANGES` lists for each key an observer, another value, and further changes that the key needs to matter. An observer
is a function of a recipe whose result can be compared; called twice, it must return the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import shutil
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from composer.core import Event, Timestamp
from PIL import Image

from fastflower import ensemble, evaluate, export, train
from fastflower.algorithms.auxiliary import AuxiliaryHeads
from fastflower.algorithms.fixmatch import FixMatch
from fastflower.algorithms.mixing import MixUpCutMix
from fastflower.bundle import gates, writer
from fastflower.bundle.members import choose
from fastflower.bundle.submission import class_texts
from fastflower.callbacks.selection import Candidate, Selection
from fastflower.campaign import rounds
from fastflower.campaign.plan import parse_overrides
from fastflower.core import checkpoint, runs, seeding
from fastflower.core.errors import InputError
from fastflower.core.records import to_plain
from fastflower.core.runs import Run
from fastflower.data import auxiliary
from fastflower.data.auxiliary import AuxTargets
from fastflower.data.betons import fold_set
from fastflower.data.betons.beton_file import RAW, EncodedImage, open_beton
from fastflower.data.betons.beton_writer import BetonWriter
from fastflower.data.conversion.pipeline import convert
from fastflower.data.decode.kernel import Crop
from fastflower.data.labels import read_labels
from fastflower.data.loaders import train_images
from fastflower.data.samplers import order
from fastflower.data.transforms.augment import augment
from fastflower.evaluation import acceptance, agreement, distillation, priors, soft_labels, summary, views
from fastflower.model.embeddings import embedder
from fastflower.model.losses import build_loss
from fastflower.model.network import synchronise_norms, training_network
from fastflower.optim.groups import describe_groups, param_groups
from fastflower.optim.lr_range import rates
from fastflower.optim.optimizers import build_optimizer
from fastflower.optim.schedules import Plateau, frozen_parts, lr_factor
from fastflower.recipe import Recipe, checks, derived, load, schema, to_yaml
from fastflower.recipe.derived import derive
from fastflower.training import build, fold_data, ranks
from fastflower.training.features import FrozenFeatures
from fastflower.training.initial import load_initial
from support import fake_members, toy_project

KEYS = [name for name, _, _ in schema.fields_of(Recipe())]
CPU = torch.device("cpu")
KINDS_COMPARED = ("best_combo", "ema_best", "swa", "last")


def sha(*arrays: Any) -> str:
    total = hashlib.sha256()
    for array in arrays:
        data = array.detach().numpy() if isinstance(array, torch.Tensor) else np.asarray(array)
        total.update(np.ascontiguousarray(data).tobytes())
    return total.hexdigest()


def notes_and_result(work: Callable[[], Any]) -> tuple[list[str], Any]:
    """The notes that a command prints, and its result or error message."""
    out, result = io.StringIO(), None
    with contextlib.redirect_stdout(out):
        try:
            result = work()
        except InputError as error:
            result = str(error)
    return [line for line in out.getvalue().splitlines() if "note:" in line], result


# --- observers ------------------------------------------------------------------------------------------------------


def plan(recipe: Recipe) -> Any:
    """Numbers, schedules and names derived from a recipe without reading data."""
    try:
        advice = checks.check(recipe)
    except InputError as error:
        return str(error)
    numbers = derive(recipe, 2)
    run = Run(
        exp=recipe.exp.name,
        backbone=recipe.model.backbone,
        fold=derived.fold_numbers(recipe)[0],
        seed=recipe.seed,
    )
    plateau, factors = Plateau(recipe.sched.factor, recipe.sched.patience, recipe.sched.monitor), []
    for epoch in range(numbers.epochs):
        plateau.step(0.5 + 0.01 * max(0, epoch - 5))
        factors += [
            lr_factor(epoch, step, steps_per_epoch=4, recipe=recipe, plateau_factor=plateau.factor)
            for step in (0, 3)
        ]
    return (
        advice,
        numbers.as_dict(),
        factors,
        [sorted(frozen_parts(epoch, recipe)) for epoch in range(numbers.epochs)],
        derived.fold_numbers(recipe),
        rates(recipe.lrfind.low, recipe.lrfind.high, recipe.lrfind.steps),
        derived.parse_interval(recipe.train.save_every),
        fold_set.stored_side(recipe),
        run.stem,
        str(run.model_dir),
    )


def converted(recipe: Recipe) -> Any:
    """The files that convert writes, with their hashes, or its error message."""

    def work() -> Any:
        conversion = convert(recipe, read_labels(recipe), embedder)
        home = Path(recipe.data.home)
        files = sorted(
            path
            for path in home.rglob("*")
            if path.is_file() and (path.suffix in (".csv", ".beton") or path.name == auxiliary.FILE)
        )
        return {str(path): sha(np.fromfile(path, np.uint8)) for path in files}, conversion.settings

    return notes_and_result(work)


def batches(recipe: Recipe) -> Any:
    """Training batches of several epochs after augmentation and mixing, and evaluation batches."""
    position, seen = fold_data.Position(), []
    fold = fold_set.open_fold(recipe, 0)
    data = fold_data.loaders(
        recipe,
        derive(recipe, 1),
        position=position,
        fold=fold,
        interpolation="bicubic",
        machine=ranks.prepare(recipe),
    )
    mix, grey = MixUpCutMix(recipe, len(fold.classes)), (128.0, 128.0, 128.0)
    for epoch in range(3):
        data.train.cursor = lambda at=epoch: (at, 0)
        for step, batch in enumerate(data.train):
            images = augment(
                batch["image"], batch["key"], aug=recipe.aug, erase_p=recipe.reg.erase_p, fill=grey
            )
            state = types.SimpleNamespace(
                batch={**batch, "image": images}, timestamp=Timestamp(epoch=epoch, batch_in_epoch=step)
            )
            mix.apply(Event.BATCH_START, state, None)
            views = [sha(batch[name]) for name in ("weak", "strong") if name in batch]
            seen.append((sha(state.batch["image"]), sha(state.batch["target"]), *views))
    evaluation = {name: [sha(b["image"]) for b in loader] for name, loader in data.evaluation.items()}
    observed = seen, evaluation, data.train.threads, data.combos
    data.close()
    return observed


def unlabelled(recipe: Recipe) -> Any:
    """The loss and the network input that FixMatch adds for unlabelled images, with a fixed network."""
    fixmatch, pictures = (
        FixMatch(recipe, [1, 1, 1], fill=(0.0, 0.0, 0.0)),
        torch.arange(2 * 3 * 8 * 8 * 3).view(2, 3, 8, 8, 3),
    )
    pictures, keys = (pictures % 251).to(torch.uint8), torch.arange(6).view(2, 3)
    batch = {"image": torch.ones(2, 3, 8, 8), "label": torch.zeros(2), "truth": keys, "weak": pictures}
    state = types.SimpleNamespace(
        batch={**batch, "strong": pictures, "strong_key": keys}, loss=torch.zeros(()), dataloader_len=4,
        timestamp=Timestamp(epoch=0, batch_in_epoch=1),
    )  # fmt: skip
    # as if the first class were hardly ever predicted
    fixmatch.mean_prediction = torch.tensor([1e-4, 0.1, 0.9], dtype=torch.float64)
    for event in (Event.BATCH_START, Event.BEFORE_FORWARD):
        fixmatch.apply(event, state, None)
    state.outputs = state.batch["image"].mean((2, 3)) * torch.tensor([0.05, 0.06, 0.07])
    for event in (Event.AFTER_FORWARD, Event.AFTER_LOSS, Event.BATCH_END):
        fixmatch.apply(event, state, None)
    return sha(state.batch["image"]), float(state.loss), fixmatch.row()


def soft_targets(recipe: Recipe) -> Any:
    """The soft labels of unlabelled images by the trained member."""
    opened = fold_set.open_fold(recipe, 0)
    return sha(soft_labels.soft_labels(recipe, opened, len(opened.classes)).targets)


def rounds_planned(recipe: Recipe) -> Any:
    """The experiments of a campaign's rounds."""
    path = Path("observed.yaml")
    path.write_text(to_yaml(recipe))
    return [each.exp for each in rounds.plan_rounds([str(path)], parse_overrides([]))]


def paired(recipe: Recipe) -> Any:
    """Training crops of pairs."""
    with BetonWriter(Path("pairs.beton"), 8, images_per_row=2) as writer:
        for row in range(8):
            pixels = [np.full((16, 16, 3), shade + row, np.uint8) for shade in (50, 200)]
            writer.append(0, row, *(EncodedImage(RAW, p.data.cast("B"), height=16, width=16) for p in pixels))
        writer.commit()
    rows, size = np.arange(8), (16, 16)
    pairs = open_beton(Path("pairs.beton"))
    return sha(train_images(pairs, rows, keys=rows.astype(np.uint64), size=size, crop=Crop.of(recipe)))


def drawn(recipe: Recipe) -> Any:
    """The rows of an epoch sampled from a long-tailed dataset."""
    labels = np.repeat(np.arange(5), [200, 80, 20, 5, 1])
    return order(recipe.sampler, labels, seed=recipe.seed, epoch=0, fold=0, batch=1).tolist()


def network(recipe: Recipe) -> Any:
    """The network as training builds it: its output, parameter groups, optimizer, and SyncBatchNorm on two GPUs."""

    def work() -> Any:
        seeding.seed_all(0)
        classes = len(fold_data.class_counts(recipe, fold_set.open_fold(recipe, 0)))
        built, spec, notes = training_network(recipe, classes)
        images = torch.linspace(0, 255, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
        groups = param_groups(built, 1e-3, recipe)
        _, synchronised = synchronise_norms(built, recipe, device=torch.device("cuda"), world_size=2)
        layouts = [p.stride() for p in built.parameters()]
        checkpointing = [getattr(module, "grad_checkpointing", None) for module in built.modules()]
        built.train()
        return (
            sha(built(images)), notes, describe_groups(groups), repr(build_optimizer(groups, recipe, CPU)),
            synchronised, layouts, checkpointing, dataclasses.asdict(spec),
        )  # fmt: skip

    return notes_and_result(work)


def begun(recipe: Recipe) -> Any:
    """The network with the weights of model.init."""
    seeding.seed_all(0)
    fold = fold_set.open_fold(recipe, 0)
    built, spec, _ = training_network(recipe, len(fold.classes))
    if recipe.model.init:
        load_initial(built, spec, recipe=recipe, fold=fold)
    return sha(*built.state_dict().values())


def probed(recipe: Recipe) -> Any:
    """The features that a head is trained on, and its logits before the first step."""
    fold, device = fold_set.open_fold(recipe, 0), ranks.prepare(recipe)
    seeding.seed_all(0)
    built, spec, _ = training_network(recipe, len(fold.classes), images=fold.train.rows)
    data = fold_data.loaders(
        recipe,
        derive(recipe, 1),
        position=fold_data.Position(),
        fold=fold,
        interpolation="bicubic",
        machine=device,
    )
    FrozenFeatures(recipe, network=built, spec=spec, machine=device, say=print).use(data, fold)
    rows = np.arange(8)
    return sha(data.train.features(rows, rows.astype(np.uint64))), sha(
        built.eval()(data.evaluation["clean"].features(rows))
    )


def resumed(recipe: Recipe) -> Any:
    """The result of training where a run of one epoch has ended: an exit code or an error message."""
    Path("observed.yaml").write_text(to_yaml(recipe))
    return notes_and_result(lambda: train.main(["observed.yaml"]))[1]


def objective(recipe: Recipe) -> Any:
    """The loss of fixed logits."""
    loss = build_loss(recipe, [50, 20, 5])
    logits = torch.tensor([[0.9, -0.2, 0.1], [0.3, 0.5, -0.7]])
    return float(loss(logits, torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])).mean())


def helped(recipe: Recipe) -> float:
    """The loss of a batch with an auxiliary column, beside that of its labels."""
    targets = AuxTargets(("other",), (2,), train=np.array([[0]]), val=None)
    state = types.SimpleNamespace(
        outputs=torch.ones(1, 5),
        batch={"label": torch.zeros(1), "aux": torch.eye(2)[:1]},
        loss=torch.ones(()),
    )
    heads = AuxiliaryHeads(recipe, targets)
    for event in (Event.AFTER_FORWARD, Event.AFTER_LOSS):
        heads.apply(event, state, None)
    return float(state.loss)


def taught(recipe: Recipe) -> float:
    """The loss of fixed logits against labels and a teacher."""
    targets = torch.tensor([[1.0, 0.0, 0.0, 0.2, 0.5, 0.3], [0.0, 0.0, 1.0, 0.6, 0.1, 0.3]])
    return float(build_loss(recipe, [50, 20, 5])(torch.tensor([[0.9, -0.2, 0.1], [0.3, 0.5, -0.7]]), targets))


def teachers(recipe: Recipe) -> Any:
    """The distillation targets of the training images, or the error message."""
    return notes_and_result(lambda: distillation.probabilities(recipe, fold_set.open_fold(recipe, 0), 4))


def judged(recipe: Recipe) -> Any:
    """The decisions of Selection on a fixed sequence of scores over two stages."""
    selection = Selection(recipe.select, recipe.es, 2)
    course = [(0.50, 0.30), (0.60, 0.35), (0.59, 0.42), (0.60, 0.20), (0.6004, 0.20)] + [(0.6, 0.2)] * 12
    seen = []
    for epoch, (clean, corrupted) in enumerate(course, 1):
        verdict = selection.update(
            epoch, int(epoch > 3), {"raw": Candidate(clean, corrupted, clean, val_loss=1 / epoch)}
        )
        seen.append((verdict.new, verdict.stop, verdict.patience_left, selection.best))
    return seen


def machine(recipe: Recipe) -> Any:
    """The precision and cuDNN settings of the process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        patch.setattr(torch.cuda, "set_device", lambda number: None)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
        patch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
        prepared = ranks.prepare(recipe)
    return (
        prepared.precision,
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
        prepared.determinism(),
    )


def trained(recipe: Recipe) -> Any:
    """One training: its files, scores, weights, notes, and its result or error message."""
    path = Path("observed.yaml")
    path.write_text(to_yaml(recipe))
    notes, end = notes_and_result(lambda: train.main([str(path)]))
    run = Run(exp=recipe.exp.name, backbone=recipe.model.backbone, fold=0, seed=recipe.seed)
    folders = (run.model_dir, run.results_dir)
    files = sorted({p.name.split(".out.")[0] for f in folders for p in f.rglob("*") if p.is_file()})
    weights = [
        sha(*checkpoint.load(p).tensors.values()) for kind in KINDS_COMPARED for p in run.checkpoints(kind)
    ]
    return (
        notes,
        end,
        files,
        weights,
        runs.read_events(run.events_path, [])[1:] and toy_project.epochs(recipe.exp.name),
    )


def arguments(recipe: Recipe) -> Any:
    """The arguments that Composer's Trainer receives."""

    class Seen(Exception):
        pass

    def trainer(**arguments: Any) -> None:
        teachers = [
            algorithm.teacher for algorithm in arguments["algorithms"] if isinstance(algorithm, FixMatch)
        ]
        without_teacher = [teacher is None for teacher in teachers]
        raise Seen(
            arguments["compile_config"], arguments["precision"], arguments["max_duration"], without_teacher
        )

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Seen) as seen:
        patch.setattr(build, "FoldTrainer", trainer)
        fold, run = fold_set.open_fold(recipe, 0), toy_project.run_of()
        build.training(
            recipe,
            run,
            fold=fold,
            machine=ranks.prepare(recipe),
            stop=None,
            console=types.SimpleNamespace(write=print),
            identity={},
        )  # type: ignore[arg-type]
    return seen.value.args


def summed_up(recipe: Recipe) -> Any:
    """scores.json of fake members: two seeds of one backbone and one of another."""
    members = [fake_members.member(fold) for fold in range(3)]
    members += [fake_members.member(fold, seed=7) for fold in range(3)]
    members += [fake_members.member(fold, fake_members.BACKBONES[1]) for fold in range(3)]
    return json.dumps(
        to_plain(
            summary.summarise(
                members, fake_members.folds(), classes=fake_members.classes_csv(), recipe=recipe
            )
        ),
        default=str,
    )


def combined(recipe: Recipe) -> Any:
    """The console lines about soups of the trained member."""
    with pytest.MonkeyPatch.context() as patch:
        member = fake_members.member(0)
        patch.setattr(summary, "load_member_logits", lambda folder: [member])
        patch.setattr(agreement, "check_recipe", lambda recipe, members: None)
        patch.setattr(ensemble, "read_folds", lambda path: types.SimpleNamespace(fold=fake_members.folds()))
        out = io.StringIO()
        path = Path("observed.yaml")
        path.write_text(to_yaml(recipe))
        with contextlib.redirect_stdout(out):
            ensemble.main([str(path)])
    return [line for line in out.getvalue().splitlines() if "soup" in line]


def accepted(recipe: Recipe) -> Any:
    """The acceptance checks of fake members."""
    members = [fake_members.member(fold) for fold in range(3)]
    scores = summary.summarise(
        members, fake_members.folds(), classes=fake_members.classes_csv(), recipe=recipe
    )
    return acceptance.check(scores, [], recipe.accept)


def matched(recipe: Recipe) -> Any:
    """The checkpoints that evaluate uses."""
    return [path.name for path in evaluate.member_paths(recipe)]


def bundled(recipe: Recipe) -> Any:
    """The bundle of the trained member: its manifest and the size of its weights."""
    chosen = choose(recipe, [])
    members = writer.load_members(chosen.paths, recipe.bundle.dtype)
    with writer.temporary_bundle() as folder:
        manifest = writer.write_bundle(
            folder, members, weights=np.ones(1), recipe=recipe, temperature=chosen.temperature
        )
        return json.dumps(to_plain(manifest)), (folder / "weights_0.safetensors").stat().st_size


def labelled(recipe: Recipe) -> Any:
    """The texts of two classes in a submission, or the refusal where they have no names."""
    return notes_and_result(lambda: class_texts(recipe, ["7", "12"]))


def exported(recipe: Recipe) -> Any:
    """The names of the gates that fail in export."""
    path = Path("observed.yaml")
    path.write_text(to_yaml(recipe))
    _, refusal = notes_and_result(lambda: export.main([str(path)]))
    return [gate.split(":")[0] for gate in str(refusal).split("; ")]


def kept_views(recipe: Recipe) -> Any:
    """The views that export takes, or its refusal where evaluate has not measured them."""
    return notes_and_result(lambda: to_plain(views.kept_views(recipe).tta.scales))


def bundle_correction(recipe: Recipe) -> Any:
    """The correction of probabilities in the bundle, or the refusal where evaluate has not measured it."""
    return notes_and_result(lambda: priors.correction(recipe, ["0", "1", "2"]))


def lost(recipe: Recipe) -> Any:
    """The gate of a bundle that lost 20 right answers of 100 images."""
    return gates.loss_gate("int8", 70, before=90, count=100, max_loss=recipe.bundle.max_loss)


# --- the keys -------------------------------------------------------------------------------------------------------

FIRST, SECOND = fake_members.BACKBONES
HAND = f"ensembling.weighting=hand ensembling.weights={{{FIRST}: 1, {SECOND}: 1}}"
ONE = " ".join(toy_project.ONE)
TWO = ONE.replace("cosine_epochs=1", "cosine_epochs=2")
PATIENT = "bundle.max_ms=60000"  # a busy machine passes, too
FROZEN = f"{ONE} model.backbone=test_resnet model.pretrained=true model.freeze=backbone"
MANY = "sched.cosine_epochs=12 data.size_epochs=[4,12]"
MIXED = "reg.mix_prob=1 reg.mixup=0.5 reg.cutmix=0.5"
SMALL = "data.home=new data.store=jpeg data.img_size=[16] data.size_epochs=auto tta.scales=[16]"
GIVEN = "data.home=new data.split=given data.n_splits=2"
EMBEDDED = "data.home=new data.root=twins data.group=embedding data.group_backbone=test_resnet"
SOFT = "semi.method=soft semi.soft_teacher=tiny semi.floor=0 semi.enabled=true data.labels_per_class=3"
SEMI = "semi.enabled=true semi.mu=3 semi.threshold=0 data.labels_per_class=3"
CHANGES: dict[str, tuple[Callable[[Recipe], Any], str, str]] = {
    "seed": (batches, "7", ""),
    "exp.name": (plan, "other", ""),
    "data.root": (converted, "elsewhere", "data.home=new"),
    "data.csv": (converted, "elsewhere.csv", "data.home=new"),
    "data.form": (converted, "folders", "data.home=new data.root=foldered"),
    "data.arrays": (converted, "[z,y]", "data.home=new data.root=numbers.npz data.arrays=[x,y]"),
    "data.shape": (converted, "[24,32,3]", "data.home=new data.root=flat.npz data.shape=[32,24,3]"),
    "data.symmetric": (paired, "true", ""),
    "data.val": (converted, "held_out.npz", "data.home=new data.root=flat.npz data.shape=[32,24,3]"),
    "data.unlabelled": (converted, "data/train", "data.home=new"),
    "data.group_col": (converted, "other", "data.home=new data.csv=given.csv"),
    "data.aux_cols": (converted, "[other]", "data.csv=given.csv"),
    "data.fold_col": (converted, "other", f"{GIVEN} data.csv=given.csv"),
    "data.fold_csv": (converted, "folds.csv", f"{GIVEN} data.csv=given.csv"),
    "data.image_col": (converted, "picture", "data.home=new"),
    "data.label_col": (converted, "kind", "data.home=new"),
    "data.num_classes": (network, "9", ""),
    "data.home": (converted, "newer", "data.home=new"),
    "data.test": (plan, "data/train", ""),
    "data.split": (converted, "kfold", "data.home=new"),
    "data.n_splits": (converted, "4", "data.home=new"),
    "data.fold": (plan, "[1,2]", ""),
    "data.group": (converted, "phash", "data.home=new data.root=twins"),
    "data.group_threshold": (converted, "8", "data.home=new data.root=twins data.group=phash"),
    "data.group_backbone": (converted, "test_convnext", EMBEDDED),
    "data.group_cosine": (converted, "0.999", EMBEDDED),
    "data.labels_per_class": (batches, "3", ""),
    "data.img_size": (batches, "[16,48]", ""),
    "data.resize": (batches, "whole", ""),
    "data.size_epochs": (batches, "[2,3]", ""),
    "data.store": (converted, "jpeg", "data.home=new data.store=raw"),
    "data.raw_share": (converted, "1e-9", "data.home=new"),
    "data.jpeg_quality": (converted, "60", SMALL),
    "data.on_bad": (converted, "skip", "data.home=new data.root=bad data.csv=bad.csv"),
    "data.workers": (batches, "2", ""),
    "data.mean": (network, "[0.1,0.2,0.3]", ""),
    "data.std": (network, "[0.1,0.2,0.3]", ""),
    "aug.strength": (batches, "0.5", ""),
    "aug.rrc_scale": (batches, "[0.3,0.5]", ""),
    "aug.rrc_ratio": (batches, "[1,1]", ""),
    "aug.hflip_p": (batches, "0", ""),
    "aug.vflip_p": (batches, "1", ""),
    "aug.rotation_deg": (batches, "90", ""),
    "aug.translate": (batches, "[0.1,0.2]", ""),
    "aug.jitter": (batches, "[0,0,0,0]", ""),
    "aug.photometric_p": (batches, "1", ""),
    "aug.clahe_p": (batches, "1", ""),
    "aug.clahe_clip": (batches, "1", "aug.clahe_p=1 aug.clahe_tiles=2"),
    "aug.clahe_tiles": (batches, "2", "aug.clahe_p=1"),
    "aug.randaugment_n": (batches, "2", ""),
    "aug.randaugment_m": (batches, "25", "aug.randaugment_n=2"),
    "aug.trivial_p": (batches, "1", ""),
    "aug.augmix_p": (batches, "1", ""),
    "aug.corrupt_p": (batches, "1", ""),
    "aug.extra": (batches, "[support.own_transform:darker]", ""),
    "sampler.type": (drawn, "none", ""),
    "sampler.beta": (drawn, "0.9", ""),
    "sampler.oversample_cap": (drawn, "1", ""),
    "sampler.rf_alpha": (drawn, "0.1", "sampler.type=repeat_factor sampler.rf_t=100"),
    "sampler.rf_t": (drawn, "200", "sampler.type=repeat_factor"),
    "sampler.undersample_frac": (drawn, "0.2", ""),
    "sampler.passes": (batches, "2", ""),
    "model.backbone": (network, "resnet10t", ""),
    "model.pretrained": (network, "true", ""),
    "model.head": (network, "arcface", ""),
    "model.margin": (objective, "0.1", "model.head=cosface"),
    "model.head_scale": (network, "8", "model.head=cosface"),
    "model.mlp_width": (network, "64", "model.head=mlp"),
    "model.knn_k": (probed, "3", f"{FROZEN} model.head=knn"),
    "model.knn_temperature": (probed, "1", f"{FROZEN} model.head=knn"),
    "model.freeze": (network, "backbone", "model.backbone=test_resnet"),
    "model.frozen_views": (probed, "3", FROZEN),
    "model.lora.rank": (network, "4", ""),
    "model.lora.alpha": (begun, "1", "model.lora.rank=4"),
    "model.lora.targets": (network, "[qkv]", "model.lora.rank=4"),
    "model.drop_rate": (network, "0.9", ""),
    "model.drop_path": (network, "0.9", ""),
    "model.grad_checkpointing": (network, "true", ""),
    "loss.name": (objective, "focal", ""),
    "loss.focal_gamma": (objective, "1", "loss.name=focal"),
    "loss.pos_weight": (objective, "auto", "loss.name=bce"),
    "loss.aux_weight": (helped, "0.7", "data.aux_cols=[other]"),
    "distill.teacher": (teachers, "[elders]", ""),
    "distill.weight": (taught, "0.2", "distill.teacher=[elders]"),
    "distill.temperature": (taught, "5", "distill.teacher=[elders]"),
    "distill.t_squared": (taught, "false", "distill.teacher=[elders]"),
    "opt.name": (network, "sgd", ""),
    "model.init": (begun, "tiny", f"{ONE} exp.name=next"),
    "opt.lr": (plan, "0.1", ""),
    "opt.lr_ref": (plan, "1e-3", "opt.lr=auto"),
    "opt.lr_ref_batch": (plan, "16", "opt.lr=auto"),
    "opt.lr_min_bound": (plan, "1e-3", "opt.lr=auto"),
    "opt.lr_max_bound": (plan, "6e-6", "opt.lr=auto"),
    "opt.large_batch_factor": (plan, "0.5", "opt.lr=auto opt.large_batch_threshold=8"),
    "opt.large_batch_threshold": (plan, "8", "opt.lr=auto opt.large_batch_factor=0.5"),
    "opt.weight_decay": (network, "0.2", ""),
    "opt.no_decay_norm_bias": (network, "false", ""),
    "opt.momentum": (network, "0.5", "opt.name=sgd"),
    "opt.sam_rho": (trained, "0.3", ONE),
    "opt.clip_grad": (trained, "0.01", ONE),
    "train.batch_per_gpu": (batches, "5", ""),
    "train.world_size": (trained, "2", ONE),
    "train.grad_accum": (batches, "2", ""),
    "train.stage_batch": (batches, "[10,5]", ""),
    "train.amp": (machine, "true", ""),
    "train.clip_grad": (trained, "0.01", ONE),
    "train.sync_bn": (network, "false", "model.backbone=resnet10t"),
    "train.channels_last": (network, "false", "model.backbone=resnet10t"),
    "train.compile": (arguments, "true", ""),
    "train.max_nonfinite": (trained, "2", f"{ONE} opt.lr=1e30"),
    "train.save_every": (plan, "7ba", ""),
    "train.refit_epochs": (plan, "2", "data.fold=none train.refit_epochs=1"),
    "train.keep_every": (trained, "1", ONE),
    "train.extend": (resumed, "true", f"{ONE} sched.cosine_epochs=2"),
    "sched.name": (plan, "none", ""),
    "sched.warmup_epochs": (plan, "0.5", ""),
    "sched.cosine_epochs": (plan, "4", "data.size_epochs=auto"),
    "sched.warmup_unit": (plan, "epoch", "sched.warmup_epochs=4 sched.cosine_epochs=8 data.size_epochs=auto"),
    "sched.cycle_steps": (plan, "7", "sched.name=cyclic sched.cycle_steps=3"),
    "sched.eta_min": (plan, "0.5", ""),
    "sched.factor": (plan, "0.1", f"sched.name=plateau {MANY}"),
    "sched.patience": (plan, "1", f"sched.name=plateau {MANY}"),
    "sched.monitor": (plan, "val_loss", f"sched.name=plateau {MANY}"),
    "lrfind.low": (plan, "1e-5", ""),
    "lrfind.high": (plan, "0.1", ""),
    "lrfind.steps": (plan, "50", ""),
    "llrd.enabled": (network, "false", ""),
    "llrd.multipliers": (network, "[0.1,1]", ""),
    "llrd.decay": (network, "0.75", ""),
    "llrd.unfreeze_schedule": (plan, "{1: [head], 3: [back]}", ""),
    "reg.ls_eps": (objective, "0.3", ""),
    "reg.mixup": (batches, "4", MIXED),
    "reg.cutmix": (batches, "4", MIXED),
    "reg.mix_prob": (batches, "1", ""),
    "reg.mix_switch_prob": (batches, "1", MIXED),
    "reg.mix_final_epoch": (batches, "2", MIXED),
    "reg.mix_prob_final": (batches, "0", f"{MIXED} reg.mix_final_epoch=2 reg.mix_prob_final=1"),
    "reg.erase_p": (batches, "1", ""),
    "semi.enabled": (batches, "true", "semi.mu=1 data.labels_per_class=3"),
    "semi.method": (unlabelled, "pseudo", SEMI),
    "semi.soft_teacher": (plan, "other", "semi.method=soft " + SEMI),
    "semi.power": (soft_targets, "3", SOFT),
    "semi.floor": (soft_targets, "0.99", SOFT),
    "semi.rounds": (rounds_planned, "2", SEMI),
    "semi.threshold": (unlabelled, "1", SEMI),
    "semi.align": (unlabelled, "true", SEMI),
    "semi.mu": (batches, "2", SEMI),
    "semi.lambda_u": (unlabelled, "0.5", SEMI),
    "semi.ramp_epochs": (unlabelled, "2", SEMI),
    "semi.teacher": (arguments, "ema", SEMI),
    "semi.weak_scale": (batches, "[0.2,0.3]", SEMI),
    "semi.randaugment_n": (unlabelled, "0", SEMI),
    "semi.randaugment_m": (unlabelled, "25", SEMI),
    "semi.erase_p": (unlabelled, "0", SEMI),
    "ema.enabled": (trained, "false", ONE),
    "ema.decay": (trained, "0.05", ONE),
    "ema.warmup": (trained, "false", ONE),
    "swa.enabled": (trained, "true", ONE),
    "swa.start": (trained, "0.7", f"{TWO} swa.enabled=true swa.start=0.3"),
    "robust.enabled": (batches, "false", ""),
    "robust.kinds": (converted, "[jpeg]", "data.home=new"),
    "robust.level": (converted, "medium", "data.home=new"),
    "robust.score": (batches, "one", ""),
    "es.enabled": (judged, "false", ""),
    "es.monitor": (judged, "val_loss", ""),
    "es.patience": (judged, "3", ""),
    "es.min_delta": (judged, "0.0001", ""),
    "es.reset_on_stage": (judged, "false", ""),
    "select.metric": (judged, "clean", ""),
    "select.alpha": (judged, "0.1", ""),
    "eval.resize_factor": (batches, "1.0", ""),
    "eval.batch": (batches, "3", ""),
    "eval.every": (trained, "2", TWO),
    "eval.ece_bins": (summed_up, "5", ""),
    "tta.scales": (bundled, "[32,48]", ""),
    "tta.rotations": (bundled, "[-10,10]", ""),
    "tta.shift": (bundled, "0.1", ""),
    "tta.vflip": (bundled, "true", ""),
    "tta.quarter_turns": (bundled, "true", ""),
    "tta.crops": (bundled, "0.8", ""),
    "tta.prune": (kept_views, "true", ""),
    "tta.reduce": (bundled, "vote", ""),
    "ensembling.average": (summed_up, "probabilities", ""),
    "tta.hflip": (bundled, "false", ""),
    "ensembling.find_pattern": (matched, "ema_best__*", ""),
    "ensembling.weighting": (summed_up, "family", ""),
    "ensembling.soup": (combined, "folds", ""),
    "ensembling.weights": (summed_up, f"{{{fake_members.BACKBONES[0]}: 3, {fake_members.BACKBONES[1]}: 1}}", HAND),
    "accept.clean_min": (accepted, "0.99", ""),
    "accept.corrupted_min": (accepted, "0.99", ""),
    "accept.score": (accepted, "0.99", ""),
    "accept.gain_min": (accepted, "0.01", ""),
    "accept.macro_drop_max": (accepted, "0.01", ""),
    "ts.enabled": (summed_up, "false", ""),
    "ts.fit_on": (summed_up, "combo", ""),
    "bundle.max_mb": (exported, "0.001", PATIENT),
    "bundle.max_ms": (exported, "0.001", PATIENT),
    "bundle.members": (exported, "greedy", PATIENT),
    "bundle.dtype": (bundled, "fp32", ""),
    "bundle.half": (bundled, "none", ""),
    "bundle.max_loss": (lost, "0.5", ""),
    "bundle.prior": (bundle_correction, "uniform", ""),
    "bundle.columns": (bundled, "two", ""),
    "bundle.top_k": (bundled, "3", ""),
    "bundle.separator": (bundled, ";", ""),
    "bundle.labels": (labelled, "names", ""),
    "cudnn.deterministic": (machine, "false", ""),
    "cudnn.benchmark": (machine, "true", ""),
    "log.tensorboard": (trained, "true", ONE),
    "log.wandb": (trained, "true", ONE),
    "log.mlflow": (trained, "true", ONE),
    "data.flips_keep_class": (plan, "false", ""),
    "checks.allow_flips": (plan, "true", "data.flips_keep_class=false"),
    "checks.from_scratch": (plan, "true", "model.pretrained=true"),
    "checks.allow_unlabelled_test": (plan, "true", "semi.enabled=true data.unlabelled=a/b data.test=a"),
    "checks.allow_double_correction": (plan, "true", "loss.name=bsce"),
}  # fmt: skip


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny project, trained, with further datasets: a bad image, other columns, other formats, near-duplicates."""
    home = toy_project.project(tmp_path_factory.mktemp("project"))
    smooth = np.kron(np.random.default_rng(5).integers(60, 200, (6, 6, 3)), np.ones((8, 8, 1)))
    with contextlib.chdir(home):
        toy_project.fit(*ONE.split())
        labels = Path("data/train_labels.csv").read_text()
        Path("elsewhere.csv").write_text(labels.rsplit("\n", 3)[0] + "\n")
        Path("bad.csv").write_text(labels + "broken.jpg,7\n")
        names = [line.split(",")[0] for line in labels.splitlines()[1:]]
        given = [f"{line},{k % 2},{k % 3 % 2}" for k, line in enumerate(labels.splitlines()[1:])]
        Path("given.csv").write_text("\n".join(["filename,category_id,fold,other", *given]) + "\n")
        Path("folds.csv").write_text(
            "".join(["filename,fold\n", *(f"{n},{k % 5 % 2}\n" for k, n in enumerate(names))])
        )
        for name in names:
            Path("foldered", name.split("_")[0]).mkdir(parents=True, exist_ok=True)
            shutil.copy(f"data/train/{name}", f"foldered/{name.split('_')[0]}/{name}")
        numbers = np.random.default_rng(0).integers(0, 256, (2, 20, 32 * 24 * 3), dtype=np.uint8)
        np.savez("numbers.npz", x=numbers[0, :, :1024], z=numbers[1, :, :1024], y=np.arange(20) % 2)
        np.savez("flat.npz", x=numbers[0], y=np.arange(20) % 2)
        np.savez("held_out.npz", x=numbers[1, :5], y=np.arange(5) % 2)
        for folder in ("elsewhere", "bad", "twins"):
            shutil.copytree("data/train", folder)
        shutil.copy("elsewhere/c7_0.jpg", "elsewhere/c7_1.jpg")
        Path("bad/broken.jpg").write_bytes(b"\xff\xd8 not a photograph")
        for number, amplitude in enumerate((0, 0, 12)):  # an image, encoded again, and with added noise
            pixels = smooth + np.random.default_rng(number).normal(0, amplitude, smooth.shape)
            picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            picture.save(f"twins/c7_{number}.jpg", quality=95 - 5 * number)
        weights = tmp_path_factory.mktemp("weights")  # each observation copies only the link to them
        for name in ("test_resnet", "test_convnext"):
            torch.manual_seed(0)
            torch.save(timm.create_model(name).state_dict(), weights / f"{name}.pth")
        runs.PRETRAINED.symlink_to(weights)
    return home


HEAVY = {trained, resumed, exported, combined}  # a training or an export each
PURE = {
    plan,
    drawn,
    network,
    objective,
    helped,
    taught,
    unlabelled,
    judged,
    machine,
    arguments,
    labelled,
    lost,
}


def observe(observer: Callable[[Recipe], Any], changes: str, *, folder: Path, project: Path) -> Any:
    """Call an observer in a fresh copy of the project, or in the project itself if it writes nothing."""
    if observer in PURE:
        folder = project
    else:
        shutil.copytree(project, folder, symlinks=True)
    with contextlib.chdir(folder):
        if observer is trained:
            shutil.rmtree("results")
        return observer(load("tiny.yaml", toy_project.recipes_words(changes)))


def test_no_key_is_left_out():
    assert sorted(CHANGES) == sorted(KEYS)


@pytest.fixture(scope="module")
def unchanged(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Callable, str], str]:
    """The observation before a key is changed; made twice, and once for all keys that need the same changes."""

    @functools.cache
    def observed(observer: Callable[[Recipe], Any], needed: str) -> str:
        home = tmp_path_factory.mktemp("unchanged")
        first, second = (
            repr(observe(observer, needed, folder=home / name, project=project))
            for name in ("before", "again")
        )
        assert first == second, "an observer must give the same twice"
        return first

    return observed


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if entry[0] in HEAVY else ())
        for name, entry in CHANGES.items()
    ],
)
def test_a_key_changes_what_an_observer_sees(name, unchanged, project, tmp_path):
    observer, value, needed = CHANGES[name]
    before = unchanged(observer, needed)
    after = observe(observer, f"{needed} {name}={value}", folder=tmp_path / "after", project=project)
    assert repr(after) != before
