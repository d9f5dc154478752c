"""A set of betons written beside the current one by worker processes, then swapped in atomically.

A conversion that is killed at any moment leaves the complete old set or the complete new one; the next conversion
removes its temporary files.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from fastflower.core import files, workers
from fastflower.core.errors import EnvironmentFault
from fastflower.data.betons import fold_set
from fastflower.data.betons.beton_file import JPEG, RAW, EncodedImage
from fastflower.data.betons.beton_writer import BetonWriter
from fastflower.data.betons.manifest import Origin, StorageSettings, manifest_path
from fastflower.data.conversion import encode
from fastflower.data.folds import Folds
from fastflower.data.readers.image_files import encode_jpeg
from fastflower.data.transforms.corruptions import corrupt, image_key, jpeg_bytes

CONTENTS = ("*.beton", "*.beton.json")  # of betons/


@contextmanager
def new_set(home: Path) -> Iterator[Path]:
    """Context manager: an empty temporary folder for a new set of betons.

    On exit it is deleted, with the old set if `replace_set` has put it there.
    """
    betons = _betons_folder(home)
    if betons.exists() and not betons.is_dir():
        raise EnvironmentFault(
            f"{home / 'betons'} is not a folder; move it away, or choose another data.home"
        )
    new = betons.with_name(f".{betons.name}.new")
    with files.temporary_folder(new, betons, contents=CONTENTS) as folder:
        yield folder


def replace_set(home: Path, folder: Path) -> None:
    """Replace the betons of `home` by those in a finished folder."""
    files.swap_in(folder, _betons_folder(home), contents=CONTENTS)


def reuse(home: Path, folder: Path, origin: Origin) -> bool:
    """Hard-link a beton of the current set into the new one, if it has this origin; return whether it could."""
    if not fold_set.is_current(home / "betons", origin):
        return False
    beton = home / "betons" / fold_set.beton_name(origin.fold, origin.split)
    try:
        for path in (beton, manifest_path(beton)):
            os.link(path, folder / path.name)
    except OSError:  # the file system has no hard links
        return False
    return True


def write_betons(
    folder: Path,
    origins: list[Origin],
    *,
    folds: Folds,
    spool: encode.Spool,
    spool_rows: np.ndarray,
    machine: encode.Machine,
    meanwhile: Callable[[], object],
) -> None:
    """Write the beton of each origin with the processes of `machine`; `meanwhile` runs in this process.

    spool_rows: int64 (N,), the spool's row of each row of folds. Corrupted copies are computed here: an image
    validates one fold, so each copy is computed once.
    """
    columns = {"train": encode.TRAIN, "val": encode.VAL, "val_corrupt": encode.PIXELS}

    def write(origin: Origin) -> None:
        rows, combos = rows_of(folds, origin), origin.combos or (None,)
        path = folder / fold_set.beton_name(origin.fold, origin.split)
        with BetonWriter(path, len(rows) * len(combos), images_per_row=spool.blobs.shape[1]) as writer:
            for combo in combos:
                stored = spool.read(spool_rows[rows], columns[origin.split])
                for row, label, images in zip(
                    rows.tolist(), folds.class_idx[rows].tolist(), stored, strict=True
                ):
                    if combo:
                        images = corrupted(
                            images, folds.filenames[row], combo=combo, settings=origin.settings
                        )
                    writer.append(label, row, *images)
                    workers.count_done()
            writer.commit(origin)

    # longest tasks first, so that the workers finish together
    origins = sorted(origins, key=lambda origin: ("val_corrupt", "train", "val").index(origin.split))
    total = sum(len(rows_of(folds, origin)) * max(1, len(origin.combos)) for origin in origins)
    for _ in machine.map_ordered(
        write,
        ((origin,) for origin in origins),
        count=min(machine.processes, len(origins)),
        on_progress=workers.Progress("rows", total),
        meanwhile=meanwhile,
    ):
        pass


def rows_of(folds: Folds, origin: Origin) -> np.ndarray:
    """Rows of folds.csv in a beton, before corrupted copies: int64, ascending."""
    return folds.train_rows(origin.fold) if origin.split == "train" else folds.val_rows(origin.fold)


def corrupted(
    images: list[EncodedImage], name: str, *, combo: tuple[str, str], settings: StorageSettings
) -> list[EncodedImage]:
    """Corrupted copies of a row's raw images, stored as the settings ask; the two images of a pair differ."""
    (kind, level), copies = combo, []
    for number, image in enumerate(images):
        pixels = np.frombuffer(image.data, np.uint8).reshape(image.height, image.width, 3)
        key = image_key(name if number == 0 else f"{name}:{number}")
        data: bytes | memoryview
        if settings.store == "raw":
            mode, data = RAW, corrupt(pixels, kind, level=level, key=key).data.cast("B")
        elif kind == "jpeg":  # the corruption is a JPEG file already
            mode, data = JPEG, jpeg_bytes(pixels, level)
        else:
            pixels = corrupt(pixels, kind, level=level, key=key)
            mode, data = JPEG, encode_jpeg(pixels, settings.jpeg_quality)
        copies.append(EncodedImage(mode, data, height=image.height, width=image.width))
    return copies


def _betons_folder(home: Path) -> Path:
    """The real path of betons/, which may be a link to another disk."""
    return Path(os.path.realpath(home / "betons"))
