"""The images that gates try a bundle on: files as they were given, of what the members validated on.

Beside them lies what convert would store of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastflower.bundle.writer import Member
from fastflower.data.betons import fold_set
from fastflower.data.betons.beton_file import RAW, Beton, BetonWriter, Picture, open_beton
from fastflower.data.readers import image_files, sources
from fastflower.data.readers.arrays import open_npz
from fastflower.data.readers.sources import Source
from fastflower.recipe import Recipe

MOST_ROWS = 64


@dataclass(frozen=True)
class Photographs:
    """Files of validation images, as they were given: class_idx, row of folds.csv and fold of each, int64 (n,).

    The file of a pair is a .npz of one row.
    """

    files: list[Path]
    class_idx: np.ndarray
    index: np.ndarray
    fold: np.ndarray

    def __len__(self) -> int:
        return len(self.files)

    def first(self, count: int) -> Photographs:
        return Photographs(self.files[:count], self.class_idx[:count], self.index[:count], self.fold[:count])


def originals(recipe: Recipe) -> Source:
    """Where the images come from that members validated on; InputError when that is not here."""
    return sources.open_labelled(recipe).source


def held_out(place: Path, recipe: Recipe, members: list[Member]) -> Photographs:
    """Photographs spread evenly over the validation parts of the members' folds, folds and classes mixed.

    Their files are copied to a new folder; images that come as numbers become PNGs of the same pixels, or a .npz of
    the same numbers where they are pairs.
    """
    folds = sorted({int(member.meta["fold"]) for member in members})
    source = originals(recipe)
    place.mkdir()
    found = []
    for fold in folds:
        opened = fold_set.open_fold(recipe, fold)
        share = min(opened.val.rows, max(1, MOST_ROWS // len(folds)))
        for row in np.linspace(0, opened.val.rows - 1, share).astype(int).tolist():
            index = int(opened.val.index[row])
            found.append((opened.folds.filenames[index], int(opened.val.labels[row]), index, fold))
    found = [found[i] for i in np.random.default_rng(0).permutation(len(found))]
    names, *numbers = zip(*found, strict=True)
    files = single_pairs(place, recipe, names) if source.count == 2 else singles(place, source, names)
    return Photographs(files, *(np.array(column) for column in numbers))


def singles(place: Path, source: Source, names: Sequence[str]) -> list[Path]:
    """A file of each of some photographs."""
    files = []
    for number, name in enumerate(names):
        image = source.read(name, 0)
        files.append(place / f"{number}{Path(name).suffix if isinstance(image, bytes) else '.png'}")
        if isinstance(image, bytes):
            files[-1].write_bytes(image)
        else:
            Image.fromarray(image).save(files[-1])
    return files


def single_pairs(place: Path, recipe: Recipe, names: Sequence[str]) -> list[Path]:
    """A .npz of each of some pairs: the numbers as they are where these validate, under the names of data.root."""
    path, arrays = recipe.data.val or recipe.data.root, sources.pair_arrays(recipe)
    rows = [int(name.rpartition("/")[2]) for name in names]
    with np.load(path, allow_pickle=False) as numbers:
        own = [numbers[name][rows] for name in sources.pair_arrays(recipe, path)]
    files = [place / f"{number}.npz" for number in range(len(rows))]
    for number, file in enumerate(files):
        np.savez(file, **{name: values[[number]] for name, values in zip(arrays, own, strict=True)})
    return files


def written(place: Path, bundle: dict[str, Any], photographs: Photographs) -> dict[int, Beton]:
    """The images as convert stores them without loss, for each stored side that a member knows."""
    betons = {}
    for side in sorted({crop["stored_side"] for crop in bundle["crops"]}):
        path = place / f"photographs_{side}.beton"
        with BetonWriter(path, len(photographs), 2 if bundle["pairs"] else 1) as writer:
            for row, file in enumerate(photographs.files):
                stored = [
                    np.array(image_files.stored(image, side)) for image in images_of(file, bundle["pairs"])
                ]
                own = [Picture(RAW, image.data.cast("B"), *image.shape[:2]) for image in stored]
                writer.append(int(photographs.class_idx[row]), row, *own)
            writer.commit({})
        betons[side] = open_beton(path)
    return betons


def images_of(file: Path, pairs: dict[str, Any] | None) -> list[Image.Image]:
    """What convert reads in a file: a photograph, or the two images of a pair."""
    if not pairs:
        return [image_files.decode(image_files.read_bytes(file))]
    stack = open_npz(file, [*pairs["arrays"], ""], shape=pairs["shape"], labelled=False)
    return [Image.fromarray(images[0]).convert("RGB") for images in stack.images]
