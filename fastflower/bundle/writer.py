"""Writes the bundle: members as programs and weights that code/predict.py runs with torch, NumPy and Pillow alone.

One small program for each backbone and view size serves all folds and seeds; each member's weights are stored
once, as safetensors, so nothing is unpickled. `gates.py` decides whether a bundle may be used. Before the first
export the predictor uses the programs that evaluate writes beside the members' checkpoints.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

import fastflower
from fastflower.bundle.description import (
    BundleDescription,
    BundleMember,
    MemberView,
    PairArrays,
    PriorCorrection,
    Program,
    ViewCrop,
)
from fastflower.bundle.program import TOLERANCE, TracedProgram, logits_of_test_picture, trace
from fastflower.bundle.submission import class_texts
from fastflower.core import runs
from fastflower.core.errors import InputError
from fastflower.core.files import remove_abandoned, swap_in, temporary_folder, temporary_path
from fastflower.core.records import write_record
from fastflower.core.tables import CHECK, sealed_rows, write_csv
from fastflower.data.labels import check_columns, class_differences, read_class_rows
from fastflower.evaluation import priors
from fastflower.evaluation.inference import load_network
from fastflower.evaluation.moves import moved, moves_of
from fastflower.evaluation.views import sizes_of
from fastflower.model.member import MemberCheckpoint, MemberMeta, load_member
from fastflower.recipe import Recipe

PIXEL_TOLERANCE = 0  # of 255: both sides resample with Pillow's arithmetic
CONTENTS = ("bundle.json", "SHA256", "classes.csv", "program_*", "weights_*")  # of a bundle and of programs
PROGRAMS = "programs"  # the folder beside an experiment's members
SCALE = ":scale"  # suffix of the name under which an int8 tensor's scales are stored

T = TypeVar("T")


@dataclass
class Member:
    """A checkpoint to export: its meta, its tensors as stored, and its network with the weights so rounded.

    versions: the network of each view in the bundle, with its rotation or shift. scales: tta.scales of its own
    experiment, where the bundle holds members of several.
    """

    path: Path
    meta: MemberMeta
    stored: dict[str, Tensor]
    network: nn.Module
    versions: list[nn.Module] = field(default_factory=list)
    scales: list[int] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the last training stage."""
        return self.meta.size


def load_members(paths: list[Path], dtype: str) -> list[Member]:
    """Read checkpoints and round their weights to the dtype of the bundle.

    Raises InputError for members of different class maps.
    """
    members: list[Member] = []
    for path in paths:
        file = load_member(path)
        first = members[0] if members else None
        if first and file.meta.class_hash != first.meta.class_hash:
            difference = class_differences(first.meta.class_ids, file.meta.class_ids)
            raise InputError(
                f"{first.path.name} has class map {first.meta.class_hash}, {path.name} has "
                f"{file.meta.class_hash}{difference and f', {difference}'}; a bundle holds members of one class "
                "map, choose with --members"
            )
        tensors = pack(file.tensors, dtype)
        network = load_network(MemberCheckpoint(file.meta, unpack(tensors)), path, torch.device("cpu"))
        members.append(Member(path, file.meta, tensors, network))
    return members


