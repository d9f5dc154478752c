"""Image embeddings by a pretrained backbone; convert finds near-duplicates with them (data.group = embedding)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np
import torch
from PIL import Image
from torch import nn

from fastflower.core import runs
from fastflower.core.errors import InputError
from fastflower.data.conversion.grouping import Embed
from fastflower.data.decode.kernel import eval_box
from fastflower.model.backbones import build_backbone, check_name, profile
from fastflower.model.pretrained import locate_weights
from fastflower.model.sizes import fitting
from fastflower.recipe import Recipe
from fastflower.recipe.derived import eval_factor, largest_size

BATCH = 32


def embedder(recipe: Recipe) -> Embed:
    """A function from N images, uint8 (H, W, 3) of any size, to unit vectors float32 (N, F).

    The backbone is data.group_backbone with its published weights; InputError when they are missing from
    results/model/pretrained_model/ or do not fit. Its input is the centre crop at the recipe's largest size.
    """
    name = recipe.model.backbone if recipe.data.group_backbone == "auto" else recipe.data.group_backbone
    check_name(name)
    if not locate_weights(name):
        raise InputError(
            f"data.group = embedding: no weights of {name} in {runs.PRETRAINED}; get them by "
            f"python -m fastflower.weights {name}, or use data.group=phash"
        )
    side = largest_size(recipe)
    (size,) = fitting(name, [(side, side)], largest=side)
    network, _ = build_backbone(name, [size], pretrained=runs.PRETRAINED)
    config = profile(name, [size])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network.eval().to(device)
    mean, std = (torch.tensor(numbers, device=device)[:, None, None] for numbers in (config.mean, config.std))

    def centre_crop(pixels: np.ndarray) -> np.ndarray:
        height, width = pixels.shape[:2]
        box = eval_box(height, width, size=size, factor=eval_factor(recipe))
        return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC, box))

    @torch.inference_mode()
    def embed(pictures: Iterable[np.ndarray]) -> np.ndarray:
        crops, vectors = map(centre_crop, pictures), []
        while batch := list(itertools.islice(crops, BATCH)):
            images = torch.from_numpy(np.stack(batch)).to(device).permute(0, 3, 1, 2)
            features = network((images / 255 - mean) / std).flatten(1)
            vectors.append(nn.functional.normalize(features.float()).cpu().numpy())
        return np.concatenate(vectors)

    return embed
