"""Bundles with random weights, photographs to predict, and runs of code/predict.py in this process."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from fastflower.bundle import sandbox, writer
from fastflower.bundle.writer import Member
from fastflower.core.tables import sealed_rows, write_csv
from fastflower.model.member import save_member
from fastflower.model.network import build_network
from fastflower.recipe import load
from support.member_metas import member_meta

CODE = Path(__file__).resolve().parents[2] / "code"
IDS = ["7", "012", "rose, red"]


class Exported(NamedTuple):
    """The folder of a bundle and its members."""

    folder: Path
    members: list[Member]


def save_random_member(
    folder: Path,
    backbone: str = "resnet10t",
    *,
    seed: int = 0,
    size: int = 32,
    name: str = "",
    **changes: object,
) -> Path:
    """Save a checkpoint with random weights, named as training names it."""
    torch.manual_seed(seed)
    fields = {
        "backbone": backbone, "num_classes": len(IDS), "size": (size, size), "stored_side": 73,
        "class_ids": tuple(IDS), "class_counts": (3, 9, 4), "fold": seed, "weights": "ema", **changes,
    }  # fmt: skip
    meta = member_meta(**fields)
    network = build_network(meta)
    for buffer_name, buffer in network.named_buffers():
        if buffer_name.endswith("running_var"):
            buffer.uniform_(0.5, 2.0)
    path = folder / (name or f"best_combo__{backbone}__fold{seed}_seed42_epoch1_score0.5000.pth")
    save_member(path, network.state_dict(), meta)
    return path


def write_bundle(folder: Path, paths: list[Path], *changes: str) -> list[Member]:
    """Export members with equal weights, without gates."""
    folder.mkdir(parents=True)
    recipe = load(None, ["tta.scales=[32,64]", *changes])
    members = writer.load_members(paths, recipe.bundle.dtype)
    weights = np.full(len(members), 1 / len(members))
    writer.write_bundle(folder, members, weights=weights, recipe=recipe, temperature=1.5)
    return members


def write_classes(root: Path) -> None:
    """Write data/classes.csv of three classes; the second is the most frequent one."""
    (root / "data").mkdir()
    write_class_table(root / "data/classes.csv", ("7", "3"), ("007", "6"), ("x", "1"))


def write_class_table(path: Path, *classes: tuple[str, ...], named: int = 0) -> None:
    """Write a classes.csv of (id, count) or (id, count, name); the first `named` columns of names are checked, too."""
    columns = ("class_idx", "category_id", "n", "name")
    rows = [dict(zip(columns, (str(number), *row), strict=False)) for number, row in enumerate(classes)]
    write_csv(path, sealed_rows(rows, columns[: 3 + named], count=len(rows)))


def photograph(seed: int, size: tuple[int, int] = (90, 70)) -> Image.Image:
    """A smooth picture with some detail, of a width and height."""
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def jpeg(seed: int, **options: object) -> bytes:
    """The JPEG file of a photograph."""
    buffer = io.BytesIO()
    photograph(seed).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def write_photographs(count: int) -> None:
    """Write test_dataset/000.jpg and so on."""
    for number in range(count):
        Path(f"test_dataset/{number:03d}.jpg").write_bytes(jpeg(number))


def make_hand_in(root: Path, bundle: Path, count: int) -> Path:
    """Lay out code/, a bundle and photographs as the evaluator has them; returns the root."""
    root.mkdir()
    for number in range(count):
        (root / f"{number:03d}.jpg").write_bytes(jpeg(number))
    return sandbox.copy_hand_in(root, bundle, sorted(root.glob("*.jpg")))


def read_rows(path: Path) -> list[list[str]]:
    """The rows of a table, the header first."""
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(csv.reader(file))


def fill_rows(table: Any, rows: list[int]) -> int:
    """Predict the first class for rows of a table; returns 0, the exit code of finished work."""
    for row in rows:
        table.fill([row], np.eye(3)[:1])
    return 0


def run_without_bundle(code: Any, *options: str) -> tuple[int, bytes, dict[str, object]]:
    """Exit code, table and summary of a run without the option --bundle."""
    try:
        exit_code = code.predict.main(["test_dataset", "own.csv", "--threads", "1", *options])
    except code.bundles.Problem as problem:
        exit_code = problem.code
    return exit_code, Path("own.csv").read_bytes(), json.loads(Path("own.json").read_text())
