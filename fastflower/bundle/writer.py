"""The bundle: chosen members as programs and weights that code/predict.py runs with torch, NumPy and Pillow alone.

One small program for each backbone and view size serves all folds and seeds; each member's weights are stored
once, as safetensors, so nothing is unpickled. `gates.py` decides whether a bundle may be used. Until there is one,
the programs lie beside the members, whose own files hold the weights.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

import fastflower
from fastflower.bundle.program import TOLERANCE, logits_of_test_picture, trace
from fastflower.core import checkpoint, runs
from fastflower.core import files as core_files
from fastflower.core.errors import InputError
from fastflower.core.files import aside_of, growing, replacing, sweep
from fastflower.data.labels import check_columns, differing
from fastflower.evaluation.inference import load_network, views_of
from fastflower.recipe import Recipe

FORMAT = 2
CODE = Path(__file__).resolve().parents[2] / "code"
PIXEL_TOLERANCE = 0  # of 255: both sides resample with Pillow's arithmetic
PROGRAMS = "programs"  # the folder beside an experiment's members
SCALE = ":scale"  # names the scales of a tensor stored in eight bits


@dataclass
class Member:
    """A checkpoint ready to travel: its description, stored tensors, and network with the weights these stand for."""

    path: Path
    meta: dict[str, Any]
    stored: dict[str, Tensor]
    network: nn.Module

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the last training stage."""
        return int(self.meta["size"][0]), int(self.meta["size"][1])


def load_members(paths: list[Path], dtype: str) -> list[Member]:
    """Read checkpoints and round their weights to what the bundle will store.

    Raises InputError for members of different class maps.
    """
    members: list[Member] = []
    for path in paths:
        file = checkpoint.load(path)
        first = members[0] if members else None
        if first and file.meta["class_hash"] != first.meta["class_hash"]:
            how = differing(first.meta["class_ids"], file.meta["class_ids"])
            raise InputError(
                f"{first.path.name} has class map {first.meta['class_hash']}, {path.name} has "
                f"{file.meta['class_hash']}{how and f', {how}'}; a bundle holds members of one class map, "
                "choose with --members"
            )
        tensors = pack(file.tensors, dtype)
        network = load_network(checkpoint.Checkpoint(unpack(tensors), file.meta), path, torch.device("cpu"))
        members.append(Member(path, file.meta, tensors, network))
    return members


