"""The choice between raw pixels and JPEGs, by the memory and disk that an estimate from a few headers needs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np

from fastflower.core.errors import EnvironmentFault, InputError
from fastflower.data.betons import fold_set
from fastflower.data.folds import may_validate
from fastflower.data.labels import LabelTable
from fastflower.recipe import Recipe
from fastflower.recipe.derived import fold_count

SAMPLE = 200  # files whose headers are read for the estimate
JPEG_BYTES = 0.5  # bytes a pixel at quality 95 without chroma subsampling, measured on photographs
MARGIN = 1.1  # factor on the estimate of free disk that is needed


def choose_store(recipe: Recipe, table: LabelTable, home: Path) -> str:
    """Choose "raw" or "jpeg", print the reason, and refuse what the disk cannot hold.

    Raises InputError when JPEGs are asked for images that come from arrays, EnvironmentFault for a lack of disk.
    """
    side, ram, free = fold_set.stored_side(recipe), memory(), shutil.disk_usage(home).free
    combos = len(fold_set.storage_settings(recipe, "").combos)
    raw_bytes, jpeg_bytes, keeps_files = _mean_bytes(table, side)
    n, folds, held_out = len(table), fold_count(recipe), int(may_validate(table, recipe).sum())
    in_use = raw_bytes * (n + held_out / folds * combos)
    corrupt = held_out * combos
    # the spool holds each image once, the betons each image once a fold; held-out pixels are stored without loss
    lossless_copies = (combos > 0) if keeps_files else 2
    disk = {
        "raw": raw_bytes * (n * (folds + 1) + corrupt),
        "jpeg": jpeg_bytes * (n * (folds + 1) + corrupt) + lossless_copies * raw_bytes * held_out,
    }
    store, reason = recipe.data.store, "as data.store says"
    if table.source.from_arrays:
        if store == "jpeg":
            raise InputError(
                f"data.store = jpeg: {recipe.data.root} holds arrays, not JPEGs; use auto or raw"
            )
        store, reason = "raw", "as the images come from arrays"
    if store == "auto":
        fraction = recipe.data.raw_share
        fits = in_use <= fraction * ram and disk["raw"] <= fraction * free
        store = "raw" if fits else "jpeg"
        reason = (
            f"{_size(in_use)} of raw pixels a fold {'fit' if fits else 'and the files of all folds do not fit'} "
            f"in {fraction:.0%} of memory ({_size(ram)}) and free disk ({_size(free)})"
        )
    if keeps_files:
        print(
            f"note: most photographs have a short side of at most {side}, which data.img_size and tta.scales ask for; "
            "they are stored in their own size, never enlarged, and training enlarges its crops of them"
        )
    print(f"store: {store}, short side {side}; {reason}; about {_size(disk[store])} on disk while converting")
    if disk[store] * MARGIN > free:
        raise EnvironmentFault(
            f"{home}: converting needs about {_size(disk[store] * MARGIN)}, {_size(free)} are free; "
            "free the disk, move data.home, or "
            + ("use data.store=jpeg" if store == "raw" else "lower data.n_splits")
        )
    return store


def _mean_bytes(table: LabelTable, side: int) -> tuple[float, float, bool]:
    """Estimated bytes of a raw row and of a JPEG row, and whether most files can be stored unchanged."""
    raw, jpeg, unchanged = [], [], []
    for row in range(0, len(table), max(1, len(table) // SAMPLE)):
        size = table.source.size(table.filenames[row])
        if size is None:
            continue
        height, width = size
        scale = min(1.0, side / min(width, height))
        pixels = width * height * scale * scale
        raw.append(3 * pixels * table.source.images_per_row)
        unchanged.append(scale == 1.0)
        jpeg.append(float(table.sizes[row]) if scale == 1.0 else JPEG_BYTES * pixels)
    if not raw:
        return 3.0 * side * side, JPEG_BYTES * side * side, False
    return float(np.mean(raw)), float(np.mean(jpeg)), float(np.mean(unchanged)) > 0.5


def memory() -> int:
    """Bytes of memory: the machine's, or the container's limit where that is lower."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(int(Path(path).read_text()))
        except (OSError, ValueError):
            continue
    return min(limits)


def _size(n: float) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"
