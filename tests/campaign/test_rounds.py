"""Rounds of students: the plan, the labels that reach each fold, the loss on them, and whole campaigns."""

from __future__ import annotations

import csv
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from composer.core import Event, Timestamp
from torch.nn import functional as F

from fastflower import evaluate, train
from fastflower.algorithms.soft_labels import SoftLabels
from fastflower.campaign import launch, plan, rounds
from fastflower.campaign.__main__ import main
from fastflower.core import runs
from fastflower.core.errors import InputError
from fastflower.data.betons import fold_set
from fastflower.evaluation import inference, soft_labels, summary
from fastflower.model.member import save_member
from fastflower.model.network import NetworkSpec, build_network
from fastflower.recipe import checks, load
from support import forked, toy_project
from support.member_metas import member_meta

SHORT = [*toy_project.ONE, "robust.enabled=false", "data.labels_per_class=4", "semi.mu=2", "semi.floor=0.26"]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return toy_project.project(tmp_path)


def planned(*words: str) -> list[rounds.Round]:
    return rounds.plan_rounds(["tiny.yaml"], plan.parse_overrides([*SHORT, *words]))


def test_each_round_learns_from_the_one_before(project) -> None:
    first, second, third = planned("semi.rounds=2", "data.fold=[0,1]", "seed=[1,2]")
    assert [each.exp for each in (first, second, third)] == ["tiny", "tiny-round1", "tiny-round2"]
    assert [(task.run.seed, task.run.fold) for task in second.tasks] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert not first.recipe.semi.enabled and first.recipe.semi.rounds == 0
    assert (second.recipe.semi.soft_teacher, third.recipe.semi.soft_teacher) == ("tiny", "tiny-round1")
    assert third.recipe.semi.method == "soft" and third.recipe.semi.enabled
    for task in third.tasks:
        assert task.recipe.semi == third.recipe.semi and "semi.soft_teacher=tiny-round1" in task.arguments


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trials", "2"], r"got --trials with semi.rounds; a search trains no rounds"),
        (["opt.lr=[1e-3,2e-3]"], r"with lists of seed and model.backbone alone; got opt.lr"),
        (["data.labels_per_class=null"], r"semi.rounds = 1 learns from data.unlabelled or .* got neither"),
        (["data.labels_per_class=null", "data.unlabelled=a/b", "data.test=a"], r"one inside the other"),
    ],
)
def test_rounds_that_cannot_be_are_refused_before_anything_starts(project, words, message) -> None:
    with pytest.raises(InputError, match=message):
        main(["tiny.yaml", *SHORT, "semi.rounds=1", *words])
    assert not runs.MODELS.exists()


def test_only_a_campaign_trains_rounds(project) -> None:
    with pytest.raises(InputError, match=r"semi.rounds = 1: rounds of students are trained by .*campaign"):
        train.check(["tiny.yaml", *SHORT, "semi.rounds=1"])
    with pytest.raises(InputError, match=r"semi.method=soft needs semi.soft_teacher"):
        checks.check(load("tiny.yaml", [*SHORT, "semi.enabled=true", "semi.method=soft"]))


def save_random(fold: int) -> None:
    """Save a member of a fold with random weights."""
    recipe = load("tiny.yaml", SHORT)
    opened = fold_set.open_fold(recipe, fold)
    spec = NetworkSpec.from_recipe(recipe, 4)
    torch.manual_seed(fold)
    fields = {
        "fold": fold, "class_ids": tuple(opened.classes.ids), "class_hash": opened.classes.hash,
        "class_counts": (1, 1, 1, 1), "folds_hash": opened.folds.hash, "resize_factor": 1.14,
    }  # fmt: skip
    path = toy_project.run_of(fold=fold).checkpoint_path("best_combo", 1, 0.5)
    save_member(path, dict(build_network(spec).state_dict()), member_meta(spec, **fields))


def test_a_fold_is_labelled_by_the_members_that_validated_it(project) -> None:
    for fold in (0, 1):
        save_random(fold)
    student = load(
        "tiny.yaml",
        [
            *SHORT,
            "semi.enabled=true",
            "semi.method=soft",
            "semi.soft_teacher=tiny",
            "semi.power=2",
            "tta.hflip=false",
        ],
    )
    targets = {}
    for fold in (0, 1):
        opened = fold_set.open_fold(student, fold)
        labels = soft_labels.soft_labels(student, opened, 4)
        targets[fold] = labels.targets
        (path,) = [path for path in runs.MODELS.glob("tiny/best_combo__*") if f"fold{fold}" in path.name]
        member = soft_labels.load_member(path)
        network = inference.load_network(member, path, torch.device("cpu"))
        beton, rows = soft_labels.unlabelled_rows(student, opened)
        loader = soft_labels.EvalLoader(
            beton, 5, size=lambda member=member: member.meta.size, factor=member.meta.resize_factor,
            interpolation=member.meta.interpolation, threads=1,
        )  # fmt: skip
        (logits,) = inference.logits_of(
            [network], loader, rows=beton.rows, flips=(False,), device=torch.device("cpu")
        )
        p = torch.softmax(torch.from_numpy(logits).double(), 1)
        sharp = p**2 / (p**2).sum(1, keepdim=True)
        learned = np.isin(np.arange(beton.rows), rows) & (p.max(1).values.numpy() >= 0.26)
        torch.testing.assert_close(
            labels.targets, (sharp * torch.from_numpy(learned)[:, None]).float(), atol=1e-5, rtol=0
        )
        assert (
            f"by 1 members of tiny that validated fold {fold}: {learned.sum()} of {len(rows)} images"
            in labels.line
        )
    with pytest.raises(InputError, match=r"semi.soft_teacher = tiny: no member of fold 2 in"):
        soft_labels.soft_labels(student, fold_set.open_fold(student, 2), 4)


