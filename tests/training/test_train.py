"""Trainings of the toy project: the files they write, the keys they follow, the ways they end."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from composer.core import State
from composer.loggers import Logger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastflower.algorithms.gradients import GradientGuard
from fastflower.callbacks.progress import COLUMNS, epoch_line, headline, step_line, time_left
from fastflower.callbacks.scoring import Scoring
from fastflower.core import checkpoint, errors, runs
from fastflower.core.console import clock
from fastflower.core.records import read_record
from fastflower.core.runs import Run
from fastflower.core.scores import scores
from fastflower.data.betons.beton_file import Beton
from fastflower.data.betons.fold_set import open_fold
from fastflower.data.loaders import EvalLoader
from fastflower.model.member import MemberCheckpoint, load_member
from fastflower.model.network import build_network
from fastflower.recipe import load, to_yaml
from fastflower.recipe.derived import derive
from fastflower.recipe.run_record import RunEnd, RunNumbers, numbers_path
from fastflower.training import ranks
from support import forked, toy_project


@pytest.fixture(autouse=True)
def project(tmp_path: Path) -> Path:
    return toy_project.project(tmp_path)


def test_bf16_on_a_cpu_trains_beside_float32_and_is_recorded(monkeypatch):
    monkeypatch.setattr(ranks.processor, "multiplies_bf16", lambda: True)
    losses = {}
    for name, words in (("float32", ()), ("bf16", ("train.amp=true",))):
        assert toy_project.fit(*toy_project.ONE, "robust.enabled=false", f"exp.name={name}", *words) == 0
        losses[name] = toy_project.epochs(name)[0]["train_loss"]
    run = toy_project.run_of("bf16")
    assert read_record(numbers_path(run), RunNumbers).precision == "amp_bf16"
    assert losses["bf16"] != losses["float32"]
    assert losses["bf16"] == pytest.approx(losses["float32"], rel=0.02)
    weights = load_member(run.checkpoints("best_clean")[0]).tensors
    assert {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("backbone, amp", [(toy_project.BACKBONE, "false"), ("test_convnext", "true")])
def test_recomputed_activations_train_the_same_weights(backbone, amp, monkeypatch):
    monkeypatch.setattr(ranks.processor, "multiplies_bf16", lambda: True)
    words = (*toy_project.ONE, "robust.enabled=false", f"model.backbone={backbone}", f"train.amp={amp}")
    tensors = []
    for again in ("false", "true"):
        assert toy_project.fit(*words, f"model.grad_checkpointing={again}", f"exp.name=again_{again}") == 0
        run = Run(exp=f"again_{again}", backbone=backbone, fold=0, seed=42)
        tensors.append(load_member(run.checkpoints("best_clean")[0]).tensors)
    assert toy_project.different(*tensors) == []


@pytest.mark.slow
def test_a_run_leaves_checkpoints_that_say_what_they_are(capsys):
    assert toy_project.fit("log.tensorboard=true") == 0
    run, rows = toy_project.run_of(), toy_project.epochs()
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    counts = read_record(numbers_path(run), RunNumbers).class_counts
    for row in rows:  # the sampler repeats the small classes, three times at most
        assert sum(row["class_draws"]) == 40 and row["class_draws"] != list(counts)
        assert all(draws <= 3 * count for draws, count in zip(row["class_draws"], counts, strict=True))
    for kind in ("best_clean", "best_combo", "ema_best", "last"):
        (path,) = run.checkpoints(kind)
        assert path.samefile(run.model_dir / f"{kind}.pth")
        member = load_member(path)
        row = rows[member.meta.epoch - 1]
        assert member.meta.kind == kind and member.meta.weights in ("raw", "ema")
        assert {key: row[key] for key in member.meta.scores} == member.meta.scores
        assert list(member.meta.size) == row["size"] and member.meta.class_ids == ("3", "7", "12", "40")
        network = build_network(member.meta)
        network.load_state_dict(member.tensors)
        assert bool(checkpoint.load(path).training_state) == (kind == "last")
    best = max((row for row in rows if row["epoch"] > 1), key=lambda row: max(row["s_raw"], row["s_ema"]))
    assert checkpoint.load(run.model_dir / "best_combo.pth").meta["epoch"] == best["epoch"]
    text = to_yaml(load("tiny.yaml", ["log.tensorboard=true"]))
    assert (run.meta_dir / "recipe.yaml").read_text().endswith(text)
    numbers = read_record(numbers_path(run), RunNumbers)
    assert numbers.batch_global == 10 and numbers.lr == 1e-3 and sum(numbers.class_counts) == 40
    assert numbers.determinism == "full" and numbers.groups[0].lr > 0 and numbers.groups[-1].part == "head"
    end = read_record(run.end_path, RunEnd)
    assert end.identity == checkpoint.load(run.model_dir / "last.pth").meta["identity"]
    assert end.reason == "all 3 epochs" and end.best.epoch == best["epoch"]
    for name in ("folds.csv", "classes.csv"):
        assert (run.meta_dir / name).read_bytes() == (Path("data") / name).read_bytes()
    assert json.loads((run.meta_dir / "versions.json").read_text())["packages"]["torch"].startswith("2.7")
    (started,) = (run.meta_dir / run.stem).iterdir()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", started.name)
    for name in ("recipe.yaml", "versions.json"):
        assert (started / name).read_bytes() == (run.meta_dir / name).read_bytes()
    clock = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    lines = (run.model_dir / f"train_{run.stem}.log").read_text().splitlines()
    assert lines and all(re.match(clock, line) for line in lines)
    assert re.fullmatch(clock, checkpoint.load(run.model_dir / "best_combo.pth").meta["time"])
    for suffix, size in (("", 32), ("_48", 48)):
        with Image.open(run.results_dir / f"samples_{run.stem}{suffix}.png") as picture:
            assert 8 * size < picture.width < 8 * size + 9 * 5  # and gaps
    shown = EventAccumulator(str(run.results_dir / "tensorboard" / run.stem))
    shown.Reload()
    tags = shown.Tags()
    assert {"clean_raw", "s_ema", "train_loss"} <= set(tags["scalars"])
    assert sorted(tags["images"]) == ["samples/48", "samples/first size"]
    (recipe,) = shown.Tensors("recipe/text_summary")
    assert b"    cosine_epochs: 3" in recipe.tensor_proto.string_val[0]
    hparams = shown.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"opt.lr" in hparams and b"model.backbone" in hparams
    assert [row["event"] for row in runs.read_events(run.events_path, [])] == [
        "start",
        "epoch",
        "epoch",
        "epoch",
        "end",
    ]
    out, log = capsys.readouterr().out, (run.model_dir / f"train_{run.stem}.log").read_text()
    for said in (
        "fold 0   seed 42",
        "1-1 at 32 (4 steps of 10), 2-3 at 48",
        headline(),
        "done: all 3 epochs",
        "best_combo",
    ):
        assert said in out and said in log


def logits(member: MemberCheckpoint, beton: Beton) -> np.ndarray:
    """Logits (rows, classes) of a member over a beton, computed without Composer."""
    network = build_network(member.meta)
    network.load_state_dict(member.tensors)
    network.eval()
    loader = EvalLoader(
        beton,
        7,
        size=lambda: member.meta.size,
        factor=member.meta.resize_factor,
        interpolation=member.meta.interpolation,
    )
    with torch.inference_mode():
        parts = [network(b["image"].permute(0, 3, 1, 2).float())[b["valid"]] for b in loader]
    return torch.cat(parts).numpy()


def test_the_score_of_a_checkpoint_is_that_of_its_weights():
    """best_combo, run over the validation betons without Composer, has the scores of its epoch."""
    assert toy_project.fit() == 0
    member = load_member(toy_project.run_of().model_dir / "best_combo.pth")
    recorded, weights = member.meta.scores, member.meta.weights
    opened = open_fold(load("tiny.yaml"), 0)
    measured = scores(logits(member, opened.val), opened.val.labels)
    assert measured["top1"] == recorded[f"clean_{weights}"]
    assert measured["macro_f1"] == pytest.approx(recorded[f"macro_f1_{weights}"])
    hits = logits(member, opened.val_corrupt).argmax(1) == opened.val_corrupt.labels
    assert hits.mean() == pytest.approx(recorded[f"corrupt_{weights}"])
    assert recorded[f"s_{weights}"] == pytest.approx(0.7 * measured["top1"] + 0.3 * hits.mean())


@pytest.mark.slow
def test_microbatches_give_the_gradient_of_the_whole_batch():
    still = ("model.drop_rate=0", "model.drop_path=0", *toy_project.ONE)
    toy_project.fit("exp.name=whole", *still)
    toy_project.fit("exp.name=parts", "train.batch_per_gpu=5", "train.grad_accum=2", *still)
    whole, parts = toy_project.last("whole"), toy_project.last("parts")
    for name, tensor in whole.tensors.items():
        torch.testing.assert_close(parts.tensors[name], tensor, rtol=0, atol=2e-6)
    assert whole.training_state["time"]["batch"] == parts.training_state["time"]["batch"] == 4


def test_a_stage_with_a_smaller_batch_has_more_steps():
    toy_project.fit("train.stage_batch=[20,8]", "opt.lr=auto", "opt.lr_ref=0.005", "opt.lr_max_bound=1")
    sizes = [row["batch_global"] for row in toy_project.epochs()]
    assert sizes == [20, 8, 8]
    assert toy_project.last().training_state["time"]["batch"] == 2 + 5 + 5


@pytest.mark.slow
def test_folds_train_one_after_the_other():
    assert toy_project.fit("data.fold=[0,2]", *toy_project.ONE) == 0
    assert [toy_project.run_of(fold=fold).checkpoints("best_combo") != [] for fold in (0, 1, 2)] == [
        True,
        False,
        True,
    ]
    first, second = toy_project.last(fold=0), toy_project.last(fold=2)
    assert first.meta["fold"] == 0 and second.meta["fold"] == 2
    assert any(not torch.equal(first.tensors[name], second.tensors[name]) for name in first.tensors)


def test_without_averages_and_without_corruptions(capsys):
    assert toy_project.fit("ema.enabled=false", "robust.enabled=false", *toy_project.ONE) == 0
    (row,) = toy_project.epochs()
    assert row["s_raw"] == row["clean_raw"] and "s_ema" not in row and row["per_kind"] == {}
    assert toy_project.run_of().checkpoints("ema_best") == [] and toy_project.run_of().checkpoints(
        "best_combo"
    )
    assert "best is chosen by clean top-1" in capsys.readouterr().out


@pytest.mark.slow
def test_swa_is_scored_and_kept_as_its_own_kind_with_statistics_of_its_own():
    """A network with BatchNorm: the statistics of the average are re-estimated, not averaged."""
    words = (
        "model.backbone=test_resnet",
        "model.drop_path=0",
        "swa.enabled=true",
        "swa.start=0.5",
        "sched.warmup_epochs=0",
    )
    assert toy_project.fit("sched.cosine_epochs=4", "data.size_epochs=[1,4]", *words) == 0
    rows = toy_project.epochs()
    assert ["s_swa" in row for row in rows] == [False, False, True, True]
    run = runs.Run(exp="tiny", backbone="test_resnet", fold=0, seed=42)
    swa, last = (checkpoint.load(run.checkpoints(kind)[-1]) for kind in ("swa", "last"))
    assert swa.meta["weights"] == "swa"
    statistics = [name for name in swa.tensors if name.endswith("running_mean")]
    assert statistics and all(not torch.equal(swa.tensors[name], last.tensors[name]) for name in statistics)


@pytest.mark.slow
def test_a_run_that_stops_early_is_finished(capsys):
    words = ("es.patience=1", "es.min_delta=1", "sched.cosine_epochs=6", "data.size_epochs=[1,6]")
    assert toy_project.fit(*words) == 0
    assert len(toy_project.epochs()) == 3  # a first at the new size, then one without a gain of 1
    end = toy_project.end()
    assert end["stopped_early"] and end["reason"] == "no gain of 1 in 1 epochs up to epoch 3"
    capsys.readouterr()
    assert toy_project.fit(*words) == 0
    assert "is finished (no gain of 1" in capsys.readouterr().out
    assert len(toy_project.epochs()) == 3


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Make the gradients of some global steps NaN."""
    original = GradientGuard.apply

    def apply(self: GradientGuard, event, state, logger) -> None:
        if str(event.value) == "after_train_batch" and state.timestamp.batch.value in steps:
            next(self.network.parameters()).grad.fill_(math.nan)
        original(self, event, state, logger)

    monkeypatch.setattr(GradientGuard, "apply", apply)


