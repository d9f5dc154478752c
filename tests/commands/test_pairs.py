"""Pairs: drawn ones, their batches, the networks that compare them, and their recipe."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import shutil
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from composer.core import Event
from PIL import Image
from timm.layers.cbam import CbamModule

from fastflower import convert, evaluate, export, sample_data, train
from fastflower.algorithms.augmentation import DeviceAugment
from fastflower.bundle import gates, held_out, program, writer
from fastflower.core import checkpoint, runs, scores, seeding, workers
from fastflower.core.errors import InputError
from fastflower.core.runs import Run, read_events
from fastflower.data.betons.fold_set import open_fold
from fastflower.data.decode.kernel import Crop, decode_eval, decode_train
from fastflower.data.folds import read_folds
from fastflower.data.loaders import EvalLoader, TrainLoader
from fastflower.data.readers import image_files, sources
from fastflower.data.transforms.augment import augment
from fastflower.evaluation import gradcam, inference, logits, mistakes, soups
from fastflower.model.backbones import build_backbone, profile
from fastflower.model.compare import FEATURES, FUSIONS, CompareNet
from fastflower.model.network import Network, NetworkSpec, build_network
from fastflower.recipe import derived, load, parse_command, schema
from fastflower.report import thumbnails
from fastflower.training import samples

FILL = (127.5,) * 3  # what the networks' mean of 0.5 makes of erased boxes
SMALL = ["exp.name=pairs", "data.workers=1", "sched.cosine_epochs=1", "train.batch_per_gpu=16"]


@pytest.fixture
def recipe(repo: Path) -> schema.Recipe:
    """pairs_small.yaml with a few pairs, converted."""
    sample_data.main(["pairs", "rows=64", "held_out=24"])
    words = [str(repo / "recipes/pairs_small.yaml"), *SMALL]
    convert.main(words)
    return parse_command(words)


def test_drawn_pairs_agree_in_half_and_share_no_image_between_parts():
    sample_data.main(["pairs", "rows=300", "held_out=100", "seed=3", "home=one"])
    sample_data.main(["pairs", "rows=300", "held_out=100", "seed=3", "home=other"])
    seen = {}
    for part, rows in (("train", 300), ("val", 100), ("test", 100)):
        made, again = np.load(f"one/{part}.npz"), np.load(f"other/{part}.npz")
        assert made["xa"].shape == made["xb"].shape == (rows, 32, 32) and made["xa"].dtype == np.uint8
        assert made["y"].sum() == rows / 2
        assert all(np.array_equal(made[name], again[name]) for name in ("xa", "xb", "y"))
        assert not (made["xa"] == made["xb"]).all((1, 2)).any()
        seen[part] = {image.tobytes() for name in ("xa", "xb") for image in made[name]}
    assert not seen["train"] & seen["val"] and not seen["val"] & seen["test"]
    with pytest.raises(InputError, match="not empty"):
        sample_data.main(["pairs", "home=one"])


def test_batches_hold_both_images_side_by_side(recipe):
    fold = open_fold(recipe, 0)
    assert (fold.train.rows, fold.val.rows, fold.train.images) == (64, 24, 2)
    rows, out = np.arange(8), np.empty((8, 16, 16, 3), np.uint8)
    (batch, *_) = EvalLoader(
        fold.val, 8, size=lambda: (16, 16), factor=1.0, interpolation="bilinear", threads=1
    )
    for beton, half in zip((fold.val, fold.val.second), batch["image"].chunk(2, 2), strict=True):
        decode_eval(beton, rows, out=out, factor=1.0, interpolation="bilinear", threads=1)
        assert np.array_equal(half.numpy(), out)
    crop = Crop((0.5, 1.0), (1, 1), 0.5)
    (batch, *_) = TrainLoader(
        fold.train,
        lambda epoch: np.arange(64),
        seed=1,
        batch=lambda epoch: 8,
        size=lambda epoch: (16, 16),
        crop=crop,
        threads=1,
    )
    keys = batch["key"].numpy().view(np.uint64)
    halves = zip(
        (fold.train, fold.train.second), (keys, seeding.mix(keys)), batch["image"].chunk(2, 2), strict=True
    )
    for beton, own, half in halves:
        decode_train(beton, rows, keys=own, out=out, crop=crop, threads=1)
        assert np.array_equal(half.numpy(), out)


def test_the_halves_are_augmented_as_the_images_they_are():
    images = torch.randint(0, 256, (5, 12, 20, 3), dtype=torch.uint8)
    keys, aug = torch.arange(5) * 977, load(None, ["aug.photometric_p=0.5"]).aug
    got = augment(images, keys, aug=aug, erase_p=0.3, fill=(1.0, 2.0, 3.0), pairs=True)
    first = augment(images[:, :, :10].contiguous(), keys, aug=aug, erase_p=0.3, fill=(1.0, 2.0, 3.0))
    second = augment(
        images[:, :, 10:].contiguous(), seeding.mix_tensor(keys), aug=aug, erase_p=0.3, fill=(1.0, 2.0, 3.0)
    )
    assert torch.equal(got, torch.cat([first, second], 3))


@pytest.mark.parametrize("fusion", FUSIONS)
def test_fusions_are_their_formulas(fusion):
    network = CompareNet([1, 1, 1], fusion, cbam=False, width=0.25).eval()
    pairs = torch.randn(3, 3, 16, 32)
    with torch.no_grad():
        got = network(pairs)
        a, b = network.embed(pairs[..., :16]), network.embed(pairs[..., 16:])
    want = {
        "concat": torch.cat([a, b], 1), "difference": a - b, "distance": (a - b).abs(), "product": a * b,
        "square": (a - b) ** 2, "adaptive": torch.cat([a, b, a - b, (a - b).abs(), a * b, (a - b) ** 2], 1),
    }[fusion]  # fmt: skip
    torch.testing.assert_close(got, want)
    if network.shares is not None:
        network.shares.data = torch.tensor([5.0, 0, 0, 0, 0, 0])
        with torch.no_grad():
            terms = network(pairs).unflatten(1, (6, FEATURES))
        assert (terms[:, 0] / a).mean() == pytest.approx(6 * torch.softmax(network.shares, 0)[0].item())


def test_norms_of_the_trunk_are_multiplied_in_once_though_it_runs_twice():
    network = CompareNet([1, 1, 1], "adaptive", cbam=True, width=0.25)
    network(torch.randn(8, 3, 16, 32))  # statistics that are not those of a new network
    pairs = torch.randn(3, 3, 16, 32)
    made, norms = program.without_norms(network.eval(), pairs)
    assert not [norm for norm in made.modules() if isinstance(norm, torch.nn.BatchNorm2d)]
    assert len({norm["norm"] for norm in norms}) == len(norms) == 12  # stem, blocks, shortcuts, attention
    torch.testing.assert_close(made(pairs), network(pairs), atol=1e-4, rtol=0)


def test_recipes_name_layers_fusion_attention_and_width():
    sizes = {}
    for variant in ("222", "333", "222_cbam", "222_w75", "222_w112", "222_w125"):
        name = variant.replace("222", "compare_resnet222_concat").replace("333", "compare_resnet333_concat")
        network, _ = build_backbone(name, [(28, 28)])
        assert profile(name, [(28, 28)]).features == 2 * FEATURES
        assert sum(isinstance(module, CbamModule) for module in network.modules()) == 3 * ("cbam" in name)
        sizes[variant] = sum(p.numel() for p in network.parameters())
    assert sizes["222_w75"] < sizes["222"] < sizes["222_w112"] < sizes["222_w125"]
    assert sizes["222"] < sizes["222_cbam"] < sizes["333"]
    assert timm.is_model("compare_resnet333_adaptive_cbam_w112")


def test_the_recipe_is_the_seeds(repo):
    r = load(repo / "recipes/pairs.yaml")
    assert (r.opt.lr, r.opt.weight_decay, r.opt.name, r.train.batch_per_gpu) == (1e-3, 5e-4, "adamw", 64)
    assert (r.sched.name, r.sched.monitor, r.sched.factor, r.sched.patience) == ("plateau", "score", 0.5, 3)
    assert (r.loss.name, r.loss.focal_gamma, r.reg.ls_eps, r.es.patience) == ("focal", 2.0, 0.0, 5)
    assert derived.derive(r, 1).epochs == 100 and r.aug.hflip_p == 0 and not r.tta.hflip


@pytest.fixture
def trained(recipe, repo) -> list[str]:
    """The words of the recipe after a short training of it."""
    words = [
        str(repo / "recipes/pairs_small.yaml"),
        *SMALL,
        "opt.lr=0.01",
        "bundle.dtype=fp32",
        "bundle.max_ms=60000",
    ]
    assert train.main(words) == 0
    return words


def test_the_recipe_trains_and_is_handed_in(recipe, trained, capsys):
    run = Run("pairs", recipe.model.backbone, 0, 42)
    (row,) = [row for row in read_events(run.events) if row["event"] == "epoch"]
    assert 0 <= row["clean_raw"] <= 1 and 0 <= row["f1_raw"] <= 1
    assert len(run.files("best_clean")) == 1
    assert evaluate.main(trained) == 0
    capsys.readouterr()
    export.main([*trained, "--zip", "hand-in.zip"])
    said = capsys.readouterr().out
    gpu = torch.cuda.is_available()
    assert said.count("passed") == 7 + gpu and said.count("not seen") == 1 - gpu and "FAILED" not in said
    assert "0 of 255 on 24 pairs" in said and re.search(r"ms a pair on .* <= 60000 ms", said)
    assert "run python code/predict.py <.npz> <csv>" in said
    shutil.unpack_archive("hand-in.zip", "stranger")
    predict = [sys.executable, "stranger/code/predict.py", "--threads", "1", "--logits", "logits.npz"]
    subprocess.run([*predict, "data/pairs/val.npz", "out.csv"], check=True, capture_output=True)
    known = logits.load_logits(runs.RESULTS / f"pairs/oof/{recipe.model.backbone}__fold0_seed42.npz")
    got = np.load("logits.npz")["logits"][:, 0].mean(1)
    assert np.ptp(got, axis=0).min() > 0.01  # else nothing tells one pair from another
    np.testing.assert_allclose(got, known.logits, atol=1e-4)
    with open("out.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["filename", "category_id", "probability"]
    assert [row[0] for row in rows] == known.filename.tolist()
    assert [row[1] for row in rows] == [str(label) for label in known.logits.argmax(1)]
    t = json.loads(Path("stranger/results/model/bundle/bundle.json").read_text())["temperature"]
    odds = np.exp(known.logits / t)
    want = (odds / odds.sum(1, keepdims=True))[:, 1]  # that they agree
    np.testing.assert_allclose([float(row[2]) for row in rows], want, atol=1e-4)
    labels = np.load("data/pairs/val.npz")
    np.savez("unlabelled.npz", xb=labels["xb"], xa=labels["xa"])
    subprocess.run([*predict, "unlabelled.npz", "other.csv"], check=True, capture_output=True)
    assert Path("other.csv").read_text() == Path("out.csv").read_text().replace("val/", "unlabelled/")


def test_what_evaluate_leaves_predicts_pairs(recipe, trained):
    evaluate.main(trained)
    folder = runs.MODELS / "pairs/programs"
    code = Path(writer.CODE, "predict.py")
    words = [sys.executable, str(code), "data/pairs/val.npz", "out.csv", "--bundle", str(folder)]
    done = subprocess.run([*words, "--logits", "logits.npz"], check=True, capture_output=True, text=True)
    assert "no bundle; taking the members above" in done.stdout and "24 pairs, 1 members" in done.stdout
    known = logits.load_logits(runs.RESULTS / f"pairs/oof/{recipe.model.backbone}__fold0_seed42.npz")
    np.testing.assert_allclose(np.load("logits.npz")["logits"][:, 0].mean(1), known.logits, atol=1e-4)


@pytest.mark.parametrize("side", [0, 1])
def test_a_gate_sees_pairs_that_the_predictor_reads_otherwise(trained, monkeypatch, side):
    """The two swapped, and one image for both."""
    honest = gates.trained_view

    def other(*words):
        halves = np.split(honest(*words), 2, axis=2)
        return np.concatenate([halves[1], halves[side]], axis=2)

    monkeypatch.setattr(gates, "trained_view", other)
    with pytest.raises(InputError, match=r"^pixels: \d+ of 255 on 24 pairs, allowed <= 0"):
        export.main(trained)
    assert not runs.BUNDLE.exists()


def test_the_gates_take_the_numbers_as_they_are(recipe, repo):
    """Channels first, as shares of 1, under the names of the training file."""
    for part in ("train", "val"):
        made = dict(np.load(f"data/pairs/{part}.npz"))
        names = ("xa", "xb", "y") if part == "train" else ("left", "right", "same")
        floats = [np.repeat(made[name][:, None], 3, 1) / np.float32(255) for name in ("xa", "xb")]
        np.savez(f"data/pairs/{part}.npz", **dict(zip(names, [*floats, made["y"]], strict=True)))
    words = [str(repo / "recipes/pairs_small.yaml"), *SMALL]
    convert.main(words)
    member = types.SimpleNamespace(meta={"fold": 0})
    found = held_out.held_out(Path("held out"), parse_command(words), [member])
    val = np.load("data/pairs/val.npz")
    names = read_folds(Path("data/pairs/folds.csv")).filenames
    for file, index in zip(found.files, found.index, strict=True):
        one, row = np.load(file), int(names[index].removeprefix("val/"))
        assert one.files == ["xa", "xb"] and one["xa"].dtype == np.float32
        assert np.array_equal(one["xa"], val["left"][[row]]) and np.array_equal(
            one["xb"], val["right"][[row]]
        )
    pairs = {"arrays": ["xa", "xb"], "shape": "auto"}
    betons = held_out.written(Path("."), {"crops": [{"stored_side": 16}], "pairs": pairs}, found)
    opened = open_fold(parse_command(words), 0).val
    order = np.argsort(opened.index)[np.searchsorted(np.sort(opened.index), found.index)]
    for ours, theirs in ((betons[16], opened), (betons[16].second, opened.second)):
        assert all(np.array_equal(ours.row(k), theirs.row(int(row))) for k, row in enumerate(order))


def test_arrays_of_pairs_are_those_of_the_training_file():
    numbers = np.zeros((6, 8, 8), np.uint8)
    np.savez("pairs.npz", b=numbers, a=numbers, y=np.arange(6) % 2)
    np.savez("single.npz", a=numbers, y=np.arange(6) % 2)

    def arrays(*words: str) -> list[str]:
        return sources.pair_arrays(load(None, list(words)))

    assert arrays("data.root=pairs.npz") == ["a", "b"]
    assert arrays("data.root=pairs.npz", "data.arrays=[b,a,y]") == ["b", "a"]
    assert arrays("data.root=single.npz") == arrays("data.root=photos") == []
    assert arrays("data.root=lost.npz", "data.form=arrays") == []
    with pytest.raises(InputError, match=r"lost.npz: no such file, and it says whether its images are pairs"):
        arrays("data.root=lost.npz")


@pytest.fixture
def coloured(repo: Path) -> schema.Recipe:
    """Pairs whose first images are shades of red and second ones of blue, converted; data.workers=0."""
    Path("data/pairs").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, rows in (("train", 24), ("val", 12)):
        one, other = np.zeros((2, rows, 16, 16, 3), np.uint8)
        one[..., 0], other[..., 2] = rng.integers(150, 256, (2, rows, 16, 16))
        np.savez(f"data/pairs/{part}.npz", xa=one, xb=other, y=np.arange(rows) % 2)
    words = [str(repo / "recipes/pairs_small.yaml"), *SMALL, "data.store=raw", "data.workers=0"]
    convert.main(words)
    return parse_command(words)


def red_and_blue(images: np.ndarray) -> bool:
    """Whether all of images (B, h, 2w, 3) are red to the left and blue to the right."""
    red, blue = np.split(np.asarray(images, int), 2, axis=2)
    return bool(
        (red[..., 0] > 100).all() and (blue[..., 2] > 100).all()
        and (red[..., 1:] < 50).all() and (blue[..., :2] < 50).all()
    )  # fmt: skip


def checkpointed(recipe: schema.Recipe, kind: str, seed: int = 0) -> Path:
    """A checkpoint of random weights of the recipe's network."""
    fold = open_fold(recipe, 0)
    spec = NetworkSpec.from_recipe(recipe, 2)
    seeding.seed_all(seed)
    meta = {
        **spec.meta(), "kind": kind, "weights": "raw", "resize_factor": 1.0, "fold": 0, "seed": 42, "scores": {},
        "epoch": 1, "class_ids": list(fold.classes.ids), "class_hash": fold.classes.hash,
        "class_counts": [12, 12], "folds_hash": fold.folds.hash, "stored_side": 16,
    }  # fmt: skip
    path = Run("pairs", recipe.model.backbone, 0, 42).file(kind, 1, 0.5)
    checkpoint.save(path, dict(build_network(spec).state_dict()), meta)
    return path


