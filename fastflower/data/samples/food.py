"""Photographs in the folders of a food contest, few with labels and many without: drawn flowers, eleven species.

training/labeled/<class>/, training/unlabeled/, validation/<class>/ and testing/, whose labels are in truth.csv. No
image is in two of them.
"""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from fastflower.core import seeding, workers
from fastflower.core.errors import InputError
from fastflower.data.samples import flowers

CLASSES = [species.name for species in flowers.SPECIES[:11]]
SIDE = 128
LABELLED = ("training/labeled", "validation")  # folders with one folder per class


class Shot(NamedTuple):
    """One photograph to draw."""

    path: Path
    species: int
    number: int  # within the species


def write(home: Path, *, rows: int = 220, unlabelled: int = 1320, held_out: int = 440, seed: int = 0) -> None:
    """Draw `rows` labelled and `unlabelled` training images, and `held_out` each to validate and to test.

    Every class has equally many, give or take one. InputError when a class would be empty.
    """
    counts = {
        "training/labeled": rows,
        "training/unlabeled": unlabelled,
        "validation": held_out,
        "testing": held_out,
    }
    for name, count in (("rows", rows), ("held_out", held_out)):
        if count < len(CLASSES):
            raise InputError(f"{name}={count}: must be at least {len(CLASSES)}, one image of each class")
    shots = planned(home, counts, seed)
    for folder in {shot.path.parent for shot in shots} | {home / name for name in counts}:
        folder.mkdir(parents=True, exist_ok=True)
    progress = workers.Progress("photographs", len(shots))
    take = partial(_take, seed)
    for _ in workers.map_ordered(take, zip(shots), count=workers.cores(0), on_progress=progress):
        pass
    with (home / "truth.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("filename", "category_id"))
        hidden = sorted(shot for shot in shots if shot.path.parent == home / "testing")
        writer.writerows((shot.path.name, CLASSES[shot.species]) for shot in hidden)


def planned(home: Path, counts: dict[str, int], seed: int) -> list[Shot]:
    """All photographs; their file names are numbers in random order, so that no name tells its class."""
    total = sum(counts.values())
    names = iter(seeding.generator(seed, total).permutation(total) + 1)
    shots, drawn = [], [0] * len(CLASSES)
    for folder, count in counts.items():
        for k in range(count):
            species = k % len(CLASSES)
            inside = home / folder / (CLASSES[species] if folder in LABELLED else "")
            shots.append(Shot(inside / f"{next(names):06}.jpg", species=species, number=drawn[species]))
            drawn[species] += 1
    return shots


def _take(seed: int, shot: Shot) -> None:
    picture = flowers.draw(shot.species, seed, shot.number)
    picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(shot.path, "JPEG", quality=90)
    workers.count_done()