def test_the_loss_is_the_cross_entropy_to_the_soft_labels(project) -> None:
    """Divided by all images, those without a label too; the labelled images' outputs are left alone."""
    recipe = load("tiny.yaml", [*SHORT, "semi.enabled=true", "semi.method=soft", "semi.soft_teacher=t"])
    targets = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0, 0, 0, 0], [0.1, 0.1, 0.2, 0.6]])
    algorithm = SoftLabels(recipe, [4, 4, 4, 4], fill=(0.0, 0.0, 0.0), targets=targets)
    logits = torch.randn(2 + 4, 4, generator=torch.Generator().manual_seed(0))

    state = types.SimpleNamespace(
        batch={
            "image": torch.zeros(2, 3, 8, 8), "label": torch.tensor([0, 1]), "truth": torch.tensor([[0, 1], [2, -1]]),
            "strong": torch.zeros(2, 2, 3, 8, 8), "unlabelled_row": torch.tensor([[0, 1], [2, 0]]),
        },
        outputs=logits, loss=torch.tensor(1.0), timestamp=Timestamp(), dataloader_len=4,
    )  # fmt: skip
    algorithm.apply(Event.BEFORE_FORWARD, state, None)
    assert state.batch["image"].shape == (6, 3, 8, 8)
    algorithm.apply(Event.AFTER_FORWARD, state, None)
    torch.testing.assert_close(state.outputs, logits[:2])
    algorithm.apply(Event.AFTER_LOSS, state, None)
    rows = [0, 1, 2, 0]
    wanted = sum(-(targets[row] * F.log_softmax(logits[2 + i], 0)).sum() for i, row in enumerate(rows)) / 4
    torch.testing.assert_close(state.loss, 1 + wanted)
    algorithm.apply(Event.BATCH_END, state, None)
    row = algorithm.row()
    assert row["mask_rate"] == 0.75 and row["pseudo_counts"] == [2, 0, 0, 1]
    assert row["pseudo_accuracy"] == 0.5  # of two labels with a known truth, that of row 0 is right


def run_here(command: list[str], environment: dict[str, str], log: Path | None) -> tuple[int, str]:
    """The command in this process, which saves the start of another."""
    module = {"fastflower.train": train.main, "fastflower.evaluate": evaluate.main}[command[2]]
    return module(command[3:]), ""


@pytest.mark.slow
def test_a_campaign_trains_rounds_keeps_them_and_shows_their_gain(
    project, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "run_process", run_here)
    words = ["tiny.yaml", *SHORT, "semi.rounds=1", "data.fold=[0,1]", "--no-ray", "-n", "1"]
    assert main(words) == 0
    out = capfd.readouterr().out
    assert "round 1 of 1: tiny-round1" in out and "by 1 members of tiny that validated fold 1" in out
    with open(runs.RESULTS / "tiny" / rounds.FILE, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["round"] for row in rows] == ["tiny", "tiny-round1"]
    column = rounds.read_folds(Path("data/folds.csv")).fold
    top1 = []
    for row in rows:
        members = summary.load_member_logits(runs.RESULTS / row["round"])
        hits = np.concatenate([member.logits.argmax(1) == member.class_idx for member in members])
        assert int(row["n"]) == len(hits) == (np.isin(column, [0, 1])).sum()
        top1.append(hits.mean())
        assert row["top-1"] == f"{hits.mean():.4f}"
    assert rows[1]["gain over round 0"].startswith(f"{top1[1] - top1[0]:+.4f} (")

    def refused(*_: object) -> tuple[int, str]:
        raise AssertionError("nothing is left to do")

    monkeypatch.setattr(launch, "run_process", refused)
    assert main(words) == 0
    assert capfd.readouterr().out.count("kept: ") == 4


@pytest.mark.slow
@pytest.mark.dist
def test_a_student_learns_on_two_ranks(project) -> None:
    save_random(0)
    words = [*SHORT, "semi.rounds=1", "data.fold=0", "train.batch_per_gpu=4", "train.world_size=2"]
    teacher, student = rounds.plan_rounds(["tiny.yaml"], plan.parse_overrides(words))
    assert teacher.exp == "tiny"
    two = forked.training(*student.arguments[1:])
    assert two.wait() == [0, 0], two.text()
    assert "soft labels by 1 members of tiny that validated fold 0" in two.text()
    events = runs.read_events(runs.RESULTS / "tiny-round1" / "events.jsonl", [])
    epochs = [event for event in events if event.get("event") == "epoch"]
    assert epochs and 0 <= epochs[-1]["mask_rate"] <= 1 and epochs[-1]["unlabelled_loss"] > 0
