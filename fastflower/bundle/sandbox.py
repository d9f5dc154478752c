"""Where the hand-in is tried: a copy in another folder and a Python that has nothing but torch, NumPy and Pillow."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from packaging.requirements import Requirement

from fastflower.bundle.writer import CODE
from fastflower.core import runs

NEEDS = ("torch", "numpy", "pillow")
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
BARE = """
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


def environment(folder: Path) -> Path:
    """A fresh virtual environment with torch, NumPy, Pillow and what these require, and its interpreter.

    Packages are links to the ones installed here: nothing is downloaded, and it takes a tenth of a second.
    Raises OSError or CalledProcessError where none can be made.
    """
    venv.EnvBuilder(symlinks=True).create(folder)
    site = next(folder.glob("lib/python*/site-packages"))
    for name in sorted(required(NEEDS)):
        for top, source in parts(name):
            if not (site / top).exists():  # NVIDIA's packages share a folder
                (site / top).symlink_to(source)
    return folder / "bin/python"


def required(names: tuple[str, ...]) -> set[str]:
    """These distributions and what they need, as far as it is installed."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(name)
        asked = [Requirement(text) for text in needs]
        waiting += [
            r.name
            for r in asked
            if r.name not in found and (not r.marker or r.marker.evaluate({"extra": ""}))
        ]
    return found


def parts(name: str) -> Iterator[tuple[str, Path]]:
    """Files and folders that a distribution puts into site-packages."""
    own = importlib.metadata.distribution(name)
    tops = {path.parts[0] for path in own.files or ()} - {"..", "__pycache__"}
    return ((top, Path(str(own.locate_file(top)))) for top in sorted(tops))


def copy_hand_in(root: Path, bundle: Path, files: list[Path]) -> Path:
    """code/, the bundle and what is to be predicted as they lie at the evaluator's.

    That is test_dataset/ of photographs whose names give the order, or test_dataset.npz of pairs, put together from
    a .npz of each.
    """
    shutil.copytree(CODE, root / "code", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(bundle, root / runs.BUNDLE)
    if files and files[0].suffix == ".npz":
        parts = [dict(np.load(file)) for file in files]
        whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        np.savez(root / "test_dataset.npz", **whole)
        return root
    (root / "test_dataset").mkdir()
    for number, file in enumerate(files):
        shutil.copyfile(file, root / "test_dataset" / f"{number:06d}{file.suffix}")
    return root


def run(root: Path, options: list[str], python: Path | None) -> str | None:
    """Run the copy's predictor without a network; its last words when it fails.

    `python` is that of a fresh environment, or None for this one with all but its needs blocked.
    """
    words = [
        str(python or sys.executable),
        "-I",
        "-c",
        BARE.replace("{blocked!r}", repr(set() if python else set(BLOCKED))),
        str(root / "code/predict.py"),
    ]
    done = subprocess.run([*words, *options], cwd=root, capture_output=True, text=True, errors="replace")
    if done.returncode == 0:
        return None
    return f"exit {done.returncode}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
