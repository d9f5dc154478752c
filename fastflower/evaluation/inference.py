"""A member's logits on its own validation part: single view, the recipe's views, corrupted copies.

fp32 without TF32, each image once, the same views that the predictor uses.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fastflower.core import checkpoint
from fastflower.core.checkpoint import Checkpoint
from fastflower.core.errors import InputError
from fastflower.data.betons import fold_set
from fastflower.data.betons.beton_file import Beton
from fastflower.data.labels import differing
from fastflower.data.loaders import EvalLoader
from fastflower.evaluation.logits import Logits, average
from fastflower.model.network import NetworkSpec, build_network
from fastflower.recipe import Recipe


@dataclass(frozen=True)
class View:
    """One version of an image that is predicted: its size, and mirrored or not."""

    height: int
    width: int
    flip: bool


def views_of(size: tuple[int, int], scales: list[int], *, hflip: bool) -> list[View]:
    """Every scale, plain and mirrored; a member trained on oblong images has its own size only."""
    sizes = [(scale, scale) for scale in scales] if size[0] == size[1] else [size]
    return [
        View(height, width, flip)
        for height, width in sizes
        for flip in ((False, True) if hflip else (False,))
    ]


@torch.inference_mode()
def logits_of(
    network: nn.Module, loader: EvalLoader, *, rows: int, flips: tuple[bool, ...], device: torch.device
) -> list[np.ndarray]:
    """Logits (rows, C) float32 in the order of the beton for each of `flips`; every image is decoded once."""
    found: list[np.ndarray] = []
    seen = np.zeros(rows, dtype=np.int64)
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        for batch in loader:
            images = batch["image"].to(device, non_blocking=True)  # uint8 (B, H, W, 3)
            valid = batch["valid"].numpy()
            own = batch["row"].numpy()[valid]
            for position, flip in enumerate(flips):
                turned = images.flip(2) if flip else images
                logits = network(turned.permute(0, 3, 1, 2).float()).float().cpu().numpy()
                if len(found) == position:
                    found.append(np.empty((rows, logits.shape[1]), dtype=np.float32))
                found[position][own] = logits[valid]
            np.add.at(seen, own, 1)
    if (seen != 1).any():
        raise InputError(
            f"{loader}: {int((seen != 1).sum())} images were not read exactly once; run convert again"
        )
    return found


def load_network(member: Checkpoint, path: Path, device: torch.device) -> nn.Module:
    """A member's network with its weights, in evaluation mode; InputError when the tensors are not the network's."""
    network = build_network(NetworkSpec.from_meta(member.meta))
    try:
        network.load_state_dict(member.tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path}: its tensors are not those of {member.meta['backbone']} ({reason})"
        ) from None
    return network.to(device).to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]


def predict(path: Path, recipe: Recipe, device: torch.device) -> Logits:
    """Load a member and run it over its fold's validation betons.

    Raises InputError when the betons are stale, or not of the classes and folds that the member was trained on.
    """
    member = checkpoint.load(path)
    meta, fold = member.meta, int(member.meta["fold"])
    opened = fold_set.open_fold(recipe, fold)
    own = differing(opened.classes.ids, meta.get("class_ids") or ())
    for noun, then, now, how in (
        ("classes", meta.get("class_hash"), opened.classes.hash, own and f", {own}"),
        ("folds", meta.get("folds_hash"), opened.folds.hash, ""),
    ):
        if then != now:
            raise InputError(
                f"{path.name} was trained with other {noun} ({then}{how}) than {recipe.data.home} holds ({now}); "
                "point data.home at its conversion, or train again"
            )
    clean, corrupted = opened.val, opened.val_corrupt
    network = load_network(member, path, device)
    size = (int(meta["size"][0]), int(meta["size"][1]))

    def run(beton: Beton, size: tuple[int, int], flips: tuple[bool, ...]) -> list[np.ndarray]:
        batch = recipe.eval.batch or recipe.train.batch_per_gpu
        factor, interpolation = float(meta["resize_factor"]), str(meta["interpolation"])
        loader = EvalLoader(
            beton,
            batch,
            size=lambda: size,
            factor=factor,
            interpolation=interpolation,
            rank=0,
            world=1,
            threads=recipe.data.workers,
        )
        try:
            return logits_of(network, loader, rows=beton.rows, flips=flips, device=device)
        finally:
            loader.close()

    views = views_of(size, recipe.tta.scales, hflip=recipe.tta.hflip)
    flips = (False, True) if recipe.tta.hflip else (False,)
    start = time.perf_counter()
    by_size = {side: run(clean, side, flips) for side in dict.fromkeys((v.height, v.width) for v in views)}
    seconds = time.perf_counter() - start
    single = by_size[size][0] if size in by_size else run(clean, size, (False,))[0]
    n, classes = single.shape
    combos = np.array(corrupted.manifest["combos"] if corrupted else [], dtype=str).reshape(-1, 2)
    corrupt = run(corrupted, size, (False,))[0] if corrupted else np.empty((0, n, classes), np.float32)
    about: dict[str, Any] = {
        "kind": "logits",
        "name": path.name,
        "checkpoint": path.name,
        "seal": checkpoint.seal(path),
        "backbone": meta["backbone"],
        "fold": fold,
        "seed": int(meta["seed"]),
        "epoch": int(meta["epoch"]),
        "weights": meta["weights"],
        "head": meta["head"],
        "stored": meta["scores"].get(f"clean_{meta['weights']}"),
        "size": list(size),
        "views": [[view.height, view.width, view.flip] for view in views],
        "class_ids": list(meta["class_ids"]),
        "class_hash": meta["class_hash"],
        "folds_hash": opened.folds.hash,
        "mb": sum(tensor.numel() * 2 for tensor in member.tensors.values()) / 1e6,
        "ms": 1000 * seconds / n,
    }
    return Logits(
        logits=average([logits for own in by_size.values() for logits in own]),
        single=single,
        corrupt=corrupt.reshape(len(combos), n, classes),
        class_idx=clean.labels,
        index=clean.index,
        fold=np.full(n, fold, dtype=np.int64),
        filename=np.array(opened.folds.filenames)[clean.index],
        combos=combos,
        about=about,
    )
