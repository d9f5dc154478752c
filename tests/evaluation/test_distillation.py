"""Distillation: the loss against its formula, the targets of training images, a student that follows its teacher."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from composer.core import Event, Timestamp
from scipy.special import log_softmax, rel_entr, softmax

from fastflower.algorithms.mixing import MixUpCutMix
from fastflower.core import runs
from fastflower.core.errors import InputError
from fastflower.core.records import write_record
from fastflower.data.betons import fold_set
from fastflower.data.loaders import eval_images
from fastflower.evaluation import distillation, summary
from fastflower.evaluation.logits import Logits, MemberInfo, load_logits, save_logits
from fastflower.evaluation.teacher_start import check_start
from fastflower.model.losses import build_loss
from fastflower.model.member import save_member
from fastflower.model.network import NetworkSpec, build_network
from fastflower.recipe import load, schema
from fastflower.recipe.arguments import recorded_recipe
from fastflower.recipe.run_record import write_recipe
from support import toy_project
from support.member_metas import member_meta

WORDS = "distill.teacher=[elders] loss.name=ce"


def student(changes: str = "") -> schema.Recipe:
    return load("tiny.yaml", toy_project.recipes_words(f"{WORDS} {changes}"))


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
    loss = build_loss(load(None, f"{WORDS} {words}".split()), [5, 5, 5, 5])
    target = np.concatenate([labels, softmax(elder / t, axis=1)], axis=1)
    got = float(loss(torch.tensor(z), torch.tensor(target)))
    hard = -(labels * log_softmax(z, axis=1)).sum(1).mean()
    soft = rel_entr(softmax(elder / t, axis=1), softmax(z / t, axis=1)).sum(1).mean()
    assert got == pytest.approx((1 - weight) * hard + weight * scale * soft, rel=1e-5)


def test_t_squared_keeps_the_size_of_gradients():
    z, elder, labels = batch()
    sizes = []
    for t in (5.0, 50.0):
        loss = build_loss(
            load(None, [*WORDS.split(), "distill.weight=1", f"distill.temperature={t}"]), [1] * 4
        )
        leaf = torch.tensor(z, requires_grad=True)
        loss(leaf, torch.tensor(np.concatenate([labels, softmax(elder / t, axis=1)], axis=1))).backward()
        sizes.append(float(leaf.grad.norm()))
    assert 0.8 < sizes[0] / sizes[1] < 1.25


def write_teacher(certain: float = 6.0, folds: tuple[int, ...] = (0, 1, 2), turn: int = 0) -> None:
    """Write the evaluation of members whose out-of-fold logits are `certain` for the class label + turn."""
    members, folder = [], runs.RESULTS / "elders"
    recipe = load("tiny.yaml", [])
    opened = fold_set.open_fold(recipe, 0)
    for fold in folds:
        index = opened.folds.val_rows(fold)
        labels = opened.folds.class_idx[index]
        logits = (certain * np.eye(4)[(labels + turn) % 4]).astype(np.float32)
        info = MemberInfo(
            name=f"m{fold}", checkpoint=f"m{fold}.pth", seal=None, backbone="vit", fold=fold, seed=1, epoch=1,
            weights="raw", head="linear", stored=None, size=(16, 16), views=[(16, 16, False)],
            class_ids=list(opened.classes.ids), class_hash=opened.classes.hash, folds_hash=opened.folds.hash,
            mb=1.0, ms=1.0,
        )  # fmt: skip
        member = Logits(
            logits=logits, single=logits, corrupt=np.empty((0, len(index), 4), np.float32), class_idx=labels,
            index=index, fold=np.full(len(index), fold), filename=np.array(opened.folds.filenames)[index],
            combos=np.empty((0, 2), str), info=info,
        )  # fmt: skip
        save_logits(folder / "oof", member)
        members.append(member)
    classes = [{"class_idx": str(c), "n": "5"} for c in range(4)]
    scores = summary.summarise(members, opened.folds.fold, classes=classes, recipe=recipe)
    write_record(folder / "scores.json", scores)


def test_each_image_is_taught_its_out_of_fold_probabilities(tmp_path):
    toy_project.project(tmp_path)
    write_teacher(turn=1)
    opened = fold_set.open_fold(student(), 1)
    targets = distillation.probabilities(student(), opened, 4)
    want = softmax(6.0 / 3.0 * np.eye(4)[(opened.train.labels + 1) % 4], axis=1)
    np.testing.assert_allclose(targets.numpy(), want, atol=1e-6)
    assert distillation.probabilities(load("tiny.yaml", []), opened, 4) is None
    with pytest.raises(InputError, match=r"elders knows 4 classes, the student 9; set data.num_classes=auto"):
        distillation.probabilities(student(), opened, 9)


def test_teachers_that_do_not_fit_are_refused(tmp_path):
    toy_project.project(tmp_path)
    opened = fold_set.open_fold(student(), 1)
    with pytest.raises(InputError, match=r"no results/results/elders/scores.json; run python -m"):
        distillation.probabilities(student(), opened, 4)
    write_teacher(folds=(1, 2))
    with pytest.raises(InputError, match=r"\d+ of \d+ training images have no out-of-fold logits; train and"):
        distillation.probabilities(student(), opened, 4)
    write_teacher()
    change_folds_hash("0ther")
    with pytest.raises(
        InputError, match=r"elders was evaluated with other folds \(0ther\) than the betons hold"
    ):
        distillation.probabilities(student(), opened, 4)


def change_folds_hash(folds_hash: str) -> None:
    """Change the folds hash in the teacher's saved logits."""
    for path in Path("results/results/elders/oof").glob("*.npz"):
        member = load_logits(path)
        info = dataclasses.replace(member.info, folds_hash=folds_hash)
        save_logits(path.parent, dataclasses.replace(member, info=info))


