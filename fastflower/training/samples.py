"""A picture of what the network will be shown: stored images, and the same ones augmented, mixed and cut."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from fastflower.core import files
from fastflower.data.loaders import TrainLoader, eval_images
from fastflower.data.transforms.augment import augment
from fastflower.data.transforms.mixing import Kind, mix
from fastflower.data.unlabelled import strong_augmentation
from fastflower.recipe import Recipe

COLUMNS = 8
GAP = 4
BAND = 16  # pixels for a row's title


def sample_rows(
    recipe: Recipe, loader: TrainLoader, *, num_classes: int, interpolation: str, fill: tuple[float, ...]
) -> dict[str, np.ndarray]:
    """Title -> uint8 (n, h, w, 3) of the first rows of epoch 0: stored, augmented, MixUp, CutMix, unlabelled views.

    Of pairs w is that of both images.
    """
    batch = next(iter(loader))
    keys, labels = batch["key"], batch["label"]
    beton, size = loader.beton, loader.size(0)
    stored = eval_images(
        beton,
        batch["row"].numpy(),
        size=size,
        factor=recipe.eval.resize_factor,
        interpolation=interpolation,
        threads=loader.threads,
    )
    images = augment(
        batch["image"], keys, aug=recipe.aug, erase_p=recipe.reg.erase_p, fill=fill, pairs=beton.images == 2
    )
    rows = {"as evaluated": stored.numpy(), "as trained": pixels(images)}
    alphas: dict[Kind, float] = {"mixup": recipe.reg.mixup, "cutmix": recipe.reg.cutmix}
    for kind, alpha in alphas.items():
        if alpha and recipe.reg.mix_prob:
            rows[kind] = pixels(
                mix(images, labels, keys=keys, num_classes=num_classes, kind=kind, alpha=alpha)[0]
            )
    if "weak" in batch:
        rows["unlabelled, weak view"] = batch["weak"].flatten(0, 1).numpy()
    if "strong" in batch:
        images, keys = batch["strong"].flatten(0, 1), batch["strong_key"].flatten()
        aug, erase_p = strong_augmentation(recipe)
        rows["the same, strong view"] = pixels(augment(images, keys, aug=aug, erase_p=erase_p, fill=fill))
    return rows


def pixels(images: torch.Tensor) -> np.ndarray:
    """Float (B, 3, h, w) in 0..255 as uint8 (B, h, w, 3)."""
    return images.detach().cpu().clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def grid(rows: dict[str, np.ndarray]) -> Image.Image:
    """Rows of pictures under their titles."""
    count, height, width, _ = next(iter(rows.values())).shape
    canvas = Image.new("RGB", (GAP + count * (width + GAP), len(rows) * (height + BAND + GAP)), "white")
    draw = ImageDraw.Draw(canvas)
    for place, (title, images) in enumerate(rows.items()):
        top = place * (height + BAND + GAP)
        draw.text((GAP, top + 2), title, fill="black")
        for column, image in enumerate(images):
            canvas.paste(Image.fromarray(image), (GAP + column * (width + GAP), top + BAND))
    return canvas


def save_samples(
    path: Path,
    recipe: Recipe,
    *,
    loader: TrainLoader,
    num_classes: int,
    interpolation: str,
    fill: tuple[float, ...],
) -> None:
    """Write the picture of the loader's first batch and close the loader."""
    try:
        buffer = io.BytesIO()
        grid(
            sample_rows(recipe, loader, num_classes=num_classes, interpolation=interpolation, fill=fill)
        ).save(buffer, "PNG")
        files.write_atomic(path, buffer.getvalue())
    finally:
        loader.close()
