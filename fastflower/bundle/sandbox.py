"""Runs a copy of the hand-in in an isolated environment with only torch, NumPy and Pillow, without network."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import signal
import subprocess
import sys
import venv
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from packaging.requirements import Requirement

from fastflower.bundle.tracing import CODE
from fastflower.core import runs
from fastflower.core.workers import die_with_parent

REQUIRED = ("torch", "numpy", "pillow")
BLOCKED = (
    "composer",
    "ffcv",
    "timm",
    "torchvision",
    "fastflower",
    "pandas",
    "sklearn",
    "scipy",
    "cv2",
    "omegaconf",
)
ISOLATED = """
import runpy, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Block())
def audit(event, args):
    if event.startswith("socket."):
        raise PermissionError("no network: " + event)
sys.addaudithook(audit)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def try_environment(folder: Path) -> tuple[Path | None, str]:
    """The interpreter of a fresh environment, or None where none can be made; and the isolation in words."""
    try:
        return make_environment(folder), "fresh venv"
    except (OSError, subprocess.CalledProcessError) as error:
        return None, f"other imports blocked (no venv: {' '.join(str(error).split())[:60]})"


def make_environment(folder: Path) -> Path:
    """Create a virtual environment with torch, NumPy, Pillow and their requirements; returns its interpreter.

    Packages are links to the installed ones: nothing is downloaded, and it takes a tenth of a second. Raises OSError
    or CalledProcessError where it cannot be made.
    """
    venv.EnvBuilder(symlinks=True).create(folder)
    site = next(folder.glob("lib/python*/site-packages"))
    for name in sorted(with_requirements(REQUIRED)):
        for top, source in installed_files(name):
            if not (site / top).exists():  # NVIDIA's packages share a folder
                (site / top).symlink_to(source)
    return folder / "bin/python"


def with_requirements(names: tuple[str, ...]) -> set[str]:
    """Distributions and all their requirements, as far as they are installed."""
    installed: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        try:
            requirements = [Requirement(text) for text in importlib.metadata.requires(name) or []]
        except importlib.metadata.PackageNotFoundError:
            continue
        installed.add(name)
        waiting += [
            r.name
            for r in requirements
            if r.name not in installed and (not r.marker or r.marker.evaluate({"extra": ""}))
        ]
    return installed


def installed_files(name: str) -> Iterator[tuple[str, Path]]:
    """Names and paths of the files and folders of a distribution directly in site-packages."""
    distribution = importlib.metadata.distribution(name)
    tops = {path.parts[0] for path in distribution.files or ()} - {"..", "__pycache__"}
    return ((top, Path(str(distribution.locate_file(top)))) for top in sorted(tops))


def copy_hand_in(root: Path, bundle: Path, files: list[Path]) -> Path:
    """Lay out code/, the bundle and the images to predict in `root`, as the evaluator has them; returns `root`.

    Photographs become test_dataset/ with names in the order of `files`; the .npz files of single pairs are joined
    into test_dataset.npz.
    """
    shutil.copytree(CODE, root / "code", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(bundle, root / runs.BUNDLE)
    if files and files[0].suffix == ".npz":
        pairs = [dict(np.load(file)) for file in files]
        joined = {name: np.concatenate([pair[name] for pair in pairs]) for name in pairs[0]}
        np.savez(root / "test_dataset.npz", **joined)
        return root
    (root / "test_dataset").mkdir()
    for number, file in enumerate(files):
        shutil.copyfile(file, root / "test_dataset" / f"{number:06d}{file.suffix}")
    return root


def run_predictor(root: Path, options: list[str], python: Path | None) -> str | None:
    """Run the copy's predictor without network; returns None, or its exit code and last line when it fails.

    `python` is the interpreter of a fresh environment, or None for this one with the packages of BLOCKED hidden.
    """
    command = [
        str(python or sys.executable),
        "-I",
        "-c",
        ISOLATED.replace("{blocked!r}", repr(set() if python else set(BLOCKED))),
        str(root / "code/predict.py"),
    ]
    done = subprocess.run(
        [*command, *options],
        cwd=root,
        capture_output=True,
        text=True,
        errors="replace",
        # or it would write on where a killed export ran
        preexec_fn=partial(die_with_parent, signal.SIGKILL, parent=os.getpid()),
    )
    if done.returncode == 0:
        return None
    return f"exit {done.returncode}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
