"""Grad-CAM pictures and numbers for an experiment's wrong and right images, each by the member that never saw it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fastflower import checkpoint, runs
from fastflower.data import sets
from fastflower.data.betons import open_beton
from fastflower.data.loaders import eval_images
from fastflower.evaluation import gradcam
from fastflower.evaluation.oof import Logits
from fastflower.evaluation.pictures import jpeg, small
from fastflower.evaluation.views import load_network
from fastflower.recipe import Recipe

COUNTED = 48  # images of each kind whose border share is measured
SHOWN = 6  # of them, as pictures
BATCH = 8


def save(
    folder: Path, members: list[Logits], found: dict[str, Any], settings: Recipe, device: torch.device
) -> None:
    """Write one JPEG for each shown image and class, and gradcam.json; one seed of each backbone.

    Wrong images get two pictures: what speaks for the prediction, and what speaks for the label.
    """
    for old in folder.glob("*.jpg"):
        old.unlink()
    examples = [(row, False) for row in found["mistakes"][:COUNTED]] + [
        (row, True) for row in found["right"][:COUNTED]
    ]
    shown = {
        row["index"]
        for right in (False, True)
        for row in [r for r, kind in examples if kind is right][:SHOWN]
    }
    images: list[dict[str, Any]] = []
    border: list[dict[str, Any]] = []
    for backbone in dict.fromkeys(member.run[0] for member in members):
        seed = min(member.run[1] for member in members if member.run[0] == backbone)
        shares: dict[bool, list[float]] = {False: [], True: []}
        for member in (member for member in members if member.run == (backbone, seed)):
            own = [example for example in examples if example[0]["fold"] == member.about["fold"]]
            for row, right, target, cam, share, pixels in _maps(member, own, shown, settings, device):
                if target == row["guess"] and share == share:
                    shares[right].append(share)
                if row["index"] in shown:
                    name = f"{backbone}__row{row['index']}_class{target}.jpg"
                    runs.write_atomic(folder / name, jpeg(small(gradcam.overlay(pixels, cam))))
                    about = {key: row[key] for key in ("index", "filename", "label", "guess")}
                    about |= {
                        "backbone": backbone,
                        "right": right,
                        "target": target,
                        "file": name,
                        "border": share,
                    }
                    images.append(about)
        border.append({"backbone": backbone, "wrong": _mean(shares[False]), "right": _mean(shares[True])})
    runs.write_json(folder / "gradcam.json", {"even": gradcam.EVEN, "border": border, "images": images})


def _mean(shares: list[float]) -> dict[str, Any]:
    return {"n": len(shares), "mean": float(np.mean(shares)) if shares else None}


def _maps(
    member: Logits,
    examples: list[tuple[dict[str, Any], bool]],
    shown: set[int],
    settings: Recipe,
    device: torch.device,
) -> Iterable[tuple[dict[str, Any], bool, int, np.ndarray, float, np.ndarray]]:
    """(image, right, class_idx, map (H, W), its share at the border, pixels uint8 (H, W, 3)) for every map that is
    wanted of a member; of pairs W is that of both images.
    """
    if not examples:
        return
    beton = open_beton(sets.beton_path(Path(settings.data.home), int(member.about["fold"]), "val"))
    place = {int(index): row for row, index in enumerate(beton.index)}
    network, meta = _network(settings, member, device)
    height, width = meta["size"]
    tasks = [
        (row, right, target) for row, right in examples for target in _targets(row, row["index"] in shown)
    ]
    for start in range(0, len(tasks), BATCH):
        part = tasks[start : start + BATCH]
        rows = np.array([place[row["index"]] for row, _, _ in part], np.int64)
        pixels = eval_images(
            beton, rows, (height, width), meta["resize_factor"], meta["interpolation"], settings.data.workers
        )
        images = pixels.to(device).permute(0, 3, 1, 2).float()
        targets = torch.tensor([target for _, _, target in part], device=device)
        cams = gradcam.attribute(network, images, targets)
        shares = gradcam.border_share(cams, beton.images).tolist()
        for task, *found in zip(part, cams, shares, pixels.numpy(), strict=True):
            yield *task, *found


def _targets(row: dict[str, Any], both: bool) -> list[int]:
    return list(dict.fromkeys([row["guess"], row["label"]] if both else [row["guess"]]))


def _network(settings: Recipe, member: Logits, device: torch.device) -> tuple[nn.Module, dict[str, Any]]:
    path = runs.MODELS / settings.exp.name / str(member.about["checkpoint"])
    saved = checkpoint.load(path)
    return load_network(saved, path, device), saved.meta
