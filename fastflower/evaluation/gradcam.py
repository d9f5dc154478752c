"""Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391) through captum, for maps (NCHW, NHWC) and for tokens.

Shows where in the image the network finds a class, and how much of that lies at the image's border.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from captum.attr import LayerGradCam
from torch import Tensor, nn

from fastflower.core import checkpoint, files, runs
from fastflower.core.errors import InputError
from fastflower.data.betons import fold_set
from fastflower.data.betons.beton_file import open_beton
from fastflower.data.loaders import eval_images
from fastflower.data.readers.image_files import jpeg, small
from fastflower.evaluation import gradcam
from fastflower.evaluation.inference import load_network
from fastflower.evaluation.logits import Logits
from fastflower.model.compare import CompareNet
from fastflower.recipe import Recipe

COARSEST = 4  # a map of 2 x 2, as small images leave it, shows nothing
BORDER = 1 / 8  # of each side
EVEN = 1 - (1 - 2 * BORDER) ** 2  # the border's share of a map that is the same everywhere


class Probe(nn.Module):
    """Passes on a map (B, C, h, w): the layer whose gradients are read."""

    def forward(self, x: Tensor) -> Tensor:
        return x


@contextmanager
def probed(network: nn.Module, sample: Tensor) -> Iterator[list[Probe]]:
    """Put a Probe where the network last has a spatial map, for the length of the block; two in a network that
    compares pairs, which has a map of either image.

    Token networks get it before their last block, where every patch still reaches the output.
    """
    backbone: Any = getattr(network, "backbone", network)
    blocks: Any = getattr(backbone, "blocks", None)
    patched = hasattr(backbone, "patch_embed") and isinstance(blocks, nn.Sequential)
    if patched and _yields_tokens(network, blocks, sample):
        prefix = int(getattr(backbone, "num_prefix_tokens", 1))
        grid = tuple(int(n) for n in backbone.patch_embed.dynamic_feat_size(sample.shape[-2:]))
        probe = Probe()
        chosen = [probe]

        def tokens(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x = args[0]  # (B, prefix + h * w, C)
            patches = x[:, prefix:].transpose(1, 2).unflatten(2, grid)
            patches = probe(patches).flatten(2).transpose(1, 2)
            return (torch.cat([x[:, :prefix], patches], dim=1), *args[1:])

        handle = blocks[-1].register_forward_pre_hook(tokens)
    else:
        last = getattr(backbone, "output_fmt", "NCHW") == "NHWC"
        module, times = _last_map(network, sample, channels_last=last)
        probes = [Probe() for _ in range(times)]
        turns, each = itertools.cycle(probes), times // (2 if isinstance(backbone, CompareNet) else 1)
        chosen = probes[each - 1 :: each]

        def maps(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
            probe = next(turns)
            return probe(out.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) if last else probe(out)

        handle = module.register_forward_hook(maps)
    try:
        yield chosen
    finally:
        handle.remove()


def attribute(network: nn.Module, images: Tensor, targets: Tensor) -> np.ndarray:
    """Grad-CAM of float images (B, 3, H, W) for class_idx targets (B,): float32 (B, H, W), each image's sum is 1.

    An image in which nothing speaks for its target has a map of zeros. The maps of a pair lie side by side,
    as its images do.
    """
    with torch.enable_grad(), probed(network, images[:1]) as probes:
        inputs = images.detach().requires_grad_()
        cams = [
            LayerGradCam(network, probe).attribute(inputs, target=targets, relu_attributions=True).detach()
            for probe in probes
        ]
    size = (images.shape[2], images.shape[3] // len(cams))
    fine = [F.interpolate(cam, size, mode="bilinear", align_corners=False)[:, 0] for cam in cams]
    maps = torch.cat(fine, 2)
    total = maps.sum((1, 2), keepdim=True)
    return (maps / torch.where(total > 0, total, torch.ones_like(total))).cpu().numpy()


def border_share(maps: np.ndarray, sides: int = 1) -> np.ndarray:
    """The share (B,) of each map (B, H, W) that lies in the outer eighth on each side; EVEN when spread evenly.

    With `sides` = 2 each is the map of a pair, and either half has a border of its own.
    """
    height, width = maps.shape[1], maps.shape[2] // sides
    top, left = round(height * BORDER), round(width * BORDER)
    halves = maps.reshape(len(maps), height, sides, width)
    inner = halves[:, top : height - top, :, left : width - left].sum((1, 2, 3))
    total = maps.sum((1, 2))
    return np.where(total > 0, 1 - inner / np.where(total > 0, total, 1), np.nan)


def overlay(image: np.ndarray, cam: np.ndarray) -> np.ndarray:
    """An image uint8 (H, W, 3) dimmed where the map (H, W) is low, so that colours stay what they are."""
    light = cam / max(float(cam.max()), 1e-12)
    return (image * (0.15 + 0.85 * light[..., None])).round().astype(np.uint8)


def _yields_tokens(network: nn.Module, blocks: nn.Sequential, sample: Tensor) -> bool:
    shapes: list[int] = []
    handle = blocks[-1].register_forward_hook(lambda module, args, out: shapes.append(out.ndim))
    with torch.no_grad():
        network(sample)
    handle.remove()
    return shapes == [3]


def _last_map(network: nn.Module, sample: Tensor, *, channels_last: bool) -> tuple[nn.Module, int]:
    """The module that last yields a map of COARSEST x COARSEST positions or more, and how often it runs; failing
    that, the finest.
    """
    found: list[tuple[int, nn.Module]] = []

    def note(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        spatial = isinstance(out, Tensor) and out.ndim == 4
        found.append((min(out.shape[1:3] if channels_last else out.shape[2:]) if spatial else 0, module))

    handles = [module.register_forward_hook(note) for module in network.modules()]
    with torch.no_grad():
        network(sample)
    for handle in handles:
        handle.remove()
    finest = max(side for side, _ in found)
    if not finest:
        raise InputError("Grad-CAM: the network has no spatial map")
    last = [module for side, module in found if side >= min(COARSEST, finest)][-1]
    return last, sum(module is last for _, module in found)


COUNTED = 48  # images of each kind whose border share is measured
SHOWN = 6  # of them, as pictures
BATCH = 8


def save(
    folder: Path, members: list[Logits], *, found: dict[str, Any], settings: Recipe, device: torch.device
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
            for row, right, target, cam, share, pixels in _maps(
                member, own, shown=shown, settings=settings, device=device
            ):
                if target == row["guess"] and share == share:
                    shares[right].append(share)
                if row["index"] in shown:
                    name = f"{backbone}__row{row['index']}_class{target}.jpg"
                    files.write_atomic(folder / name, jpeg(small(gradcam.overlay(pixels, cam))))
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
    files.write_json(folder / "gradcam.json", {"even": gradcam.EVEN, "border": border, "images": images})


def _mean(shares: list[float]) -> dict[str, Any]:
    return {"n": len(shares), "mean": float(np.mean(shares)) if shares else None}


def _maps(
    member: Logits,
    examples: list[tuple[dict[str, Any], bool]],
    *,
    shown: set[int],
    settings: Recipe,
    device: torch.device,
) -> Iterable[tuple[dict[str, Any], bool, int, np.ndarray, float, np.ndarray]]:
    """(image, right, class_idx, map (H, W), its share at the border, pixels uint8 (H, W, 3)) for every map that is
    wanted of a member; of pairs W is that of both images.
    """
    if not examples:
        return
    beton = open_beton(fold_set.beton_path(Path(settings.data.home), int(member.about["fold"]), "val"))
    place = {int(index): row for row, index in enumerate(beton.index)}
    network, meta = _network(settings, member, device)
    height, width = meta["size"]
    tasks = [
        (row, right, target)
        for row, right in examples
        for target in _targets(row, both=row["index"] in shown)
    ]
    for start in range(0, len(tasks), BATCH):
        part = tasks[start : start + BATCH]
        rows = np.array([place[row["index"]] for row, _, _ in part], np.int64)
        pixels = eval_images(
            beton,
            rows,
            size=(height, width),
            factor=meta["resize_factor"],
            interpolation=meta["interpolation"],
            threads=settings.data.workers,
        )
        images = pixels.to(device).permute(0, 3, 1, 2).float()
        targets = torch.tensor([target for _, _, target in part], device=device)
        cams = gradcam.attribute(network, images, targets)
        shares = gradcam.border_share(cams, beton.images).tolist()
        for task, *found in zip(part, cams, shares, pixels.numpy(), strict=True):
            yield *task, *found


def _targets(row: dict[str, Any], *, both: bool) -> list[int]:
    return list(dict.fromkeys([row["guess"], row["label"]] if both else [row["guess"]]))


def _network(settings: Recipe, member: Logits, device: torch.device) -> tuple[nn.Module, dict[str, Any]]:
    path = runs.MODELS / settings.exp.name / str(member.about["checkpoint"])
    saved = checkpoint.load(path)
    return load_network(saved, path, device), saved.meta
