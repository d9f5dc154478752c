"""Trainings that another metric than S chooses, end to end: checkpoints, evaluation, acceptance, one and two ranks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score, f1_score, roc_auc_score

from fastflower import evaluate
from fastflower.core import runs
from fastflower.core.records import read_record
from fastflower.core.scores import softmax
from fastflower.evaluation import summary
from fastflower.evaluation.records import ExperimentScores
from support import forked, toy_project

SUM = "select.metric=0.5*auc + 0.5*macro_f1"


@pytest.fixture
def _project(tmp_path: Path) -> None:
    toy_project.project(tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("_project")
def test_a_weighted_sum_chooses_the_epoch_the_members_and_the_acceptance(
    capsys: pytest.CaptureFixture,
) -> None:
    assert toy_project.fit(SUM, "data.fold=[0,1]") == 0
    assert "best by    0.5*auc + 0.5*macro_f1, patience 10" in capsys.readouterr().out
    end = toy_project.end()
    name = runs.parse_member(Path(end["files"]["best_weighted"]))
    rows = [row for row in toy_project.epochs() if row["fold"] == 0 and row["size"] == [48, 48]]
    assert name is not None and name.kind == "best_weighted" and "best_f1" not in end["files"]
    assert end["best"]["score"] == max(row["score"] for row in rows)
    chosen = next(row for row in rows if row["epoch"] == end["best"]["epoch"])
    weights = end["best"]["weights"]
    assert end["best"]["score"] == pytest.approx(
        0.5 * chosen[f"auc_{weights}"] + 0.5 * chosen[f"macro_f1_{weights}"]
    )
    assert evaluate.main(["tiny", "accept.score=2", "tta.hflip=false"]) == 1
    out = capsys.readouterr().out
    assert "REFUSED   0.5*auc + 0.5*macro_f1: 0." in out and "at least 2" in out
    scores = read_record(runs.RESULTS / "tiny" / "scores.json", ExperimentScores)
    assert {runs.parse_member(Path(member.checkpoint)).kind for member in scores.members} == {"best_weighted"}
    members = summary.load_member_logits(runs.RESULTS / "tiny")
    logits, labels = (np.concatenate([getattr(m, key) for m in members]) for key in ("logits", "class_idx"))
    wanted = 0.5 * roc_auc_score(labels, softmax(logits), multi_class="ovr")
    wanted += 0.5 * f1_score(labels, logits.argmax(1), average="macro")
    assert scores.fused.selected is not None
    assert scores.fused.selected.value == pytest.approx(wanted)
    single = next(member for member in members if member.info.fold == 0)
    measured = 0.5 * roc_auc_score(single.class_idx, softmax(single.single), multi_class="ovr")
    measured += 0.5 * f1_score(single.class_idx, single.single.argmax(1), average="macro")
    assert measured == pytest.approx(end["best"]["score"], abs=1e-4)  # what training saw


@pytest.mark.slow
@pytest.mark.usefixtures("_project")
def test_the_lowest_log_loss_is_the_best() -> None:
    assert toy_project.fit("select.metric=log_loss") == 0
    end = toy_project.end()
    rows = [row for row in toy_project.epochs() if row["size"] == [48, 48]]
    losses = [min(row[f"log_loss_{name}"] for name in ("raw", "ema")) for row in rows]
    assert end["best"]["score"] == pytest.approx(-min(losses))
    assert f"_score-{min(losses):.4f}.pth" in end["files"]["best_log_loss"]
    assert Path("results/model/tiny/best_log_loss.pth").samefile(end["files"]["best_log_loss"])


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.usefixtures("_project")
def test_two_ranks_measure_what_one_does() -> None:
    Path("my_metrics.py").write_text(
        "def first(probabilities, labels): return float(probabilities[0, labels[0]])\n"
    )
    words = ["select.metric=my_metrics:first + 0.1*kappa", *toy_project.ONE, "train.world_size=2"]
    two = forked.training(*words, "exp.name=two")
    assert two.wait() == [0, 0], two.text()
    member = toy_project.end(toy_project.run_of("two"))
    (end,) = [
        row for row in runs.read_events(toy_project.run_of("two").events_path, []) if row["event"] == "end"
    ]
    assert json.dumps(end["best"]) == json.dumps(member["best"])
    assert evaluate.main(["two", "tta.hflip=false"]) == 0
    single = summary.load_member_logits(runs.RESULTS / "two")[0]
    order = np.argsort(single.index)
    first = softmax(single.single[order])[0, single.class_idx[order][0]]
    kappa = cohen_kappa_score(single.class_idx, single.single.argmax(1), weights="quadratic")
    assert member["best"]["score"] == pytest.approx(first + 0.1 * kappa, abs=1e-4)