def pack(tensors: dict[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """Tensors as the bundle stores them in fp32, fp16 or int8, rounded to nearest.

    Vectors (norms, biases, variances) are small and keep their dtype. int8 is for matrices and kernels, with one scale
    for each output channel (`name:scale`, the largest magnitude over 127); other tensors become fp16.
    """
    packed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if dtype == "fp32" or not tensor.is_floating_point() or tensor.ndim < 2:
            packed[name] = tensor
        elif dtype == "int8" and name.endswith("weight") and bool(torch.isfinite(tensor).all()):
            scale = tensor.float().flatten(1).abs().amax(1).clamp_min(1e-12) / 127
            packed[name] = (tensor / per_channel(scale, tensor)).round().to(torch.int8)
            packed[name + SCALE] = scale
        else:
            half = tensor.half()
            packed[name] = half if bool(torch.isfinite(half).all()) else tensor
    return packed


def unpack(packed: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in floating point, from those that `pack` made."""
    return {
        name: tensor.float() * per_channel(packed[name + SCALE], tensor) if name + SCALE in packed else tensor
        for name, tensor in packed.items()
        if not name.endswith(SCALE)
    }


def per_channel(scale: Tensor, tensor: Tensor) -> Tensor:
    """Scales (C,), one for each output channel, shaped to multiply a tensor (C, ...)."""
    return scale.view(-1, *[1] * (tensor.ndim - 1))


@dataclass
class _Inventory:
    """The distinct crops, programs and program files of a bundle."""

    crops: list[ViewCrop] = field(default_factory=list)
    programs: list[Program] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)

    def add_view(self, crop: ViewCrop, traced: TracedProgram) -> MemberView:
        """Add a crop and a program where they are new; returns their positions."""
        file = self.files.setdefault(traced.text, f"program_{len(self.files)}.txt")
        program = Program(file=file, inputs=traced.inputs, norms=traced.norms, half_keeps=traced.half_keeps)
        return MemberView(_position(self.crops, crop), _position(self.programs, program))


def _position(entries: list[T], entry: T) -> int:
    """The index of an entry, which is appended where it is new."""
    if entry not in entries:
        entries.append(entry)
    return entries.index(entry)


def write_bundle(
    folder: Path,
    members: list[Member],
    *,
    weights: np.ndarray,
    recipe: Recipe,
    temperature: float,
    arrays: Sequence[str] = (),
    standalone: bool = True,
) -> BundleDescription:
    """Write programs, weights, classes.csv, bundle.json and SHA256 into an empty folder.

    `weights` (M,) are those of the members in the mean and sum to 1. `arrays` names the two arrays of a .npz of pairs,
    whose images the networks see side by side. A bundle that is not `standalone` refers to the members' checkpoints
    in the folder above and stores only tensors that these lack.
    """
    meta = members[0].meta
    check_columns(recipe, len(meta.class_ids))
    labels = class_texts(recipe, [str(value) for value in meta.class_ids])
    corrected = priors.correction(recipe, [str(value) for value in meta.class_ids])
    # bf16 is for bundles only: no gate measures the programs that evaluate writes
    half = recipe.bundle.half if standalone or recipe.bundle.half != "all" else "gpu"
    inventory = _Inventory()
    entries = [
        _write_member(
            folder / f"weights_{number}.safetensors",
            member,
            weight=float(weight),
            inventory=inventory,
            recipe=recipe,
            images=2 if arrays else 1,
            standalone=standalone,
        )
        for number, (member, weight) in enumerate(zip(members, weights, strict=True))
    ]
    for text, file in inventory.files.items():
        (folder / file).write_text(text, encoding="ascii")
    write_classes(folder / "classes.csv", meta, Path(recipe.data.home) / "classes.csv")
    counts = np.sum([member.meta.class_counts for member in members], axis=0, dtype=np.float64)
    description = BundleDescription(
        fastflower=fastflower.__version__,
        class_ids=[str(value) for value in meta.class_ids],
        class_hash=meta.class_hash,
        prior=(counts / counts.sum()).tolist(),
        columns=recipe.bundle.columns,
        labels=labels,
        top_k=recipe.bundle.top_k,
        separator=recipe.bundle.separator,
        half=half,
        temperature=temperature,
        hflip=recipe.tta.hflip,
        reduce=recipe.tta.reduce,
        space=recipe.ensembling.average,
        correction=PriorCorrection(corrected.source, corrected.target) if corrected else None,
        pairs=PairArrays(list(arrays), recipe.data.shape) if arrays else None,
        tolerance=TOLERANCE,
        pixel_tolerance=PIXEL_TOLERANCE,
        crops=inventory.crops,
        programs=inventory.programs,
        members=entries,
    )
    write_record(folder / "bundle.json", description)
    names = sorted(path.name for path in folder.iterdir())
    names += [entry.checkpoint for entry in entries if entry.checkpoint is not None]
    lines = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (folder / "SHA256").write_text("".join(lines), encoding="ascii")
    return description


def _write_member(
    path: Path,
    member: Member,
    *,
    weight: float,
    inventory: _Inventory,
    recipe: Recipe,
    images: int,
    standalone: bool,
) -> BundleMember:
    """Store a member's tensors at `path` and describe it; `images` is 2 for pairs, else 1."""
    tensors, views, expected, versions = unpack(member.stored), [], [], []
    asked = recipe.tta.scales if member.scales is None else member.scales
    for height, width in sizes_of(member.size, member.meta.scales(asked)):
        for move in moves_of(recipe.tta):
            network = moved(member.network, move, (height, width), images=images)
            traced = trace(member.path, network, height=height, width=images * width, tensors=tensors)
            views.append(inventory.add_view(crop_of(member.meta, height, width), traced))
            expected.append(logits_of_test_picture(network, height, images * width))
            versions.append(network)
    member.versions = versions
    added = {name: tensor for name, tensor in tensors.items() if name not in member.stored}
    saved = {**member.stored, **added} if standalone else added
    # not by save_file, which hides the errors of the disk behind its own
    path.write_bytes(safetensors.torch.save({name: tensor.contiguous() for name, tensor in saved.items()}))
    return BundleMember(
        name=member.path.stem,
        weights=path.name,
        weight=weight,
        views=views,
        expected=expected,
        checkpoint=None if standalone else f"../{member.path.name}",
    )


def write_classes(path: Path, meta: MemberMeta, converted: Path) -> None:
    """Write the classes, their counts, and their names where the classes that convert wrote are the same.

    The predictor follows samples by the names, and falls back on the counts when bundle.json is missing or damaged. The
    checksum of a row covers its names too.
    """
    rows = [
        {"class_idx": str(position), "category_id": str(class_id), "n": str(count)}
        for position, (class_id, count) in enumerate(zip(meta.class_ids, meta.class_counts, strict=True))
    ]
    known = read_class_rows(converted) if converted.is_file() else []
    if [row["category_id"] for row in known] == [row["category_id"] for row in rows]:
        names = [name for name in known[0] if name not in (*rows[0], CHECK)]
        rows = [
            {**row, **{name: of_class[name] or "" for name in names}}
            for row, of_class in zip(rows, known, strict=True)
        ]
    write_csv(path, sealed_rows(rows, tuple(rows[0]), count=len(rows)))


def crop_of(meta: MemberMeta, height: int, width: int) -> ViewCrop:
    """The crop of one view of a member."""
    return ViewCrop(
        height=height,
        width=width,
        factor=meta.resize_factor,
        interpolation=meta.interpolation,
        stored_side=meta.stored_side,
    )


def write_programs(
    paths: list[Path], weights: np.ndarray, *, recipe: Recipe, temperature: float, arrays: Sequence[str] = ()
) -> Path:
    """Write the programs for a predictor without a bundle beside an experiment's members; returns their folder."""
    target = runs.MODELS / recipe.exp.name / PROGRAMS
    with temporary_bundle(target) as folder:
        write_bundle(
            folder,
            load_members(paths, "fp32"),
            weights=weights,
            recipe=recipe,
            temperature=temperature,
            arrays=arrays,
            standalone=False,
        )
        publish(folder, target)
    return target


@contextmanager
def temporary_bundle(target: Path = runs.BUNDLE) -> Iterator[Path]:
    """Context manager: a new folder beside `target`, deleted on exit unless `publish` took it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(target.parent, target.name)
    with temporary_folder(temporary_path(target), target, contents=CONTENTS) as folder:
        yield folder


def publish(folder: Path, target: Path = runs.BUNDLE) -> None:
    """Replace the bundle at `target` by a finished folder, atomically where the file system supports it."""
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors creates files as 0600, and another user may run the predictor
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    swap_in(folder, target, contents=CONTENTS)