@pytest.fixture
def seen(monkeypatch) -> list[np.ndarray]:
    """What networks of pairs are given from here on, each (B, h, 2w, 3) in 0..255."""
    given: list[np.ndarray] = []
    honest = Network.forward

    def forward(self, images):
        given.append(images.detach().permute(0, 2, 3, 1).numpy().copy())
        return honest(self, images)

    monkeypatch.setattr(Network, "forward", forward)
    return given


@pytest.fixture
def threads(monkeypatch) -> set[int]:
    """How many threads decoding was asked for from here on; 0 stands for the machine's cores."""
    asked: set[int] = set()
    monkeypatch.setattr(workers, "cores", lambda threads, share=1: asked.add(threads) or 2)
    return asked


def test_a_soups_statistics_are_those_of_both_images(coloured, seen, threads):
    path = checkpointed(coloured, "best_clean")
    soups.mix(path.with_name("mixed.pth"), [path, path], recipe=coloured, fold=0, device=torch.device("cpu"))
    assert sum(map(len, seen)) == 24 and threads == {0}
    assert all(images.shape[1:] == (16, 32, 3) and red_and_blue(images) for images in seen)


def test_grad_cam_sees_both_images_and_has_a_map_of_either(coloured, seen, threads):
    path = checkpointed(coloured, "best_clean")
    member = inference.predict(path, coloured, torch.device("cpu"))
    rows = [mistakes.image(member, scores.softmax(member.logits), row=row) for row in range(4)]
    seen.clear(), threads.clear()
    found = {"mistakes": rows[:2], "right": rows[2:]}
    gradcam.save(Path("gradcam"), [member], found=found, settings=coloured, device=torch.device("cpu"))
    assert seen and all(images.shape[1:] == (16, 32, 3) and red_and_blue(images) for images in seen)
    assert threads == {0}
    files = list(Path("gradcam").glob("*.jpg"))
    assert len(files) >= 4
    for file in files:
        with Image.open(file) as picture:
            assert picture.size == (2 * image_files.SIDE, image_files.SIDE)


