"""The learning-rate finder: what it suggests on known curves, what it writes, and what it leaves alone."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

from fastflower import lrfind
from fastflower.errors import InputError
from fastflower.optim.sweep import rates, ruined, smoothed, suggest


def test_rates_rise_by_a_constant_factor():
    got = rates(1e-6, 1e-1, 6)
    assert got == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1])


def test_the_suggestion_is_the_steepest_place_before_the_minimum():
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
    assert ruined([1.0, float("nan")]) and ruined([1.0] * 5 + [100.0] * 3) and not ruined([1.0, 2.0, 0.5])


def files(folder: str) -> dict[str, str]:
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in Path(folder).rglob("*")
        if path.is_file() and not path.name.startswith("lrfind_")
    }


def test_a_sweep_leaves_no_trace_in_the_run(tmp_path, capsys):
    tiny.project(tmp_path)
    tiny.fit("sched.cosine_epochs=2", "data.size_epochs=[1,2]")
    before, last = files("results"), tiny.last().tensors
    words = ["sched.cosine_epochs=2", "data.size_epochs=[1,2]", "lrfind.steps=30", "lrfind.low=1e-5"]
    assert lrfind.main(["tiny.yaml", *words]) == 0
    said = capsys.readouterr().out
    assert "suggested for a global batch of 10: opt.lr=" in said and "(the recipe has 0.001)" in said
    assert files("results") == before
    assert not tiny.different(tiny.last().tensors, last)
    stem = f"results/results/tiny/lrfind_{tiny.run_of().stem}"
    table = np.loadtxt(f"{stem}.csv", delimiter=",", skiprows=1)
    assert table[0, 0] == pytest.approx(1e-5) and len(table) >= 10 and np.isfinite(table[:, 2]).all()
    with Image.open(f"{stem}.png") as picture:
        assert picture.width > 500
    assert lrfind.main(["tiny.yaml", *words]) == 0
    assert np.array_equal(np.loadtxt(f"{stem}.csv", delimiter=",", skiprows=1), table)  # the same every time
    with pytest.raises(InputError, match="did not fall between"):
        lrfind.main(["tiny.yaml", *words, "lrfind.low=1e-12", "lrfind.high=1e-11", "lrfind.steps=10"])