def test_with_validation_images_of_their_own_the_teachers_predict_the_training_images(tmp_path):
    """A fold file with separate validation images: all others train in every fold."""
    toy_project.project(tmp_path)
    write_teacher(folds=(1,))
    opened = fold_set.open_fold(student(), 1)
    fold = np.where(opened.folds.fold == 1, 1, -1)
    opened = dataclasses.replace(opened, folds=dataclasses.replace(opened.folds, fold=fold))
    change_folds_hash(opened.folds.hash)
    (member,) = summary.load_member_logits(runs.RESULTS / "elders")
    spec = NetworkSpec.from_recipe(student(), 4)
    network = build_network(spec).eval()
    torch.nn.init.normal_(network.head.weight)
    save_member(
        runs.MODELS / "elders" / member.info.checkpoint, dict(network.state_dict()), member_meta(spec)
    )
    got = distillation.probabilities(student("distill.temperature=5"), opened, 4)
    rows = np.arange(opened.train.rows)
    images = eval_images(opened.train, rows, size=spec.size, factor=1.14, interpolation=spec.interpolation)
    with torch.no_grad():
        logits = network(images.permute(0, 3, 1, 2).float()).numpy()
    np.testing.assert_allclose(got.numpy(), softmax(logits / 5, axis=1), atol=1e-4)
    assert got.shape == (opened.train.rows, 4) and np.ptp(got.numpy(), axis=0).max() > 0.05


def test_teacher_is_mixed_as_the_labels_are(tmp_path):
    toy_project.project(tmp_path)
    recipe = student("reg.mix_prob=1 reg.mix_switch_prob=0 reg.mixup=1")
    rows = torch.arange(6)
    teacher = torch.eye(4)[rows % 4]  # its class is row mod 4, which is also the label
    state = type("State", (), {"timestamp": Timestamp(epoch=0, batch_in_epoch=0)})()
    state.batch = {"image": torch.rand(6, 3, 8, 8), "label": rows % 4, "key": rows * 7919, "row": rows}
    MixUpCutMix(recipe, 4, teacher).apply(Event.BATCH_START, state, None)
    labels, taught = state.batch["target"].chunk(2, dim=1)
    assert torch.equal(labels, taught) and (labels > 0).sum() > 6


@pytest.mark.slow
def test_a_student_follows_a_teacher_that_contradicts_the_labels(tmp_path):
    """Taught the class after its labels', it scores near 0; taught its labels' class, it learns."""
    toy_project.project(tmp_path)
    hits = []
    for turn in (0, 1):
        write_teacher(turn=turn)
        words = f"exp.name=student{turn} distill.weight=1 reg.mix_prob=0 opt.lr=3e-3 sched.cosine_epochs=6"
        assert toy_project.fit(*toy_project.recipes_words(f"{WORDS} {words} data.size_epochs=[1,6]")) == 0
        hits.append(toy_project.epochs(f"student{turn}")[-1]["clean_raw"])
    assert hits[0] > 0.5 and hits[1] < 0.2


@pytest.mark.parametrize(
    ("words", "start"),
    [
        ("model.pretrained=true", "it trained from pretrained weights"),
        ("model.init=others", "it trained from others"),
        ("distill.teacher=[others]", "it was taught by others"),
    ],
)
def test_a_student_from_scratch_has_no_teacher_that_was_not(words: str, start: str) -> None:
    settings = ["exp.name=elders", "model.pretrained=false"]
    path = recorded_recipe("elders")
    path.parent.mkdir(parents=True)
    fair = load(None, ["checks.from_scratch=true", "model.pretrained=false"])
    write_recipe(path, load(None, settings))
    check_start(fair, "distill.teacher", "elders")
    write_recipe(path, load(None, [*settings, words]))
    with pytest.raises(InputError, match=f"distill.teacher = elders: {start}, and this recipe"):
        check_start(fair, "distill.teacher", "elders")
    check_start(load(None), "distill.teacher", "elders")