def test_a_step_that_is_not_finite_is_skipped_and_counted(monkeypatch, capsys):
    poison(monkeypatch, {0, 3})
    assert toy_project.fit(*toy_project.ONE) == 0
    (row,) = toy_project.epochs()
    assert row["nonfinite"] == 2 and math.isfinite(row["train_loss"]) and math.isfinite(row["grad_norm"])
    assert toy_project.last().training_state["parts"]["ema"]["updates"] == 2
    assert all(bool(tensor.isfinite().all()) for tensor in toy_project.last().tensors.values())
    assert "2 steps were not finite and were skipped" in capsys.readouterr().out


def test_a_run_of_nan_stops_with_advice(monkeypatch):
    poison(monkeypatch, set(range(100)))
    with pytest.raises(
        errors.Diverged, match=r"3 steps in a row, up to step 3 .* lower opt.lr_ref or opt.lr"
    ):
        toy_project.fit("train.max_nonfinite=3", *toy_project.ONE)


@pytest.mark.parametrize(
    "words, said",
    [
        (["data.fold=7"], r"data.fold = 7: must be all, none, or a number \(or list\) in 0..2"),
        (["train.save_every=often"], "train.save_every = often: must be epochs such as 1ep"),
        (
            ["train.batch_per_gpu=64"],
            "40 training images with labels, fewer than the global batch of 64; lower train.batch_per_gpu",
        ),
        (
            ["model.backbone=resnet10t", "train.batch_per_gpu=1"],
            "a batch of 1 image: the BatchNorm layers of resnet10t need 2 or more; raise train.batch_per_gpu",
        ),
        (["data.img_size=[32,64]"], "short side .* run convert with this recipe"),
        (["robust.kinds=[jpeg]"], "robust.kinds or robust.level differ"),
        (["data.home=elsewhere"], "elsewhere"),
        (["model.pretrained=true"], "no pretrained weights of test_vit"),
    ],
)
def test_what_cannot_train_is_refused_in_one_line(words, said):
    with pytest.raises(errors.InputError, match=said) as refused:
        toy_project.fit(*words)
    assert "\n" not in str(refused.value)


