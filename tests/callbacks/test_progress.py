"""The console during training: lines of an epoch in a pipe, and advice that is not repeated."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from fastflower.callbacks import progress, scoring
from fastflower.core.console import Console
from fastflower.recipe import load
from fastflower.recipe.derived import derive

ADVICE = "S rose to {:.4f} while macro recall fell to 0.8: rare classes got worse; try loss.name=bsce"


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A callback that writes to a pipe, with a clock that tests set."""
    recipe = load(None, ["model.pretrained=false", "log.tensorboard=false"])
    sums = {"seconds": 1.0, "steps": 1, "images": 8}
    meter = SimpleNamespace(sums=sums, lr={"head": 1e-3}, mean=lambda name: 0.5)
    verdict = SimpleNamespace(notes=[])
    scoring = SimpleNamespace(
        recipe=recipe, latest=SimpleNamespace(verdict=verdict), selection=SimpleNamespace(stopped="")
    )
    recorder = SimpleNamespace(row={}, meter=meter)
    monkeypatch.setattr(sys, "stdout", out := io.StringIO())
    callback = progress.Progress(
        Console(None), derive(recipe, 1), recorder=recorder, scoring=scoring,
        trends=SimpleNamespace(update=lambda row: []),
    )  # fmt: skip
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(progress, "epoch_line", lambda row, *_, **__: f"row {row['epoch']}")
    return SimpleNamespace(callback=callback, recorder=recorder, verdict=verdict, clock=clock, out=out)


def state(epoch: int, step: int) -> Any:
    timestamp = SimpleNamespace(
        epoch=SimpleNamespace(value=epoch), batch_in_epoch=SimpleNamespace(value=step)
    )
    return SimpleNamespace(timestamp=timestamp, dataloader_len=100)


def end_epoch(shown: SimpleNamespace, epoch: int) -> None:
    shown.recorder.row.update(
        epoch=epoch, seconds=1.0, nonfinite=0, grad_norm=1.0, best={"epoch": 0}, eval_seconds=0.0
    )
    shown.callback.eval_after_all(state(epoch, 0), None)


def test_a_pipe_gets_one_line_an_epoch_and_one_each_five_minutes(shown: SimpleNamespace) -> None:
    shown.callback.fit_start(state(0, 0), None)
    for epoch, step_seconds in ((1, 2.9), (2, 10.0)):
        for step in range(100):
            shown.clock.now += step_seconds
            shown.callback.batch_end(state(epoch - 1, step), None)
        end_epoch(shown, epoch)
    lines = [line for line in shown.out.getvalue().splitlines() if line.startswith(("row", "epoch "))]
    assert [line.split()[0] for line in lines] == ["row", "epoch", "epoch", "epoch", "row"]


def test_the_same_advice_waits_twenty_epochs(shown: SimpleNamespace) -> None:
    for epoch in range(1, 23):
        shown.verdict.notes = [ADVICE.format(0.5 + epoch / 100)]
        end_epoch(shown, epoch)
    said = [line for line in shown.out.getvalue().splitlines() if "rare classes" in line]
    assert [line.split()[3] for line in said] == ["0.5100", "0.7100"]


def test_the_remedy_for_rare_classes_is_one_that_the_recipe_has_not(shown: SimpleNamespace) -> None:
    plain = scoring.rare_class_remedy(load(None, ["sampler.type=none"]))
    assert plain.startswith("try sampler.type=weighted_en")
    balanced = scoring.rare_class_remedy(load(None, ["sampler.type=weighted_en", "reg.mix_prob=0.1"]))
    assert balanced.startswith("sampler.type=weighted_en favours them already")
