"""Raw pixels or JPEGs: what memory and disk allow, estimated from a few headers before anything is written."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np

from fastflower.core.errors import EnvironmentFault, InputError
from fastflower.data.betons import fold_set
from fastflower.data.folds import candidates
from fastflower.data.labels import LabelTable
from fastflower.recipe import Recipe
from fastflower.recipe.derived import fold_count

SAMPLE = 200  # files whose headers are read to estimate sizes
JPEG_BYTES = 0.5  # a pixel at quality 95 without chroma subsampling, measured on photographs
MARGIN = 1.1  # on the estimate, when the disk is asked for room


def choose_store(recipe: Recipe, table: LabelTable, home: Path) -> str:
    """raw or jpeg by memory and disk; refuses what the disk cannot hold. Sizes are estimates from a few headers."""
    side, ram, free = fold_set.stored_side(recipe), memory(), shutil.disk_usage(home).free
    kinds = len(fold_set.settings(recipe, "")["combos"])
    one_raw, one_jpeg, kept = _mean_bytes(table, side)
    n, count, held_out = len(table), fold_count(recipe), int(candidates(table, recipe).sum())
    in_use = one_raw * (n + held_out / count * kinds)
    corrupt = held_out * kinds
    # the spool holds each image once, the betons each image once a fold; held-out pixels are never lossy
    plain = (kinds > 0) if kept else 2
    disk = {
        "raw": one_raw * (n * (count + 1) + corrupt),
        "jpeg": one_jpeg * (n * (count + 1) + corrupt) + plain * one_raw * held_out,
    }
    store = recipe.data.store
    why = "as data.store says"
    if table.source.numbers:  # they stay what they are
        if store == "jpeg":
            raise InputError(
                f"data.store = jpeg: {recipe.data.root} holds numbers, not JPEGs; use auto or raw"
            )
        store, why = "raw", "as the images are numbers"
    if store == "auto":
        share = recipe.data.raw_share
        fits = in_use <= share * ram and disk["raw"] <= share * free
        store = "raw" if fits else "jpeg"
        why = (
            f"{_size(in_use)} of raw pixels a fold {'fit' if fits else 'and the files of all folds do not fit'} "
            f"in {share:.0%} of memory ({_size(ram)}) and free disk ({_size(free)})"
        )
    print(f"store: {store}, short side {side}; {why}; about {_size(disk[store])} on disk while converting")
    if disk[store] * MARGIN > free:
        raise EnvironmentFault(
            f"{home}: converting needs about {_size(disk[store] * MARGIN)}, {_size(free)} are free; "
            "free the disk, move data.home, or "
            + ("use data.store=jpeg" if store == "raw" else "lower data.n_splits")
        )
    return store


def _mean_bytes(table: LabelTable, side: int) -> tuple[float, float, bool]:
    """Estimated bytes of a raw and of a JPEG row, and whether most files keep their own bytes."""
    raw, jpeg, kept = [], [], []
    for row in range(0, len(table), max(1, len(table) // SAMPLE)):
        size = table.source.size(table.filenames[row])
        if size is None:
            continue
        height, width = size
        scale = min(1.0, side / min(width, height))
        pixels = width * height * scale * scale
        raw.append(3 * pixels * table.source.count)
        kept.append(scale == 1.0)
        jpeg.append(float(table.sizes[row]) if kept[-1] else JPEG_BYTES * pixels)
    if not raw:
        return 3.0 * side * side, JPEG_BYTES * side * side, False
    return float(np.mean(raw)), float(np.mean(jpeg)), float(np.mean(kept)) > 0.5


def memory() -> int:
    """Bytes of memory: the machine's, or the container's share of it."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(int(Path(path).read_text()))
        except (OSError, ValueError):
            continue
    return min(limits)


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
