"""Conversion: from labels and images to folds, and to one set of betons for each fold.

Every image is read, decoded and encoded once, into a spool; the betons of all folds are written from the spool beside
the current set, and replace it when all of them are finished.
"""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from fastflower.core import files
from fastflower.core.errors import EnvironmentFault, InputError
from fastflower.core.tables import CHECK, escaped, read_sealed, sealed_rows, write_csv
from fastflower.core.workers import Progress, cores
from fastflower.data import auxiliary
from fastflower.data.betons import fold_set
from fastflower.data.betons.beton_writer import BetonWriter
from fastflower.data.betons.manifest import NO_FOLD, UNLABELLED, Origin, StorageSettings
from fastflower.data.conversion import assemble, encode
from fastflower.data.conversion.class_chart import class_chart
from fastflower.data.conversion.grouping import Embed, new_folds, wants_hashing
from fastflower.data.conversion.storage import choose_store
from fastflower.data.folds import (
    DUPLICATE_COLUMNS,
    DUPLICATES,
    Folds,
    check_leaks,
    load_folds,
    may_validate,
    save_folds,
    write_skipped,
)
from fastflower.data.labels import MAX_LISTED, LabelTable, class_stats, read_class_rows, write_classes
from fastflower.data.readers import contents
from fastflower.data.readers.sources import Source, open_unlabelled
from fastflower.recipe import Recipe
from fastflower.recipe.derived import refits


@dataclass(frozen=True)
class Converted:
    """The result of a conversion; up_to_date: there was nothing to do."""

    table: LabelTable
    folds: Folds
    settings: StorageSettings
    bytes_on_disk: int
    seconds: float
    up_to_date: bool


def convert(
    recipe: Recipe,
    table: LabelTable,
    embedder: Callable[[Recipe], Embed] | None = None,
    *,
    cluster: AbstractContextManager[encode.Machine] | None = None,
) -> Converted:
    """Write classes.csv, folds.csv and the betons of every fold, as far as they are missing; print the progress.

    `embedder` opens the network of data.group = embedding, before any image is read. `cluster` joins the machines that
    do the work; without it, this one does. All outputs appear at the end, together. Raises InputError for unreadable
    images (naming all of them) and for labels that no longer match folds.csv; EnvironmentFault for a full disk, a
    killed worker, or another conversion to the same folder.
    """
    start, home = time.monotonic(), Path(recipe.data.home)
    unlabelled = _check_unlabelled(recipe) if recipe.data.unlabelled else None

    def converted(settings: StorageSettings, folds: Folds, *, up_to_date: bool) -> Converted:
        return Converted(
            table=table,
            folds=folds,
            settings=settings,
            bytes_on_disk=sum(path.stat().st_size for path in (home / "betons").glob("*.beton")),
            seconds=time.monotonic() - start,
            up_to_date=up_to_date,
        )

    with _locked(home), assemble.new_set(home) as folder, ExitStack() as work:
        folds, content = None, ""
        if (home / "folds.csv").exists():
            folds, table = load_folds(home, table, recipe)
            content = fold_set.inputs_hash(home, table)
            current = _current_settings(recipe, table, folds=folds, content=content, unlabelled=unlabelled)
            if current:
                whole = auxiliary.is_recorded(home, table.aux, folds.hash)
                auxiliary.record(home, table.aux, folds.hash)
                return converted(current, folds, up_to_date=whole)
        settings = fold_set.storage_settings(recipe, choose_store(recipe, table, home))
        hashing = folds is None and wants_hashing(recipe, table, settings.stored_side)
        embed = embedder(recipe) if embedder and folds is None and recipe.data.group == "embedding" else None
        machine = work.enter_context(cluster) if cluster else encode.Machine(cores(recipe.data.workers))
        labelled = _convert_labelled(
            recipe,
            table,
            folds=folds,
            content=content,
            settings=settings,
            hashing=hashing,
            embed=embed,
            machine=machine,
            folder=folder,
        )
        table = labelled.table
        if unlabelled and not (
            (home / fold_set.UNLABELLED_TABLE).is_file()
            and assemble.reuse(home, folder, unlabelled.origin(settings))
        ):
            _convert_unlabelled(recipe, unlabelled, settings=settings, machine=machine, folder=folder)
        _write_tables(home, labelled)
        assemble.replace_set(home, folder)
        return converted(settings, labelled.folds, up_to_date=False)