@pytest.mark.parametrize("side", [0, 1])
def test_the_maps_of_a_pair_are_the_formula_for_either_image(side):
    """The features of one image alone decide: its half of the map is Grad-CAM of the trunk, the other is empty."""
    network = CompareNet([1, 1, 1], "concat", cbam=False, width=0.25).eval()
    pairs = torch.rand(2, 3, 32, 64)
    weight = torch.randn(FEATURES)
    score = torch.nn.Linear(2 * FEATURES, 1, bias=False)
    score.weight.data = torch.cat([weight * (side == 0), weight * (side == 1)])[None]
    whole = torch.nn.Sequential()
    whole.backbone, whole.head = network, score
    got = np.split(gradcam.attribute(whole, pairs, torch.zeros(2, dtype=torch.int64)), 2, axis=2)
    maps = network.stages(network.stem(pairs.chunk(2, 3)[side])).detach().requires_grad_()
    (network.features(maps.mean((2, 3))) @ weight).sum().backward()
    coarse = (maps.grad.mean((2, 3), keepdim=True) * maps.detach()).sum(1, keepdim=True).relu()
    fine = torch.nn.functional.interpolate(coarse, (32, 32), mode="bilinear")[:, 0].numpy()
    assert (fine.sum((1, 2)) > 0).any()
    np.testing.assert_allclose(
        got[side], fine / np.maximum(fine.sum((1, 2), keepdims=True), 1e-12), atol=1e-6
    )
    assert not got[1 - side].any()


