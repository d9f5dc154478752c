"""Pairs of digits: a comparing network for each seed, a stacking of them, and predictions of a .npz."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from systems.conftest import HandIn, epochs

from fastflower import convert, ensemble, evaluate, sample_data, train
from fastflower.core import runs
from fastflower.core.errors import InputError
from fastflower.core.records import read_record
from fastflower.evaluation import stacking
from fastflower.evaluation.logits import load_logits
from fastflower.evaluation.stacking import Stacker
from fastflower.recipe import checks, derived, load

SMALL = [
    *("exp.name=pairs", "data.workers=1", "data.img_size=16", "tta.scales=[16]", "sched.cosine_epochs=1"),
    *("train.batch_per_gpu=16", "opt.lr=0.01", "bundle.dtype=fp32", "log.tensorboard=false"),
    "model.backbone=compare_resnet222_adaptive_cbam_w25",
]


@pytest.mark.slow
def test_seeds_become_a_stacking_and_a_hand_in(repo: Path, hand_in: HandIn) -> None:
    sample_data.main(["pairs", "rows=64", "held_out=24"])
    words = [str(repo / "recipes/pairs.yaml"), *SMALL]
    convert.main(words)
    assert [train.main([*words, f"seed={seed}"]) for seed in (42, 2023)] == [0, 0]
    other = [str(repo / "recipes/pairs_efficientnet.yaml"), *SMALL[:-1]]
    assert train.main([*other, "model.backbone=compare_test_efficientnet_adaptive"]) == 0
    assert all(0 <= row["clean_raw"] <= 1 and 0 <= row["f1_raw"] <= 1 for row in epochs("pairs"))
    assert evaluate.main(words) == 0
    with pytest.raises(
        InputError, match=r"stacking.json; run python -m fastflower.ensemble with --save first"
    ):
        ensemble.main([*words, "--predict", "data/pairs/test.npz", "stacked.csv"])
    ensemble.main([*words, "--save"])
    assert len(read_record(runs.RESULTS / "pairs" / stacking.FILE, Stacker).runs) == 3
    ensemble.main([*words, "--predict", "data/pairs/test.npz", "stacked.csv"])
    with open("stacked.csv", newline="", encoding="utf-8") as file:
        header, *stacked = csv.reader(file)
    assert header == ["filename", "category_id", "probability"] and len(stacked) == 24
    assert all((row[1] == "1") == (float(row[2]) > 0.5) for row in stacked)

    labelled = np.load("data/pairs/val.npz")
    np.savez("unlabelled.npz", xb=labelled["xb"], xa=labelled["xa"])
    table = hand_in(words, "unlabelled.npz", "--logits", "logits.npz")
    members = [load_logits(path) for path in sorted((runs.RESULTS / "pairs/oof").glob("*.npz"))]
    got = np.load("logits.npz")["logits"].mean((1, 2))
    assert np.ptp(got, axis=0).min() > 0.01  # the logits differ between pairs
    known = np.mean([member.logits for member in members], axis=0)
    np.testing.assert_allclose(got, known, atol=1e-4)
    assert [row["filename"].replace("unlabelled", "val") for row in table] == members[0].filename.tolist()
    assert [row["category_id"] for row in table] == [str(label) for label in known.argmax(1)]


def test_the_efficientnet_recipe_is_the_symmetric_one_with_smoothing(repo: Path) -> None:
    r = load(repo / "recipes/pairs_efficientnet.yaml")
    checks.check(r)
    assert r.model.backbone.startswith("compare_efficientnet_b0_") and r.data.symmetric
    assert r.reg.ls_eps > 0 and r.loss.name == "lsce" and derived.derive(r, 1).epochs == 50
