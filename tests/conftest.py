"""Shared by all tests: a directory of their own, fixed seeds, one thread; the photographs when they are there."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch; the ranks of a test share few cores

import importlib
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastflower.core import seeding

REPO = Path(__file__).resolve().parents[1]
SCRATCH = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    """Gather what tests and killed commands leave in the temporary folder, to remove it at the end."""
    if hasattr(config, "workerinput"):
        return  # a worker inherits the environment of the process that started it
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())  # failed tests' folders stay
    config.stash[SCRATCH] = tempfile.mkdtemp(prefix="fft-")  # short: paths of sockets end at 107 characters
    os.environ["TMPDIR"] = config.stash[SCRATCH]
    tempfile.tempdir = None  # read TMPDIR anew


def pytest_unconfigure(config: pytest.Config) -> None:
    if SCRATCH in config.stash:
        shutil.rmtree(config.stash[SCRATCH], ignore_errors=True)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One worker more than cores: a test that waits for a process or a signal leaves its core to another."""
    return len(os.sched_getaffinity(0)) + 1


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--page",
        action="append",
        help="folder of an experiment whose report is checked; several: compare.html",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _own_place(tmp_path: Path) -> Iterator[None]:
    """Commands write below the current directory, so each test gets one; and the same random numbers."""
    os.chdir(tmp_path)
    torch.set_num_threads(1)
    seeding.seed_all(0)
    yield
    os.chdir(REPO)  # pytest removes the folder


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of the repository."""
    return REPO


@pytest.fixture(scope="session")
def flowers17() -> Path:
    """A folder with train/ and train_labels.csv: 1088 photographs of 17 flowers. The test is skipped without it."""
    path = Path(os.environ.get("FASTFLOWER_FLOWERS17", REPO.parent / "shared/data/flowers17"))
    if not (path / "train_labels.csv").is_file():
        pytest.skip(f"no photographs at {path}; set FASTFLOWER_FLOWERS17")
    return path


@pytest.fixture
def code(monkeypatch: pytest.MonkeyPatch) -> Iterator[type]:
    """The predictor's modules, as `python code/predict.py` sees them."""
    monkeypatch.syspath_prepend(str(REPO / "code"))
    monkeypatch.setattr(signal, "signal", lambda *_, **__: None)
    names = (
        "predict",
        "bundles",
        "guard",
        "inputs",
        "messages",
        "pictures",
        "priors",
        "programs",
        "networks",
        "rows",
        "sample",
        "table",
    )
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield type("code", (), {name: importlib.import_module(name) for name in names})
    for name in names:
        sys.modules.pop(name, None)
