"""Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391) through captum, for maps (NCHW, NHWC) and for tokens.

A map shows the evidence for a class by position in the image; the fraction at the image's border is reported too.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastflower.core import files, runs
from fastflower.core.errors import InputError
from fastflower.core.records import write_record
from fastflower.data.betons import fold_set
from fastflower.data.betons.beton_file import open_beton
from fastflower.data.loaders import eval_images
from fastflower.data.readers.image_files import thumbnail, thumbnail_jpeg
from fastflower.evaluation.gradcam_record import BackboneBorder, BorderFraction, GradCamPicture, GradCams
from fastflower.evaluation.inference import load_network
from fastflower.evaluation.logits import MemberLogits
from fastflower.evaluation.records import ErrorAnalysis, ImageScores
from fastflower.model.compare import CompareNet
from fastflower.model.member import MemberMeta, load_member
from fastflower.recipe import Recipe

COARSEST = 4  # positions a side; a map of 2 x 2, the last of small images, shows nothing
BORDER = 1 / 8  # of each side
EVEN = 1 - (1 - 2 * BORDER) ** 2  # fraction of a constant map at the border
COUNTED = 48  # right and wrong images each whose fraction at the border is measured
SHOWN = 6  # of them, as pictures
BATCH = 8
RAMP = np.array(
    [[68, 20, 120], [200, 30, 110], [250, 120, 20], [255, 240, 80]], float
)  # weak to strong evidence
DIMMEST, BRIGHTEST = 45.0, 205.0  # of the grey photograph below the colours, so that dark ones can be read


class Probe(nn.Module):
    """The identity on a map (B, C, h, w): the layer whose gradients captum reads."""

    def forward(self, x: Tensor) -> Tensor:
        return x


@contextmanager
def probed(network: nn.Module, sample: Tensor) -> Iterator[list[Probe]]:
    """Context manager: a Probe on the network's last spatial map, two in a network that compares pairs of images.

    In token networks it sits before the last block, where every patch still reaches the output.
    """
    backbone: Any = getattr(network, "backbone", network)
    blocks: Any = getattr(backbone, "blocks", None)
    patched = hasattr(backbone, "patch_embed") and isinstance(blocks, nn.Sequential)
    if patched and _yields_tokens(network, blocks, sample):
        prefix = int(getattr(backbone, "num_prefix_tokens", 1))
        grid = tuple(int(n) for n in backbone.patch_embed.dynamic_feat_size(sample.shape[-2:]))
        probe = Probe()
        yielded = [probe]

        def tokens(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x = args[0]  # (B, prefix + h * w, C)
            patches = x[:, prefix:].transpose(1, 2).unflatten(2, grid)
            patches = probe(patches).flatten(2).transpose(1, 2)
            return (torch.cat([x[:, :prefix], patches], dim=1), *args[1:])

        handle = blocks[-1].register_forward_pre_hook(tokens)
    else:
        channels_last = getattr(backbone, "output_fmt", "NCHW") == "NHWC"
        module, times = _last_map(network, sample, channels_last=channels_last)
        probes = [Probe() for _ in range(times)]
        next_probe, per_image = (
            itertools.cycle(probes),
            times // (2 if isinstance(backbone, CompareNet) else 1),
        )
        yielded = probes[per_image - 1 :: per_image]  # the last run of the module for each image

        def maps(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
            probe = next(next_probe)
            return probe(out.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) if channels_last else probe(out)

        handle = module.register_forward_hook(maps)
    try:
        yield yielded
    finally:
        handle.remove()


def attribute(network: nn.Module, images: Tensor, targets: Tensor) -> np.ndarray:
    """Grad-CAM of float images (B, 3, H, W) for class_idx targets (B,): float32 (B, H, W), each image's sum is 1.

    An image without evidence for its target has a map of zeros. The maps of a pair lie side by side, as its images.
    """
    from captum.attr import LayerGradCam  # here: it imports matplotlib

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


def border_fraction(maps: np.ndarray, images: int = 1) -> np.ndarray:
    """The fraction (B,) of each map (B, H, W) in the outer eighth on each side; NaN for a map of zeros.

    It is EVEN for a constant map. With `images` = 2 each is the map of a pair, whose halves have borders each.
    """
    height, width = maps.shape[1], maps.shape[2] // images
    top, left = round(height * BORDER), round(width * BORDER)
    halves = maps.reshape(len(maps), height, images, width)
    inner = halves[:, top : height - top, :, left : width - left].sum((1, 2, 3))
    total = maps.sum((1, 2))
    return np.where(total > 0, 1 - inner / np.where(total > 0, total, 1), np.nan)


def overlay(image: np.ndarray, cam: np.ndarray) -> np.ndarray:
    """An image uint8 (H, W, 3) in grey, with the map (H, W) in the colours of RAMP over it.

    The grey is stretched between DIMMEST and BRIGHTEST, so that every colour is evidence and dark pictures can be read.
    """
    grey = image.astype(float) @ [0.299, 0.587, 0.114]
    low, high = np.percentile(grey, [1, 99])
    stretched = np.clip((grey - low) / max(high - low, 24.0), 0, 1)
    grey = DIMMEST + (BRIGHTEST - DIMMEST) * stretched
    evidence = cam / max(float(cam.max()), 1e-12)
    stops = np.linspace(0, 1, len(RAMP))
    colour = np.stack([np.interp(evidence, stops, RAMP[:, channel]) for channel in range(3)], axis=-1)
    opacity = 0.85 * np.sqrt(evidence)[..., None]
    return ((1 - opacity) * grey[..., None] + opacity * colour).round().astype(np.uint8)


def legend(width: int = 160, height: int = 10) -> np.ndarray:
    """The colours of `overlay` from no evidence to the most, on a middle grey: uint8 (height, width, 3)."""
    grey = np.full((height, width, 3), 128, np.uint8)
    grey[:, :4], grey[:, -4:] = 0, 255  # the ends of the stretch; the middle stays grey
    return overlay(grey, np.tile(np.linspace(0, 1, width), (height, 1)))[:, 4:-4]


def picture(result: Map, *, with_photograph: bool) -> np.ndarray:
    """The map as a picture, beside the photograph, or of a pair below it."""
    map_only = thumbnail(overlay(result.pixels, result.cam))
    if not with_photograph:
        return map_only
    axis = 0 if map_only.shape[1] > map_only.shape[0] else 1
    return np.concatenate([thumbnail(result.pixels), map_only], axis=axis)


def _yields_tokens(network: nn.Module, blocks: nn.Sequential, sample: Tensor) -> bool:
    shapes: list[int] = []
    handle = blocks[-1].register_forward_hook(lambda module, args, out: shapes.append(out.ndim))
    with torch.no_grad():
        network(sample)
    handle.remove()
    return shapes == [3]


def _last_map(network: nn.Module, sample: Tensor, *, channels_last: bool) -> tuple[nn.Module, int]:
    """The last module with a map of COARSEST x COARSEST positions or more, and how often it runs in a forward pass.

    Without such a map it is the last with the finest; InputError without any.
    """
    outputs: list[tuple[int, nn.Module]] = []  # shorter side of the map, or 0

    def note(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        spatial = isinstance(out, Tensor) and out.ndim == 4
        outputs.append((min(out.shape[1:3] if channels_last else out.shape[2:]) if spatial else 0, module))

    handles = [module.register_forward_hook(note) for module in network.modules()]
    with torch.no_grad():
        network(sample)
    for handle in handles:
        handle.remove()
    finest = max(side for side, _ in outputs)
    if not finest:
        raise InputError("Grad-CAM: the network has no spatial map")
    last = [module for side, module in outputs if side >= min(COARSEST, finest)][-1]
    return last, sum(module is last for _, module in outputs)


@dataclass(frozen=True)
class Example:
    """A rightly or wrongly predicted image, and whether its maps become pictures."""

    scores: ImageScores
    right: bool
    shown: bool

    @property
    def targets(self) -> list[int]:
        """The class_idx to explain: the prediction, and in pictures of wrong images the label too."""
        guess, label = self.scores.guess, self.scores.label
        return list(dict.fromkeys([guess, label])) if self.shown else [guess]


@dataclass(frozen=True)
class Map:
    """The map (H, W) of an example for a target, its fraction at the border, and the pixels uint8 (H, W, 3).

    W is that of both images of a pair.
    """

    example: Example
    target: int
    cam: np.ndarray
    border: float
    pixels: np.ndarray


def write_gradcam(
    folder: Path,
    members: list[MemberLogits],
    *,
    analysis: ErrorAnalysis,
    settings: Recipe,
    device: torch.device,
) -> None:
    """Write a JPEG for each shown image and target, and gradcam.json, for the lowest seed of each backbone.

    That of an image's first target shows the photograph too.
    """
    for old in folder.glob("*.jpg"):
        old.unlink()
    examples = [
        Example(image, right, rank < SHOWN)
        for right, images in ((False, analysis.mistakes), (True, analysis.right))
        for rank, image in enumerate(images[:COUNTED])
    ]
    pictures: list[GradCamPicture] = []
    border: list[BackboneBorder] = []
    for backbone in dict.fromkeys(member.info.backbone for member in members):
        seed = min(member.info.seed for member in members if member.info.backbone == backbone)
        fractions: dict[bool, list[float]] = {False: [], True: []}
        for member in (member for member in members if member.run == (backbone, seed)):
            for result in _maps(member, examples, settings=settings, device=device):
                example, image = result.example, result.example.scores
                if result.target == image.guess and not np.isnan(result.border):
                    fractions[example.right].append(result.border)
                if example.shown:
                    name = f"{backbone}__row{image.index}_class{result.target}.jpg"
                    first = result.target == example.targets[0]
                    data = thumbnail_jpeg(picture(result, with_photograph=first))
                    files.write_atomic(folder / name, data)
                    pictures.append(
                        GradCamPicture(
                            index=image.index,
                            filename=image.filename,
                            label=image.label,
                            guess=image.guess,
                            backbone=backbone,
                            right=example.right,
                            target=result.target,
                            file=name,
                            digest=files.digest(data),
                            border=result.border,
                        )
                    )
        wrong, right = (_mean(fractions[outcome]) for outcome in (False, True))
        border.append(BackboneBorder(backbone=backbone, wrong=wrong, right=right))
    write_record(folder / "gradcam.json", GradCams(even=EVEN, border=border, images=pictures))


def _mean(fractions: list[float]) -> BorderFraction:
    return BorderFraction(n=len(fractions), mean=float(np.mean(fractions)) if fractions else None)


def _maps(
    member: MemberLogits, examples: list[Example], *, settings: Recipe, device: torch.device
) -> Iterable[Map]:
    """The maps of a member for those examples that it was validated on."""
    fold = member.info.fold
    tasks = [
        (example, target) for example in examples if example.scores.fold == fold for target in example.targets
    ]
    if not tasks:
        return
    beton = open_beton(fold_set.beton_path(Path(settings.data.home), fold, "val"))
    row_of = {int(index): row for row, index in enumerate(beton.index)}
    network, meta = _network(settings, member, device)
    for start in range(0, len(tasks), BATCH):
        batch = tasks[start : start + BATCH]
        pixels = eval_images(
            beton,
            np.array([row_of[example.scores.index] for example, _ in batch], np.int64),
            size=meta.size,
            factor=meta.resize_factor,
            interpolation=meta.interpolation,
            threads=settings.data.workers,
        )
        images = pixels.to(device).permute(0, 3, 1, 2).float()
        cams = attribute(network, images, torch.tensor([target for _, target in batch], device=device))
        fractions = border_fraction(cams, beton.images_per_row).tolist()
        for i, (example, target) in enumerate(batch):
            yield Map(example, target, cam=cams[i], border=fractions[i], pixels=pixels[i].numpy())


def _network(settings: Recipe, member: MemberLogits, device: torch.device) -> tuple[nn.Module, MemberMeta]:
    path = runs.MODELS / settings.exp.name / member.info.checkpoint
    saved = load_member(path)
    return load_network(saved, path, device), saved.meta
