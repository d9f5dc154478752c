"""Checkpoints: plain tensors, numbers and text in torch's zip format, checked before use, never executed.

torch.save writes a CRC-32 for every part and torch.load does not read it; flipped bits load silently, in the
zip's own headers too. So a CRC-32 of the whole file ends it, as the zip's comment, which torch.load passes over;
it is checked first, and only plain types are unpickled (`weights_only=True`).
"""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from isal.isal_zlib import crc32
from torch import Tensor

from fastflower.core import files
from fastflower.core.errors import CorruptionError, InputError

FORMAT = 1
SEAL = struct.Struct("<4sI")  # mark, CRC-32 of all before it
MARK = b"ffCK"
END_OF_ZIP = (
    22  # bytes of the record that ends a zip without a comment; its last two are the comment's length
)


@dataclass
class Checkpoint:
    """What a file held: the network's tensors by canonical name, its description, and any further state."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any]
    more: dict[str, Any] = field(default_factory=dict)


def save(path: Path, tensors: dict[str, Tensor], meta: dict[str, Any], **more: Any) -> None:
    """Write a checkpoint aside, check what the disk holds, and put it in place in one rename.

    `more` is a tree of dicts, lists, tensors, numbers and text (optimizer state, counters). Nothing may change
    meanwhile: see `snapshot`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = files.aside_of(path)
    content = {
        "fastflower": FORMAT,
        "meta": json.dumps(meta, ensure_ascii=False),
        "tensors": _alone(tensors),
        "more": _alone(more),
    }
    try:
        torch.save(content, aside)
        _seal(aside)
        _check_seal(aside)
        files.replace_atomic(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def load(path: Path) -> Checkpoint:
    """Read a checkpoint onto the CPU.

    Raises CorruptionError for a damaged file and InputError for a missing or foreign one.
    """
    if not path.is_file():
        raise InputError(f"no checkpoint {path}")
    sealed = _check_seal(path)
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
    if not sealed:
        raise CorruptionError(
            f"{path}: cut short or damaged (its checksum is missing); use an older checkpoint"
        )
    return Checkpoint(content["tensors"], json.loads(content["meta"]), content["more"])


def seal(path: Path) -> int | None:
    """The checksum that ends a file, by which another one of the same name is known; None where there is none."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - SEAL.size))
        tail = file.read()
    mark, crc = SEAL.unpack(tail) if len(tail) == SEAL.size else (b"", 0)
    return int(crc) if mark == MARK else None


def snapshot(tree: Any) -> Any:
    """A tree of dicts, lists and tensors with every tensor copied to the CPU; the rest as it is."""
    return _each(tree, lambda tensor: tensor.detach().to("cpu", copy=True))


def _alone(tree: Any) -> Any:
    """The tree with tensors on the CPU, copied where they are views, which would save their whole base."""

    def own(tensor: Tensor) -> Tensor:
        tensor = tensor.detach().cpu()
        return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()

    return _each(tree, own)


def _each(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, dict):
        return {key: _each(value, change) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_each(value, change) for value in tree)
    return tree


def _seal(path: Path) -> None:
    """Append the checksum and announce it as the zip's comment."""
    with open(path, "r+b") as file:
        file.seek(-END_OF_ZIP, 2)
        if file.read(4) != b"PK\5\6":
            raise RuntimeError(f"{path}: torch.save ended it in an unknown way")
        file.seek(-2, 2)
        file.write(struct.pack("<H", SEAL.size))
        file.flush()
        file.seek(0, 2)
        file.write(SEAL.pack(MARK, _crc(path, file.tell())))


def _check_seal(path: Path) -> bool:
    """Whether the file ends in a checksum; raises CorruptionError when it is wrong, or the file is no zip at all."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(max(0, size - SEAL.size))
        tail = file.read()
    mark, crc = SEAL.unpack(tail) if len(tail) == SEAL.size else (b"", 0)
    if mark != MARK and zipfile.is_zipfile(path):
        return False
    if mark != MARK or _crc(path, size - SEAL.size) != crc:
        raise CorruptionError(f"{path}: cut short or damaged; use an older checkpoint")
    return True


def _crc(path: Path, size: int) -> int:
    """CRC-32 of a file's first `size` bytes, in pieces of 16 MiB."""
    crc = 0
    with open(path, "rb") as file:
        while size > 0:
            piece = file.read(min(size, 1 << 24))
            if not piece:
                break
            crc, size = crc32(piece, crc), size - len(piece)
    return crc
