"""Inference: a member's logits on its validation images, for a single view, the recipe's views and corruptions.

fp32 without TF32, each image once, with the views that the predictor uses.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fastflower.core import checkpoint
from fastflower.core.errors import InputError
from fastflower.data.betons import fold_set
from fastflower.data.betons.beton_file import Beton
from fastflower.data.labels import class_differences
from fastflower.data.loaders import EvalLoader
from fastflower.evaluation.logits import Logits, MemberInfo, MemberLogits, reduce_views
from fastflower.evaluation.moves import Move, moved, moves_of
from fastflower.model.member import MemberCheckpoint, MemberMeta, load_member
from fastflower.model.network import build_network, fitted, use_channels_last
from fastflower.recipe import Recipe, derived


@dataclass(frozen=True)
class View:
    """A version of an image at which the network is run: its size, and mirrored or not."""

    height: int
    width: int
    flip: bool


def views_of(size: tuple[int, int], scales: list[int], *, hflip: bool) -> list[View]:
    """Every scale, plain and, with hflip, mirrored; a member trained on oblong images has only its own size."""
    sizes = [(scale, scale) for scale in scales] if size[0] == size[1] else [size]
    return [
        View(height, width, flip)
        for height, width in sizes
        for flip in ((False, True) if hflip else (False,))
    ]


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


def check_recipe(recipe: Recipe, members: Mapping[Path, MemberMeta]) -> None:
    """Refuse a recipe that contradicts the trained members; InputError names the key, both values and the member.

    An experiment may hold several backbones: the recipe's must be one of them, and its members must have the recipe's
    head, one of its image sizes, its normalisation and its crop.
    """
    backbone = recipe.model.backbone
    trained = sorted({meta.backbone for meta in members.values()})
    if backbone not in trained:
        raise InputError(
            f"model.backbone = {backbone}, but the members of {recipe.exp.name} are of {', '.join(trained)}; give the "
            f"recipe they were trained with, or model.backbone={trained[0]}"
        )
    sizes, data = derived.image_sizes(fitted(recipe)[0]), recipe.data
    for path, meta in members.items():
        if meta.backbone != backbone:
            continue
        for key, wanted, got, fits in (
            ("model.head", recipe.model.head, meta.head, recipe.model.head == meta.head),
            ("data.img_size", data.img_size, list(meta.size), tuple(meta.size) in sizes),
            (
                "data.mean",
                data.mean,
                list(meta.mean),
                data.mean == "auto" or np.allclose(data.mean, meta.mean),
            ),
            ("data.std", data.std, list(meta.std), data.std == "auto" or np.allclose(data.std, meta.std)),
            (
                "data.resize",
                data.resize,
                "crop" if meta.resize_factor else "whole",
                (data.resize == "crop") == bool(meta.resize_factor),
            ),
            (
                "eval.resize_factor",
                derived.eval_factor(recipe),
                meta.resize_factor,
                derived.eval_factor(recipe) == meta.resize_factor,
            ),
        ):
            if not fits:
                raise InputError(
                    f"{key} = {wanted}, but {path.name} was trained with {got}; give the recipe it was trained with, "
                    "or change exp.name"
                )


def predict(path: Path, recipe: Recipe, device: torch.device) -> MemberLogits:
    """Load a member and run it over its fold's validation betons, clean and corrupted.

    Raises InputError when the betons are stale, or not of the classes and folds that the member was trained on.
    """
    member = load_member(path)
    meta, fold = member.meta, member.meta.fold
    opened = fold_set.open_fold(recipe, fold)
    difference = class_differences(opened.classes.ids, meta.class_ids)
    for noun, trained, present, detail in (
        ("classes", meta.class_hash, opened.classes.hash, difference and f", {difference}"),
        ("folds", meta.folds_hash, opened.folds.hash, ""),
    ):
        if trained != present:
            raise InputError(
                f"{path.name} was trained with other {noun} ({trained}{detail}) than {recipe.data.home} holds "
                f"({present}); point data.home at its conversion, or train again"
            )
    clean, corrupted = opened.val, opened.val_corrupt
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
    views = views_of(size, meta.scales(recipe.tta.scales), hflip=recipe.tta.hflip)
    flips = (False, True) if recipe.tta.hflip else (False,)
    start = time.perf_counter()
    sizes = dict.fromkeys((view.height, view.width) for view in views)
    by_size = {view_size: run(clean, view_size, flips, moves) for view_size in sizes}
    seconds = time.perf_counter() - start
    single = by_size[size][0] if size in by_size else run(clean, size, (False,))[0]
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
        views=[(view.height, view.width, view.flip) for view in views for _ in moves],
        class_ids=list(meta.class_ids),
        class_hash=meta.class_hash,
        folds_hash=opened.folds.hash,
        mb=sum(tensor.numel() * 2 for tensor in member.tensors.values()) / 1e6,
        ms=1000 * seconds / n,
    )
    return Logits(
        logits=reduce_views(
            [logits for by_view in by_size.values() for logits in by_view], recipe.tta.reduce
        ),
        single=single,
        corrupt=corrupt.reshape(len(combos), n, classes),
        class_idx=clean.labels,
        index=clean.index,
        fold=np.full(n, fold, dtype=np.int64),
        filename=np.array(opened.folds.filenames)[clean.index],
        combos=combos,
        info=info,
    )
