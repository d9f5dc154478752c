"""Learning from unlabelled images with fixed soft labels, as in noisy student training (Xie et al., arXiv:1911.04252).

The student sees strong views and learns the probabilities that a teacher gave to the images before the training.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from composer.core import State
from torch import Tensor
from torch.nn import functional as F

from fastflower.algorithms.fixmatch import FixMatch
from fastflower.recipe import Recipe


class SoftLabels(FixMatch):
    """FixMatch's events with labels from `targets`, float32 (rows of the unlabelled beton, C); a row of 0 has none.

    Works on a batch with "strong" uint8 (B, mu, H, W, 3), "strong_key", "truth" and "unlabelled_row" int64 (B, mu).
    The loss is the cross-entropy to the targets, summed over images that have one and divided by all.
    """

    def __init__(
        self, recipe: Recipe, class_counts: Sequence[int], *, fill: tuple[float, ...], targets: Tensor
    ) -> None:
        super().__init__(recipe, class_counts, fill=fill)
        self.targets = targets

    def _append_views(self, state: State) -> None:
        batch = state.batch
        state.batch = {**batch, "image": torch.cat([batch["image"], batch["strong"].flatten(0, 1)])}

    def _split_logits(self, state: State) -> None:
        assert isinstance(state.outputs, Tensor)
        rows = len(state.batch["label"])
        self._learned_logits = state.outputs[rows:, : len(self.counts)]
        state.outputs = state.outputs[:rows]

    def _add_loss(self, state: State) -> None:
        self.targets = self.targets.to(self._learned_logits.device)
        targets = self.targets[state.batch["unlabelled_row"].flatten()]
        log_p = F.log_softmax(self._learned_logits.float(), dim=1)
        loss = -(targets * log_p).sum(1).mean()
        self._learn(
            state,
            loss,
            labels=targets.argmax(1),
            mask=targets.sum(1) > 0,
            predicted=log_p.detach().double().exp().sum(0),
        )
