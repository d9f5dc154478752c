"""Content hashes of the files that images are read from, remembered so that an unchanged file is not read again.

A file's state is its path, size, inode and its times of change to the nanosecond. The hash of a state that was seen
before is looked up in a file below data.home; any other file is read. mtime alone proves nothing, as tools set it back;
ctime is set by the kernel whenever bytes or times change. States younger than YOUNG are not remembered, because a
second change within one tick of the file system's clock would leave the same state.

What remains possible: a file rewritten while the system clock is set back to the very nanosecond, on a disk that is
written to beneath its file system, or on a network share that hides changes from this machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from fastflower.core.errors import InputError
from fastflower.core.files import digest
from fastflower.core.records import read_record, write_record
from fastflower.core.workers import cores

YOUNG = 2 * 10**9  # nanoseconds; the coarsest clock of a file system in use, FAT's, ticks every two seconds


@dataclass(frozen=True)
class Contents:
    """SHA-256 of each file by its state."""

    FORMAT: ClassVar[int] = 1
    REMEDY: ClassVar[str] = "delete it"

    sha256: dict[str, str]


def content_hash(memory: Path, files: Sequence[str]) -> str:
    """Hash of the content of files, in their order; files of an unknown state are read, in threads, and remembered."""
    known, states = _known(memory), file_states(files)
    unread = [position for position, state in enumerate(states) if state not in known]
    content = [known.get(state, "") for state in states]
    with ThreadPoolExecutor(cores(0)) as pool:
        hashes = pool.map(_sha256, (files[position] for position in unread))
        for position, sha256 in zip(unread, hashes, strict=True):
            content[position] = sha256
    if any(states[position] and content[position] for position in unread):
        remember(memory, states, content)
    return hash_of(content)


def hash_of(content: Iterable[str]) -> str:
    """The hash that `content_hash` gives files of this content."""
    return digest(*content)


def file_states(files: Iterable[str]) -> list[str]:
    """The state of each file as a key, to be taken before the file is read; empty where it must not be remembered."""
    now = time.time_ns()
    return [_state(file, now) for file in files]


def remember(memory: Path, states: Sequence[str], content: Sequence[str]) -> None:
    """Replace what is known by the hashes of these states; where it cannot be written, files are read again."""
    known = {state: sha256 for state, sha256 in zip(states, content, strict=True) if state and sha256}
    with contextlib.suppress(OSError):
        write_record(memory, Contents(known))


def _known(memory: Path) -> dict[str, str]:
    try:
        return read_record(memory, Contents).sha256
    except InputError:  # missing or damaged: the files themselves tell
        return {}


def _state(file: str, now: int) -> str:
    try:
        found = os.stat(file)
    except OSError:
        return ""
    if max(found.st_mtime_ns, found.st_ctime_ns) > now - YOUNG:
        return ""
    return digest(
        os.path.abspath(file), f"{found.st_size} {found.st_ino} {found.st_mtime_ns} {found.st_ctime_ns}"
    )


def _sha256(file: str) -> str:
    """SHA-256 of a file; empty if it cannot be read, which the conversion reports when it reads the file."""
    try:
        with open(file, "rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError:
        return ""
