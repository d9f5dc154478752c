"""Picture of training samples: the images as stored, augmented, and mixed by MixUp and CutMix."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from fastflower.callbacks.progress import side
from fastflower.core import files
from fastflower.core.runs import Run
from fastflower.data.loaders import TrainLoader, eval_images
from fastflower.data.transforms import preview
from fastflower.data.transforms.augment import augment
from fastflower.data.unlabelled import UnlabelledBatches, strong_augmentation
from fastflower.recipe import Recipe
from fastflower.recipe.derived import eval_factor
from fastflower.training.prepared import Prepared

COLUMNS = 8  # images in a row
GAP = 4  # pixels between images
BAND = 16  # pixels for a row's title


def sample_rows(
    recipe: Recipe, loader: TrainLoader, *, num_classes: int, interpolation: str, fill: tuple[float, ...]
) -> dict[str, np.ndarray]:
    """Title -> uint8 (n, h, w, 3) of the first batch: stored, augmented, MixUp, CutMix, unlabelled views.

    For pairs w is the width of both images side by side.
    """
    batch = next(iter(loader))
    keys, labels = batch["key"], batch["label"]
    beton, size = loader.beton, loader.size(0)
    stored = eval_images(
        beton,
        batch["row"].numpy(),
        size=size,
        factor=eval_factor(recipe),
        interpolation=interpolation,
        threads=loader.threads,
    )
    images = augment(
        batch["image"],
        keys,
        aug=recipe.aug,
        erase_p=recipe.reg.erase_p,
        fill=fill,
        pairs=beton.images_per_row == 2,
    )
    rows = {"as evaluated": stored.numpy(), "as trained": preview.to_uint8(images)}
    rows |= preview.mixed(images, labels, keys=keys, num_classes=num_classes, reg=recipe.reg)
    if "weak" in batch:
        rows["unlabelled, weak view"] = batch["weak"].flatten(0, 1).numpy()
    if "strong" in batch:
        images, keys = batch["strong"].flatten(0, 1), batch["strong_key"].flatten()
        aug, erase_p = strong_augmentation(recipe)
        rows["unlabelled, strong view"] = preview.to_uint8(
            augment(images, keys, aug=aug, erase_p=erase_p, fill=fill)
        )
    return rows


def grid(rows: dict[str, np.ndarray]) -> Image.Image:
    """One picture of all rows of images, each below its title."""
    count, height, width, _ = next(iter(rows.values())).shape
    canvas = Image.new("RGB", (GAP + count * (width + GAP), len(rows) * (height + BAND + GAP)), "white")
    draw = ImageDraw.Draw(canvas)
    for row, (title, images) in enumerate(rows.items()):
        top = row * (height + BAND + GAP)
        draw.text((GAP, top + 2), title, fill="black")
        for column, image in enumerate(images):
            canvas.paste(Image.fromarray(image), (GAP + column * (width + GAP), top + BAND))
    return canvas


def save_pictures(prepared: Prepared, run: Run) -> None:
    """Save pictures of epoch 0's first samples, samples_<run>.png, and samples_<run>_<size>.png for later sizes."""
    recipe = prepared.recipe
    if prepared.features is not None and recipe.model.frozen_views == 1:
        return  # nothing is augmented
    sizes = dict.fromkeys((stage.height, stage.width) for stage in prepared.derived.stages)
    for position, size in enumerate(sizes):
        suffix = f"_{side(list(size))}" if position else ""
        save_samples(
            run.results_dir / f"samples_{run.stem}{suffix}.png",
            recipe,
            loader=_first_batch(prepared, size),
            num_classes=prepared.num_classes,
            interpolation=prepared.spec.interpolation,
            fill=prepared.spec.fill,
        )


def _first_batch(prepared: Prepared, size: tuple[int, int]) -> TrainLoader:
    """A separate loader of COLUMNS images of a size, which reads as a single rank would."""
    train = prepared.data.train
    extras = train.extras
    if isinstance(extras, UnlabelledBatches):
        extras = replace(extras, batch=lambda epoch: COLUMNS, size=lambda epoch: size, mu=1, rank=0, world=1)
    return TrainLoader(
        train.beton,
        train.order,
        seed=train.seed,
        batch=lambda epoch: COLUMNS,
        size=lambda epoch: size,
        crop=train.crop,
        extras=extras,
    )


def save_samples(
    path: Path,
    recipe: Recipe,
    *,
    loader: TrainLoader,
    num_classes: int,
    interpolation: str,
    fill: tuple[float, ...],
) -> None:
    """Write the picture of the loader's first batch as a PNG, atomically, and close the loader."""
    try:
        buffer = io.BytesIO()
        grid(
            sample_rows(recipe, loader, num_classes=num_classes, interpolation=interpolation, fill=fill)
        ).save(buffer, "PNG")
        files.write_atomic(path, buffer.getvalue())
    finally:
        loader.close()