@dataclass(frozen=True)
class LabelledImages:
    """The labelled images that can be used, their folds, and the chart of their classes.

    duplicate_rows: of folds that are new, else None.
    """

    table: LabelTable
    folds: Folds
    duplicate_rows: Iterator[dict[str, str]] | None
    chart: bytes


def _convert_labelled(
    recipe: Recipe,
    table: LabelTable,
    *,
    folds: Folds | None,
    content: str,
    settings: StorageSettings,
    hashing: bool,
    embed: Embed | None,
    machine: encode.Machine,
    folder: Path,
) -> LabelledImages:
    """Write the betons of every fold, and make the folds unless they are given.

    content: hash of the labelled images' files, where it is known before they are read.
    """
    home = Path(recipe.data.home)
    files_before = contents.file_states(table.source.files(table.filenames))
    if table.source.in_one_file and not content:
        content = fold_set.inputs_hash(home, table)
    with _encoded(
        table.source,
        machine=machine,
        names=table.filenames,
        validating=folds.fold >= 0 if folds else may_validate(table, recipe),
        settings=settings,
        folder=folder,
        hashing=hashing,
    ) as spool:
        if not table.source.in_one_file:
            contents.remember(home / fold_set.CONTENTS, files_before, spool.sha256)
        table, spool_rows = _usable(recipe, table, spool=spool, folds=folds, home=home)
        if not table.source.in_one_file:  # the bytes that were decoded, even if a file has changed since
            content = contents.hash_of(spool.sha256[row] for row in spool_rows.tolist())
        duplicate_rows = None
        if folds is None:
            folds, duplicate_rows = new_folds(recipe, table, spool=spool, spool_rows=spool_rows, embed=embed)
        elif folds.sha256 != spool.sha256:
            _refuse_changed(folds, spool, home)
        for fold in folds.numbers:
            check_leaks(folds, fold)
        chart = functools.cache(lambda: class_chart(table))
        origins = _fold_origins(settings, table, folds=folds, content=content, extra=refits(recipe))
        assemble.write_betons(
            folder,
            [origin for origin in origins if not assemble.reuse(home, folder, origin)],
            folds=folds,
            spool=spool,
            spool_rows=spool_rows,
            machine=machine,
            meanwhile=chart,
        )
    return LabelledImages(table, folds, duplicate_rows, chart())


def _write_tables(home: Path, labelled: LabelledImages) -> None:
    """Write the tables beside the betons; those of the folds only where the folds are new."""
    table, folds = labelled.table, labelled.folds
    write_classes(home / "classes.csv", table)
    write_csv(home / "class_stats.csv", class_stats(table))
    files.write_atomic(home / "class_stats.png", labelled.chart)
    if labelled.duplicate_rows is not None:
        write_csv(home / DUPLICATES, labelled.duplicate_rows, (*DUPLICATE_COLUMNS, CHECK))
        save_folds(home / "folds.csv", folds)
    auxiliary.record(home, table.aux, folds.hash)


def _current_settings(
    recipe: Recipe,
    table: LabelTable,
    *,
    folds: Folds,
    content: str,
    unlabelled: UnlabelledImages | None,
) -> StorageSettings | None:
    """The settings with which all betons and tables of these folds are there already; None if any is missing."""
    home = Path(recipe.data.home)
    for store in ("raw", "jpeg") if recipe.data.store == "auto" else (recipe.data.store,):
        settings = fold_set.storage_settings(recipe, store)
        origins = _fold_origins(settings, table, folds=folds, content=content, extra=refits(recipe))
        origins += [unlabelled.origin(settings)] if unlabelled else []
        if all(fold_set.is_current(home / "betons", origin) for origin in origins) and _has_tables(
            home, table, unlabelled=bool(unlabelled)
        ):
            return settings
    return None


