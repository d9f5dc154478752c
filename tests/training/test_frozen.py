"""Trainings on a frozen backbone: its weights stay, features are computed once, and every head is handed in."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from fastflower import evaluate
from fastflower.bundle import writer
from fastflower.callbacks.checkpoints import CheckpointSaver
from fastflower.core import runs
from fastflower.core.errors import InputError
from fastflower.data.betons import fold_set
from fastflower.data.betons.fold_set import FoldSet
from fastflower.evaluation.summary import load_member_logits
from fastflower.model.frozen import frozen_recipe
from fastflower.model.member import load_member
from fastflower.model.network import training_network
from fastflower.recipe import Recipe, checks, load
from fastflower.recipe.derived import derive
from fastflower.recipe.starting_point import layerwise
from fastflower.training import features as features_module
from fastflower.training import ranks
from fastflower.training.features import FrozenFeatures
from support import forked, toy_project

BACKBONE = "test_resnet"  # with BatchNorm
HEAD = (
    *(f"model.backbone={BACKBONE}", "model.pretrained=true", "model.drop_path=0", "model.freeze=backbone"),
    *(
        "llrd.enabled=auto",
        "model.frozen_views=2",
        "opt.lr=1e-2",
        "robust.enabled=false",
        "sched.warmup_epochs=0",
    ),
    *("data.img_size=32", "data.size_epochs=auto", "tta.scales=[32]"),
)
FEATURES = Path("data/features")


@pytest.fixture(autouse=True)
def _weights(tmp_path: Path) -> None:
    toy_project.project(tmp_path)
    runs.PRETRAINED.mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(timm.create_model(BACKBONE).state_dict(), runs.PRETRAINED / f"{BACKBONE}.pth")


def run_of(exp: str) -> runs.Run:
    return runs.Run(exp=exp, backbone=BACKBONE, fold=0, seed=42)


def tensors(exp: str, kind: str = "last") -> dict[str, torch.Tensor]:
    return load_member(run_of(exp).checkpoints(kind)[-1]).tensors


def assert_same(
    first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], tolerance: float = 0
) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=tolerance, msg=name)


def assert_backbone_stays(exp: str, *kinds: str) -> None:
    published = torch.load(runs.PRETRAINED / f"{BACKBONE}.pth")
    for kind in kinds:
        ours = {
            name.removeprefix("backbone."): tensor
            for name, tensor in tensors(exp, kind).items()
            if name.startswith("backbone.")
        }
        assert_same(ours, {name: published[name] for name in ours})


def scores(exp: str) -> list[dict]:
    return [
        {name: value for name, value in row.items() if name not in toy_project.TIMES}
        for row in runs.read_events(run_of(exp).events_path, [])
        if row["event"] == "epoch"
    ]


@pytest.mark.slow
def test_features_are_computed_once_and_the_backbone_stays(capsys):
    words = (*HEAD, "sched.cosine_epochs=4")
    assert toy_project.fit(*words, "exp.name=first") == 0
    first = capsys.readouterr().out
    assert "reg.mix_prob = 0" in first and "the head alone trains" in first
    assert first.count("  features of ") == 3  # two views in training, and the images that score
    assert_backbone_stays("first", "last", "best_combo", "ema_best")
    rows = scores("first")
    assert rows[-1]["train_loss"] < rows[0]["train_loss"] and rows[-1]["clean_raw"] >= 0.5

    assert toy_project.fit(*words, "exp.name=second") == 0
    assert "  features of " not in capsys.readouterr().out
    assert_same(tensors("first"), tensors("second"))
    assert scores("second") == rows

    one = sorted(FEATURES.iterdir())[0]
    one.write_bytes(one.read_bytes()[:-9])
    assert toy_project.fit(*words, "exp.name=third") == 0
    said = capsys.readouterr().out
    assert f"WARNING {one}: cut short or damaged" in said and said.count("  features of ") == 1
    assert_same(tensors("first"), tensors("third"))


@pytest.mark.slow
def test_a_cut_run_resumes_on_the_same_features(monkeypatch, tmp_path, capsys):
    words = (*HEAD, "sched.cosine_epochs=3", "train.save_every=2ba")
    assert toy_project.fit(*words, "exp.name=uncut") == 0
    original, cut = CheckpointSaver.batch_checkpoint, []

    def killed(self: CheckpointSaver, state, logger) -> None:
        original(self, state, logger)
        if state.timestamp.batch.value == 6 and not cut:
            cut.append(True)
            self.writer.wait()
            raise KeyboardInterrupt

    monkeypatch.setattr(CheckpointSaver, "batch_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        toy_project.fit(*words, "exp.name=cut")
    weights = runs.PRETRAINED / f"{BACKBONE}.pth"
    content = torch.load(weights)
    changed = {name: 2 * tensor if "conv1.weight" in name else tensor for name, tensor in content.items()}
    torch.save(changed, weights)
    with pytest.raises(InputError, match="its weights are no longer those with which this run computed"):
        toy_project.fit(*words, "exp.name=cut")
    torch.save(content, weights)
    assert toy_project.fit(*words, "exp.name=cut") == 0
    assert_same(tensors("uncut"), tensors("cut"))
    assert scores("uncut") == scores("cut")


def test_new_views_in_every_epoch_leave_the_backbone_alone():
    words = ("model.frozen_views=0", "data.img_size=[32,48]", "data.size_epochs=[1,2]", "reg.mix_prob=1")
    averages = ("sched.cosine_epochs=2", "swa.enabled=true", "swa.start=0.4")
    assert toy_project.fit(*HEAD, *words, *averages) == 0
    assert not FEATURES.exists()
    assert_backbone_stays("tiny", "last", "ema_best", "swa")
    assert [row["size"] for row in scores("tiny")] == [[32, 32], [48, 48]]


@pytest.mark.slow
@pytest.mark.parametrize("head", ["linear", "cosine", "mlp", "knn"])
def test_every_head_is_scored_and_exported(head, capsys):
    words = (*HEAD, "sched.cosine_epochs=2", f"model.head={head}", "ensembling.soup=checkpoints")
    assert toy_project.fit(*words) == 0
    assert (head == "knn") == ("the head holds the features of 40 images" in capsys.readouterr().out)
    evaluate.main(["tiny.yaml", *words])
    (member,) = load_member_logits(runs.RESULTS / "tiny")
    assert member.info.head == head
    top1 = float((member.single.argmax(1) == member.class_idx).mean())
    assert top1 == pytest.approx(member.info.stored, abs=0.051)  # a tie may fall either way
    path = run_of("tiny").checkpoints("best_combo")[-1]
    Path("bundle").mkdir()
    writer.write_bundle(
        Path("bundle"),
        writer.load_members([path], "fp16"),
        weights=np.ones(1),
        recipe=load("tiny.yaml", list(words)),
        temperature=1.0,
    )
    bundle = json.loads(Path("bundle/bundle.json").read_text())
    assert bundle["half"] == "gpu" and all(
        program["half_keeps"] is not None for program in bundle["programs"]
    )


@pytest.mark.dist
@pytest.mark.parametrize("head", ["linear", "knn"])
def test_two_ranks_share_the_features(head):
    words = (*HEAD, "sched.cosine_epochs=3", f"model.head={head}", "model.drop_rate=0", "eval.batch=4")
    two = forked.training("exp.name=two", *words, "train.batch_per_gpu=5", "train.world_size=2")
    assert two.wait() == [0, 0], two.text()
    files = sorted(path.name for path in FEATURES.iterdir())
    assert toy_project.fit("exp.name=one", *words, "train.batch_per_gpu=10") == 0
    assert sorted(path.name for path in FEATURES.iterdir()) == files
    assert_same(tensors("one"), tensors("two"), 1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["model.freeze=backbone", "model.pretrained=false"], r"model.freeze = backbone keeps weights that are random"),
        (["model.lora.rank=4", "model.pretrained=false"], r"model.lora.rank = 4 keeps weights that are random here"),
        (["model.freeze=backbone", "llrd.enabled=true"], r"contradicts llrd.enabled; set llrd.enabled=auto, or model"),
        (["model.freeze=backbone", "model.lora.rank=4"], r"contradicts model.lora.rank; set model.lora.rank=0"),
        (["model.freeze=backbone", "model.drop_path=0.1", "model.grad_checkpointing=true"],
         r"contradicts model.drop_path, model.grad_checkpointing; set model.drop_path=0 model.grad_checkpointing"),
        (["model.freeze=backbone", "semi.enabled=true", "data.unlabelled=more"], r"set model.frozen_views=0"),
        (["model.head=knn"], r"model.head = knn finds neighbours by features that stay as they are; set model.freeze="),
        (["model.head=knn", "model.freeze=backbone", "model.frozen_views=0"], r"model.frozen_views to 1 or more"),
        (["model.lora.targets=qkv"], r"model.lora.targets = qkv: must be auto or a list of layer names"),
    ],
)  # fmt: skip
def test_contradictions_are_refused_in_one_line(changes, said):
    with pytest.raises(InputError) as caught:
        checks.check(load(None, changes))
    assert re.search(said, str(caught.value)) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "words",
    [("model.freeze=backbone", "model.frozen_views=0"), ("model.lora.rank=4", "model.backbone=test_vit")],
)
def test_compiled_weights_that_do_not_train_are_refused_on_a_cpu(words):
    torch.save(timm.create_model("test_vit").state_dict(), runs.PRETRAINED / "test_vit.pth")
    words = (f"model.backbone={BACKBONE}", *words, "model.pretrained=true", "llrd.enabled=auto")
    with pytest.raises(InputError) as refused:
        toy_project.fit(*words, "model.drop_path=0", "train.compile=true")
    key = words[1].partition("=")[0]
    assert str(refused.value) == (
        f"train.compile=true with {key}: on a CPU torch's compiler corrupts memory where weights do not train; set "
        "train.compile=false"
    )


def test_the_recipe_follows_fixed_views():
    recipe = load(None, ["model.freeze=backbone"])
    assert not [line for line in checks.check(recipe) if "lr" in line] and not layerwise(recipe)
    adapted, lines = frozen_recipe(recipe)
    assert adapted.data.img_size == [320] and adapted.reg.mix_prob == 0 and len(lines) == 2
    assert "data.img_size = [320]: the features of fixed views have one size" in lines
    voting, _ = frozen_recipe(replace(recipe, model=replace(recipe.model, head="knn")))
    assert (voting.sched.cosine_epochs, voting.model.frozen_views, voting.ema.enabled) == (1, 1, False)
    derive(voting, 1)
    for changes in (["model.freeze=backbone", "model.frozen_views=0"], []):
        assert frozen_recipe(load(None, changes)) == (load(None, changes), [])


@pytest.mark.slow
def test_adapters_are_trained_and_members_have_them_merged():
    torch.manual_seed(0)
    published = timm.create_model(toy_project.BACKBONE).state_dict()
    torch.save(published, runs.PRETRAINED / f"{toy_project.BACKBONE}.pth")
    words = (
        *toy_project.ONE,
        "model.pretrained=true",
        "model.lora.rank=4",
        "robust.enabled=false",
        "opt.lr=1e-2",
    )
    assert toy_project.fit(*words) == 0
    last = toy_project.last().tensors
    for name, tensor in published.items():
        if f"backbone.{name}" in last:
            torch.testing.assert_close(last[f"backbone.{name}"], tensor, rtol=0, atol=0, msg=name)
    adapters = [name for name in last if name.endswith("lora_b")]
    assert adapters and all(last[name].any() for name in adapters)
    member = load_member(toy_project.run_of().checkpoints("best_combo")[-1])
    assert not [name for name in member.tensors if "lora" in name]
    weight = f"{adapters[0].removesuffix('.lora_b')}.weight"
    assert not torch.equal(member.tensors[weight], last[weight])
    evaluate.main(["tiny.yaml", *words])
    (scored,) = load_member_logits(runs.RESULTS / "tiny")
    assert float((scored.single.argmax(1) == scored.class_idx).mean()) == pytest.approx(
        scored.info.stored, abs=0.051
    )


def frozen_features(recipe: Recipe, machine: ranks.Machine | None = None) -> tuple[FrozenFeatures, FoldSet]:
    """The features of the toy project's fold 0, before any is computed."""
    fold, machine = fold_set.open_fold(recipe, 0), machine or ranks.prepare(recipe)
    network, spec, _ = training_network(recipe, len(fold.classes))
    return FrozenFeatures(recipe, network=network, spec=spec, machine=machine, say=print), fold


