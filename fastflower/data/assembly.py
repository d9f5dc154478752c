"""A set of betons beside the one in place: assembled from the spool by worker processes, then exchanged in one step.

A conversion that is killed at any moment leaves the old set or the new one, whole; the next removes what it left.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fastflower import runs
from fastflower.data import sets, spool, workers
from fastflower.data.betons import BetonWriter, manifest_path
from fastflower.data.folds import Folds

EXCHANGE, HERE = 2, -100  # RENAME_EXCHANGE and AT_FDCWD of renameat2(2)


@contextmanager
def new_set(home: Path) -> Iterator[Path]:
    """An empty folder in which a set grows; gone afterwards, with what is left of the old set."""
    place = _place(home)
    folder, old = _beside(place, "new"), _beside(place, "old")
    if old.exists() and not place.exists():  # killed between the two renames of `put_in_place`
        os.rename(old, place)
    for left in (folder, old):
        shutil.rmtree(left, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def put_in_place(home: Path, folder: Path) -> None:
    """Make a finished folder the set of `home`, and what was there the folder, in one step where the disk can."""
    place = _place(home)
    if not place.exists():
        os.rename(folder, place)
    elif not _exchange(folder, place):
        os.rename(place, _beside(place, "old"))
        os.rename(folder, place)
    runs.fsync_folder(place.parent)


def keep(home: Path, folder: Path, wanted: dict[str, Any]) -> bool:
    """Take over a beton of the set in place that is still what is wanted; a link, not a copy."""
    if not sets.is_current(home / "betons", wanted):
        return False
    name = sets.beton_name(wanted.get("fold", -1), wanted["split"])
    try:
        for path in (home / "betons" / name, manifest_path(home / "betons" / name)):
            os.link(path, folder / path.name)
    except OSError:  # a disk without links
        return False
    return True


def write_betons(
    folder: Path,
    manifests: list[dict[str, Any]],
    folds: Folds,
    images: spool.Spool,
    good: np.ndarray,
    count: int,
) -> None:
    """Write the betons that the manifests describe, each by one of `count` processes."""

    def write(wanted: dict[str, Any]) -> None:
        split, fold = wanted["split"], wanted["fold"]
        rows, columns = rows_of(folds, wanted), columns_of(wanted)
        path = folder / sets.beton_name(fold, split)
        with BetonWriter(path, len(rows) * len(columns), images.blobs.shape[1]) as writer:
            for column in columns:
                for row in rows.tolist():
                    writer.append(int(folds.class_idx[row]), row, *images.read(int(good[row]), column))
                    workers.beat()
            writer.commit(wanted)

    total = sum(len(rows_of(folds, wanted)) * len(columns_of(wanted)) for wanted in manifests)
    tasks = ((wanted,) for wanted in manifests)
    for _ in workers.run(write, tasks, min(count, len(manifests)), spool.Progress("rows", total)):
        pass


def rows_of(folds: Folds, wanted: dict[str, Any]) -> np.ndarray:
    return folds.train_rows(wanted["fold"]) if wanted["split"] == "train" else folds.val_rows(wanted["fold"])


def columns_of(wanted: dict[str, Any]) -> list[int]:
    """The columns of the spool that a beton holds, one after the other."""
    if wanted["split"] == "val_corrupt":
        return [spool.CORRUPT + position for position in range(len(wanted["combos"]))]
    return [spool.TRAIN if wanted["split"] == "train" else spool.VAL]


def _place(home: Path) -> Path:
    """Where the betons really lie: betons/ may be a link to another disk."""
    return Path(os.path.realpath(home / "betons"))


def _beside(place: Path, what: str) -> Path:
    return place.with_name(f".{place.name}.{what}")


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step; False where the file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(HERE, os.fsencode(one), HERE, os.fsencode(other), EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(other))