def test_a_flipped_bit_in_a_beton_is_found_before_the_first_step():
    path = Path("data/betons/fold0_train.beton")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(errors.CorruptionError, match="run convert again"):
        toy_project.fit()
    assert toy_project.run_of().checkpoints("last") == []


def test_two_processes_do_not_train_one_run(monkeypatch):
    recipe = load("tiny.yaml")
    with (
        ranks.lock_run(recipe, 0),
        pytest.raises(
            errors.EnvironmentFault, match=rf"another process \({os.getpid()}\) trains fold 0, seed 42"
        ),
    ):
        toy_project.fit()
    assert toy_project.fit(*toy_project.ONE) == 0


def test_the_console_reads_well():
    row = {
        "epoch": 3, "size": [224, 224], "lr_max": 1e-4, "train_loss": 3.125, "train_acc": 0.312, "val_loss": 2.5,
        "clean_raw": 0.4512, "clean_ema": 0.4301, "corrupt_raw": 0.39, "corrupt_ema": 0.38, "score": 0.4332,
        "chosen": "raw", "best": {"epoch": 3, "score": 0.4332}, "patience_left": 10, "images_per_s": 812.4,
    }  # fmt: skip
    line = epoch_line(row, 40, 2470)
    assert len(line) <= len(headline()) <= 120 and line.endswith("  812    41:10")
    assert "0.4332 @3*" in line and "3/40" in line and "3.1250  0.3120  2.5000" in line
    assert headline("f1") == headline().replace("     S", "    F1")
    ends = np.cumsum([width + 2 for _, width in COLUMNS]) - 2
    assert all(line[end - 1] != " " and headline()[end - 1] != " " for end in ends), line
    moving = step_line(
        3, 40, step=35, steps=78, loss=2.3456, val=2.5, lr=1.2e-4, speed=812.0, epoch_left=55, left=4000
    )
    assert moving == (
        "epoch 3/40   45%  step 35/78  loss 2.3456  val 2.5000  lr 1.2e-04  812 img/s  0:55 left, 1:06:40 in all"
    )
    assert [clock(s) for s in (7, 750, 3723)] == ["0:07", "12:30", "1:02:03"]
    recipe = load(None, ["data.img_size=[100,200]", "data.size_epochs=[2,4]", "sched.cosine_epochs=4"])
    assert time_left(derive(recipe, 2), 1, 10.0) == 10 + 40 + 40


