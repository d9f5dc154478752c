"""Images of the report, read from the betons: validation images, training images before and after augmentation."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fastflower.core import seeding
from fastflower.data.betons import fold_set
from fastflower.data.betons.beton_file import Beton, open_beton
from fastflower.data.decode.kernel import Crop
from fastflower.data.loaders import eval_images, train_images
from fastflower.data.readers.image_files import THUMBNAIL_SIDE, thumbnail, thumbnail_jpeg
from fastflower.data.transforms import preview
from fastflower.data.transforms.augment import augment
from fastflower.evaluation.records import ExperimentScores
from fastflower.model.network import NetworkSpec
from fastflower.recipe import Recipe, derived

SAMPLES = 6  # training images that show the augmentation
CORRUPTED_SIDE = 200  # largest short side in pixels of the pictures that show corruptions


@dataclass(frozen=True)
class Sample:
    """A training image as a data URI, with its class index."""

    uri: str
    label: int


@dataclass(frozen=True)
class SampleGroup:
    """The sample images in one state: stored, augmented in an epoch, or mixed."""

    title: str
    images: list[Sample]


@dataclass(frozen=True)
class AugmentationSamples:
    """The section on augmentation: training images of a fold; `size` as text, height × width."""

    fold: int
    size: str
    groups: list[SampleGroup]


@dataclass(frozen=True)
class CorruptedSample:
    """One photograph under a corruption, as a data URI; kind and level are empty for the clean one."""

    kind: str
    level: str
    uri: str
    label: int


def data_uri(data: bytes) -> str:
    """JPEG bytes as a data URI, which embeds an image in a page."""
    return "data:image/jpeg;base64," + base64.b64encode(data).decode("ascii")


def centre_squares(beton: Beton, rows: np.ndarray) -> np.ndarray:
    """Largest centred square of each row: uint8 (B, S, S, 3), of pairs (B, S, 2 S, 3), S = THUMBNAIL_SIDE."""
    return eval_images(
        beton, rows, size=(THUMBNAIL_SIDE, THUMBNAIL_SIDE), factor=1.0, interpolation="bicubic"
    ).numpy()


def thumbnails(home: Path, folds_hash: str, rows_by_fold: dict[int, set[int]]) -> dict[int, str]:
    """Row of folds.csv -> data URI; folds without a beton of these folds are left out."""
    uris: dict[int, str] = {}
    for fold, indices in rows_by_fold.items():
        split = "val" if fold >= 0 else "train"  # -1: in the training set of every fold
        beton = _open(fold_set.beton_path(home, max(fold, 0), split), folds_hash)
        if beton is None:
            continue
        rows = np.flatnonzero(np.isin(beton.index, sorted(indices)))
        for index, pixels in zip(beton.index[rows], centre_squares(beton, rows), strict=True):
            uris[int(index)] = data_uri(thumbnail_jpeg(pixels))
    return uris


def augmented(recipe: Recipe, folds_hash: str, fold: int) -> AugmentationSamples | None:
    """Training images as stored, augmented in two epochs, and mixed; None without the betons of these folds."""
    beton = _open(fold_set.beton_path(Path(recipe.data.home), fold, "train"), folds_hash)
    if beton is None:
        return None
    rows = np.unique(np.linspace(0, beton.rows - 1, SAMPLES).round().astype(np.int64))
    height, width = derived.image_sizes(recipe)[0]
    draws = [
        augmented_batch(beton, rows, recipe=recipe, epoch=epoch, size=(height, width)) for epoch in (0, 1)
    ]
    labels, keys = (
        torch.from_numpy(beton.labels[rows]),
        torch.from_numpy(_keys(recipe, 0, rows).view(np.int64)),
    )
    groups = [("Stored", centre_squares(beton, rows))]
    for number, images in enumerate(draws, 1):
        groups.append((f"Epoch {number}", _thumbnails(preview.to_uint8(images))))
    num_classes = int(beton.labels.max()) + 1
    mixed = preview.mixed(draws[0], labels, keys=keys, num_classes=num_classes, reg=recipe.reg)
    groups += [(preview.TITLES[kind], _thumbnails(images)) for kind, images in mixed.items()]
    encoded = [
        SampleGroup(
            title,
            [
                Sample(data_uri(thumbnail_jpeg(image)), label=int(label))
                for image, label in zip(pixels, labels, strict=True)
            ],
        )
        for title, pixels in groups
    ]
    return AugmentationSamples(fold, size=f"{height} × {width}", groups=encoded)


def corrupted(recipe: Recipe, scores: ExperimentScores) -> list[CorruptedSample]:
    """A photograph that is rightly classified, clean and under each corruption, as the network sees it.

    Empty without corruptions or betons. It is the right one of middle confidence, of the fold that it is in.
    """
    combos = (
        [(row.kind, row.level) for row in scores.fused.corrupted.combos] if scores.fused.corrupted else []
    )
    if not combos or not scores.right:
        return []
    chosen, home = scores.right[len(scores.right) // 2], Path(recipe.data.home)
    betons = [
        _open(fold_set.beton_path(home, chosen.fold, split), scores.folds_hash)
        for split in ("val", "val_corrupt")
    ]
    clean, copies = betons
    if clean is None or copies is None or list(copies.origin.combos) != combos:
        return []
    size = next(member.size for member in scores.members if member.fold == chosen.fold)
    scale = min(1.0, CORRUPTED_SIDE / min(size))
    height, width = (max(1, round(side * scale)) for side in size)
    factor = derived.eval_factor(recipe)
    samples = []
    for beton, names in ((clean, [("", "")]), (copies, combos)):
        rows = np.flatnonzero(beton.index == chosen.index)  # one for each corruption, in their order
        pixels = eval_images(
            beton, rows, size=(height, width), factor=factor, interpolation="bicubic"
        ).numpy()
        samples += [
            CorruptedSample(kind, level, data_uri(thumbnail_jpeg(image, quality=88)), chosen.label)
            for (kind, level), image in zip(names, pixels, strict=True)
        ]
    return samples


def augmented_batch(
    beton: Beton, rows: np.ndarray, *, recipe: Recipe, epoch: int, size: tuple[int, int]
) -> torch.Tensor:
    """Rows as training augments them at the start of an epoch (from 0).

    Returns float32 (B, 3, h, w) in 0..255; pairs are (B, 3, h, 2w).
    """
    aug, keys = recipe.aug, _keys(recipe, epoch, rows)
    images = train_images(beton, rows, keys=keys, size=size, crop=Crop.of(recipe))
    fill = NetworkSpec.from_recipe(recipe, int(beton.labels.max()) + 1).fill
    signed_keys = torch.from_numpy(keys.view(np.int64))
    return augment(
        images, signed_keys, aug=aug, erase_p=recipe.reg.erase_p, fill=fill, pairs=beton.images_per_row == 2
    )


def _keys(recipe: Recipe, epoch: int, rows: np.ndarray) -> np.ndarray:
    return seeding.row_keys(recipe.seed, epoch, positions=np.arange(len(rows)), rows=rows)


def _thumbnails(images: np.ndarray) -> np.ndarray:
    """Images uint8 (B, H, W, 3) as thumbnails (B, h, w, 3) with a short side of THUMBNAIL_SIDE."""
    return np.stack([thumbnail(image) for image in images])


def _open(path: Path, folds_hash: str) -> Beton | None:
    """The beton, or None when it is missing or of other folds than those that were scored."""
    if not path.is_file():
        return None
    beton = open_beton(path)
    return beton if beton.origin.folds_hash == folds_hash else None
