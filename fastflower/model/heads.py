"""Classifier heads on pooled features. They return plain logits; margins are applied by the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from fastflower.model.network import NetworkSpec

MARGIN_HEADS = ("arcface", "cosface")
COSINE_HEADS = ("cosine", *MARGIN_HEADS)
VOTE_SCALE = 10.0  # of the k-NN head's logits: a class with all votes gets this logit, one without any 0


class CosineHead(nn.Module):
    """scale * cos(angle between feature and class), plain or for ArcFace (arXiv:1801.07698) and CosFace (1801.09414).

    Always in float32: bfloat16 would cost 0.1 of a logit.
    """

    def __init__(self, features: int, classes: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(classes, features))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, features: Tensor) -> Tensor:
        """(B, F) -> logits (B, C) float32 in -scale..scale."""
        with torch.autocast(features.device.type, enabled=False):
            return self.scale * F.linear(F.normalize(features.float()), F.normalize(self.weight))


class NeighboursHead(nn.Module):
    """k-nearest neighbours by cosine similarity among the training images, whose features are its weights.

    The weight of neighbour i is exp((s_i - s_next) / temperature) - 1, where s_next is the similarity of the first one
    that no longer votes. It falls to 0 where a neighbour leaves the list, so that the logits are a continuous function
    of the features and a rounding error cannot turn one around. Always in float32, as the cosine heads.
    """

    images: Tensor  # (N, F) unit vectors
    labels: Tensor  # (N,)
    classes: Tensor  # (C,), counted from 0

    def __init__(self, features: int, classes: int, *, k: int, temperature: float, images: int) -> None:
        super().__init__()
        self.k, self.temperature = k, temperature
        self.register_buffer("images", torch.zeros(images, features))
        self.register_buffer("labels", torch.zeros(images, dtype=torch.int64))
        self.register_buffer("classes", torch.arange(classes), persistent=False)

    @torch.no_grad()
    def remember(self, features: Tensor, labels: Tensor) -> None:
        """Take the features (N, F) and labels (N,) of the training images."""
        self.images.copy_(F.normalize(features.float()))
        self.labels.copy_(labels)

    def forward(self, features: Tensor) -> Tensor:
        """(B, F) -> logits (B, C) float32: each class's share of the votes times VOTE_SCALE."""
        with torch.autocast(features.device.type, enabled=False):
            similarity = F.linear(F.normalize(features.float()), self.images)
            nearest, rows = similarity.topk(self.k + 1, dim=1)
            weights = ((nearest[:, :-1] - nearest[:, -1:]) / self.temperature).exp() - 1
            votes = weights[:, :, None] * (self.labels[rows[:, :-1]][:, :, None] == self.classes)
            return VOTE_SCALE * votes.sum(1) / (weights.sum(1, keepdim=True) + 1e-12)


def build_aux_heads(sizes: Sequence[int], features: int) -> nn.ModuleList:
    """A linear head for each auxiliary column, of `sizes` values."""
    return nn.ModuleList(_linear(features, size) for size in sizes)


def build_head(spec: NetworkSpec, features: int) -> nn.Module:
    """The head of a specification on `features` numbers; linear layers are initialised as timm does."""
    classes = spec.num_classes
    if spec.head in COSINE_HEADS:
        return CosineHead(features, classes, spec.head_scale)
    if spec.head == "knn":
        return NeighboursHead(
            features, classes, k=spec.knn_k, temperature=spec.knn_temperature, images=spec.knn_images
        )
    if spec.head == "mlp":
        return nn.Sequential(_linear(features, spec.mlp_width), nn.GELU(), _linear(spec.mlp_width, classes))
    return _linear(features, classes)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.trunc_normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    return layer
