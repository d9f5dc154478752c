from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fastflower.evaluation import acceptance, summary
from fastflower.evaluation.records import ExperimentScores
from fastflower.recipe import load, schema
from support.fake_members import BACKBONES, classes_csv, folds, member


def scored(*words: str) -> tuple[ExperimentScores, schema.Recipe]:
    settings = load(None, list(words))
    members = [member(fold) for fold in range(3)]
    return summary.summarise(members, folds(), classes=classes_csv(), recipe=settings), settings


def course(fold: int, *values: float, size: int = 32) -> list[dict]:
    """Epochs from 1 with macro F1 of the raw and the averaged weights."""
    return [
        {
            "event": "epoch", "backbone": BACKBONES[0], "fold": fold, "seed": 42, "epoch": epoch, "size": [size, size],
            "macro_f1_raw": value - 0.1, "macro_f1_ema": value,
        }
        for epoch, value in enumerate(values, 1)
    ]  # fmt: skip


def test_scores_are_held_against_the_thresholds() -> None:
    scores, settings = scored("accept.clean_min=0.2", "accept.corrupted_min=0.999")
    clean, corrupted = acceptance.check(scores, [], settings.accept)
    assert clean.passed and not corrupted.passed
    assert clean.got == scores.fused.clean.top1 and clean.n == scores.fused.n
    exact, settings = scored(f"accept.clean_min={scores.fused.clean.top1!r}")
    assert acceptance.check(exact, [], settings.accept)[0].passed
    lines = acceptance.console_lines([clean, corrupted])
    assert lines[0].startswith("accepted  clean top-1: 0.") and "at least 0.2 (95%: 0." in lines[0]
    assert lines[1].startswith("REFUSED   corrupted top-1")


@pytest.mark.parametrize(
    ("metric", "wanted", "bound", "title"),
    [
        ("auc", 0.5, "at least", "AUC"),
        ("log_loss", 9.0, "at most", "log loss"),
        ("0.5*clean + 0.5*kappa", -1.0, "at least", "0.5*clean + 0.5*kappa"),
    ],
)
def test_a_threshold_of_the_metric_that_chooses(metric: str, wanted: float, bound: str, title: str) -> None:
    scores, settings = scored(f"select.metric={metric}", f"accept.score={wanted}")
    (verdict,) = acceptance.check(scores, [], settings.accept)
    chosen = scores.fused.selected
    assert chosen is not None and chosen.low < chosen.value < chosen.high and chosen.n == scores.fused.n
    assert (verdict.name, verdict.bound, verdict.passed) == (title, bound, True)
    assert verdict.got == chosen.value
    if metric == "log_loss":  # shown as a loss
        assert chosen.value == pytest.approx(scores.fused.clean.nll)
        assert chosen.low == pytest.approx(scores.fused.clean.nll_low, abs=0.05)
        assert not acceptance.check(scores, [], replace(settings.accept, score=0.001))[0].passed


def test_a_gain_of_the_ensemble_over_its_best_run() -> None:
    settings = load(None, ["accept.gain_min=0"])
    members = [member(fold, backbone=backbone) for backbone in BACKBONES[:2] for fold in range(3)]
    scores = summary.summarise(members, folds(), classes=classes_csv(), recipe=settings)
    (verdict,) = acceptance.check(scores, [], settings.accept)
    gain = scores.fused.over_best
    best = max(run.clean.top1 for run in scores.runs)
    assert gain is not None and verdict.got == pytest.approx(scores.fused.clean.top1 - best)
    assert (verdict.name, verdict.passed) == (f"gain over {gain.best}", verdict.got >= 0)
    assert not acceptance.check(scores, [], replace(settings.accept, gain_min=0.5))[0].passed
    alone, settings = scored("accept.gain_min=-1")
    (verdict,) = acceptance.check(alone, [], settings.accept)
    assert verdict.got is None and not verdict.passed  # one run is no ensemble


def test_no_threshold_no_row() -> None:
    scores, settings = scored()
    assert acceptance.check(scores, [], settings.accept) == []


def test_what_was_not_measured_is_not_passed() -> None:
    scores, settings = scored("accept.corrupted_min=0.1", "accept.macro_drop_max=0.5")
    scores = replace(scores, fused=replace(scores.fused, corrupted=None))
    verdicts = acceptance.check(scores, [], settings.accept)
    assert [verdict.got for verdict in verdicts] == [None, None]
    assert not any(verdict.passed for verdict in verdicts)
    assert "not measured" in acceptance.console_lines(verdicts)[0]


@pytest.mark.parametrize("most, passed", [(0.05, True), (0.03, False)])
def test_macro_f1_falls_back_from_the_best_of_its_size(most: float, passed: bool) -> None:
    scores, settings = scored(f"accept.macro_drop_max={most}")  # the members are of epochs 3, 4 and 5
    events = [*course(0, 0.5, 0.6, 0.56), *course(1, 0.1, 0.2, 0.3, 0.4), *course(2, 0.9, 0.1, 0.2, 0.3, 0.4)]
    for row in events:
        if row["fold"] == 2 and row["epoch"] == 1:
            row["size"] = [16, 16]  # an earlier size; its scores are not compared
    verdict = acceptance.check(scores, events, settings.accept)[0]
    assert verdict.got == pytest.approx(0.04) and verdict.passed is passed
    falls = [acceptance.macro_f1_fall(row, events) for row in scores.members]
    np.testing.assert_allclose(falls, [0.04, 0, 0], atol=1e-12)