@pytest.mark.dist
def test_two_ranks_are_one_rank():
    """50 steps at the same global batch; each validation image counts once on any number of ranks."""
    still = (
        "model.drop_rate=0",
        "model.drop_path=0",
        "sched.cosine_epochs=10",
        "data.size_epochs=[5,10]",
        "opt.lr=1e-4",
        "eval.batch=4",
    )
    two_ranks = forked.training("exp.name=two", "train.batch_per_gpu=4", "train.world_size=2", *still)
    assert two_ranks.wait() == [0, 0], two_ranks.text()
    toy_project.fit("exp.name=one", "train.batch_per_gpu=8", *still, "eval.batch=7")
    one, two = toy_project.last("one"), toy_project.last("two")
    assert one.training_state["time"]["batch"] == two.training_state["time"]["batch"] == 50
    for name, tensor in one.tensors.items():
        torch.testing.assert_close(two.tensors[name], tensor, rtol=0, atol=1e-5)
    for a, b in zip(toy_project.epochs("one"), toy_project.epochs("two"), strict=True):
        assert a["clean_raw"] == pytest.approx(b["clean_raw"], abs=0.051)
        assert a["val_loss"] == pytest.approx(b["val_loss"], abs=1e-4)
        assert a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-5)


def note_scored_buffers() -> None:
    """Let the scores' callback save the buffers of the networks that it scores, before and after."""

    def saving(event: str, name: str) -> None:
        original = getattr(Scoring, event)

        def stand_in(self: Scoring, state: State, logger: Logger) -> None:
            path = f"{name}_{state.timestamp.epoch.value}_{os.environ['RANK']}.pt"
            buffers = [{key: b.clone() for key, b in n.named_buffers()} for n in self.networks()]
            torch.save(buffers, path)
            original(self, state, logger)

        setattr(Scoring, event, stand_in)

    saving("eval_before_all", "before")
    saving("eval_end", "scored")


