"""Open and closed eyes: oblong images, two classes, F1 selects, the table has a probability."""

from __future__ import annotations

from pathlib import Path

import pytest
from systems.conftest import HandIn, epochs

from fastflower import convert, evaluate, sample_data, train
from fastflower.core import runs
from fastflower.data.betons.fold_set import open_fold
from fastflower.recipe import parse_command

SMALL = [
    *("exp.name=eyes", "model.backbone=ocec_baseline_c8_b3", "data.workers=1", "train.world_size=1"),
    *("train.batch_per_gpu=16", "sched.cosine_epochs=2", "log.tensorboard=false"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "warmup", "loss"), [("eyes", 0, "bce"), ("eyes_bold", 1, "focal")])
def test_eyes_become_a_table_of_probabilities(
    repo: Path, hand_in: HandIn, variant: str, warmup: int, loss: str
) -> None:
    sample_data.main(["eyes", "rows=120", "held_out=12"])
    words = [str(repo / f"recipes/{variant}.yaml"), *SMALL, f"sched.warmup_epochs={warmup}"]
    convert.main(words)
    recipe = parse_command(words)
    assert recipe.loss.name == loss
    fold = open_fold(recipe, 0)
    assert (fold.train.rows, fold.held_out.rows, fold.val_corrupt) == (96, 24, None)
    assert set(fold.train.descriptors["height"]) == {32} and set(fold.train.descriptors["width"]) == {64}
    assert train.main(words) == 0
    for row in epochs("eyes"):
        assert 0 <= row["f1_ema"] <= 1 and row["grad_norm"] > 0 and row["lr_max"] > 0 and row["val_loss"] > 0
        assert row["score"] == max(row["f1_raw"], row["f1_ema"]) and 0 <= row["train_acc"] <= 1
    assert (runs.MODELS / "eyes/ema_best.pth").is_file()
    (chosen,) = evaluate.member_paths(recipe)
    assert chosen.name.startswith("best_f1__")
    assert evaluate.main(words) == 0
    table = hand_in(words, "data/eyes/test")
    assert list(table[0]) == ["filename", "category_id", "probability"] and len(table) == 12
    assert all((row["category_id"] == "1") == (float(row["probability"]) > 0.5) for row in table)
