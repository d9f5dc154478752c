"""Inference: a member's logits on its validation images, for a single view, the recipe's views and corruptions.

fp32 without TF32, each image once, with the views that the predictor uses.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fastflower.core import checkpoint
from fastflower.core.errors import InputError
from fastflower.data.betons import fold_set
from fastflower.data.betons.beton_file import Beton
from fastflower.data.loaders import EvalLoader
from fastflower.evaluation.agreement import Trained, check_data
from fastflower.evaluation.logits import Logits, MemberInfo, MemberLogits, reduce_views
from fastflower.evaluation.moves import Move, moved, moves_of
from fastflower.evaluation.views import MemberViews, View, sizes_of
from fastflower.model.member import MemberCheckpoint, load_member
from fastflower.model.network import build_network, use_channels_last
from fastflower.recipe import Recipe


@torch.inference_mode()
def logits_of(
    networks: Sequence[nn.Module],
    loader: EvalLoader,
    *,
    rows: int,
    flips: tuple[bool, ...],
    device: torch.device,
) -> list[np.ndarray]:
    """Logits (rows, C) float32 in the order of the beton of each network and flip; every image is decoded once.

    Raises InputError unless the loader yields every row exactly once.
    """
    by_view: list[np.ndarray] = []
    reads = np.zeros(rows, dtype=np.int64)
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        for batch in loader:
            images = batch["image"].to(device, non_blocking=True)  # uint8 (B, H, W, 3)
            valid = batch["valid"].numpy()
            batch_rows = batch["row"].numpy()[valid]
            for position, (network, flip) in enumerate(itertools.product(networks, flips)):
                view = images.flip(2) if flip else images
                logits = network(view.permute(0, 3, 1, 2).float()).float().cpu().numpy()
                if len(by_view) == position:
                    by_view.append(np.empty((rows, logits.shape[1]), dtype=np.float32))
                by_view[position][batch_rows] = logits[valid]
            np.add.at(reads, batch_rows, 1)
    if (reads != 1).any():
        raise InputError(
            f"{loader}: {int((reads != 1).sum())} images were not read exactly once; run convert again"
        )
    return by_view


def load_network(member: MemberCheckpoint, path: Path, device: torch.device) -> nn.Module:
    """A member's network with its weights, in evaluation mode; InputError when the tensors do not fit the network."""
    network = build_network(member.meta)
    try:
        network.load_state_dict(member.tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: its tensors are not those of {member.meta.backbone} ({reason})") from None
    use_channels_last(network)
    return network.to(device).eval()


def predict(path: Path, recipe: Recipe, device: torch.device) -> MemberLogits:
    """The logits of a member on its fold's validation betons, clean and corrupted; raises as `predict_views`."""
    return predict_views(path, recipe, device).member


def predict_views(path: Path, recipe: Recipe, device: torch.device) -> MemberViews:
    """Load a member and run it over its fold's validation betons, clean and corrupted, with the logits of each view.

    Raises InputError when the betons are stale, or not of the classes and folds that the member was trained on.
    """
    member = load_member(path)
    meta, fold = member.meta, member.meta.fold
    opened = fold_set.open_fold(recipe, fold)
    check_data(
        [Trained.of(path.name, meta)], Path(recipe.data.home), classes=opened.classes, folds=opened.folds
    )
    clean, corrupted = opened.held_out, opened.val_corrupt
    network = load_network(member, path, device)
    size = meta.size

    def run(
        beton: Beton, size: tuple[int, int], flips: tuple[bool, ...], moves: Sequence[Move] = (Move(),)
    ) -> list[np.ndarray]:
        """The logits of every move, plain and mirrored."""
        batch = recipe.eval.batch or recipe.train.batch_per_gpu
        loader = EvalLoader(
            beton,
            batch,
            size=lambda: size,
            factor=meta.resize_factor,
            interpolation=meta.interpolation,
            rank=0,
            world=1,
            threads=recipe.data.workers,
        )
        try:
            networks = [moved(network, move, size, images=beton.images_per_row) for move in moves]
            return logits_of(networks, loader, rows=beton.rows, flips=flips, device=device)
        finally:
            loader.close()

    moves = moves_of(recipe.tta)
    flips = (False, True) if recipe.tta.hflip else (False,)
    by_view: dict[View, np.ndarray] = {}
    ms: dict[View, float] = {}
    for view_size in sizes_of(size, meta.scales(recipe.tta.scales)):
        views = [(*view_size, move, flip) for move in moves for flip in flips]
        start = time.perf_counter()
        by_view |= zip(views, run(clean, view_size, flips, moves), strict=True)
        ms |= dict.fromkeys(views, 1000 * (time.perf_counter() - start) / clean.rows / len(views))
    plain = (*size, Move(), False)
    single = by_view[plain] if plain in by_view else run(clean, size, (False,))[0]
    n, classes = single.shape
    combos = np.array(corrupted.origin.combos if corrupted else [], dtype=str).reshape(-1, 2)
    corrupt = run(corrupted, size, (False,))[0] if corrupted else np.empty((0, n, classes), np.float32)
    info = MemberInfo(
        name=path.name,
        checkpoint=path.name,
        seal=checkpoint.seal(path),
        backbone=meta.backbone,
        fold=fold,
        seed=meta.seed,
        epoch=meta.epoch,
        weights=meta.weights,
        head=meta.head,
        stored=meta.scores.get(f"clean_{meta.weights}"),
        size=size,
        views=[(height, width, flip) for height, width, _, flip in by_view],
        class_ids=list(meta.class_ids),
        class_hash=meta.class_hash,
        folds_hash=opened.folds.hash,
        mb=sum(tensor.numel() * 2 for tensor in member.tensors.values()) / 1e6,
        ms=sum(ms.values()),
    )
    predicted = Logits(
        logits=reduce_views(list(by_view.values()), recipe.tta.reduce),
        single=single,
        corrupt=corrupt.reshape(len(combos), n, classes),
        class_idx=clean.labels,
        index=clean.index,
        fold=np.full(n, fold, dtype=np.int64),
        filename=np.array(opened.folds.filenames)[clean.index],
        combos=combos,
        info=info,
    )
    return MemberViews(predicted, meta.scales, by_view, ms)
