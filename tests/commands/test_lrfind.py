"""The learning-rate finder: suggestions on known curves, the files it writes, runs it must not touch."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from composer import Trainer
from composer.utils import dist
from PIL import Image

from fastflower import lrfind, train
from fastflower.core.errors import PREEMPTED, EnvironmentFault, InputError
from fastflower.optim.lr_range import has_diverged, rates, smoothed, suggest
from fastflower.training import build, exits, ranks
from support import toy_project


def test_rates_rise_by_a_constant_factor():
    got = rates(1e-6, 1e-1, 6)
    assert got == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1])


def test_the_suggestion_is_the_steepest_point_before_the_minimum():
    tried = rates(1e-7, 1.0, 400)
    x = np.log10(tried)
    losses = (
        2 - 1.5 / (1 + np.exp(-4 * (x + 3))) + np.exp(3 * (x + 0.6))
    )  # falls around 1e-3, rises from 1e-1 on
    found = suggest(tried, losses.tolist())
    assert found is not None and 5e-4 < found.lr < 4e-3 and 1e-2 < found.lowest < 0.3
    assert suggest(tried, np.linspace(1, 2, 400).tolist()) is None
    assert suggest(tried[:3], [3.0, 2.0, 1.0]) is None


def test_smoothing_starts_without_a_pull_and_ruin_is_seen():
    assert smoothed([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])
    assert (
        has_diverged([1.0, float("nan")])
        and has_diverged([1.0] * 5 + [100.0] * 3)
        and not has_diverged([1.0, 2.0, 0.5])
    )


def files(folder: str) -> dict[str, str]:
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in Path(folder).rglob("*")
        if path.is_file() and not path.name.startswith("lrfind_")
    }


@pytest.mark.slow
def test_a_range_test_leaves_no_trace_in_the_run(tmp_path, capsys):
    toy_project.project(tmp_path)
    toy_project.fit("sched.cosine_epochs=2", "data.size_epochs=[1,2]")
    before, last = files("results"), toy_project.last().tensors
    words = ["sched.cosine_epochs=2", "data.size_epochs=[1,2]", "lrfind.steps=30", "lrfind.low=1e-5"]
    assert lrfind.main(["tiny.yaml", *words]) == 0
    said = capsys.readouterr().out
    assert "suggested for a global batch of 10: opt.lr=" in said and "(the recipe has 0.001)" in said
    assert files("results") == before
    assert not toy_project.different(toy_project.last().tensors, last)
    stem = f"results/results/tiny/lrfind_{toy_project.run_of().stem}"
    table = np.loadtxt(f"{stem}.csv", delimiter=",", skiprows=1)
    assert table[0, 0] == pytest.approx(1e-5) and len(table) >= 10 and np.isfinite(table[:, 2]).all()
    with Image.open(f"{stem}.png") as picture:
        assert picture.width > 500
    assert lrfind.main(["tiny.yaml", *words]) == 0
    assert np.array_equal(np.loadtxt(f"{stem}.csv", delimiter=",", skiprows=1), table)  # the same every time
    with pytest.raises(InputError, match="did not fall between"):
        lrfind.main(["tiny.yaml", *words, "lrfind.low=1e-12", "lrfind.high=1e-11", "lrfind.steps=10"])


@pytest.mark.parametrize("command", [lrfind, train])
def test_other_ranks_wait_for_the_first_to_say_why_all_are_refused(monkeypatch, capsys, command):
    waited: list[float] = []
    monkeypatch.setattr(exits.time, "sleep", waited.append)
    monkeypatch.setattr(exits.signal, "signal", lambda *_, **__: None)

    def end(error: BaseException) -> None:
        def refuse(argv: list[str]) -> None:
            raise error

        monkeypatch.setattr(command, "parse_command", refuse)
        with pytest.raises((type(error), exits.RankFailure)):
            command.main([])

    end(InputError("bad"))
    assert waited == []
    monkeypatch.setenv("RANK", "1")
    for error in (exits.RankFailure(4), SystemExit(PREEMPTED)):
        end(error)
    assert waited == []
    for error in (InputError("bad"), SystemExit(2)):
        end(error)
    assert waited == [exits.PATIENCE] * 2
    assert capsys.readouterr().err == "fastflower: rank 1: bad\n"  # it waited in vain, so it was alone


def test_the_process_group_is_closed_only_after_success(tmp_path, monkeypatch):
    toy_project.project(tmp_path)
    closed: list[bool] = []
    monkeypatch.setattr(ranks.Machine, "close", lambda self: closed.append(True))

    def fail(*_: object, **__: object) -> None:
        raise InputError("bad")

    with monkeypatch.context() as patch, pytest.raises(InputError, match="bad"):
        patch.setattr(build, "lr_range_test", fail)
        lrfind.main(["tiny.yaml"])
    assert closed == []  # closing would wait for the other ranks
    monkeypatch.setattr(build, "lr_range_test", lambda *_, **__: ([1e-4, 1e-3], [2.0, 1.0]))
    monkeypatch.setattr(lrfind, "report", lambda *_, **__: None)
    assert lrfind.main(["tiny.yaml"]) == 0 and closed == [True]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_fails_prints_its_error_and_exits(tmp_path, monkeypatch, capsys, rank):
    toy_project.project(tmp_path)

    def full(self: Trainer) -> None:
        monkeypatch.setattr(dist, "get_global_rank", lambda: rank)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(Trainer, "fit", full)
    shortage = (
        "size 32 (stage 1 of 2): a microbatch of 10 images does not fit into memory "
        "(CUDA out of memory. Tried to allocate 2 GiB); set model.grad_checkpointing=true"
    )
    with pytest.raises(
        exits.RankFailure if rank else EnvironmentFault, match=None if rank else re.escape(shortage)
    ):
        lrfind.main(["tiny.yaml", "lrfind.steps=10"])
    assert (f"fastflower: rank 1: {shortage}" in capsys.readouterr().err) == (rank == 1)
