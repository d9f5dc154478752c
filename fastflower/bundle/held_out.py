"""The images on which gates test a bundle: original files of validation images, and betons of the same images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from fastflower.bundle.description import BundleDescription, PairArrays
from fastflower.core.errors import CorruptionError
from fastflower.core.tables import escaped
from fastflower.data.betons import fold_set
from fastflower.data.betons.beton_file import RAW, Beton, EncodedImage, open_beton
from fastflower.data.betons.beton_writer import BetonWriter
from fastflower.data.conversion.encode import content_of
from fastflower.data.folds import Folds
from fastflower.data.readers import image_files, sources
from fastflower.data.readers.arrays import open_npz
from fastflower.data.readers.sources import Source
from fastflower.recipe import Recipe

if TYPE_CHECKING:
    from fastflower.bundle.writer import Member

MOST_ROWS = 64


@dataclass(frozen=True)
class HeldOut:
    """Validation images as their users gave them, with the class_idx, row of folds.csv and fold of each, int64 (n,).

    The file of a pair is a .npz of one row.
    """

    files: list[Path]
    class_idx: np.ndarray
    index: np.ndarray
    fold: np.ndarray

    def __len__(self) -> int:
        return len(self.files)

    def first(self, count: int) -> HeldOut:
        return HeldOut(
            files=self.files[:count],
            class_idx=self.class_idx[:count],
            index=self.index[:count],
            fold=self.fold[:count],
        )


def open_originals(recipe: Recipe) -> Source:
    """Open the source of the validation images; InputError when it is missing."""
    return sources.open_labelled(recipe).source


def collect(folder: Path, recipe: Recipe, members: list[Member]) -> HeldOut:
    """Copy photographs to a new folder, spread evenly over the validation splits of the members' folds and shuffled.

    Where every image trained, they are training images: programs and pixels can be compared on any image. A refit on
    all images adds none to those of the folds.
    Images that come as numbers are saved as PNG with the same pixels, pairs as .npz with the same numbers.
    """
    every = {
        fold: fold_set.open_fold(recipe, fold) for fold in sorted({member.meta.fold for member in members})
    }
    folds = [fold for fold, opened in every.items() if opened.val] or list(every)
    source = open_originals(recipe)
    folder.mkdir()
    rows = []
    for fold in folds:
        opened = every[fold]
        beton = opened.val or opened.train
        count = min(beton.rows, max(1, MOST_ROWS // len(folds)))
        for row in np.linspace(0, beton.rows - 1, count).astype(int).tolist():
            index = int(beton.index[row])
            _check_content(source, opened.folds, index)
            rows.append((opened.folds.filenames[index], int(beton.labels[row]), index, fold))
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    names, labels, indices, row_folds = zip(*rows, strict=True)
    files = (
        save_pairs(folder, recipe, names)
        if source.images_per_row == 2
        else save_photographs(folder, source, names)
    )
    return HeldOut(files=files, class_idx=np.array(labels), index=np.array(indices), fold=np.array(row_folds))


def _check_content(source: Source, folds: Folds, index: int) -> None:
    """Raise CorruptionError unless the original of a row of folds.csv is the one that was converted."""
    name = folds.filenames[index]
    if content_of(source, name) != folds.sha256[index]:
        raise CorruptionError(
            f"{escaped(name)} is not the image that was converted: its SHA-256 is not that of folds.csv; restore it, "
            "or move folds.csv away, convert and train again"
        )


def save_photographs(folder: Path, source: Source, names: Sequence[str]) -> list[Path]:
    """Write one file for each photograph; returns the paths."""
    files = []
    for number, name in enumerate(names):
        image = source.read(name, 0)
        files.append(folder / f"{number}{Path(name).suffix if isinstance(image, bytes) else '.png'}")
        if isinstance(image, bytes):
            files[-1].write_bytes(image)
        else:
            Image.fromarray(image).save(files[-1])
    return files


def save_pairs(folder: Path, recipe: Recipe, names: Sequence[str]) -> list[Path]:
    """Write one .npz for each pair: the numbers of the validation file under the array names of data.root."""
    path, arrays = recipe.data.val or recipe.data.root, sources.pair_arrays(recipe)
    rows = [int(name.rpartition("/")[2]) for name in names]
    with np.load(path, allow_pickle=False) as numbers:
        selected = [numbers[name][rows] for name in sources.pair_arrays(recipe, path)]
    files = [folder / f"{number}.npz" for number in range(len(rows))]
    for number, file in enumerate(files):
        np.savez(file, **{name: values[[number]] for name, values in zip(arrays, selected, strict=True)})
    return files


def write_betons(folder: Path, bundle: BundleDescription, photographs: HeldOut) -> dict[int, Beton]:
    """Write the images losslessly as convert stores them, one beton for each stored side of the bundle's crops."""
    betons = {}
    for side in sorted({crop.stored_side for crop in bundle.crops}):
        path = folder / f"photographs_{side}.beton"
        with BetonWriter(path, len(photographs), images_per_row=2 if bundle.pairs else 1) as writer:
            for row, file in enumerate(photographs.files):
                stored = [
                    np.array(image_files.stored(image, side)) for image in read_images(file, bundle.pairs)
                ]
                pictures = [EncodedImage(RAW, image.data.cast("B"), *image.shape[:2]) for image in stored]
                writer.append(int(photographs.class_idx[row]), row, *pictures)
            writer.commit()
        betons[side] = open_beton(path)
    return betons


def read_images(file: Path, pairs: PairArrays | None) -> list[Image.Image]:
    """Read a photograph, or the two images of a pair, as convert does."""
    if not pairs:
        return [image_files.decode(image_files.read_bytes(file))]
    stack = open_npz(file, [*pairs.arrays, ""], shape=pairs.shape, labelled=False)
    return [Image.fromarray(images[0]).convert("RGB") for images in stack.images]