@pytest.mark.dist
def test_two_ranks_score_and_save_the_same_running_statistics():
    """Between evaluations each rank has its own; the scored network is equal on both ranks and is the saved one."""
    words = ("model.backbone=test_resnet", "model.drop_path=0", "train.batch_per_gpu=5", "train.world_size=2")
    ranks = forked.training(*words, prepare=note_scored_buffers)
    assert ranks.wait() == [0, 0], ranks.text()
    for epoch in (1, 2, 3):
        before, scored = (
            [torch.load(f"{when}_{epoch}_{rank}.pt") for rank in (0, 1)] for when in ("before", "scored")
        )
        assert len(scored[0]) == 2  # raw and EMA
        assert toy_project.different(*before) and toy_project.different(*scored) == []
    member = load_member(
        runs.Run(exp="tiny", backbone="test_resnet", fold=0, seed=42).model_dir / "best_combo.pth"
    )
    saved = torch.load(f"scored_{member.meta.epoch}_1.pt")[member.meta.weights == "ema"]
    kept = {name: buffer for name, buffer in saved.items() if name in member.tensors}  # not mean and std
    assert any("running_var" in name for name in kept) and not toy_project.different(
        {name: member.tensors[name] for name in kept}, kept
    )
    val = open_fold(load("tiny.yaml"), 0).val
    measured = scores(logits(member, val), val.labels)
    assert measured["top1"] == member.meta.scores[f"clean_{member.meta.weights}"]


@pytest.mark.dist
def test_a_refusal_is_said_once_and_its_exit_code_is_the_launchers():
    script = str(Path(toy_project.train.__file__))
    command = [sys.executable, "-m", "composer.cli.launcher", "-n", "2", script, "tiny.yaml", "opt.lr_reff=1"]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert refused.returncode == 2
    assert (refused.stderr + refused.stdout).count("unknown key opt.lr_reff; did you mean opt.lr_ref?") == 1
