"""A set of betons beside the one in place: assembled from the spool by worker processes, then exchanged in one step.

A conversion that is killed at any moment leaves the old set or the new one, whole; the next removes what it left.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fastflower.core import files, workers
from fastflower.core.errors import EnvironmentFault
from fastflower.data.betons import fold_set
from fastflower.data.betons.beton_file import JPEG, RAW, BetonWriter, Picture, manifest_path
from fastflower.data.conversion import encode
from fastflower.data.folds import Folds
from fastflower.data.readers.image_files import encode_jpeg
from fastflower.data.transforms.corruptions import corrupt, image_key, jpeg_bytes


@contextmanager
def new_set(home: Path) -> Iterator[Path]:
    """An empty folder in which a set grows; gone afterwards, with what is left of the old set."""
    place = _place(home)
    if place.exists() and not place.is_dir():
        raise EnvironmentFault(f"{home / 'betons'} is no folder; move it away, or choose another data.home")
    with files.growing(place.with_name(f".{place.name}.new"), place) as folder:
        yield folder


def put_in_place(home: Path, folder: Path) -> None:
    """Make a finished folder the set of `home`."""
    files.put_in_place(folder, _place(home))


def keep(home: Path, folder: Path, wanted: dict[str, Any]) -> bool:
    """Take over a beton of the set in place that is still what is wanted; a link, not a copy."""
    if not fold_set.is_current(home / "betons", wanted):
        return False
    name = fold_set.beton_name(wanted.get("fold", -1), wanted["split"])
    try:
        for path in (home / "betons" / name, manifest_path(home / "betons" / name)):
            os.link(path, folder / path.name)
    except OSError:  # a disk without links
        return False
    return True


def write_betons(
    folder: Path,
    manifests: list[dict[str, Any]],
    *,
    folds: Folds,
    images: encode.Spool,
    good: np.ndarray,
    count: int,
    meanwhile: Callable[[], object],
) -> None:
    """Write the betons that the manifests describe by `count` processes; `meanwhile` is work for this one.

    Corrupted copies are made here: an image validates one fold, so each is made once.
    """

    def write(wanted: dict[str, Any]) -> None:
        rows, combos = rows_of(folds, wanted), wanted["combos"] or [None]
        column = {"train": encode.TRAIN, "val": encode.VAL, "val_corrupt": encode.PIXELS}[wanted["split"]]
        path = folder / fold_set.beton_name(wanted["fold"], wanted["split"])
        with BetonWriter(path, len(rows) * len(combos), images.blobs.shape[1]) as writer:
            for combo in combos:
                stored = images.read(good[rows], column)
                for row, label, pictures in zip(
                    rows.tolist(), folds.class_idx[rows].tolist(), stored, strict=True
                ):
                    if combo:
                        pictures = corrupted(
                            pictures, folds.filenames[row], combo=combo, settings=wanted["settings"]
                        )
                    writer.append(label, row, *pictures)
                    workers.beat()
            writer.commit(wanted)

    # the longest work first, for an even end
    manifests = sorted(manifests, key=lambda wanted: ("val_corrupt", "train", "val").index(wanted["split"]))
    total = sum(len(rows_of(folds, wanted)) * max(1, len(wanted["combos"])) for wanted in manifests)
    tasks = ((wanted,) for wanted in manifests)
    for _ in workers.run(
        write,
        tasks,
        count=min(count, len(manifests)),
        tell=workers.Progress("rows", total),
        meanwhile=meanwhile,
    ):
        pass


def rows_of(folds: Folds, wanted: dict[str, Any]) -> np.ndarray:
    return folds.train_rows(wanted["fold"]) if wanted["split"] == "train" else folds.val_rows(wanted["fold"])


def corrupted(
    pictures: list[Picture], name: str, *, combo: list[str], settings: dict[str, Any]
) -> list[Picture]:
    """The disturbed copies of a row's raw pictures, as its settings store them; the two of a pair differ."""
    (kind, level), made = combo, []
    for place, picture in enumerate(pictures):
        pixels = np.frombuffer(picture.data, np.uint8).reshape(picture.height, picture.width, 3)
        key = image_key(name if place == 0 else f"{name}:{place}")
        data: bytes | memoryview
        if settings["store"] == "raw":
            mode, data = RAW, corrupt(pixels, kind, level=level, key=key).data.cast("B")
        elif kind == "jpeg":  # a file as it is
            mode, data = JPEG, jpeg_bytes(pixels, level)
        else:
            mode, data = (
                JPEG,
                encode_jpeg(corrupt(pixels, kind, level=level, key=key), settings["jpeg_quality"]),
            )
        made.append(Picture(mode, data, picture.height, picture.width))
    return made


def _place(home: Path) -> Path:
    """Where the betons really lie: betons/ may be a link to another disk."""
    return Path(os.path.realpath(home / "betons"))
