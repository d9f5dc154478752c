"""Fixtures of the predictor's tests: a bundle, members without a bundle, and runs in this process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastflower.bundle.writer import write_programs
from fastflower.recipe import load
from support.predictor_runs import (
    Exported,
    read_rows,
    save_random_member,
    write_bundle,
    write_classes,
    write_photographs,
)


@pytest.fixture(scope="session")
def exported(tmp_path_factory) -> Exported:
    """A bundle of two members, which no test may change."""
    folder = tmp_path_factory.mktemp("exported")
    paths = [save_random_member(folder, seed=seed) for seed in (0, 1)]
    return Exported(folder / "bundle", write_bundle(folder / "bundle", paths))


@pytest.fixture
def run(code, exported):
    """Run the predictor on test_dataset/ in this process; returns the exit code and the rows of the table."""

    def call(*options: str, csv_path: str = "out/submission.csv") -> tuple[int, list[list[str]]]:
        arguments = ["test_dataset", csv_path, "--bundle", str(exported.folder), "--threads", "1"]
        try:
            exit_code = code.predict.main([*arguments, *options])
        except code.bundles.Problem as problem:
            exit_code = problem.code
        return exit_code, read_rows(Path(csv_path)) if Path(csv_path).exists() else []

    Path("test_dataset").mkdir()
    return call


@pytest.fixture
def run_without_networks(code, monkeypatch):
    """Run the predictor where there are classes and photographs but no networks, and check its exit code of 4."""
    monkeypatch.setattr(code.bundles, "ROOT", str(Path.cwd()))
    write_classes(Path.cwd())

    def call(csv_path: str) -> None:
        with pytest.raises(code.bundles.Problem, match="no bundle in nowhere") as problem:
            code.predict.main(["test_dataset", csv_path, "--bundle", "nowhere"])
        assert problem.value.code == 4

    Path("test_dataset").mkdir()
    return call


@pytest.fixture
def evaluated(run, code, monkeypatch):
    """Two members and the programs that evaluate writes beside them; the views of one need weights of their own."""
    monkeypatch.setattr(code.bundles, "ROOT", str(Path.cwd()))
    folder, recipe = Path("results/model/exp"), load(None, ["exp.name=exp", "tta.scales=[32,64]"])
    paths = [
        save_random_member(folder, name, seed=seed) for seed, name in enumerate(("resnet10t", "test_vit"))
    ]
    write_programs(paths, np.array([0.25, 0.75]), recipe=recipe, temperature=1.5)
    write_photographs(5)
    return paths
