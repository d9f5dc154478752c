"""The betons of a fold (train, val, val_corrupt) and the checks that they come from the same conversion.

Each beton's manifest holds its origin: settings, classes, labels, inputs and folds. Convert is up to date when all
origins agree with the recipe and the labels; a training refuses any other fold.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fastflower.core import own_parts
from fastflower.core.errors import InputError
from fastflower.core.files import digest
from fastflower.core.records import read_record
from fastflower.data import auxiliary
from fastflower.data.auxiliary import AuxColumn, AuxTargets
from fastflower.data.betons.beton_file import Beton, open_beton
from fastflower.data.betons.manifest import (
    NO_FOLD,
    UNLABELLED,
    Manifest,
    Origin,
    StorageSettings,
    manifest_path,
)
from fastflower.data.folds import Folds, check_leaks, load_folds, read_folds
from fastflower.data.labels import ClassMap, LabelTable, read_classes, read_labels
from fastflower.data.readers import sources
from fastflower.data.readers.contents import content_hash
from fastflower.data.readers.sources import Source
from fastflower.recipe import Recipe, derived
from fastflower.recipe.derived import combos

CONTENTS, UNLABELLED_CONTENTS = "contents.json", "unlabelled_contents.json"  # below data.home
UNLABELLED_TABLE, UNLABELLED_COLUMNS = "unlabelled.csv", ("filename", "sha256")  # below data.home
PIXEL_FORMAT = 2  # of the stored pixels; raised when the same recipe would store other pixels


@dataclass(frozen=True)
class FoldSet:
    """One fold, open and checked.

    val: None when every image trains. val_corrupt: None when the recipe scores no corruptions. unlabelled: None when it
    does not learn from data.unlabelled. aux: the recorded columns of data.aux_cols.
    """

    folds: Folds
    classes: ClassMap
    train: Beton
    val: Beton | None
    val_corrupt: Beton | None
    unlabelled: Beton | None = None
    aux: tuple[AuxColumn, ...] = ()

    @property
    def aux_targets(self) -> AuxTargets | None:
        """The auxiliary labels of the training and validation images; None without data.aux_cols."""
        if not self.aux:
            return None
        return AuxTargets.of(self.aux, train=self.train.index, val=self.val.index if self.val else None)

    @property
    def held_out(self) -> Beton:
        """The validation images; InputError where every image trains."""
        if self.val is None:
            raise InputError(
                "data.split = none: every image trained, and none was held out to be scored; another data.split with "
                "its own data.home holds images out"
            )
        return self.val

    def data_identity(self) -> dict[str, str | int]:
        """The hashes and the stored side that must not change when a training resumes."""
        origin = self.train.origin
        identity: dict[str, str | int] = {
            "classes_hash": origin.classes_hash,
            "folds_hash": origin.folds_hash,
            "labels_hash": origin.labels_hash,
            "stored_side": origin.stored_side,
        }
        if self.unlabelled is not None:
            identity["unlabelled_hash"] = self.unlabelled.origin.inputs_hash
        if self.aux:
            identity["aux_hash"] = auxiliary.columns_hash(self.aux)
        return identity


def stored_side(recipe: Recipe) -> int:
    """The short side in pixels that the largest stage or view needs before its centre crop."""
    return derived.resize_side(derived.largest_size(recipe), derived.eval_factor(recipe) or 1.0)


def storage_settings(recipe: Recipe, store: str) -> StorageSettings:
    """The settings that decide the stored pixels; store is raw or jpeg."""
    own = [kind for kind in recipe.robust.kinds if own_parts.is_own(kind)] if recipe.robust.enabled else []
    return StorageSettings(
        format=PIXEL_FORMAT,
        stored_side=stored_side(recipe),
        store=store,
        jpeg_quality=recipe.data.jpeg_quality,
        combos=tuple(combos(recipe.robust.kinds, recipe.robust.level)) if recipe.robust.enabled else (),
        own_corruptions=tuple((kind, own_parts.source_digest("robust.kinds", kind)) for kind in own),
    )


def inputs_hash(home: Path, table: LabelTable) -> str:
    """Hash of the content of the files that the images of a table are read from."""
    return content_hash(home / CONTENTS, table.source.files(table.filenames))


def unlabelled_inputs_hash(home: Path, source: Source, names: list[str]) -> str:
    """Hash of the content of the files that unlabelled images are read from."""
    return content_hash(home / UNLABELLED_CONTENTS, source.files(names))


def origin_of(
    settings: StorageSettings, table: LabelTable, *, inputs_hash: str, folds: Folds, split: str, fold: int
) -> Origin:
    """The origin that a beton of a fold must have."""
    return Origin(
        split=split,
        fold=fold,
        settings=settings,
        inputs_hash=inputs_hash,
        classes_hash=table.classes.hash,
        labels_hash=table.hash,
        folds_hash=folds.hash,
    )


def unlabelled_origin(settings: StorageSettings, names: list[str], inputs_hash: str) -> Origin:
    """The origin that the beton of unlabelled images must have, by their names and the hash of their content."""
    return Origin(split=UNLABELLED, fold=NO_FOLD, settings=settings, inputs_hash=digest(inputs_hash, *names))


def beton_name(fold: int, split: str) -> str:
    """`fold0_train.beton`, or `unlabelled.beton` for every fold."""
    return f"{split}.beton" if split == UNLABELLED else f"fold{fold}_{split}.beton"


def beton_path(home: Path, fold: int, split: str) -> Path:
    """The path of a beton below data.home."""
    return home / "betons" / beton_name(fold, split)


def splits(settings: StorageSettings, *, validates: bool) -> tuple[str, ...]:
    """The splits of each fold: train, val where images are held out, and val_corrupt where corruptions are scored."""
    if not validates:
        return ("train",)
    return ("train", "val", "val_corrupt") if settings.combos else ("train", "val")


def is_current(folder: Path, expected: Origin) -> bool:
    """True if `folder` holds a beton of the expected origin, of the size in its manifest."""
    path = folder / beton_name(expected.fold, expected.split)
    try:
        manifest = read_record(manifest_path(path), Manifest)
        return path.stat().st_size == manifest.size and manifest.origin == expected
    except (InputError, OSError):
        return False


def check_converted(recipe: Recipe) -> None:
    """Refuse a recipe whose folds are not converted: a look at files, for before the imports that take seconds."""
    home = Path(recipe.data.home)
    folds = read_folds(home / "folds.csv")
    read_classes(home / "classes.csv")
    auxiliary.recorded(recipe, folds.hash)
    for fold in derived.fold_numbers(recipe):
        _check_fold(home, fold, folds)
        path = beton_path(home, fold, "train")
        if derived.refits(recipe) and not path.is_file():
            raise InputError(
                f"data.fold = none: no {path}; python -m fastflower.convert with data.fold=none writes all images "
                "as one set"
            )
        for split in splits(storage_settings(recipe, ""), validates=derived.validates(recipe)):
            open_beton(beton_path(home, fold, split))


def open_fold(recipe: Recipe, fold: int) -> FoldSet:
    """Open the betons of a fold, checked against labels, folds, classes and recipe.

    A row's checksum is left to the functions that read it. Where the photographs are not on this machine, the set is
    only checked against folds.csv. Raises InputError when the set is stale, mixed, too small for the recipe's largest
    size, or leaks between its splits.
    """
    home = Path(recipe.data.home)
    folds = read_folds(home / "folds.csv")
    classes = read_classes(home / "classes.csv")
    hashes = {"folds_hash": folds.hash, "classes_hash": classes.hash}
    aux = auxiliary.recorded(recipe, folds.hash)
    if sources.is_present(recipe):
        folds, table = load_folds(home, read_labels(recipe), recipe)
        auxiliary.check_current(home, aux, table.aux)
        hashes |= {"labels_hash": table.hash, "inputs_hash": inputs_hash(home, table)}
    _check_fold(home, fold, folds)
    check_leaks(folds, fold)
    needed = storage_settings(recipe, "")
    names = splits(needed, validates=derived.validates(recipe) and fold in folds.numbers)
    betons = {split: open_beton(beton_path(home, fold, split)) for split in names}
    for split, beton in betons.items():
        _check_origin(
            beton,
            replace(beton.origin, split=split, fold=fold, settings=betons["train"].origin.settings, **hashes),
        )
        _check_rows(beton, folds, split=split, fold=fold)
    _check_settings(betons["train"], needed)
    unlabelled = open_unlabelled(recipe) if recipe.semi.enabled and recipe.data.unlabelled else None
    return FoldSet(
        folds=folds,
        classes=classes,
        train=betons["train"],
        val=betons.get("val"),
        val_corrupt=betons.get("val_corrupt"),
        unlabelled=unlabelled,
        aux=aux,
    )


def open_unlabelled(recipe: Recipe) -> Beton:
    """The images of data.unlabelled: labels are -1, `index` counts the rows of unlabelled.csv.

    Raises InputError when they are stale, missing, or too small for the recipe's largest size.
    """
    if not recipe.data.unlabelled:
        raise InputError("data.unlabelled is empty: name the folder or file of images without labels")
    beton = open_beton(beton_path(Path(recipe.data.home), NO_FOLD, UNLABELLED))
    if Path(recipe.data.unlabelled).exists():
        source, names, _ = sources.open_unlabelled(recipe)
        content = unlabelled_inputs_hash(Path(recipe.data.home), source, names)
        _check_origin(beton, unlabelled_origin(beton.origin.settings, names, content))
    _check_settings(beton, replace(storage_settings(recipe, ""), combos=()))
    return beton


def _check_fold(home: Path, fold: int, folds: Folds) -> None:
    if fold not in (*folds.numbers, folds.of_all):
        raise InputError(f"data.fold = {fold}: {home / 'folds.csv'} has the folds {folds.numbers}")


def _check_origin(beton: Beton, expected: Origin) -> None:
    different = beton.origin.differences(expected)
    if different:
        raise InputError(
            f"{beton.path} is stale: other {', '.join(different)} than the current recipe and data; run convert again"
        )


def _check_rows(beton: Beton, folds: Folds, *, split: str, fold: int) -> None:
    """Refuse rows or labels other than those of folds.csv; their order counts."""
    rows = folds.train_rows(fold) if split == "train" else folds.val_rows(fold)
    rows = np.tile(rows, max(1, len(beton.origin.combos)))
    if not np.array_equal(beton.index, rows) or not np.array_equal(beton.labels, folds.class_idx[rows]):
        raise InputError(f"{beton.path} is stale: its rows are not those of folds.csv; run convert again")


def _check_settings(beton: Beton, needed: StorageSettings) -> None:
    """Refuse images too small for the recipe, or other corruptions than it scores."""
    settings = beton.origin.settings
    if settings.stored_side < needed.stored_side:
        raise InputError(
            f"{beton.path} holds images of short side {settings.stored_side}, the recipe's sizes and views need "
            f"{needed.stored_side}; run convert with this recipe"
        )
    if needed.combos and settings.combos != needed.combos:
        raise InputError(
            f"{beton.path}: robust.kinds or robust.level differ from those converted; run convert again"
        )
    if needed.combos and settings.own_corruptions != needed.own_corruptions:
        raise InputError(
            f"{beton.path}: the source of {needed.own_corruptions[0][0]} in robust.kinds has changed; run convert again"
        )
