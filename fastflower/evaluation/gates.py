"""What a bundle must pass before it is put in place: size, parity with the trainer, a bare run, latency.

The predictor itself is run, as a process from a copy in another folder where nothing but torch, NumPy and Pillow
can be imported and no socket can be opened, on the original files of validation photographs.
"""

from __future__ import annotations

import csv
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fastflower import checkpoint, runs, scores
from fastflower.data import sets
from fastflower.data.betons import Beton
from fastflower.data.decode import decode_eval
from fastflower.evaluation.bundle import CODE, Member
from fastflower.evaluation.views import load_network
from fastflower.recipe import Recipe

MOST_ROWS, FEWEST_ROWS, SECONDS = 64, 8, 60.0  # photographs in the parity run, fewer when networks are slow
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


@dataclass(frozen=True)
class Gate:
    """One line of the table: what was measured, what is allowed, and whether it passed."""

    name: str
    got: str
    allowed: str
    passed: bool


@dataclass(frozen=True)
class Photographs:
    """Validation rows: where they lie in the betons, and their original files."""

    rows: list[tuple[Beton, int]]
    files: list[Path]


def check(
    folder: Path, bundle: dict[str, Any], members: list[Member], recipe: Recipe
) -> tuple[list[Gate], list[str]]:
    """Run every gate on a bundle that lies aside; the gates, and what half precision cost each member.

    Raises InputError when the validation betons or the original photographs are not there.
    """
    photographs = held_out(recipe, members)
    expected = trainer_logits(bundle, members, photographs)
    lines = rounding(members, bundle, photographs, expected) if recipe.bundle.dtype == "fp16" else []
    size = sum(path.stat().st_size for path in [*folder.iterdir(), *CODE.glob("*.py")]) / 1e6
    gates = [Gate("size", f"{size:.1f} MB", f"<= {recipe.bundle.max_mb:g} MB", size <= recipe.bundle.max_mb)]
    with tempfile.TemporaryDirectory(prefix="hand-in-") as place:
        root = copy_hand_in(Path(place), folder, photographs.files[: len(expected)])
        run = run_bare(root, ["--device", "cpu", "--logits", str(root / "logits.npz")])
        gates.append(Gate("bare run", run or "torch, NumPy, Pillow; no network", "exit 0", run is None))
        if run is not None:
            return gates, lines
        fault = submission_fault(root, bundle, len(expected))
        gates.append(Gate("submission", fault or f"{len(expected)} rows", "valid", fault is None))
        got = np.load(root / "logits.npz")["logits"]
        gates.append(parity(got, expected, bundle["tolerance"]))
        gates.append(latency(root, recipe.bundle.max_ms))
    return gates, lines