def _has_tables(home: Path, table: LabelTable, *, unlabelled: bool) -> bool:
    """True if the tables beside current betons are whole; a missing classes.csv is written from the labels.

    Raises CorruptionError for a damaged one, which the user may have edited.
    """
    if (home / "classes.csv").is_file():
        read_class_rows(home / "classes.csv")
    else:
        write_classes(home / "classes.csv", table)
    if not unlabelled or not (listed := home / fold_set.UNLABELLED_TABLE).is_file():
        return not unlabelled
    read_sealed(listed, fold_set.UNLABELLED_COLUMNS)
    return True


@dataclass(frozen=True)
class UnlabelledImages:
    """The images of data.unlabelled, and the hash of the content of their files."""

    source: Source
    names: list[str]
    content: str

    def origin(self, settings: StorageSettings) -> Origin:
        """The origin that their beton must have."""
        return fold_set.unlabelled_origin(settings, self.names, self.content)


def _check_unlabelled(recipe: Recipe) -> UnlabelledImages:
    source, names, notices = open_unlabelled(recipe)
    for notice in notices:
        print(f"note: {notice}")
    checks = [source.check(name) for name in names]
    faults = [
        f"'{escaped(name)}' {check.problem}"
        for name, check in zip(names, checks, strict=True)
        if check.problem
    ]
    if faults:
        raise InputError(f"data.unlabelled = {recipe.data.unlabelled}: {'; '.join(faults[:MAX_LISTED])}")
    return UnlabelledImages(
        source, names, fold_set.unlabelled_inputs_hash(Path(recipe.data.home), source, names)
    )


def _convert_unlabelled(
    recipe: Recipe,
    images: UnlabelledImages,
    *,
    settings: StorageSettings,
    machine: encode.Machine,
    folder: Path,
) -> None:
    """Write one beton of images without labels (-1), and their order to unlabelled.csv."""
    n, home = len(images.names), Path(recipe.data.home)
    with _encoded(
        images.source,
        machine=machine,
        names=images.names,
        validating=np.zeros(n, bool),
        settings=settings,
        folder=folder,
        hashing=False,
    ) as spool:
        usable = [row for row in range(n) if not spool.problems[row]]
        bad = [(images.names[row], "", spool.problems[row]) for row in range(n) if spool.problems[row]]
        if bad and not (recipe.data.on_bad == "skip" and usable):
            _refuse(bad, n, home=home, remedy="replace them, or use data.on_bad=skip")
        if bad:
            write_skipped(home / "unlabelled_skipped.csv", bad)
            print(f"skipped {len(bad)} unreadable images; {home / 'unlabelled_skipped.csv'} has the list")
        path = folder / fold_set.beton_name(NO_FOLD, UNLABELLED)
        with BetonWriter(path, len(usable), images_per_row=images.source.images_per_row) as writer:
            for index, encoded in enumerate(spool.read(np.array(usable), encode.TRAIN)):
                writer.append(-1, index, *encoded)
            columns = fold_set.UNLABELLED_COLUMNS
            rows = (dict(zip(columns, (images.names[row], spool.sha256[row]), strict=True)) for row in usable)
            table = home / fold_set.UNLABELLED_TABLE
            write_csv(table, sealed_rows(rows, columns, count=len(usable)), (*columns, CHECK))
            writer.commit(images.origin(settings))


def _fold_origins(
    settings: StorageSettings, table: LabelTable, *, folds: Folds, content: str, extra: bool
) -> list[Origin]:
    """The origin of each split of each fold and, with `extra`, of all images as a fold that none validates."""
    wanted = [
        (fold, split)
        for fold in folds.numbers
        for split in fold_set.splits(settings, validates=folds.validates)
    ]
    return [
        fold_set.origin_of(settings, table, inputs_hash=content, folds=folds, split=split, fold=fold)
        for fold, split in [*wanted, *([(folds.of_all, "train")] if extra else [])]
    ]


