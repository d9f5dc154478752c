"""Classifier heads on pooled features. They return plain logits; margins are applied by the loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MARGIN_HEADS = ("arcface", "cosface")


class CosineHead(nn.Module):
    """scale * cos(angle between feature and class), for ArcFace (arXiv:1801.07698) and CosFace (arXiv:1801.09414).

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


def build_head(name: str, features: int, *, classes: int, scale: float) -> nn.Module:
    """The head `linear`, initialised as timm does, or the cosine head for `arcface` and `cosface`."""
    if name in MARGIN_HEADS:
        return CosineHead(features, classes, scale)
    head = nn.Linear(features, classes)
    nn.init.trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head
