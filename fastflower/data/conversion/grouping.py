"""Near-duplicates and new folds: how the images are grouped and split, and the list of duplicates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from fastflower.core.errors import InputError
from fastflower.core.tables import escaped, sealed_rows
from fastflower.core.workers import cores
from fastflower.data import duplicates
from fastflower.data.conversion.encode import Spool
from fastflower.data.folds import DUPLICATE_COLUMNS, DUPLICATES, Folds, make_folds, rare_classes
from fastflower.data.labels import LabelTable
from fastflower.recipe import Recipe

Embed = Callable[[Iterable[np.ndarray]], np.ndarray]  # images uint8 (H, W, 3) to unit vectors (N, F)


def wants_hashing(recipe: Recipe, table: LabelTable, side: int) -> bool:
    """True if perceptual hashes are computed, for images stored at a short side; prints data.group=auto's choice."""
    if table.source.images_per_row > 1:
        if recipe.data.group in ("phash", "embedding"):
            raise InputError(
                f"data.group = {recipe.data.group}: compares single images, not pairs; use auto or none"
            )
        return False
    if recipe.data.group != "auto":
        return recipe.data.group == "phash"
    size = table.source.size(table.filenames[0]) if table.source.in_one_file else None
    if size and min(size) < duplicates.MIN_SIDE:
        print(f"near-duplicates: left out, hashes mean little for images of {size[0]} x {size[1]}")
        return False
    seconds = duplicates.hashing_seconds(side, len(table), cores(recipe.data.workers))
    fast = seconds <= duplicates.MAX_HASHING_SECONDS
    print(
        f"near-duplicates: hashing takes about {seconds:.0f} s: "
        + ("on" if fast else "left out; data.group=phash looks for them")
    )
    return fast


def new_folds(
    recipe: Recipe, table: LabelTable, *, spool: Spool, spool_rows: np.ndarray, embed: Embed | None
) -> tuple[Folds, Iterator[dict[str, str]]]:
    """Group near-duplicates, split the groups into folds, and print what was found.

    spool_rows: int64 (N,), the spool's row of each row of the table. Returns the folds, and the rows of
    duplicates.csv, computed as they are read.
    """
    content = [spool.sha256[row] for row in spool_rows]
    hashes, hashed = spool.hashes[spool_rows], spool.hashed[spool_rows]
    largest = max(2, len(table) // recipe.data.n_splits)
    vectors = None
    if embed:
        print(f"near-duplicates: embedding {len(spool_rows)} images")
        vectors = embed(spool.pixels(row) for row in spool_rows.tolist())
        families = duplicates.cosine_components(vectors, recipe.data.group_cosine)
        groups = duplicates.group_rows(
            content, np.arange(len(spool_rows)), families=families, largest=largest
        )
    else:
        groups = duplicates.group_by_hash(
            content, hashes, hashed=hashed, threshold=recipe.data.group_threshold, largest=largest
        )
    folds = Folds(
        filenames=table.filenames,
        category_ids=table.category_ids,
        class_idx=table.class_idx,
        fold=make_folds(table, groups, recipe),
        group=groups,
        sha256=content,
    )
    first = np.unique(groups, return_index=True)[1][groups]  # the first row of each row's group
    copies = np.flatnonzero(first != np.arange(len(groups)))
    _print_findings(folds, table, copies=copies, originals=first[copies], home=Path(recipe.data.home))
    cosines = None if vectors is None else (vectors[copies] * vectors[first[copies]]).sum(1)
    rows = _duplicate_rows(
        folds, copies, originals=first[copies], hashes=hashes, hashed=hashed, cosines=cosines
    )
    return folds, sealed_rows(rows, DUPLICATE_COLUMNS, count=len(copies))


def _print_findings(
    folds: Folds, table: LabelTable, *, copies: np.ndarray, originals: np.ndarray, home: Path
) -> None:
    if len(copies):
        print(
            f"{len(copies)} images are copies or near-copies of another and share its fold: "
            f"{home / DUPLICATES}"
        )
    conflicts = [
        (row, original)
        for row, original in zip(copies.tolist(), originals.tolist(), strict=True)
        if folds.sha256[row] == folds.sha256[original] and folds.class_idx[row] != folds.class_idx[original]
    ]
    if conflicts:
        first, second = (escaped(folds.filenames[row]) for row in conflicts[0])
        print(
            f"warning: {len(conflicts)} images have the bytes of another but a different label, "
            f"such as {first} and {second}"
        )
    for line in rare_classes(folds, table):
        print(f"warning: {line}")


def _duplicate_rows(
    folds: Folds,
    copies: np.ndarray,
    *,
    originals: np.ndarray,
    hashes: np.ndarray,
    hashed: np.ndarray,
    cosines: np.ndarray | None,
) -> Iterator[dict[str, str]]:
    """Rows of duplicates.csv: each copy beside the first of its group; distance is in bits of the hash."""
    for number, (row, original) in enumerate(zip(copies.tolist(), originals.tolist(), strict=True)):
        distance = ""
        if hashed[original] and hashed[row]:
            distance = str(duplicates.hamming_distance(hashes[original], hashes[row]))
        values = (
            str(folds.group[row]),
            folds.filenames[row],
            folds.category_ids[row],
            folds.filenames[original],
            folds.category_ids[original],
            distance,
            "yes" if folds.sha256[original] == folds.sha256[row] else "no",
            "" if cosines is None else f"{cosines[number]:.4f}",
        )
        yield dict(zip(DUPLICATE_COLUMNS, values, strict=True))
