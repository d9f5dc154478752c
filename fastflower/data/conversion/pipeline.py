"""Conversion: from labels and photographs to folds and one set of betons for each fold.

Every image is read, decoded and encoded once, into a spool; the betons of all folds are assembled from it, beside
the set in place, and exchanged for it when all of them are finished.
"""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from fastflower.core import files
from fastflower.core.errors import EnvironmentFault, InputError
from fastflower.core.tables import shown, write_csv
from fastflower.core.workers import Progress, cores
from fastflower.data import duplicates
from fastflower.data.betons import fold_set
from fastflower.data.betons.beton_file import BetonWriter
from fastflower.data.conversion import assemble, encode
from fastflower.data.conversion.class_chart import distribution
from fastflower.data.conversion.storage import choose_store
from fastflower.data.folds import (
    Folds,
    candidates,
    check_leaks,
    load_folds,
    make_folds,
    rare_classes,
    save_folds,
    write_skipped,
)
from fastflower.data.labels import SHOWN, LabelTable, class_stats, write_classes
from fastflower.data.readers.sources import Source, open_unlabelled
from fastflower.recipe import Recipe


@dataclass(frozen=True)
class Converted:
    """What a conversion left: rows by part of each fold, bytes on disk, and whether there was nothing to do."""

    table: LabelTable
    folds: Folds
    settings: dict[str, Any]
    bytes_on_disk: int
    seconds: float
    up_to_date: bool


Embed = Callable[[Iterable[np.ndarray]], np.ndarray]  # pictures, uint8 (H, W, 3), to unit vectors (N, F)


def convert(
    recipe: Recipe, table: LabelTable, embedder: Callable[[Recipe], Embed] | None = None
) -> Converted:
    """Make classes.csv, folds.csv and the betons of every fold, as far as they are missing; prints what it does.

    `embedder` opens the network of data.group = embedding, before any image is read. Nothing is in place before all
    of it is. InputError for unreadable images (all of them) and for labels that no longer match folds.csv;
    EnvironmentFault for a full disk, a killed worker, or another conversion to the same place.
    """
    start, home = time.monotonic(), Path(recipe.data.home)
    unlabelled = _look_unlabelled(recipe) if recipe.data.unlabelled else None

    with _locked(home), assemble.new_set(home) as aside:
        folds = None
        if (home / "folds.csv").exists():
            folds, table = load_folds(home, table, recipe)
            for store in ("raw", "jpeg") if recipe.data.store == "auto" else (recipe.data.store,):
                made = fold_set.settings(recipe, store)
                wanted = _manifests(made, table, folds)
                wanted += [unlabelled.manifest(made)] if unlabelled else []
                if all(fold_set.is_current(home / "betons", one) for one in wanted):
                    return Converted(table, folds, made, _bytes(home), time.monotonic() - start, True)
        made = fold_set.settings(recipe, choose_store(recipe, table, home))
        validating = folds.fold >= 0 if folds else candidates(table, recipe)
        hashing = folds is None and _hashing(recipe, table, made["stored_side"])
        embed = embedder(recipe) if embedder and folds is None and recipe.data.group == "embedding" else None
        with _encoded(
            recipe,
            table.source,
            names=table.filenames,
            validating=validating,
            made=made,
            aside=aside,
            hashing=hashing,
        ) as images:
            table, good = _without_bad(recipe, table, images=images, folds=folds, home=home)
            pairs = None
            if folds is None:
                folds, pairs = _new_folds(recipe, table, images=images, good=good, embed=embed)
            elif folds.sha256 != images.sha256:
                _refuse_changed(folds, images, home)
            for fold in folds.numbers:
                check_leaks(folds, fold)
            wanted = [one for one in _manifests(made, table, folds) if not assemble.keep(home, aside, one)]
            drawn = functools.cache(lambda: distribution(table))
            workers = cores(recipe.data.workers)
            assemble.write_betons(
                aside, wanted, folds=folds, images=images, good=good, count=workers, meanwhile=drawn
            )
        if unlabelled and not assemble.keep(home, aside, unlabelled.manifest(made)):
            _convert_unlabelled(recipe, unlabelled, made=made, home=home, aside=aside)
        write_classes(home / "classes.csv", table)
        write_csv(home / "class_stats.csv", class_stats(table))
        files.write_atomic(home / "class_stats.png", drawn())
        if pairs is not None:
            write_csv(home / "duplicates.csv", pairs, PAIRS)
            save_folds(home / "folds.csv", folds)
        assemble.put_in_place(home, aside)
        return Converted(table, folds, made, _bytes(home), time.monotonic() - start, False)


