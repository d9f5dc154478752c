"""The start of trainings and learning-rate range tests: the network on its device, the loaders of its fold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastflower.bundle.program import try_export
from fastflower.core import seeding
from fastflower.core.errors import InputError
from fastflower.data.betons.fold_set import FoldSet
from fastflower.data.unlabelled import exclusion_notice
from fastflower.evaluation.views import sizes_of
from fastflower.model.classifier import Classifier
from fastflower.model.frozen import features_are_fixed
from fastflower.model.losses import build_loss
from fastflower.model.mixed_precision import keep_depthwise_in_float32
from fastflower.model.network import (
    Network,
    NetworkSpec,
    add_aux_heads,
    batch_norms,
    synchronise_norms,
    training_network,
)
from fastflower.optim.groups import Group, param_groups
from fastflower.optim.sharpness import Sharpness
from fastflower.recipe import Recipe
from fastflower.recipe.derived import Derived, aux_weights, derive
from fastflower.recipe.starting_point import reasons
from fastflower.training.features import FrozenFeatures
from fastflower.training.fold_data import Loaders, Position, augmentation, class_counts, loaders
from fastflower.training.initial import load_initial
from fastflower.training.ranks import Machine, on_rank_zero


@dataclass
class Prepared:
    """A network and the data of its fold, before a trainer drives them; `notes` are lines for people."""

    recipe: Recipe
    derived: Derived
    fold: FoldSet
    machine: Machine
    counts: np.ndarray  # int64 (C,): training images of each class
    network: Network
    spec: NetworkSpec
    data: Loaders
    position: Position
    notes: list[str]
    features: FrozenFeatures | None = None
    sharpness: Sharpness | None = None

    @property
    def num_classes(self) -> int:
        return len(self.counts)

    @property
    def in_pairs(self) -> bool:
        """True if a row of the data holds two images."""
        return self.fold.train.images_per_row == 2

    @property
    def augmentation(self) -> dict[str, Any]:
        """The keyword arguments of `augment` beside images and keys."""
        return augmentation(self.recipe, self.spec.fill, self.fold.train)

    def classifier(self) -> Classifier:
        """The network with its loss as Composer trains it."""
        loss = build_loss(self.recipe, self.counts.tolist())
        return Classifier(self.network, loss, precision=self.machine.forward_precision)

    def groups(self) -> list[Group]:
        """The parameter groups of the optimizer."""
        return param_groups(self.network, self.derived.lr, self.recipe)


def prepare(
    recipe: Recipe,
    *,
    fold: FoldSet,
    machine: Machine,
    say: Callable[[str], None] = print,
    begins: bool = True,
    hands_in: bool = False,
) -> Prepared:
    """The network, equal on all ranks, and the loaders of a fold.

    A run that resumes (`begins` is false) needs no weights of model.init. With `hands_in`, a network that could not be
    handed in is refused. Frozen features are computed here, of the weights that the run began with.
    """
    derived, position, counts = derive(recipe, machine.world), Position(), class_counts(recipe, fold)
    once = features_are_fixed(recipe)
    network, spec, notes = _network(recipe, counts, machine, fold=fold if begins or once else None)
    if hands_in:
        sizes = sizes_of(spec.size, spec.scales(recipe.tta.scales))
        wide = [(height, fold.train.images_per_row * width) for height, width in sizes]
        on_rank_zero(lambda: try_export(spec, network, wide))
    if fold.aux_targets is not None:  # after the trial of the hand-in, which has the main head alone
        add_aux_heads(network, spec, fold.aux_targets.sizes)
        columns = zip(fold.aux_targets.names, fold.aux_targets.sizes, aux_weights(recipe), strict=True)
        heads = (f"{name} ({size} values, weight {weight:g})" for name, size, weight in columns)
        notes.append(f"auxiliary heads, which are not handed in: {', '.join(heads)}")
    notes += exclusion_notice(recipe, fold)
    data = loaders(
        recipe, derived, position=position, fold=fold, interpolation=spec.interpolation, machine=machine
    )
    features = None
    if once:
        features = FrozenFeatures(recipe, network=network, spec=spec, machine=machine, say=say)
        notes.append(features.use(data, fold))
    sharpness = Sharpness(network, recipe.opt.sam_rho) if recipe.opt.sam_rho else None
    return Prepared(
        recipe, derived, fold, machine, counts, network, spec, data, position, notes, features, sharpness
    )


def _network(
    recipe: Recipe, counts: np.ndarray, machine: Machine, *, fold: FoldSet | None
) -> tuple[Network, NetworkSpec, list[str]]:
    """The recipe's network on this rank's device, initialised equally on all ranks, its spec and notes for people.

    `counts` (C,) are the training images of each class. Without `fold`, for a run that resumes, the weights of
    model.init are left out.
    """
    seeding.seed_all(recipe.seed)
    network, spec, notes = training_network(recipe, len(counts), images=int(counts.sum()))
    notes = [*reasons(recipe), *notes]
    if recipe.model.init and fold is not None:
        notes += load_initial(network, spec, recipe=recipe, fold=fold)
    network, synchronised = synchronise_norms(
        network, recipe, device=machine.torch_device, world_size=machine.world
    )
    network.to(machine.torch_device)
    _check_compiled(recipe, network, machine)
    if machine.cpu_bf16:
        keep_depthwise_in_float32(network)
    smallest = min(stage.batch_per_gpu for stage in derive(recipe, machine.world).stages)
    if smallest == 1 and batch_norms(network) and not synchronised:
        raise InputError(
            f"a batch of 1 image: the BatchNorm layers of {recipe.model.backbone} need 2 or more; raise "
            "train.batch_per_gpu (or train.stage_batch), or choose a backbone without BatchNorm"
        )
    return network, spec, notes + _norm_notes(network, synchronised, machine)


def _check_compiled(recipe: Recipe, network: Network, machine: Machine) -> None:
    """Raise InputError for weights that do not train, compiled for a CPU: torch 2.7 writes beyond their memory."""
    if not recipe.train.compile or machine.device != "cpu":
        return
    if network.kept != "nothing" and not features_are_fixed(
        recipe
    ):  # of fixed features the head alone is compiled
        key = "model.freeze" if network.kept == "backbone" else "model.lora.rank"
        raise InputError(
            f"train.compile=true with {key}: on a CPU torch's compiler corrupts memory where weights do not train; "
            "set train.compile=false"
        )


def _norm_notes(network: Network, synchronised: int, machine: Machine) -> list[str]:
    if synchronised:
        return [f"{synchronised} BatchNorm layers are synchronised over the ranks"]
    norms = len(batch_norms(network))
    if norms and machine.world > 1:
        return [f"{norms} BatchNorm layers keep each rank's own statistics; rank 0's are scored and saved"]
    return []
