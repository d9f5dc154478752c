from __future__ import annotations

import numpy as np
import pytest

from fastflower.evaluation import acceptance, summary
from fastflower.recipe import load, schema
from support.fake_members import BACKBONES, classes_csv, folds, member


def made(*words: str) -> tuple[dict, schema.Recipe]:
    settings = load(None, list(words))
    return summary.summarise(
        [member(fold) for fold in range(3)], folds(), classes=classes_csv(), recipe=settings
    ), settings


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
    found, settings = made("accept.clean_min=0.2", "accept.corrupted_min=0.999")
    clean, corrupted = acceptance.check(found, [], settings.accept)
    assert clean["passed"] and not corrupted["passed"]
    assert clean["got"] == found["fused"]["clean"]["top1"] and clean["n"] == found["fused"]["n"]
    exact, settings = made(f"accept.clean_min={found['fused']['clean']['top1']!r}")
    assert acceptance.check(exact, [], settings.accept)[0]["passed"]
    said = acceptance.lines([clean, corrupted])
    assert said[0].startswith("accepted  clean top-1: 0.") and "at least 0.2 (95%: 0." in said[0]
    assert said[1].startswith("REFUSED   corrupted top-1")


def test_no_threshold_no_row() -> None:
    found, settings = made()
    assert acceptance.check(found, [], settings.accept) == []


def test_what_was_not_measured_is_not_passed() -> None:
    found, settings = made("accept.corrupted_min=0.1", "accept.macro_drop_max=0.5")
    found["fused"]["corrupted"] = None
    rows = acceptance.check(found, [], settings.accept)
    assert [row["got"] for row in rows] == [None, None] and not any(row["passed"] for row in rows)
    assert "not measured" in acceptance.lines(rows)[0]


@pytest.mark.parametrize("most, passed", [(0.05, True), (0.03, False)])
def test_macro_f1_falls_back_from_the_best_of_its_size(most: float, passed: bool) -> None:
    found, settings = made(f"accept.macro_drop_max={most}")  # the members are of epochs 3, 4 and 5
    events = [*course(0, 0.5, 0.6, 0.56), *course(1, 0.1, 0.2, 0.3, 0.4), *course(2, 0.9, 0.1, 0.2, 0.3, 0.4)]
    for row in events:
        if row["fold"] == 2 and row["epoch"] == 1:
            row["size"] = [16, 16]  # an earlier size; its scores are not compared
    row = acceptance.check(found, events, settings.accept)[0]
    assert row["got"] == pytest.approx(0.04) and row["passed"] is passed
    falls = [acceptance.macro_fall(own, events) for own in found["members"]]
    np.testing.assert_allclose(falls, [0.04, 0, 0], atol=1e-12)
