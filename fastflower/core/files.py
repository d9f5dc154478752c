"""Atomic replacement of files and folders, JSON, digests, and the removal of abandoned temporary files."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

ABANDONED_AFTER = 24 * 3600.0  # seconds


EXCHANGE, HERE = 2, -100  # RENAME_EXCHANGE and AT_FDCWD of renameat2(2)


def replace_atomic(aside: Path, path: Path) -> None:
    """Put a finished file in place: fsync it, rename it, fsync the folder."""
    with open(aside, "rb") as file:
        os.fsync(file.fileno())
    os.replace(aside, path)
    fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def aside_of(path: Path, pid: int | None = None) -> Path:
    """The name under which a file is written before it is put in place; no reader's pattern matches it."""
    return path.with_name(f".{path.name}.{os.getpid() if pid is None else pid}-{neighbourhood()}.tmp")


def abandoned(aside: Path) -> bool:
    """Whether it is such a name, and the process that wrote under it is gone.

    Those of another machine or container on a shared disk cannot be asked after; a day without a change says it.
    """
    pid, _, where = aside.name.split(".")[-2].partition("-")
    if not pid.isdigit():
        return False
    if where == neighbourhood():
        return not Path(f"/proc/{pid}").exists()
    try:
        return time.time() - aside.lstat().st_mtime > ABANDONED_AFTER
    except OSError:  # swept by another
        return False


@cache
def neighbourhood() -> str:
    """Eight characters for those processes that can see each other: of this machine since it started, and container.

    Not the machine's name: those made from one image may share it.
    """
    try:
        started = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
        container = os.readlink("/proc/self/ns/pid")
    except OSError:
        started, container = platform.node(), ""
    return digest(started, container)[:8]


def sweep(folder: Path, name: str = "*", *, below: bool = False) -> None:
    """Remove what killed processes left of files and folders of a name, there and in the folders `below`."""
    for left in filter(abandoned, list(folder.glob(f"{'**/' * below}.{name}.*.tmp"))):
        remove(left)


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder and all in it; nothing when there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The name under which to write a file that readers see as it was or whole, never a part; in place at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = aside_of(path)
    try:
        yield aside
        replace_atomic(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def growing(folder: Path, place: Path) -> Iterator[Path]:
    """A new, empty folder that `put_in_place` may take; gone afterwards, with what it replaced.

    What a process killed in `put_in_place` moved away is put back first.
    """
    _settle(place)
    remove(folder)
    folder.mkdir()
    try:
        yield folder
    finally:
        _settle(place)
        remove(folder)


def put_in_place(folder: Path, place: Path) -> None:
    """Make a finished folder the one in place, and what was there the folder, in one step where the disk can."""
    if not place.exists():
        os.rename(folder, place)
    elif not _exchange(folder, place):
        os.rename(place, _old(place))
        os.rename(folder, place)
    fsync_folder(place.parent)


def _settle(place: Path) -> None:
    """Put back what `put_in_place` moved away when it was cut between its two renames; else remove it."""
    old = _old(place)
    if old.exists() and not place.exists():
        os.rename(old, place)
    remove(old)


def _old(place: Path) -> Path:
    return place.with_name(f".{place.name}.old")


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step; False where the file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(HERE, os.fsencode(one), HERE, os.fsencode(other), EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(other))


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a small file so that readers see the old content or the new, never a part."""
    with replacing(path) as aside:
        aside.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, keys in the order given; NaN becomes null."""
    write_atomic(path, json.dumps(finite(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def digest(*parts: bytes | str) -> str:
    """Sixteen hex characters of the SHA-256 of the parts, each length-prefixed."""
    total = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
        total.update(len(data).to_bytes(8, "little"))
        total.update(data)
    return total.hexdigest()[:16]


def finite(value: Any) -> Any:
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    if isinstance(value, dict):
        return {str(name): finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value.item() if hasattr(value, "item") and not isinstance(value, str) else value