def test_each_image_of_a_pair_has_a_border():
    inside = np.zeros((1, 64, 128))
    inside[:, 30:34, 30:34] = 1
    seam = np.zeros((1, 64, 128))
    seam[:, 30:34, 62:66] = 1
    assert gradcam.border_share(np.concatenate([inside, seam]), 2).tolist() == [0, 1]
    assert gradcam.border_share(np.ones((1, 64, 128)), 2)[0] == pytest.approx(gradcam.EVEN)


def test_the_report_shows_both_images(coloured):
    fold = open_fold(coloured, 0)
    whole = thumbnails.whole(fold.val, np.arange(12))
    assert whole.shape == (12, image_files.SIDE, 2 * image_files.SIDE, 3) and red_and_blue(whole)
    home = Path(coloured.data.home)
    (uri,) = thumbnails.thumbnails(home, fold.folds.hash, {0: {int(fold.val.index[0])}}).values()
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as picture:
        assert picture.size == (2 * image_files.SIDE, image_files.SIDE)


@pytest.fixture
def first_rows(coloured) -> tuple[schema.Recipe, TrainLoader]:
    """A recipe that turns and erases, and a loader of the first eight training pairs."""
    strong = replace(coloured.aug, rotation_deg=30.0)
    recipe = replace(coloured, aug=strong, reg=replace(coloured.reg, erase_p=0.7))
    beton, crop = (
        open_fold(recipe, 0).train,
        Crop((0.9, 1.0), (strong.rrc_ratio[0], strong.rrc_ratio[1]), 0.0),
    )
    size, order = (lambda epoch: (16, 16)), (lambda epoch: np.arange(8))
    return recipe, TrainLoader(beton, order, seed=recipe.seed, batch=lambda epoch: 8, size=size, crop=crop)


