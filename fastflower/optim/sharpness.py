"""Sharpness-aware minimisation (SAM, Foret et al., arXiv:2010.01412): the gradient of a step is that of a near point.

The point is w + rho * g / ||g||, with the gradient g of the same batch at the weights w, over all trained weights
together: it raises the loss the most, to first order, within the distance rho.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fastflower.model.network import Network, batch_norms


class Sharpness:
    """Moves a network's weights to the near point and back; `away` is true in between.

    A step is: gradients, all ranks' together; `near_point`, in which the gradients are computed again; the optimizer's
    step from the old weights. Gradients may be scaled, as only their direction counts.
    """

    def __init__(self, network: Network, rho: float) -> None:
        self.network, self.rho = network, rho
        self.away = False

    @contextlib.contextmanager
    def near_point(self) -> Iterator[bool]:
        """Context with the weights moved and without gradients; false, and nothing moved, where one is not finite.

        BatchNorm normalises by the batch as before and leaves its statistics alone, which are those of the old weights.
        Afterwards the old weights are back to the bit.
        """
        parameters: list[Tensor] = [p for p in self.network.parameters() if p.grad is not None]
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if not math.isfinite(norm):
            yield False
            return
        before = [p.detach().clone() for p in parameters]
        norms = list(batch_norms(self.network).values())
        with torch.no_grad():
            steps = torch._foreach_mul(gradients, self.rho / (norm + 1e-12))
            torch._foreach_add_(parameters, list(steps))
        for parameter in parameters:
            parameter.grad = None
        for layer in norms:
            layer.track_running_stats = False
        self.away = True
        try:
            yield True
        finally:
            self.away = False
            for layer in norms:
                layer.track_running_stats = True
            with torch.no_grad():
                torch._foreach_copy_(parameters, before)
