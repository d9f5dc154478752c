"""Handwritten digits: folds from a table of pixels, two networks, local CV, learned weights, Kaggle's table."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from systems.conftest import HandIn

from fastflower import convert, ensemble, evaluate, sample_data, train
from fastflower.campaign import __main__ as campaign
from fastflower.campaign import launch
from fastflower.core import runs

SMALL = ["data.n_splits=2", "sched.cosine_epochs=1", "sched.warmup_epochs=0", "log.tensorboard=false"]


@pytest.mark.slow
def test_digits_become_local_cv_learned_weights_and_kaggles_table(
    repo: Path, hand_in: HandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sample_data.main(["digits"])
    table = Path("data/digits/train.csv")
    table.write_text("\n".join(table.read_text().splitlines()[:201]) + "\n")
    Path("recipes").mkdir()
    shutil.copy(repo / "recipes/digits.yaml", "recipes")
    words = ["recipes/digits.yaml", *SMALL, "tta.rotations=[8]"]
    convert.main(words)
    monkeypatch.setattr(launch, "run_process", lambda command, *_: (train.main(command[3:]), ""))
    assert campaign.main([*words, "model.backbone=[test_efficientnet,test_convnext]"]) == 0
    grid = ["data.fold=0", "exp.name=grid", "opt.lr=[1e-3,1e-2]", "train.batch_per_gpu=[20,50]"]
    assert campaign.main([*words, *grid]) == 0
    assert "best opt.lr by train.batch_per_gpu: 20: 0.0" in capsys.readouterr().out
    words.append("ensembling.average=probabilities")
    assert evaluate.main(words) == 0
    scores = json.loads((runs.RESULTS / "digits/scores.json").read_text(encoding="utf-8"))
    assert [row["n"] for row in scores["runs"]] == [200, 200] and scores["missing"] == []
    monkeypatch.setitem(sys.modules, "lightgbm", None)  # test_pairs.py uses it
    ensemble.main(words)
    compared = json.loads((runs.RESULTS / "digits/ensemble.json").read_text(encoding="utf-8"))
    names = [row["method"] for row in compared["rows"]]
    assert {"mean of probabilities", "learned mixture"} <= set(names) and compared["n"] == 200
    assert sum(compared["weights"]["learned mixture"].values()) == pytest.approx(1)
    sample = "data/digits/sample_submission.csv"
    rows = hand_in(words, "data/digits/test", "--sample", sample)
    assert list(rows[0]) == ["ImageId", "Label"]
    assert [row["ImageId"] for row in rows] == [str(number) for number in range(1, len(rows) + 1)]
    assert {row["Label"] for row in rows} <= set("0123456789")
    bundle = json.loads((runs.BUNDLE / "bundle.json").read_text(encoding="utf-8"))
    assert (
        bundle["space"] == "probabilities" and [len(m["views"]) for m in bundle["members"]] == [2] * 4
    )  # plain and turned