def test_another_source_of_an_own_part_gives_other_features():
    part = Path("my_fade_of_frozen.py")
    part.write_text("def fade(images, keys):\n    return 0.5 * images\n")
    recipe, _ = frozen_recipe(load("tiny.yaml", [*HEAD, "aug.extra=[my_fade_of_frozen:fade]"]))

    def computed() -> set[str]:
        features, fold = frozen_features(recipe)
        views = features._training_views(fold.train, np.arange(4))
        for number, view in enumerate(views):
            features._features(view, f"images, view {number}")
        return {path.name for path in FEATURES.iterdir()}

    first = computed()
    assert len(first) == 2 and computed() == first
    part.write_text("def fade(images, keys):\n    return 0.4 * images\n")
    assert len(computed() - first) == 1  # the plain view is found again


def test_a_rank_without_rows_has_features_of_the_same_shape_and_reads_with_its_share_of_the_cores(
    monkeypatch,
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8))
    recipe, _ = frozen_recipe(load("tiny.yaml", [*HEAD, "data.workers=0"]))
    features, fold = frozen_features(recipe, replace(ranks.prepare(recipe), rank=1, world=2))
    assert features.threads == 4
    shapes = []

    def pixels(rows: np.ndarray) -> torch.Tensor:  # of pairs, whose images lie side by side
        shapes.append(len(rows))
        return torch.zeros(len(rows), 32, 64, 3, dtype=torch.uint8)

    monkeypatch.setattr(features, "_forward", lambda images: images.reshape(len(images), -1).float())
    width, asked = 32 * 64 * 3, []

    def gathered(value: object) -> list:
        asked.append(value)
        return [torch.ones(1, width), value] if isinstance(value, torch.Tensor) else [True, value]

    monkeypatch.setattr(features_module.dist, "all_gather_object", gathered)
    view = features_module.View(fold.train, np.array([5]), pixels, {})
    assert features._features(view, "images").equal(torch.ones(1, width))
    assert asked[-1].shape == (0, width) and shapes == [1]
