"""Learning of auxiliary columns, such as genus beside species: a cross-entropy for each further head of the network."""

from __future__ import annotations

import torch
from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from torch import Tensor

from fastflower.data.auxiliary import AuxTargets
from fastflower.model.losses import auxiliary_loss
from fastflower.recipe import Recipe
from fastflower.recipe.derived import aux_weights


class AuxiliaryHeads(Algorithm):
    """AFTER_FORWARD: split the auxiliary logits off. AFTER_LOSS: add their weighted losses to the step's.

    Works on a batch whose "aux" are the soft targets (B, K) of all columns beside each other, as `MixUpCutMix` writes
    them. Of the views of unlabelled images, which follow the labelled ones, the auxiliary logits are dropped.
    """

    def __init__(self, recipe: Recipe, targets: AuxTargets) -> None:
        self.sizes, self.weights = targets.sizes, aux_weights(recipe)
        self._logits: Tensor = torch.empty(0)

    def match(self, event: Event, state: State) -> bool:
        return event in (Event.AFTER_FORWARD, Event.AFTER_LOSS)

    def apply(self, event: Event, state: State, logger: Logger | None) -> None:
        if event == Event.AFTER_FORWARD:
            assert isinstance(state.outputs, Tensor)
            main = state.outputs.shape[1] - sum(self.sizes)
            self._logits = state.outputs[: len(state.batch["label"]), main:]
            state.outputs = state.outputs[:, :main]
            return
        assert isinstance(state.loss, Tensor)
        state.loss = state.loss + auxiliary_loss(
            self._logits, state.batch["aux"], sizes=self.sizes, weights=self.weights
        )
        self._logits = torch.empty(0)