@dataclass(frozen=True)
class Unlabelled:
    """The images without labels: where they come from, their names and bytes."""

    source: Source
    names: list[str]
    sizes: np.ndarray

    def manifest(self, made: dict[str, Any]) -> dict[str, Any]:
        return fold_set.unlabelled_manifest(made, self.names, self.sizes)


def _look_unlabelled(recipe: Recipe) -> Unlabelled:
    source, names = open_unlabelled(recipe)
    looks = [source.look(name) for name in names]
    faults = [f"'{shown(name)}' {fault}" for name, (fault, _, _) in zip(names, looks, strict=True) if fault]
    if faults:
        raise InputError(f"data.unlabelled = {recipe.data.unlabelled}: {'; '.join(faults[:SHOWN])}")
    return Unlabelled(source, names, np.array([size for _, size, _ in looks], np.int64))


def _convert_unlabelled(
    recipe: Recipe, found: Unlabelled, *, made: dict[str, Any], home: Path, aside: Path
) -> None:
    """One beton of images without labels (-1), whose order unlabelled.csv says."""
    n = len(found.names)
    with _encoded(
        recipe,
        found.source,
        names=found.names,
        validating=np.zeros(n, bool),
        made=made,
        aside=aside,
        hashing=False,
    ) as images:
        good = [row for row in range(n) if not images.problems[row]]
        bad = [(found.names[row], "", images.problems[row]) for row in range(n) if images.problems[row]]
        if bad and not (recipe.data.on_bad == "skip" and good):
            _refuse(bad, n, home=home, remedy="replace them, or use data.on_bad=skip")
        if bad:
            write_skipped(home / "unlabelled_skipped.csv", bad)
            print(f"skipped {len(bad)} unreadable images; {home / 'unlabelled_skipped.csv'} has the list")
        with BetonWriter(
            aside / fold_set.beton_name(-1, fold_set.UNLABELLED), len(good), found.source.count
        ) as writer:
            for position, pictures in enumerate(images.read(np.array(good), encode.TRAIN)):
                writer.append(-1, position, *pictures)
            rows = ({"filename": found.names[row], "sha256": images.sha256[row]} for row in good)
            write_csv(home / "unlabelled.csv", rows, ("filename", "sha256"))
            writer.commit(found.manifest(made))


def _manifests(made: dict[str, Any], table: LabelTable, folds: Folds) -> list[dict[str, Any]]:
    return [
        fold_set.manifest(made, table, folds=folds, split=split, fold=fold)
        for fold in folds.numbers
        for split in fold_set.splits(made)
    ]


