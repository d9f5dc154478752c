"""The images that gates try a bundle on: files as they were given, of what the members validated on.

Beside them lies what convert would store of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastflower.data import pixels, sets, sources
from fastflower.data.betons import Beton, BetonWriter, open_beton
from fastflower.data.sources import Source
from fastflower.errors import InputError
from fastflower.evaluation.bundle import Member
from fastflower.recipe import Recipe

MOST_ROWS = 64


@dataclass(frozen=True)
class Photographs:
    """Files of validation images, as they were given: class_idx, row of folds.csv and fold of each, int64 (n,)."""

    files: list[Path]
    class_idx: np.ndarray
    index: np.ndarray
    fold: np.ndarray

    def __len__(self) -> int:
        return len(self.files)

    def first(self, count: int) -> Photographs:
        return Photographs(self.files[:count], self.class_idx[:count], self.index[:count], self.fold[:count])


def originals(recipe: Recipe) -> Source:
    """Where the images come from that members validated on; InputError when that is not here, or holds pairs."""
    source = sources.open_labelled(recipe).source
    if source.count > 1:
        raise InputError(
            f"data.root = {recipe.data.root}: holds pairs, and the predictor reads single images; "
            "pairs have scores by evaluate and no hand-in"
        )
    return source


def held_out(place: Path, recipe: Recipe, members: list[Member]) -> Photographs:
    """Photographs spread evenly over the validation parts of the members' folds, folds and classes mixed.

    Their files are copied to a new folder; images that come as numbers become PNGs of the same pixels.
    """
    folds = sorted({int(member.meta["fold"]) for member in members})
    source = originals(recipe)
    place.mkdir()
    found = []
    for fold in folds:
        opened = sets.open_fold(recipe, fold)
        share = min(opened.val.rows, max(1, MOST_ROWS // len(folds)))
        for row in np.linspace(0, opened.val.rows - 1, share).astype(int).tolist():
            index = int(opened.val.index[row])
            name = opened.folds.filenames[index]
            image = source.read(name, 0)
            file = place / f"{index}{Path(name).suffix if isinstance(image, bytes) else '.png'}"
            if isinstance(image, bytes):
                file.write_bytes(image)
            else:
                Image.fromarray(image).save(file)
            found.append((file, int(opened.val.labels[row]), index, fold))
    found = [found[i] for i in np.random.default_rng(0).permutation(len(found))]
    files, *numbers = zip(*found, strict=True)
    return Photographs(list(files), *(np.array(column) for column in numbers))


def written(place: Path, bundle: dict[str, Any], photographs: Photographs) -> dict[int, Beton]:
    """The photographs as convert stores them without loss, for each stored side that a member knows."""
    betons = {}
    for side in sorted({crop["stored_side"] for crop in bundle["crops"]}):
        path = place / f"photographs_{side}.beton"
        with BetonWriter(path, len(photographs)) as writer:
            for row, file in enumerate(photographs.files):
                image = pixels.decode(pixels.read_bytes(file))
                writer.raw(np.array(pixels.stored(image, side)), int(photographs.class_idx[row]), row)
            writer.commit({})
        betons[side] = open_beton(path)
    return betons
