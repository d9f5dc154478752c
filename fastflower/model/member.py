"""Members: checkpoints whose description lets evaluate and export rebuild network, crop and classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from fastflower.core import checkpoint
from fastflower.core.errors import InputError
from fastflower.core.records import FieldError, from_plain, to_plain
from fastflower.model.handed_in import handed_in
from fastflower.model.network import NetworkSpec


@dataclass(frozen=True, kw_only=True)
class MemberMeta(NetworkSpec):
    """The description of a member: its network, crop, classes, run and scores."""

    resize_factor: float  # short side before the centre crop / side of the crop; 0: no crop
    stored_side: int  # short side of the images in the betons, pixels
    class_ids: tuple[str, ...]
    class_hash: str
    class_counts: tuple[int, ...]  # training images of each class
    folds_hash: str
    exp: str
    fold: int
    seed: int
    epoch: int  # from 1
    recipe: str  # YAML
    version: str  # of fastflower
    kind: str  # one of core.runs.KINDS
    weights: str  # raw, ema or swa
    scores: dict[str, float | None]  # by metric and weights, such as clean_ema; empty for a soup
    soup: tuple[str, ...] = ()  # the files whose weights were averaged
    time: str = ""  # when it was written: 2026-01-31 23:59:59


@dataclass(frozen=True)
class MemberCheckpoint:
    """A member as read from its file: description, and the network's tensors by canonical name."""

    meta: MemberMeta
    tensors: dict[str, Tensor]


def load_member(path: Path) -> MemberCheckpoint:
    """Read a member onto the CPU; of a `last`, the adapters merged into their weights and the main head alone.

    Raises CorruptionError for a damaged file, InputError for a missing or foreign one or an incomplete description.
    """
    content = checkpoint.load(path)
    return MemberCheckpoint(parse_meta(content.meta, path), handed_in(content.tensors))


def save_member(path: Path, tensors: dict[str, Tensor], meta: MemberMeta) -> None:
    """Write a member atomically, adapters merged and without auxiliary heads; NaN scores become null."""
    checkpoint.save(path, handed_in(tensors), to_plain(meta))


def parse_meta(meta: Mapping[str, Any], path: Path) -> MemberMeta:
    """The description in a checkpoint; `last` has further keys, which are ignored. InputError when it is incomplete."""
    known = {field.name: meta[field.name] for field in fields(MemberMeta) if field.name in meta}
    missing = [
        field.name for field in fields(MemberMeta) if field.name not in known and field.default is MISSING
    ]
    if missing:
        raise InputError(
            f"{path}: its description lacks {', '.join(missing)}; use a checkpoint that train wrote"
        )
    try:
        return from_plain(MemberMeta, known)
    except FieldError as error:
        raise InputError(f"{path}: in its description {error}; use a checkpoint that train wrote") from None
