"""Distillation: the loss against its formula, the teacher's rows, and a student that follows its teacher."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from composer.core import Event, Timestamp
from scipy.special import log_softmax, rel_entr, softmax

from fastflower.algorithms.mixing import Mix
from fastflower.core import files, runs
from fastflower.core.errors import InputError
from fastflower.data.betons import fold_set
from fastflower.evaluation import distillation
from fastflower.evaluation.logits import Logits, load_logits, member_file, save_logits
from fastflower.model.losses import build_loss
from fastflower.recipe import load, schema
from support import toy_project

WORDS = "distill.teacher=[elders] loss.name=ce"


def student(more: str = "") -> schema.Recipe:
    return load("tiny.yaml", toy_project.recipes_words(f"{WORDS} {more}"))


def batch(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits of a student and a teacher (6, 4), and one-hot labels."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(6, 4)), rng.normal(size=(6, 4)) * 3, np.eye(4)[rng.integers(0, 4, 6)]


@pytest.mark.parametrize(("words", "weight", "t", "scale"), [
    ("", 0.7, 3.0, 9.0),
    ("distill.t_squared=false", 0.7, 3.0, 1.0),
    ("distill.weight=0.25 distill.temperature=2", 0.25, 2.0, 4.0),
])  # fmt: skip
def test_loss_is_the_formula(words, weight, t, scale):
    z, elder, labels = batch()
    made = build_loss(load(None, f"{WORDS} {words}".split()), [5, 5, 5, 5])
    target = np.concatenate([labels, softmax(elder / t, axis=1)], axis=1)
    got = float(made(torch.tensor(z), torch.tensor(target)))
    hard = -(labels * log_softmax(z, axis=1)).sum(1).mean()
    soft = rel_entr(softmax(elder / t, axis=1), softmax(z / t, axis=1)).sum(1).mean()
    assert got == pytest.approx((1 - weight) * hard + weight * scale * soft, rel=1e-5)


def test_t_squared_keeps_the_size_of_gradients():
    z, elder, labels = batch()
    sizes = []
    for t in (5.0, 50.0):
        made = build_loss(
            load(None, [*WORDS.split(), "distill.weight=1", f"distill.temperature={t}"]), [1] * 4
        )
        own = torch.tensor(z, requires_grad=True)
        made(own, torch.tensor(np.concatenate([labels, softmax(elder / t, axis=1)], axis=1))).backward()
        sizes.append(float(own.grad.norm()))
    assert 0.8 < sizes[0] / sizes[1] < 1.25


def elders(certain: float = 6.0, folds: tuple[int, ...] = (0, 1, 2), turn: int = 0) -> None:
    """Members that say label + turn of every image they were not trained on."""
    rows, folder = [], runs.RESULTS / "elders"
    opened = fold_set.open_fold(load("tiny.yaml", []), 0)
    for fold in folds:
        index = opened.folds.val_rows(fold)
        labels = opened.folds.class_idx[index]
        logits = (certain * np.eye(4)[(labels + turn) % 4]).astype(np.float32)
        about = {
            "name": f"m{fold}", "checkpoint": f"m{fold}.pth", "backbone": "vit", "fold": fold, "seed": 1,
            "class_hash": opened.classes.hash, "folds_hash": opened.folds.hash,
        }  # fmt: skip
        member = Logits(
            logits, logits, np.empty((0, len(index), 4), np.float32), labels, index, np.full(len(index), fold),
            np.array(opened.folds.filenames)[index], np.empty((0, 2), str), about,
        )  # fmt: skip
        save_logits(member_file(folder / "oof", about), member)
        rows.append(about)
    files.write_json(folder / "scores.json", {"members": rows})


def test_each_row_is_taught_by_what_was_said_of_it(tmp_path):
    toy_project.project(tmp_path)
    elders(turn=1)
    opened = fold_set.open_fold(student(), 1)
    found = distillation.probabilities(student(), opened, 4)
    want = softmax(6.0 / 3.0 * np.eye(4)[(opened.train.labels + 1) % 4], axis=1)
    np.testing.assert_allclose(found.numpy(), want, atol=1e-6)
    assert distillation.probabilities(load("tiny.yaml", []), opened, 4) is None
    with pytest.raises(InputError, match=r"elders knows 4 classes, the student 9; set data.num_classes=auto"):
        distillation.probabilities(student(), opened, 9)


def test_teachers_that_do_not_fit_are_refused(tmp_path):
    toy_project.project(tmp_path)
    opened = fold_set.open_fold(student(), 1)
    with pytest.raises(InputError, match=r"no results/results/elders/scores.json; run python -m"):
        distillation.probabilities(student(), opened, 4)
    elders(folds=(1, 2))
    with pytest.raises(InputError, match=r"\d+ of \d+ training images have no out-of-fold logits; train and"):
        distillation.probabilities(student(), opened, 4)
    elders()
    claim_folds("0ther")
    with pytest.raises(
        InputError, match=r"elders was evaluated with other folds \(0ther\) than the betons hold"
    ):
        distillation.probabilities(student(), opened, 4)


def claim_folds(folds_hash: str) -> None:
    """Let the elders have been evaluated with folds of this hash."""
    for path in Path("results/results/elders/oof").glob("*.npz"):
        member = load_logits(path)
        member.about["folds_hash"] = folds_hash
        save_logits(path, member)


def test_teachers_that_were_asked_about_no_training_image_are_refused(tmp_path):
    """As where validation images are given apart: all others train always."""
    toy_project.project(tmp_path)
    elders(folds=(1,))
    opened = fold_set.open_fold(student(), 1)
    fold = np.where(opened.folds.fold == 1, 1, -1)
    opened = dataclasses.replace(opened, folds=dataclasses.replace(opened.folds, fold=fold))
    claim_folds(opened.folds.hash)
    with pytest.raises(
        InputError, match=r"all \d+ training images train in every fold, so that no member was"
    ):
        distillation.probabilities(student(), opened, 4)


def test_teacher_is_mixed_as_the_labels_are(tmp_path):
    toy_project.project(tmp_path)
    made = student("reg.mix_prob=1 reg.mix_switch_prob=0 reg.mixup=1")
    rows = torch.arange(6)
    table = torch.eye(4)[rows % 4]  # a teacher that says row mod 4, which is also the label
    state = type("State", (), {"timestamp": Timestamp(epoch=0, batch_in_epoch=0)})()
    state.batch = {"image": torch.rand(6, 3, 8, 8), "label": rows % 4, "key": rows * 7919, "row": rows}
    Mix(made, 4, table).apply(Event.BATCH_START, state, None)
    labels, taught = state.batch["target"].chunk(2, dim=1)
    assert torch.equal(labels, taught) and (labels > 0).sum() > 6


def test_a_student_follows_a_teacher_that_says_something_else_than_the_labels(tmp_path):
    """Taught one class further than its labels, it scores nothing; taught what they say, it learns."""
    toy_project.project(tmp_path)
    hits = []
    for turn in (0, 1):
        elders(turn=turn)
        words = f"exp.name=student{turn} distill.weight=1 reg.mix_prob=0 opt.lr=3e-3 sched.cosine_epochs=6"
        assert toy_project.fit(*toy_project.recipes_words(f"{WORDS} {words} data.size_epochs=[1,6]")) == 0
        hits.append(toy_project.epochs(f"student{turn}")[-1]["clean_raw"])
    assert hits[0] > 0.5 and hits[1] < 0.2
