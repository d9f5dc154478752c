"""The bench of the out-of-fold score: what it counts, by hand and on data whose truth is known."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastflower.bench import honesty
from fastflower.bench.honesty import Estimate
from fastflower.core.errors import InputError


def estimate(test: float, half: float = 0.02, test_half: float = 0.04) -> Estimate:
    return Estimate(
        score="top-1", out_of_fold=0.8, low=0.8 - half, high=0.8 + half, test=test, test_low=test - test_half,
        test_high=test + test_half, ensemble=0.9,
    )  # fmt: skip


def test_coverage_is_counted_with_and_without_the_error_of_the_test_set() -> None:
    near, between, far = estimate(0.81), estimate(0.76), estimate(0.85)
    assert [(each.covered, each.widened) for each in (near, between, far)] == [
        (True, True), (False, True), (False, False),
    ]  # fmt: skip
    draws = np.random.default_rng(0).normal(0, [[0.02 / 1.96], [0.04 / 1.96]], (2, 100_000))
    assert near.expected == pytest.approx((np.abs(draws.sum(0)) < 0.02).mean(), abs=0.01)
    line = honesty.table_lines([[near], [between], [far]])[2]
    assert "| 1 of 3 | 62% | 2 of 3 | 0.9000 |" in line and "| +0.0067 (sd 0.0451) |" in line


def test_intervals_of_noise_cover_as_often_as_expected() -> None:
    """Images whose labels are noise in two classes of three: no leak, so the estimate is honest."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 100)
    features = rng.normal(size=(300, 6)) + np.eye(6)[labels]
    splits = [honesty.split_and_score(features, labels, folds=2, seed=seed) for seed in range(3)]
    top1 = [row[0] for row in splits]
    assert [each.score for each in splits[0]] == list(honesty.SCORES.values())
    assert all(each.low < each.out_of_fold < each.high for row in splits for each in row)
    assert sum(each.widened for each in top1) >= 2
    assert abs(np.mean([each.test - each.out_of_fold for each in top1])) < 0.15


def test_the_command_writes_its_page(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("photos/train").mkdir(parents=True)
    rng, rows = np.random.default_rng(0), []
    for number in range(60):
        pixels = rng.integers(0, 90, (20, 20, 3))
        pixels[..., number % 3] += 40
        Image.fromarray(pixels.astype(np.uint8)).save(f"photos/train/{number}.png")
        rows.append((f"{number}.png", ("7", "9", "x")[number % 3]))
    with open("photos/train_labels.csv", "w", newline="") as file:
        csv.writer(file).writerows([("filename", "category_id"), *rows])
    with pytest.raises(InputError, match=r"data.group = embedding: no weights of tf_efficientnet_lite0.in1k"):
        honesty.main(["--data", "photos"])
    with pytest.raises(InputError, match=r"--folds 1: must be 2 or more"):
        honesty.main(["--data", "photos", "--folds", "1"])
    with pytest.raises(InputError, match=r"--data nowhere: no train_labels.csv"):
        honesty.main(["--data", "nowhere"])
    colours = lambda recipe: lambda pictures: np.array([image.mean((0, 1)) for image in pictures])  # noqa: E731
    monkeypatch.setattr("fastflower.model.embeddings.embedder", colours)
    honesty.main(["--data", "photos", "--splits", "2", "--images", "15", "--write", "page.md"])
    page = Path("page.md").read_text()
    assert "`python -m fastflower.bench honesty --data photos --splits 2 --images 15`" in page
    assert "2 splits of 45 photographs: 9 are split off" in page and page.count("| top-1 |") == 1
    assert "split 1: out of fold " in capsys.readouterr().out