def held_out(recipe: Recipe, members: list[Member]) -> Photographs:
    """Photographs spread evenly over the validation parts of the members' folds, folds and classes mixed."""
    folds = sorted({int(member.meta["fold"]) for member in members})
    rows, files = [], []
    for fold in folds:
        opened = sets.open_fold(recipe, fold)
        share = min(opened.val.rows, max(1, MOST_ROWS // len(folds)))
        for row in np.linspace(0, opened.val.rows - 1, share).astype(int).tolist():
            rows.append((opened.val, row))
            files.append(Path(recipe.data.root) / opened.folds.filenames[int(opened.val.index[row])])
    order = np.random.default_rng(0).permutation(len(rows)).tolist()
    return Photographs([rows[i] for i in order], [files[i] for i in order])


def trainer_logits(bundle: dict[str, Any], members: list[Member], photographs: Photographs) -> np.ndarray:
    """The trainer's evaluation of the photographs: float32 (n, members, views, C), n as many as a minute allows."""
    found: list[np.ndarray] = []
    start = time.monotonic()
    for beton, row in photographs.rows:
        views = [
            [
                views_logits(member.network, beton, row, bundle["crops"][view["crop"]], bundle["hflip"])
                for view in spec["views"]
            ]
            for member, spec in zip(members, bundle["members"], strict=True)
        ]
        found.append(np.stack([np.concatenate(own) for own in views]))
        if len(found) >= FEWEST_ROWS and time.monotonic() - start > SECONDS:
            break
    return np.stack(found)


@torch.inference_mode()
def views_logits(network: nn.Module, beton: Beton, row: int, crop: dict[str, Any], hflip: bool) -> np.ndarray:
    """Logits (1 or 2, C) of a beton's row as training evaluates it, plain and mirrored."""
    out = np.empty((1, crop["height"], crop["width"], 3), dtype=np.uint8)
    decode_eval(beton, np.array([row]), out, crop["factor"], crop["interpolation"], 1)
    image = torch.from_numpy(out)
    images = torch.cat([image, image.flip(2)]) if hflip else image
    return network(images.permute(0, 3, 1, 2).float()).numpy()


def rounding(
    members: list[Member], bundle: dict[str, Any], photographs: Photographs, logits: np.ndarray
) -> list[str]:
    """What storing the weights in half precision cost on the photographs, a line for each member."""
    lines = []
    labels = np.array([int(beton.labels[row]) for beton, row in photographs.rows[: len(logits)]])
    for position, (member, spec) in enumerate(zip(members, bundle["members"], strict=True)):
        network = load_network(checkpoint.load(member.path), member.path, torch.device("cpu"))
        crop = bundle["crops"][spec["views"][0]["crop"]]
        exact = np.concatenate(
            [views_logits(network, b, r, crop, False) for b, r in photographs.rows[: len(logits)]]
        )
        rounded = logits[:, position, 0]
        before, after = scores.scores(exact, labels), scores.scores(rounded, labels)
        lines.append(
            f"{member.path.stem}: top-1 {before['top1']:.4f} -> {after['top1']:.4f}, NLL {before['nll']:.4f} -> "
            f"{after['nll']:.4f} (n = {len(labels)}), logits move by at most {np.abs(exact - rounded).max():.2g}"
        )
    return lines


def copy_hand_in(root: Path, bundle: Path, files: list[Path]) -> Path:
    """code/, the bundle and the photographs as they lie at the evaluator's; names give the order."""
    shutil.copytree(CODE, root / "code", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(bundle, root / runs.BUNDLE)
    (root / "test_dataset").mkdir()
    for number, file in enumerate(files):
        shutil.copyfile(file, root / "test_dataset" / f"{number:06d}{file.suffix}")
    return root


def run_bare(root: Path, options: list[str]) -> str | None:
    """Run the copy's predictor with everything but its needs blocked; its last words when it fails."""
    words = [
        sys.executable,
        "-I",
        "-c",
        BARE.replace("{blocked!r}", repr(set(BLOCKED))),
        str(root / "code/predict.py"),
    ]
    run = subprocess.run([*words, *options], cwd=root, capture_output=True, text=True, errors="replace")
    if run.returncode == 0:
        return None
    return f"exit {run.returncode}: {(run.stderr.strip().splitlines() or ['no message'])[-1]}"


def submission_fault(root: Path, bundle: dict[str, Any], rows: int) -> str | None:
    """What is wrong with the table of the copy, or None."""
    with open(root / runs.SUBMISSION, encoding="utf-8", newline="") as file:
        header, *table = list(csv.reader(file))
    width = 2 if bundle["columns"] == "two" else 3
    if len(header) != width or any(len(row) != width for row in table):
        return f"columns {header}"
    names = sorted(path.name for path in (root / "test_dataset").iterdir())
    if [row[0] for row in table] != names or len(names) != rows:
        return f"{len(table)} rows for {rows} photographs"
    if not {row[1] for row in table} <= set(bundle["class_ids"]):
        return "category ids that are not in the training labels"
    if width == 3 and not all(0 < float(row[2]) <= 1 for row in table):
        return "a confidence outside (0, 1]"
    unreadable = about(root)["unreadable"]
    return f"{len(unreadable)} photographs unreadable" if unreadable else None


def parity(got: np.ndarray, expected: np.ndarray, tolerance: float) -> Gate:
    """Largest difference of a logit over photographs, members and views."""
    gap = float(np.abs(got - expected).max()) if got.shape == expected.shape else float("nan")
    return Gate("parity", f"{gap:.2g} on {len(expected)} photographs", f"<= {tolerance:g}", gap <= tolerance)


def latency(root: Path, allowed: float) -> Gate:
    """Milliseconds a photograph, start-up apart, on the device that the predictor chooses, with its name.

    Tried up to three times: that a machine is busy is not the bundle's fault.
    """
    cuda = torch.cuda.is_available()
    for attempt in range(3):
        if cuda or attempt:  # the parity run was one on the CPU
            run_bare(root, [])
        run = about(root)
        if run["ms_per_image"] <= allowed:
            break
    where = (
        torch.cuda.get_device_name()
        if run["device"].startswith("cuda")
        else f"{cpu_name()}, {run['threads']} threads"
    )
    spent = run["ms_per_image"]
    return Gate("latency", f"{spent:.1f} ms an image on {where}", f"<= {allowed:g} ms", spent <= allowed)


def about(root: Path) -> dict[str, Any]:
    """What the copy's predictor wrote beside its table."""
    return json.loads((root / runs.SUBMISSION).with_suffix(".json").read_text(encoding="utf-8"))


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def table(gates: list[Gate], say: Callable[[str], None] = print) -> None:
    """Print the gates as a table."""
    width = max(len(gate.got) for gate in gates)
    for gate in gates:
        say(
            f"  {gate.name:<12}{gate.got:<{width}}  {gate.allowed:<12}{'passed' if gate.passed else 'FAILED'}"
        )
