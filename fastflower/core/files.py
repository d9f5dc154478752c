"""Atomic replacement of files and folders, locks, JSON, digests, and the removal of abandoned temporary files."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from fastflower.core.errors import EnvironmentFault, InputError

ABANDONED_AFTER = 24 * 3600.0  # seconds
TEMPORARY = re.compile(r"\..+\.(?P<pid>\d+)-(?P<namespace>[0-9a-f]{8})\.tmp", re.DOTALL)
RENAME_EXCHANGE, AT_FDCWD = 2, -100  # of renameat2(2)


def replace_atomic(temporary: Path, path: Path) -> None:
    """Move a finished temporary file to its path: fsync the file, rename it, fsync the folder."""
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def temporary_path(path: Path, pid: int | None = None) -> Path:
    """The path at which a process writes a file before moving it to `path`; no reader's pattern matches it."""
    return path.with_name(f".{path.name}.{os.getpid() if pid is None else pid}-{process_namespace()}.tmp")


def is_abandoned(temporary: Path) -> bool:
    """True for a temporary path whose writing process is gone.

    A PID from another machine or container cannot be checked; such a file counts as abandoned after 24 h without a
    write.
    """
    name = TEMPORARY.fullmatch(temporary.name)
    if name is None:
        return False
    if name["namespace"] == process_namespace():
        return not _is_running(int(name["pid"]))
    try:
        return time.time() - temporary.lstat().st_mtime > ABANDONED_AFTER
    except OSError:  # another process has removed it
        return False


def _is_running(pid: int) -> bool:
    """True if a process exists, also one of another user or one that /proc hides."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


@cache
def process_namespace() -> str:
    """An 8-character id of this boot and PID namespace; processes with the same id can check each other's PIDs.

    Host names would not do: machines cloned from one image, and containers of one machine, may share theirs. Without
    /proc the id is of this process and its children alone.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
        container = os.readlink("/proc/self/ns/pid")
    except OSError:
        boot, container = uuid.uuid4().hex, ""
    return digest(boot, container)[:8]


def remove_abandoned(folder: Path, name: str = "*", *, below: bool = False) -> None:
    """Delete the temporary files and folders that killed processes left behind.

    `name` is a glob of the names they were written for; `below` also searches subfolders.
    """
    for temporary in filter(is_abandoned, list(folder.glob(f"{'**/' * below}.{name}.*.tmp"))):
        remove(temporary)


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with its content; nothing when there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Context manager: a temporary path to write, moved to `path` on success and deleted on error.

    Readers see the old file or the complete new one, never a part. What killed writers of `path` left is deleted.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path.parent, glob.escape(path.name))
    temporary = temporary_path(path)
    try:
        yield temporary
        replace_atomic(temporary, path)
    except OSError as error:
        # a failed write does not name its file
        if error.errno is not None and error.filename in (None, os.fspath(temporary), temporary):
            error.filename = os.fspath(path)
        raise
    finally:
        with suppress(OSError):  # it hides no error of the write
            temporary.unlink(missing_ok=True)