@contextmanager
def _locked(home: Path) -> Iterator[None]:
    """One conversion at a time; the kernel drops the lock of a killed one."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        handle = os.open(home / ".convert.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise EnvironmentFault(
            f"data.home = {home}: cannot write there ({error.strerror}); choose another"
        ) from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(handle, 64, 0).decode("ascii", "replace").strip() or "?"
            raise EnvironmentFault(
                f"{home}: another convert (process {owner}) is writing there; wait for it or choose another data.home"
            ) from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
        files.sweep(home)
        try:
            yield
        except BrokenPipeError:  # of whoever read our output
            raise
        except OSError as error:
            what = f"{error.strerror} ({error.filename})"
            raise EnvironmentFault(
                f"data.home = {home}: {what}; make room there, or choose another data.home"
            ) from None
    finally:
        os.close(handle)


@contextmanager
def _encoded(
    recipe: Recipe,
    source: Source,
    *,
    names: list[str],
    validating: np.ndarray,
    made: dict[str, Any],
    aside: Path,
    hashing: bool,
) -> Iterator[encode.Spool]:
    """The pass over the images; its spool lies in `aside` and is gone afterwards."""
    folder = aside / ".spool"
    folder.mkdir()
    workers = cores(recipe.data.workers)
    encoding = encode.Encoding(
        source=source,
        folder=str(folder),
        side=made["stored_side"],
        raw=made["store"] == "raw",
        quality=made["jpeg_quality"],
        corrupting=bool(made["combos"]),
        hashing=hashing,
    )
    images = None
    try:
        images = encode.run(
            encoding, names, validating=validating, count=workers, tell=Progress("images", len(names))
        )
        odd = [row for row, form in enumerate(images.misnamed) if form]
        if odd:
            print(
                f"note: {len(odd)} images are of another format than their names say, such as "
                f"{shown(names[odd[0]])} ({images.misnamed[odd[0]]})"
            )
        yield images
    finally:
        if images:
            images.close()
        shutil.rmtree(folder, ignore_errors=True)


def _hashing(recipe: Recipe, table: LabelTable, side: int) -> bool:
    """Whether near-duplicates are looked for; says so when the choice is ours."""
    if table.source.count > 1:
        if recipe.data.group in ("phash", "embedding"):
            raise InputError(
                f"data.group = {recipe.data.group}: compares single images, not pairs; use auto or none"
            )
        return False
    if recipe.data.group != "auto":
        return recipe.data.group == "phash"
    size = table.source.size(table.filenames[0]) if table.source.numbers else None
    if size and min(size) < duplicates.SMALLEST:
        print(f"near-duplicates: left out, a hash says little of images of {size[0]} x {size[1]}")
        return False
    seconds = duplicates.hashing_seconds(side, len(table), cores(recipe.data.workers))
    on = seconds <= duplicates.PATIENCE
    print(
        f"near-duplicates: hashing takes about {seconds:.0f} s: {'on' if on else 'left out'}"
        + ("" if on else "; data.group=phash looks for them all the same")
    )
    return on


def _without_bad(
    recipe: Recipe, table: LabelTable, *, images: encode.Spool, folds: Folds | None, home: Path
) -> tuple[LabelTable, np.ndarray]:
    """The rows that can be used, and their places in the spool; all unreadable images are named at once."""
    bad = [row for row, problem in enumerate(images.problems) if problem]
    good = np.setdiff1d(np.arange(len(table)), bad)
    if not bad:
        if folds is None:
            (home / "skipped.csv").unlink(missing_ok=True)
        return table, good
    rows = [(table.filenames[row], table.category_ids[row], images.problems[row]) for row in bad]
    if folds is not None:
        remedy = "folds.csv counts on them: restore them, or move it away and use data.on_bad=skip"
        _refuse(rows, len(table), home=home, remedy=remedy)
    if recipe.data.on_bad == "error" or not len(good):
        _refuse(rows, len(table), home=home, remedy="replace them, or use data.on_bad=skip")
    write_skipped(home / "skipped.csv", rows)
    print(f"skipped {len(bad)} unreadable images; {home / 'skipped.csv'} has the list")
    return table.take(good), good


def _refuse(rows: list[tuple[str, str, str]], of: int, *, home: Path, remedy: str) -> NoReturn:
    named = "; ".join(f"{shown(name)} {reason}" for name, _, reason in rows[:SHOWN])
    more = ""
    if len(rows) > SHOWN:
        write_skipped(home / "bad.csv", rows)
        more = f"; and {len(rows) - SHOWN} more, all in {home / 'bad.csv'}"
    raise InputError(f"{len(rows)} of {of} images cannot be used: {named}{more}; {remedy}")


def _new_folds(
    recipe: Recipe, table: LabelTable, *, images: encode.Spool, good: np.ndarray, embed: Embed | None
) -> tuple[Folds, Iterator[dict[str, str]]]:
    """Group, split, and say what was found: the folds, and the rows of duplicates.csv as they are asked for."""
    content = [images.sha256[row] for row in good]
    hashes, hashed = images.hashes[good], images.hashed[good]
    largest = max(2, len(table) // recipe.data.n_splits)
    vectors = None
    if embed:
        print(f"near-duplicates: embedding {len(good)} images")
        vectors = embed(images.pixels(row) for row in good.tolist())
        families = duplicates.similar(vectors, recipe.data.group_cosine)
        groups = duplicates.join(content, np.arange(len(good)), families=families, largest=largest)
    else:
        groups = duplicates.group(
            content, hashes, hashed=hashed, threshold=recipe.data.group_threshold, largest=largest
        )
    fold = make_folds(table, groups, recipe)
    folds = Folds(table.filenames, table.category_ids, table.class_idx, fold, groups, content)
    first = np.unique(groups, return_index=True)[1][groups]
    copies = np.flatnonzero(first != np.arange(len(groups)))
    conflicts = [
        row
        for row in copies.tolist()
        if content[row] == content[first[row]] and table.class_idx[row] != table.class_idx[first[row]]
    ]
    if len(copies):
        print(
            f"{len(copies)} images are copies or near-copies of another and share its fold: "
            f"{Path(recipe.data.home) / 'duplicates.csv'}"
        )
    if conflicts:
        one, other = (shown(table.filenames[row]) for row in (conflicts[0], first[conflicts[0]]))
        print(
            f"warning: {len(conflicts)} images are another's bytes with another label, such as {one} and {other}"
        )
    for line in rare_classes(folds, table):
        print(f"warning: {line}")
    cosines = None if vectors is None else (vectors[copies] * vectors[first[copies]]).sum(1)
    return folds, _pairs(folds, copies, others=first[copies], hashes=hashes, hashed=hashed, cosines=cosines)


PAIRS = (
    "group_id",
    "filename",
    "category_id",
    "other",
    "other_category_id",
    "distance",
    "identical",
    "cosine",
)


def _pairs(
    folds: Folds,
    copies: np.ndarray,
    *,
    others: np.ndarray,
    hashes: np.ndarray,
    hashed: np.ndarray,
    cosines: np.ndarray | None,
) -> Iterator[dict[str, str]]:
    """Each row of a group beside the group's first: names, labels, distance of hashes or cosine of embeddings."""
    for at, (row, one) in enumerate(zip(copies.tolist(), others.tolist(), strict=True)):
        apart = str(duplicates.distance(hashes[one], hashes[row])) if hashed[one] and hashed[row] else ""
        identical = "yes" if folds.sha256[one] == folds.sha256[row] else "no"
        names = (folds.filenames[row], folds.category_ids[row], folds.filenames[one], folds.category_ids[one])
        cosine = "" if cosines is None else f"{cosines[at]:.4f}"
        yield dict(zip(PAIRS, (str(folds.group[row]), *names, apart, identical, cosine), strict=True))


def _refuse_changed(folds: Folds, images: encode.Spool, home: Path) -> None:
    changed = [row for row, content in enumerate(folds.sha256) if content != images.sha256[row]]
    raise InputError(
        f"{len(changed)} images changed since {home / 'folds.csv'} was made, such as "
        f"{shown(folds.filenames[changed[0]])}; restore them, or move it away for new folds"
    )


def _bytes(home: Path) -> int:
    return sum(path.stat().st_size for path in (home / "betons").glob("*.beton"))
