"""Pictures for the report, from the betons: validation images, and training images before and after augmentation."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastflower.core import seeding
from fastflower.data.betons import fold_set
from fastflower.data.betons.beton_file import Beton, open_beton
from fastflower.data.decode.kernel import Crop
from fastflower.data.loaders import eval_images, train_images
from fastflower.data.readers.image_files import SIDE, jpeg, small
from fastflower.data.transforms.augment import augment
from fastflower.data.transforms.mixing import Kind, mix
from fastflower.model.network import NetworkSpec
from fastflower.recipe import Recipe, derived

SAMPLES = 6


def data_uri(data: bytes) -> str:
    """A JPEG as the address of a picture inside a page."""
    return "data:image/jpeg;base64," + base64.b64encode(data).decode("ascii")


def whole(beton: Beton, rows: np.ndarray) -> np.ndarray:
    """The largest centred square of each row: uint8 (B, SIDE, SIDE, 3), of pairs (B, SIDE, 2 * SIDE, 3)."""
    return eval_images(beton, rows, size=(SIDE, SIDE), factor=1.0, interpolation="bicubic").numpy()


def thumbnails(home: Path, folds_hash: str, wanted: dict[int, set[int]]) -> dict[int, str]:
    """Row of folds.csv -> data URI, for `wanted` rows by fold; without betons of these folds there are none."""
    found: dict[int, str] = {}
    for fold, indices in wanted.items():
        split = "val" if fold >= 0 else "train"  # -1: trained on in every fold
        beton = _open(fold_set.beton_path(home, max(fold, 0), split), folds_hash)
        if beton is None:
            continue
        rows = np.flatnonzero(np.isin(beton.index, sorted(indices)))
        for index, pixels in zip(beton.index[rows], whole(beton, rows), strict=True):
            found[int(index)] = data_uri(jpeg(pixels))
    return found


def augmented(recipe: Recipe, folds_hash: str, fold: int) -> dict[str, Any] | None:
    """Training images as stored, as two epochs draw them, and mixed; None without the betons of these folds."""
    beton = _open(fold_set.beton_path(Path(recipe.data.home), fold, "train"), folds_hash)
    if beton is None:
        return None
    rows = np.unique(np.linspace(0, beton.rows - 1, SAMPLES).round().astype(np.int64))
    height, width = derived.image_sizes(recipe)[0]
    draws = [draw(beton, rows, recipe=recipe, epoch=epoch, size=(height, width)) for epoch in (0, 1)]
    labels, keys = (
        torch.from_numpy(beton.labels[rows]),
        torch.from_numpy(_keys(recipe, 0, rows).view(np.int64)),
    )
    groups = [("Stored", whole(beton, rows)), *((f"Epoch {e}", _bytes(d)) for e, d in enumerate(draws, 1))]
    kinds: tuple[tuple[Kind, str, float], ...] = (
        ("mixup", "MixUp", recipe.reg.mixup),
        ("cutmix", "CutMix", recipe.reg.cutmix),
    )
    for kind, title, alpha in kinds:
        if alpha and recipe.reg.mix_prob:
            mixed, _ = mix(
                draws[0], labels, keys=keys, num_classes=int(beton.labels.max()) + 1, kind=kind, alpha=alpha
            )
            groups.append((title, _bytes(mixed)))
    shown = []
    for title, pixels in groups:
        shots = [{"uri": data_uri(jpeg(own)), "label": int(c)} for own, c in zip(pixels, labels, strict=True)]
        shown.append({"title": title, "shots": shots})
    return {"fold": fold, "size": f"{height} × {width}", "groups": shown}


def draw(
    beton: Beton, rows: np.ndarray, *, recipe: Recipe, epoch: int, size: tuple[int, int]
) -> torch.Tensor:
    """Rows as training draws them at the start of an epoch (from 0): float32 (B, 3, h, w), of pairs (B, 3, h, 2w),
    0..255.
    """
    aug, keys = recipe.aug, _keys(recipe, epoch, rows)
    scale, ratio = (aug.rrc_scale[0], aug.rrc_scale[1]), (aug.rrc_ratio[0], aug.rrc_ratio[1])
    crop = Crop(scale, ratio, min(1.0, aug.hflip_p * aug.strength))
    images = train_images(beton, rows, keys=keys, size=size, crop=crop)
    fill = NetworkSpec.from_recipe(recipe, int(beton.labels.max()) + 1).fill
    own = torch.from_numpy(keys.view(np.int64))
    return augment(images, own, aug=aug, erase_p=recipe.reg.erase_p, fill=fill, pairs=beton.images == 2)


def _keys(recipe: Recipe, epoch: int, rows: np.ndarray) -> np.ndarray:
    return seeding.row_keys(recipe.seed, epoch, positions=np.arange(len(rows)), rows=rows)


def _bytes(images: torch.Tensor) -> np.ndarray:
    """Float (B, 3, H, W), 0..255, as uint8 thumbnails (B, h, w, 3) with a short side of SIDE."""
    pixels = images.clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return np.stack([small(own) for own in pixels])


def _open(path: Path, folds_hash: str) -> Beton | None:
    """A beton of the folds that were scored, or None."""
    if not path.is_file():
        return None
    beton = open_beton(path)
    return beton if beton.manifest.get("folds_hash") == folds_hash else None
