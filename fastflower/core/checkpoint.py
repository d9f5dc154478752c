"""Checkpoints: plain tensors, numbers and text in torch's zip format, checked before use, never executed.

torch.save writes a CRC-32 for every zip entry, but torch.load does not check it, so flipped bits load silently, also
in the zip's headers. A CRC-32 of the whole file is therefore appended as the zip's comment, which torch.load skips.
It is checked first, and only plain types are unpickled (`weights_only=True`).
"""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isal.isal_zlib import crc32

from fastflower.core import files
from fastflower.core.errors import CorruptionError, InputError
from fastflower.core.host_copies import HostCopies

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
SEAL = struct.Struct("<4sI")  # mark, CRC-32 of all bytes before the comment
MARK = b"ffCK"
END_OF_ZIP = 22  # bytes of a zip's last record without comment; its last two bytes are the comment's length


@dataclass
class Checkpoint:
    """The content of a file: the network's tensors by canonical name, its description, and training state."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any]
    training_state: dict[str, Any] = field(default_factory=dict)


def save(path: Path, tensors: dict[str, Tensor], meta: dict[str, Any], **training_state: Any) -> None:
    """Write a checkpoint atomically: to a temporary file, which is read back and checked, then renamed.

    `training_state` is a tree of dicts, lists, tensors, numbers and text (optimizer state, counters). The tensors must
    not change during the call: see `snapshot`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = files.temporary_path(path)
    content = {
        "fastflower": FORMAT,
        "meta": json.dumps(meta, ensure_ascii=False),
        "tensors": _compact(tensors),
        "more": _compact(training_state),
    }
    try:
        _write(content, temporary)
        add_seal(temporary)
        check_seal(temporary, "the disk did not keep what was written; write to another")
        files.replace_atomic(temporary, path)
    except OSError as error:
        error.filename = os.fspath(path)  # a failed write does not name its file
        raise
    finally:
        with suppress(OSError):  # it hides no error of the write
            temporary.unlink(missing_ok=True)


def _write(content: dict[str, Any], path: Path) -> None:
    """torch.save, whose errors of the disk are OSErrors: torch itself hides them behind its own."""
    import torch  # here, as below: it takes two seconds, which a look at a checksum does not spend

    try:
        with open(path, "wb") as file:
            torch.save(content, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def load(path: Path) -> Checkpoint:
    """Read a checkpoint onto the CPU.

    Raises CorruptionError for a damaged file and InputError for a missing or foreign one.
    """
    if not path.is_file():
        raise InputError(f"no checkpoint {path}")
    sealed = check_seal(path, "use an older checkpoint")
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise InputError(f"{path}: not a plain checkpoint, and nothing in it was run ({reason})") from None
    if not isinstance(content, dict) or "fastflower" not in content:
        raise InputError(f"{path}: not a checkpoint of fastflower; give one that train wrote")
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
    """The checksum at the end of a checkpoint, which tells it from another file of the same name; None without one."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - SEAL.size))
        tail = file.read()
    mark, crc = SEAL.unpack(tail) if len(tail) == SEAL.size else (b"", 0)
    return int(crc) if mark == MARK else None


def snapshot(tree: Any) -> Any:
    """A copy of a tree of dicts, lists and tensors, in which every tensor is copied to the CPU.

    The host waits for a GPU once and not for each tensor.
    """
    copies = HostCopies()
    copied = _map_tensors(tree, copies.add)
    copies.wait()
    return copied


def _compact(tree: Any) -> Any:
    """The tree with tensors on the CPU; views are copied, because torch.save would write all of their base tensor."""

    def compact(tensor: Tensor) -> Tensor:
        tensor = tensor.detach().cpu()
        return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()

    return _map_tensors(tree, compact)


def _map_tensors(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    from torch import Tensor

    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, dict):
        return {key: _map_tensors(value, change) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_map_tensors(value, change) for value in tree)
    return tree


def add_seal(path: Path) -> None:
    """Append the checksum of a zip file to it, registered as the zip's comment, which readers of zip files skip."""
    with open(path, "r+b") as file:
        file.seek(-END_OF_ZIP, 2)
        if file.read(4) != b"PK\5\6":
            raise RuntimeError(f"{path}: torch.save did not end it with a plain zip record")
        file.seek(-2, 2)
        file.write(struct.pack("<H", SEAL.size))
        file.flush()
        file.seek(0, 2)
        file.write(SEAL.pack(MARK, _crc(path, file.tell())))


def check_seal(path: Path, remedy: str) -> bool:
    """True for a valid checksum, False without one; CorruptionError for a wrong one or a file that is not a zip."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(max(0, size - SEAL.size))
        tail = file.read()
    mark, crc = SEAL.unpack(tail) if len(tail) == SEAL.size else (b"", 0)
    if mark != MARK and zipfile.is_zipfile(path):
        return False
    if mark != MARK or _crc(path, size - SEAL.size) != crc:
        raise CorruptionError(f"{path}: cut short or damaged; {remedy}")
    return True


def _crc(path: Path, size: int) -> int:
    """CRC-32 of the first `size` bytes of a file, read in chunks of 16 MiB."""
    crc = 0
    with open(path, "rb") as file:
        while size > 0:
            chunk = file.read(min(size, 1 << 24))
            if not chunk:
                break
            crc, size = crc32(chunk, crc), size - len(chunk)
    return crc