@contextmanager
def _locked(home: Path) -> Iterator[None]:
    """Hold the lock of one conversion at a time, and report a full disk in one line."""
    with ExitStack() as stack:
        busy = f"{home}: another convert (process {{pid}}) is writing there; wait for it or choose another data.home"
        try:
            stack.enter_context(files.locked(home / ".convert.lock", busy))
        except OSError as error:
            raise EnvironmentFault(
                f"data.home = {home}: cannot write there ({error.strerror}); choose another"
            ) from None
        files.remove_abandoned(home)
        try:
            yield
        except BrokenPipeError:  # the reader of our output has gone
            raise
        except OSError as error:
            raise EnvironmentFault(
                f"data.home = {home}: {error.strerror} ({error.filename}); make room there, or choose another data.home"
            ) from None


@contextmanager
def _encoded(
    source: Source,
    *,
    machine: encode.Machine,
    names: list[str],
    validating: np.ndarray,
    settings: StorageSettings,
    folder: Path,
    hashing: bool,
) -> Iterator[encode.Spool]:
    """Encode all images; the spool files lie in `folder` and are deleted on exit."""
    spool_folder = folder / ".spool"
    spool_folder.mkdir()
    encoding = encode.Encoding(
        source=source,
        folder=str(spool_folder),
        side=settings.stored_side,
        raw=settings.store == "raw",
        quality=settings.jpeg_quality,
        corrupting=bool(settings.combos),
        hashing=hashing,
    )
    spool = None
    try:
        spool = encode.encode_rows(
            encoding,
            names,
            validating=validating,
            machine=machine,
            on_progress=Progress("images", len(names)),
        )
        misnamed = [row for row, form in enumerate(spool.misnamed) if form]
        if misnamed:
            print(
                f"note: {len(misnamed)} images are of another format than their names say, such as "
                f"{escaped(names[misnamed[0]])} ({spool.misnamed[misnamed[0]]})"
            )
        yield spool
    finally:
        if spool:
            spool.close()
        shutil.rmtree(spool_folder, ignore_errors=True)


def _usable(
    recipe: Recipe, table: LabelTable, *, spool: encode.Spool, folds: Folds | None, home: Path
) -> tuple[LabelTable, np.ndarray]:
    """The rows that can be used, and their rows in the spool, int64; all unreadable images are named at once."""
    bad = [row for row, problem in enumerate(spool.problems) if problem]
    usable = np.setdiff1d(np.arange(len(table)), bad)
    if not bad:
        if folds is None:
            (home / "skipped.csv").unlink(missing_ok=True)
        return table, usable
    rows = [(table.filenames[row], table.category_ids[row], spool.problems[row]) for row in bad]
    if folds is not None:
        remedy = "folds.csv counts on them: restore them, or move it away and use data.on_bad=skip"
        _refuse(rows, len(table), home=home, remedy=remedy)
    if recipe.data.on_bad == "error" or not len(usable):
        _refuse(rows, len(table), home=home, remedy="replace them, or use data.on_bad=skip")
    write_skipped(home / "skipped.csv", rows)
    print(f"skipped {len(bad)} unreadable images; {home / 'skipped.csv'} has the list")
    return table.take(usable), usable


def _refuse(rows: list[tuple[str, str, str]], total: int, *, home: Path, remedy: str) -> NoReturn:
    """Raise InputError for rows (name, label, reason); bad.csv lists them where a line is too short."""
    listed = "; ".join(f"{escaped(name)} {reason}" for name, _, reason in rows[:MAX_LISTED])
    if len(rows) > MAX_LISTED:
        write_skipped(home / "bad.csv", rows)
        listed += f"; and {len(rows) - MAX_LISTED} more, all in {home / 'bad.csv'}"
    raise InputError(f"{len(rows)} of {total} images cannot be used: {listed}; {remedy}")


def _refuse_changed(folds: Folds, spool: encode.Spool, home: Path) -> NoReturn:
    changed = [row for row, content in enumerate(folds.sha256) if content != spool.sha256[row]]
    raise InputError(
        f"{len(changed)} images changed since {home / 'folds.csv'} was made, such as "
        f"{escaped(folds.filenames[changed[0]])}; restore them, or move folds.csv away for new folds"
    )