def trained_on(recipe: schema.Recipe, loader: TrainLoader) -> torch.Tensor:
    """What the network is given of the loader's one batch, (B, 3, h, 2w)."""
    (batch,) = loader
    algorithm = DeviceAugment(recipe.aug, recipe.reg.erase_p, fill=FILL, pairs=True)
    device = types.SimpleNamespace(batch_to_device=lambda batch: batch)
    state = types.SimpleNamespace(batch=batch, device=device)
    algorithm.apply(Event.AFTER_DATALOADER, state, None)
    return state.batch["image"]


def test_the_reports_augmented_pairs_are_those_of_training(first_rows):
    recipe, loader = first_rows
    drawn = thumbnails.draw(loader.beton, np.arange(8), recipe=recipe, epoch=0, size=(16, 16))
    assert torch.equal(drawn, trained_on(recipe, loader))
    found = thumbnails.augmented(recipe, open_fold(recipe, 0).folds.hash, 0)
    for group in found["groups"]:
        for shot in group["shots"]:
            with Image.open(io.BytesIO(base64.b64decode(shot["uri"].partition(",")[2]))) as picture:
                assert picture.size == (2 * image_files.SIDE, image_files.SIDE), group["title"]


def test_samples_of_pairs_are_what_evaluation_and_training_make_of_them(first_rows):
    recipe, loader = first_rows
    found = samples.sample_rows(recipe, loader, num_classes=2, interpolation="bilinear", fill=FILL)
    evaluated = found["as evaluated"]
    assert evaluated.shape == (8, 16, 32, 3) and red_and_blue(evaluated)
    (batch,) = EvalLoader(loader.beton, 24, size=lambda: (16, 16), factor=1.0, interpolation="bilinear")
    assert np.array_equal(evaluated, batch["image"][:8].numpy())
    assert np.array_equal(found["as trained"], samples.pixels(trained_on(recipe, loader)))
