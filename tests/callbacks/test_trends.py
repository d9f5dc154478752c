"""Lines about trends over epochs: when they are said, that they are said once, and that a resume remembers."""

from __future__ import annotations

import math
from typing import Any

from fastflower.callbacks.trends import Trends
from fastflower.recipe import load


def rows(**courses: list[float]) -> list[dict[str, Any]]:
    """Rows of events.jsonl with the given courses; what is not given stays equal."""
    length = max(map(len, courses.values()))
    constant = {"val_loss": 0.5, "train_loss": 0.5, "lr_max": 1e-3, "grad_norm": 1.0}
    return [
        {
            "epoch": epoch,
            "size": [32, 64],
            "chosen": "ema",
            **constant,
            **{name: values[epoch - 1] for name, values in courses.items()},
        }
        for epoch in range(1, length + 1)
    ]


def said(course: list[dict[str, Any]], *words: str) -> dict[int, list[str]]:
    trends = Trends(load(None, list(words)))
    lines = {row["epoch"]: trends.update(row) for row in course}
    return {epoch: texts for epoch, texts in lines.items() if texts}


def test_a_validation_loss_that_rises_while_training_goes_on_is_overfitting():
    val = [1.0, 0.8, 0.6, 0.6, 0.62, 0.65, 0.7, 0.75, 0.8, 0.9]
    lines = said(rows(val_loss=val, train_loss=[1.0 - 0.05 * e for e in range(10)]))
    assert list(lines) == [8]
    assert (
        "rose from 0.6000 (epoch 3) to 0.7500 while" in lines[8][0]
        and "raise opt.weight_decay" in lines[8][0]
    )
    assert said(rows(val_loss=val, train_loss=val)) == {}  # both rise: the learning rate, not overfitting
    again = [*val, 0.5, 0.5, 0.5, 0.5, 0.5, 0.6]
    assert list(said(rows(val_loss=again, train_loss=[1.0 - 0.05 * e for e in range(16)]))) == [8, 16]


def test_each_fall_of_a_plateau_is_said_and_many_get_advice():
    lr = [1e-3, 1e-3, 1e-3, 5e-4, 5e-4, 5e-4, 2.5e-4, 2.5e-4, 2.5e-4, 1.25e-4]
    plateau = ("sched.name=plateau", "sched.patience=2")
    lines = said(rows(lr_max=lr), *plateau)
    assert list(lines) == [4, 7, 10] and lines[4] == ["learning rate lowered from 0.001 to 0.0005"]
    assert "fell 3 times in 6 epochs" in lines[10][1] and "raise sched.patience (2)" in lines[10][1]
    slow = [value for value in (1e-3, 5e-4, 2.5e-4, 1.2e-4) for _ in range(6)]
    assert all(len(texts) == 1 for texts in said(rows(lr_max=slow), *plateau).values())
    assert said(rows(lr_max=lr)) == {}  # a cosine falls at each epoch


def test_an_f1_that_stands_still_is_said_once_until_it_rises():
    f1 = [0.5, 0.8, *[0.8] * 12, 0.9, *[0.9] * 5]
    lines = said(rows(f1_ema=f1))
    assert list(lines) == [12] and "since epoch 2 (0.8000)" in lines[12][0]
    assert said(rows(f1_ema=[1.0] * 15)) == {}
    assert said(rows(macro_f1_ema=f1)) == {}
    assert list(said(rows(macro_f1_ema=f1), "select.metric=f1")) == [12]


def test_a_new_size_begins_anew_and_a_resume_remembers():
    course = rows(val_loss=[0.6, *[0.61] * 3, *[0.8] * 4], train_loss=[1.0 - 0.05 * e for e in range(8)])
    larger = [{**row, "size": [64, 64]} if row["epoch"] > 4 else row for row in course]
    assert list(said(course)) == [6] and said(larger) == {}
    first = Trends(load(None, []))
    for row in course[:4]:
        first.update(row)
    second = Trends(load(None, []))
    second.load_state_dict(first.state_dict())
    assert [bool(second.update(row)) for row in course[4:]] == [False, True, False, False]


def test_a_gradient_that_explodes_is_said_once_until_it_is_usual_again():
    norms = [2.0, 1.0, 1.0, 1.0, 8.0, 11.0, 12.0, 1.0, 1.0, 30.0, math.nan]
    lines = said(rows(grad_norm=norms), "train.clip_grad=null")
    assert list(lines) == [6, 10] and "gradient norm 11, 11 times that of the epochs before" in lines[6][0]
    assert "lower opt.lr, or set train.clip_grad=1.0" in lines[6][0]
    assert said(rows(grad_norm=norms))[6][0].endswith("lower opt.lr")  # it clips already
    converged = [2.0, 1e-3, 1e-3, 1e-3, 0.1]
    assert said(rows(grad_norm=converged)) == {}  # far below that of the first epoch


def test_a_gradient_that_vanishes_while_nothing_is_learned_is_said():
    norms = [1.0, 1e-8, 1e-8]
    lines = said(rows(grad_norm=norms, train_loss=[0.7, 0.69, 0.69]))
    assert list(lines) == [2] and "gradients vanish" in lines[2][0]
    assert said(rows(grad_norm=norms, train_loss=[0.7, 1e-3, 1e-4])) == {}  # it has learned all
