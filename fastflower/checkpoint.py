"""Checkpoints: plain tensors, numbers and text in torch's zip format, checked before use, never executed.

torch.save writes a CRC-32 for every part and torch.load does not read it; flipped bits load silently.
So the CRCs are checked first, and only plain types are unpickled (`weights_only=True`).
"""

from __future__ import annotations

import json
import pickle
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastflower import runs
from fastflower.errors import CorruptionError, InputError

FORMAT = 1


@dataclass
class Checkpoint:
    """What a file held: the network's tensors by canonical name, its description, and any further state."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any]
    more: dict[str, Any] = field(default_factory=dict)


def save(path: Path, tensors: dict[str, Tensor], meta: dict[str, Any], **more: Any) -> None:
    """Write a checkpoint aside, check what the disk holds, and put it in place in one rename.

    `more` is a tree of dicts, lists, tensors, numbers and text (optimizer state, counters).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = runs.aside_of(path)
    content = {
        "fastflower": FORMAT,
        "meta": json.dumps(meta, ensure_ascii=False),
        "tensors": {name: _own(tensor) for name, tensor in tensors.items()},
        "more": more,
    }
    try:
        torch.save(content, aside)
        _check_crc(aside)
        runs.replace_atomic(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def load(path: Path) -> Checkpoint:
    """Read a checkpoint onto the CPU.

    Raises CorruptionError for a damaged file and InputError for a missing or foreign one.
    """
    if not path.is_file():
        raise InputError(f"no checkpoint {path}")
    _check_crc(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise InputError(f"{path}: not a plain checkpoint, and nothing in it was run ({reason})") from None
    if not isinstance(content, dict) or "fastflower" not in content:
        raise InputError(f"{path}: not a checkpoint of fastflower; give one that its training wrote")
    if content["fastflower"] != FORMAT:
        raise InputError(
            f"{path}: written in format {content['fastflower']}, this version reads format {FORMAT}"
        )
    return Checkpoint(content["tensors"], json.loads(content["meta"]), content["more"])


def _own(tensor: Tensor) -> Tensor:
    """A CPU copy that shares no storage, so that a view does not save its whole base."""
    return tensor.detach().to("cpu", copy=True)


def _check_crc(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError) as error:
        raise CorruptionError(f"{path}: cut short or damaged ({error}); use an older checkpoint") from None
    if bad is not None:
        raise CorruptionError(f"{path}: damaged in {bad}; use an older checkpoint")