@contextmanager
def filling(target: Path) -> Iterator[Path]:
    """Context manager: a folder that becomes `target` on success and is deleted on error, so none is half filled.

    What killed writers of `target` left is deleted. Raises InputError for a target with anything in it.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} is not empty; remove it, or give another folder")
    target = target.resolve()  # a link stays one
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(target.parent, glob.escape(target.name))
    folder = temporary_path(target)
    folder.mkdir()
    try:
        yield folder
        folder.replace(target)
    finally:
        remove(folder)


def check_writable(*folders: Path) -> None:
    """Create folders, and raise PermissionError for one in which this process may not write: before minutes of work."""
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))


@contextmanager
def scratch_folder(purpose: str) -> Iterator[Path]:
    """Context manager: a new folder for temporary files of this process, deleted on exit.

    Deletes those of this user's killed processes, or gigabytes would pile up in the system's temporary folder: first,
    and again on exit, when the processes that a killed one had started no longer write there.
    """
    _remove_abandoned_scratch()
    ending = f".{os.getpid()}-{process_namespace()}.tmp"
    folder = Path(tempfile.mkdtemp(prefix=f".fastflower-{purpose}-", suffix=ending))
    try:
        yield folder
    finally:
        remove(folder)
        _remove_abandoned_scratch()


def _remove_abandoned_scratch() -> None:
    for folder in Path(tempfile.gettempdir()).glob(".fastflower-*.tmp"):
        with suppress(OSError):  # another process has removed it
            if is_abandoned(folder) and folder.lstat().st_uid == os.getuid():
                remove(folder)


@contextmanager
def temporary_folder(folder: Path, target: Path, *, contents: Sequence[str]) -> Iterator[Path]:
    """Context manager: an empty folder that `swap_in` can put at `target`; leftovers are deleted on exit.

    First restores a target that a process killed within `swap_in` had moved away, and refuses a target that `swap_in`
    would refuse.
    """
    _restore(target)
    _check_replaceable(target, contents)
    remove(folder)
    folder.mkdir()
    try:
        yield folder
    finally:
        _restore(target)
        remove(folder)


def swap_in(folder: Path, target: Path, *, contents: Sequence[str]) -> None:
    """Swap a finished folder with the existing target, atomically where the file system supports it.

    `contents`: globs of the files that fastflower writes into the target. Raises InputError when the target holds
    anything else, which would be deleted with it.
    """
    _check_replaceable(target, contents)
    if not target.exists():
        os.rename(folder, target)
    elif not _exchange(folder, target):
        os.rename(target, _moved_away(target))
        os.rename(folder, target)
    fsync_folder(target.parent)


def _check_replaceable(target: Path, contents: Sequence[str]) -> None:
    """Refuse a target that is no folder, or one with entries that fastflower did not write."""
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise InputError(f"{target} is not a folder; move it away")
    foreign = sorted(
        path.name
        for path in target.iterdir()
        if path.is_dir() or not (any(map(path.match, contents)) or TEMPORARY.fullmatch(path.name))
    )
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise InputError(
            f"{target} holds {foreign[0]!r}{more}, which would be deleted when the folder is replaced; "
            f"move it away (the folder is for {', '.join(contents)})"
        )


def _restore(target: Path) -> None:
    """Move the old folder back when `swap_in` was killed between its two renames; else delete it."""
    old = _moved_away(target)
    if old.exists() and not target.exists():
        os.rename(old, target)
    remove(old)


def _moved_away(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two folders atomically; False where the file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = (AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE)
    if libc.renameat2(*arguments) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(second))


@contextmanager
def locked(path: Path, message: str) -> Iterator[None]:
    """Context manager: hold an exclusive lock on a file, which is created and afterwards removed.

    Folders that it created and that are still empty go too; the kernel frees the lock of a killed process. Raises
    EnvironmentFault(message) while another process holds the lock, with {pid} in the message replaced by that
    process's PID; OSError when the file cannot be created.
    """
    handle, created = _open_lock(path)
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(handle, 64, 0).decode("ascii", "replace").strip() or "?"
                raise EnvironmentFault(message.replace("{pid}", holder)) from None
            if _is_file_of(handle, path):
                break
            os.close(handle)  # its holder has just removed it
            handle, more = _open_lock(path)
            created += more
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # while the lock is held: nobody else can hold this file
            with suppress(OSError):  # not empty
                for folder in created:
                    folder.rmdir()
    finally:
        os.close(handle)


def is_locked(path: Path) -> bool:
    """True while a process holds the lock of a file (see `locked`)."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def _open_lock(path: Path) -> tuple[int, list[Path]]:
    """A descriptor of a lock's file, and the folders created for it, the innermost first."""
    created = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
    for attempt in range(100):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), created
        except (
            FileNotFoundError,
            FileExistsError,
        ):  # another process removes the empty folder at this moment
            if attempt == 99:
                raise
    raise AssertionError


def _is_file_of(handle: int, path: Path) -> bool:
    """True if a path still names the file that a descriptor has open."""
    try:
        return path.stat().st_ino == os.fstat(handle).st_ino
    except FileNotFoundError:
        return False


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a small file so that readers see the old content or the new, never a part."""
    with replacing(path) as temporary:
        temporary.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, keys in the order given; NaN becomes null."""
    write_atomic(path, json.dumps(finite(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def digest(*values: bytes | str) -> str:
    """Sixteen hex characters of the SHA-256 of the values, each length-prefixed."""
    total = hashlib.sha256()
    for value in values:
        data = value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value
        total.update(len(data).to_bytes(8, "little"))
        total.update(data)
    return total.hexdigest()[:16]


def finite(value: Any) -> Any:
    """A tree of dicts, lists and numbers as JSON takes it: NaN and infinity are None, NumPy scalars are Python's."""
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    if isinstance(value, dict):
        return {str(name): finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value.item() if hasattr(value, "item") and not isinstance(value, str) else value
