"""A finished or interrupted run that is asked to train longer goes on from its last checkpoint, and says how."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastflower.core.errors import InputError
from fastflower.optim.schedules import lr_factor
from fastflower.recipe import load
from support import toy_project

LONGER = ("sched.cosine_epochs=5", "data.size_epochs=[1,5]")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = toy_project.project(tmp_path_factory.mktemp("finished"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        assert toy_project.fit() == 0
    return home


@pytest.mark.slow
def test_a_finished_run_goes_on_to_more_epochs(finished, monkeypatch, capsys):
    monkeypatch.chdir(finished)
    first = toy_project.epochs()
    with pytest.raises(
        InputError, match=r"or choose another exp.name; train.extend=true goes on to 5 epochs"
    ):
        toy_project.fit(*LONGER)
    with pytest.raises(InputError, match=r"to extend this run set data.size_epochs=\[1,6\]"):
        toy_project.fit("sched.cosine_epochs=6", "data.size_epochs=[2,6]", "train.extend=true")
    with pytest.raises(InputError, match=r"opt.lr: 0.001 -> 0.002"):
        toy_project.fit(*LONGER, "opt.lr=2e-3", "train.extend=true")
    capsys.readouterr()
    assert toy_project.fit(*LONGER, "train.extend=true") == 0
    assert "extended from 3 to 5 epochs: epoch 4 goes on at 0.50 of the peak" in capsys.readouterr().out
    rows = toy_project.epochs()
    assert rows[:3] == first and [row["epoch"] for row in rows] == [1, 2, 3, 4, 5]
    recipe = load("tiny.yaml", list(LONGER))
    expected = [1e-3 * lr_factor(epoch, 3, steps_per_epoch=4, recipe=recipe) for epoch in (3, 4)]
    assert [row["lr_max"] / 1.5 for row in rows[3:]] == pytest.approx(expected, rel=1e-6)
    assert toy_project.end()["epochs"] == 5
    assert toy_project.fit(*LONGER) == 0  # it is the run of five epochs now
    assert "is finished" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_that_stopped_early_gets_new_patience(tmp_path, monkeypatch):
    monkeypatch.chdir(toy_project.project(tmp_path))
    words = ("opt.lr=1e-9", "es.patience=1", "data.size_epochs=auto", "data.img_size=32", "tta.scales=[32]")
    assert toy_project.fit(*words) == 0
    stopped = toy_project.end()
    assert stopped["stopped_early"]
    assert toy_project.fit(*words, "sched.cosine_epochs=9", "train.extend=true") == 0
    assert toy_project.end()["epochs"] == stopped["epochs"] + 1
    assert toy_project.end()["best"] == stopped["best"]
