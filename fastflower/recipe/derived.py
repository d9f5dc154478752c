"""Numbers derived from a recipe: stages, batches, learning rate, epochs; computed once, printed and stored by train."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from typing import Any

from fastflower.core.errors import InputError
from fastflower.core.own_parts import is_own
from fastflower.recipe.schema import LARGEST_SIDE, Recipe
from fastflower.recipe.starting_point import lr_bound, lr_rule

CORRUPTIONS = ("gaussian_noise", "blur", "brightness", "jpeg", "occlusion")
EVERY = 5  # epochs between two evaluations, at most, with eval.every=auto
EIGHTH = 8  # part of the epochs: the interval with eval.every=auto, and the last ones, which are all scored
LEVELS = {"low": ("low",), "medium": ("medium",), "low_medium": ("low", "medium")}  # of robust.level
STAGE_ENDS = (  # for size_epochs=auto, as fractions of the epochs, by number of stages
    (1.0,),
    (15 / 40, 1.0),
    (15 / 48, 40 / 48, 1.0),
)


@dataclass(frozen=True)
class Stage:
    """The epochs first..last (from 1, inclusive) trained at one image size."""

    first: int
    last: int
    height: int
    width: int
    batch_per_gpu: int


@dataclass(frozen=True)
class Derived:
    """The numbers of a training on `world_size` devices."""

    world_size: int
    epochs: int
    stages: tuple[Stage, ...]
    batch_global: int
    lr: float
    lr_note: str

    def stage(self, epoch: int) -> Stage:
        """The stage of an epoch counted from 0."""
        return next((stage for stage in self.stages if epoch < stage.last), self.stages[-1])

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def derive(recipe: Recipe, world_size: int) -> Derived:
    """Compute stages, global batch and learning rate; InputError when sizes and epochs do not fit together."""
    sizes = image_sizes(recipe)
    ends = _stage_ends(recipe, len(sizes))
    batches = _stage_batches(recipe, len(sizes))
    starts = [1, *[end + 1 for end in ends[:-1]]]
    epochs = refit_epochs(recipe)
    batch_global = batches[0] * world_size * recipe.train.grad_accum
    lr, note = scaled_lr(recipe, batch_global)
    return Derived(
        world_size=world_size,
        epochs=epochs,
        stages=tuple(
            Stage(first=first, last=min(last, epochs), height=height, width=width, batch_per_gpu=batch)
            for first, last, (height, width), batch in zip(starts, ends, sizes, batches, strict=True)
            if first <= epochs
        ),
        batch_global=batch_global,
        lr=lr,
        lr_note=note,
    )


def scaled_lr(recipe: Recipe, batch_global: int) -> tuple[float, str]:
    """The learning rate and how it was computed: lr_ref * batch / 256, times a factor for large batches, bounded.

    Where the recipe leaves lr_ref open, the rule of the starting point gives it; from scratch Adam's rate grows with
    the root of the batch.
    """
    opt, rule = recipe.opt, lr_rule(recipe)
    if opt.lr != "auto":
        return float(opt.lr), "explicit: no scaling, no bounds"
    lr_ref = rule.lr_ref if opt.lr_ref == "auto" else float(opt.lr_ref)
    lr, note = lr_ref * batch_global / opt.lr_ref_batch, f"{lr_ref:g} x {batch_global} / {opt.lr_ref_batch}"
    if opt.lr_ref == "auto" and rule.root:
        lr = lr_ref * math.sqrt(batch_global / opt.lr_ref_batch)
        note = f"{lr_ref:g} x sqrt({batch_global} / {opt.lr_ref_batch})"
    if batch_global > opt.large_batch_threshold and opt.large_batch_factor != 1:
        lr *= opt.large_batch_factor
        note += f" x {opt.large_batch_factor:g} (large batch)"
    largest = lr_bound(recipe)
    bounded = min(max(lr, opt.lr_min_bound), largest)
    if bounded != lr:
        note += f" = {lr:g}, held in [{opt.lr_min_bound:g}, {largest:g}]"
    return bounded, note


def unscored_kind(recipe: Recipe) -> str:
    """The kind of checkpoint to hand in of a training on all images, which nothing has scored."""
    return "refit" if refits(recipe) else "ema_best" if recipe.ema.enabled else "last"


def refits(recipe: Recipe) -> bool:
    """True for the training on all images, those of every fold (data.fold=none)."""
    return bool(recipe.data.fold == "none")


def refit_epochs(recipe: Recipe) -> int:
    """The epochs of a training: sched.cosine_epochs, or train.refit_epochs of a refit, which stops on that schedule."""
    epochs, horizon = recipe.train.refit_epochs, recipe.sched.cosine_epochs
    if not refits(recipe) or epochs == "auto":
        return horizon
    if int(epochs) > horizon:
        raise InputError(
            f"train.refit_epochs = {epochs}: the schedule has {horizon} epochs (sched.cosine_epochs); give as many "
            "at most"
        )
    return int(epochs)


def fold_numbers(recipe: Recipe) -> list[int]:
    """The validation folds of data.fold as a list; for a refit the number after the last fold, which none validates."""
    fold = recipe.data.fold
    if refits(recipe):
        return [fold_count(recipe)]
    if fold == "all":
        return list(range(fold_count(recipe)))
    return list(fold) if isinstance(fold, list) else [int(fold)]


def parse_interval(text: str) -> tuple[int, str]:
    """train.save_every as (number, "ep" or "ba"). Raises InputError for anything else."""
    match = re.fullmatch(r"([1-9]\d*) ?(ep|ba)", text)
    if match is None:
        raise InputError(f"train.save_every = {text}: must be epochs such as 1ep or steps such as 200ba")
    return int(match[1]), match[2]


def image_sizes(recipe: Recipe) -> list[tuple[int, int]]:
    """The (height, width) of each stage, from data.img_size as 224, [224, 320] or [[32, 64]]."""
    value = recipe.data.img_size
    items = value if isinstance(value, list) else [value]
    sizes = []
    for item in items:
        size = item if isinstance(item, list) else [item, item]
        if len(size) != 2 or not all(type(side) is int and 8 <= side <= LARGEST_SIDE for side in size):
            raise InputError(
                f"data.img_size = {value}: sizes are whole numbers from 8 to {LARGEST_SIDE}, or [[height, width]]"
            )
        sizes.append((size[0], size[1]))
    areas = [height * width for height, width in sizes]
    if not areas or any(area >= later for area, later in zip(areas, areas[1:], strict=False)):
        raise InputError(f"data.img_size = {value}: the sizes of the stages must grow")
    return sizes


def fold_count(recipe: Recipe) -> int:
    """The number of trainings with other validation images; one for a ratio split, for data.val, and without any."""
    return 1 if recipe.data.split in ("ratio", "none") or recipe.data.val else recipe.data.n_splits


def validates(recipe: Recipe) -> bool:
    """True if images are held out of training to be scored."""
    return recipe.data.split != "none" and not refits(recipe)


def largest_size(recipe: Recipe) -> int:
    """The largest image side in training, evaluation or a view, before eval.resize_factor."""
    sizes = image_sizes(recipe)
    square = all(height == width for height, width in sizes)
    return max([max(size) for size in sizes] + (list(recipe.tta.scales) if square else []))


def resize_side(size: int, factor: float) -> int:
    """The short side before the centre crop; with factor 1.14: 224 -> 255, 320 -> 365, 384 -> 438, 448 -> 511."""
    return round(size * factor)


def eval_factor(recipe: Recipe) -> float:
    """The short side before the centre crop over the side of the crop; 0 where the whole image is resized."""
    return recipe.eval.resize_factor if recipe.data.resize == "crop" else 0.0


def mix_final_epoch(recipe: Recipe) -> int | None:
    """The epoch (from 1) from which reg.mix_prob_final applies; None: never."""
    if recipe.reg.mix_final_epoch != "auto":
        return int(recipe.reg.mix_final_epoch)
    sizes = image_sizes(recipe)
    return _stage_ends(recipe, len(sizes))[1] + 1 if len(sizes) > 2 else None


def combos(kinds: list[str], level: str) -> list[tuple[str, str]]:
    """Every (kind, level) of robust.kinds and robust.level, kind by kind; InputError for an unknown kind."""
    unknown = [kind for kind in kinds if kind not in CORRUPTIONS and not is_own(kind)]
    if unknown:
        raise InputError(
            f"robust.kinds = {kinds}: choose from {', '.join(CORRUPTIONS)}, or module:function of your own"
        )
    return [(kind, strength) for kind in kinds for strength in LEVELS[level]]


def aux_weights(recipe: Recipe) -> list[float]:
    """The weight of each column of data.aux_cols, from loss.aux_weight; InputError unless all are above 0."""
    columns, value = recipe.data.aux_cols, recipe.loss.aux_weight
    weights = value if isinstance(value, list) else [value] * len(columns)
    numbers = all(type(weight) in (int, float) and weight > 0 for weight in weights)
    if not numbers or len(weights) != len(columns):
        raise InputError(
            f"loss.aux_weight = {value}: must be a number above 0, or a list of one for each of the {len(columns)} "
            "columns of data.aux_cols; leave a column without weight out of them"
        )
    return [float(weight) for weight in weights]


def is_scored(recipe: Recipe, derived: Derived, epoch: int) -> bool:
    """True if an epoch (from 1) ends with scores, by eval.every; the last of each size does always."""
    every = recipe.eval.every
    if every == "auto":
        if recipe.sched.name == "plateau" or epoch > derived.epochs - derived.epochs // EIGHTH:
            return True
        every = min(EVERY, max(1, derived.epochs // EIGHTH))
    return epoch % int(every) == 0 or epoch == derived.stage(epoch - 1).last


def _stage_ends(recipe: Recipe, stages: int) -> list[int]:
    """The last epoch (from 1) of each stage, from data.size_epochs."""
    epochs, ends = recipe.sched.cosine_epochs, recipe.data.size_epochs
    if ends == "auto":
        if stages > len(STAGE_ENDS):
            raise InputError(f"data.size_epochs: give the last epoch of each of the {stages} sizes")
        ends = [
            max(round(fraction * epochs), stage + 1) for stage, fraction in enumerate(STAGE_ENDS[stages - 1])
        ]
    if not isinstance(ends, list) or len(ends) != stages or not all(type(end) is int for end in ends):
        raise InputError(
            f"data.size_epochs = {ends}: give one last epoch for each of the {stages} sizes of data.img_size"
        )
    if any(previous >= end for previous, end in zip([0, *ends], ends, strict=False)) or ends[-1] != epochs:
        raise InputError(
            f"data.size_epochs = {ends}: must grow and end at the last epoch, sched.cosine_epochs = {epochs}"
        )
    return ends


def _stage_batches(recipe: Recipe, stages: int) -> list[int]:
    """The batch per device of each stage, from train.stage_batch or train.batch_per_gpu."""
    batches = recipe.train.stage_batch
    if batches is None:
        return [recipe.train.batch_per_gpu] * stages
    if (
        not isinstance(batches, list)
        or len(batches) != stages
        or not all(type(batch) is int and batch > 0 for batch in batches)
    ):
        raise InputError(
            f"train.stage_batch = {batches}: give one batch for each of the {stages} sizes of data.img_size"
        )
    return batches