def pack(tensors: dict[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """Tensors as the bundle stores them in fp32, fp16 or int8, rounded to nearest.

    Vectors (norms, biases, variances) are small and stay as they are. int8 holds matrices and kernels, each output
    channel with a scale of its own (`name:scale`, its largest magnitude over 127), and the rest as fp16 does.
    """
    packed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if dtype == "fp32" or not tensor.is_floating_point() or tensor.ndim < 2:
            packed[name] = tensor
        elif dtype == "int8" and name.endswith("weight") and bool(torch.isfinite(tensor).all()):
            scale = tensor.float().flatten(1).abs().amax(1).clamp_min(1e-12) / 127
            packed[name] = (tensor / along(scale, tensor)).round().to(torch.int8)
            packed[name + SCALE] = scale
        else:
            half = tensor.half()
            packed[name] = half if bool(torch.isfinite(half).all()) else tensor
    return packed


def unpack(packed: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that packed ones stand for."""
    return {
        name: tensor.float() * along(packed[name + SCALE], tensor) if name + SCALE in packed else tensor
        for name, tensor in packed.items()
        if not name.endswith(SCALE)
    }


def along(scale: Tensor, tensor: Tensor) -> Tensor:
    """A value for each output channel (C,), shaped to multiply a tensor (C, ...)."""
    return scale.view(-1, *[1] * (tensor.ndim - 1))


def write(
    folder: Path,
    members: list[Member],
    *,
    shares: np.ndarray,
    recipe: Recipe,
    temperature: float,
    arrays: Sequence[str] = (),
    whole: bool = True,
) -> dict[str, Any]:
    """Write programs, weights, classes.csv, bundle.json and SHA256 into an empty folder; what bundle.json says.

    `shares` (M,) is the say of each member; they sum to 1. `arrays` are the names of the two that hold the pairs of a
    .npz, whose images the networks see side by side. One that is not `whole` names the members' own files,
    which lie above the folder, and stores of their weights only those that training does not have.
    """
    first = members[0].meta
    check_columns(recipe, len(first["class_ids"]))
    hflip, beside = recipe.tta.hflip, 2 if arrays else 1
    # bf16 is for bundles only: no gate measures what evaluate leaves
    half = recipe.bundle.half if whole or recipe.bundle.half != "all" else "gpu"
    crops: list[dict[str, Any]] = []
    programs: list[dict[str, Any]] = []
    files: dict[bytes, str] = {}
    described = []
    for number, (member, share) in enumerate(zip(members, shares, strict=True)):
        tensors, views, expected = unpack(member.stored), [], []
        asked = views_of(member.size, recipe.tta.scales, hflip=hflip)
        for height, width in dict.fromkeys((view.height, view.width) for view in asked):
            crop = crop_of(member.meta, height, width)
            crops += [] if crop in crops else [crop]
            program = trace(member.path, member.network, height=height, width=beside * width, tensors=tensors)
            file = files.setdefault(program.pop("data"), f"program_{len(files)}.pt")
            program = {"file": file, **program}
            programs += [] if program in programs else [program]
            views.append({"crop": crops.index(crop), "program": programs.index(program)})
            expected.append(logits_of_test_picture(member.network, height, beside * width))
        weights = f"weights_{number}.safetensors"
        extra = {name: tensor for name, tensor in tensors.items() if name not in member.stored}
        own = {**member.stored, **extra} if whole else extra
        safetensors.torch.save_file({k: v.contiguous() for k, v in own.items()}, folder / weights)
        described.append(
            {
                "name": member.path.stem,
                "weights": weights,
                "weight": float(share),
                "views": views,
                "expected": expected,
                **({} if whole else {"checkpoint": f"../{member.path.name}"}),
            }
        )
    for data, file in files.items():
        (folder / file).write_bytes(data)
    (folder / "classes.csv").write_text(classes_csv(first), encoding="utf-8")
    counts = np.sum([member.meta["class_counts"] for member in members], axis=0, dtype=np.float64)
    bundle = {
        "format": FORMAT,
        "fastflower": fastflower.__version__,
        "class_ids": [str(value) for value in first["class_ids"]],
        "class_hash": first["class_hash"],
        "prior": (counts / counts.sum()).tolist(),
        "columns": recipe.bundle.columns,
        "half": half,
        "temperature": temperature,
        "hflip": hflip,
        "pairs": {"arrays": list(arrays), "shape": recipe.data.shape} if arrays else None,
        "tolerance": TOLERANCE,
        "pixel_tolerance": PIXEL_TOLERANCE,
        "crops": crops,
        "programs": programs,
        "members": described,
    }
    (folder / "bundle.json").write_text(json.dumps(bundle, indent=1) + "\n", encoding="ascii")
    names = sorted(path.name for path in folder.iterdir())
    names += [f"../{member.path.name}" for member in members if not whole]
    lines = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (folder / "SHA256").write_text("".join(lines), encoding="ascii")
    return bundle


def classes_csv(meta: dict[str, Any]) -> str:
    """The classes once more, for a table of the commonest one should bundle.json be lost or damaged."""
    text = io.StringIO()
    rows = zip(range(len(meta["class_ids"])), meta["class_ids"], meta["class_counts"], strict=True)
    csv.writer(text, lineterminator="\n").writerows([("class_idx", "category_id", "n"), *rows])
    return text.getvalue()


def crop_of(meta: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    """How a picture is cut for one view of a member."""
    return {
        "height": height,
        "width": width,
        "factor": float(meta["resize_factor"]),
        "interpolation": meta["interpolation"],
        "stored_side": meta["stored_side"],
    }


def leave_programs(
    paths: list[Path], shares: np.ndarray, *, recipe: Recipe, temperature: float, arrays: Sequence[str] = ()
) -> Path:
    """Write what a predictor that finds no bundle needs beside an experiment's members; the folder."""
    place = runs.MODELS / recipe.exp.name / PROGRAMS
    with aside(place) as folder:
        write(
            folder,
            load_members(paths, "fp32"),
            shares=shares,
            recipe=recipe,
            temperature=temperature,
            arrays=arrays,
            whole=False,
        )
        put_in_place(folder, place)
    return place


@contextmanager
def aside(place: Path = runs.BUNDLE) -> Iterator[Path]:
    """A new folder beside the bundle's place, removed unless `put_in_place` took it."""
    place.parent.mkdir(parents=True, exist_ok=True)
    sweep(place.parent, place.name)
    with growing(aside_of(place), place) as folder:
        yield folder


def put_in_place(folder: Path, place: Path = runs.BUNDLE) -> None:
    """Move a finished bundle to its place; the old one is kept until then."""
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors leaves 0600, and whoever runs the folder may be another user
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    core_files.put_in_place(folder, place)


def zip_hand_in(path: Path, top: str = "") -> None:
    """The archive to hand in: code/ and results/model/bundle/, inside a folder `top` when given.

    The same bundle gives the same bytes. Nothing is compressed: weights do not get smaller.
    """
    sweep(path.parent, path.name)
    with replacing(path) as aside, zipfile.ZipFile(aside, "w") as archive:
        for file in [*sorted(CODE.glob("*.py")), *sorted(runs.BUNDLE.iterdir())]:
            place = Path("code") if file.parent == CODE else runs.BUNDLE
            entry = zipfile.ZipInfo((Path(top) / place / file.name).as_posix())
            entry.external_attr = 0o100644 << 16
            with archive.open(entry, "w") as target, open(file, "rb") as source:
                shutil.copyfileobj(source, target, 1 << 20)
