"""Numbers that follow from a recipe: stages, batches, lr, epochs. Computed here once, printed and stored by train.

`check` refuses contradictions between keys and returns the advice that seed 000 gives.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from fastflower.core.errors import InputError
from fastflower.recipe.schema import Recipe

KINDS = ("gaussian_noise", "blur", "brightness", "jpeg", "occlusion")


@dataclass(frozen=True)
class Stage:
    """Epochs first..last (from 1, inclusive) at one image size."""

    first: int
    last: int
    height: int
    width: int
    batch_per_gpu: int


@dataclass(frozen=True)
class Derived:
    """What a recipe means on `world_size` devices."""

    world_size: int
    epochs: int
    stages: tuple[Stage, ...]
    batch_global: int
    lr: float
    lr_note: str

    def stage(self, epoch: int) -> Stage:
        """The stage of an epoch counted from 0."""
        return next((s for s in self.stages if epoch < s.last), self.stages[-1])

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def derive(recipe: Recipe, world_size: int) -> Derived:
    """Stages, global batch and lr. Raises InputError when sizes and epochs do not fit together."""
    sizes = image_sizes(recipe)
    lasts = _stage_ends(recipe, len(sizes))
    batches = _stage_batches(recipe, len(sizes))
    firsts = [1, *[last + 1 for last in lasts[:-1]]]
    stages = tuple(
        Stage(f, e, h, w, b) for f, e, (h, w), b in zip(firsts, lasts, sizes, batches, strict=True)
    )
    batch_global = batches[0] * world_size * recipe.train.grad_accum
    lr, note = scaled_lr(recipe, batch_global)
    return Derived(world_size, recipe.sched.cosine_epochs, stages, batch_global, lr, note)


def scaled_lr(recipe: Recipe, batch_global: int) -> tuple[float, str]:
    """The linear rule of seed 000 section 6: lr_ref * B / 256, x factor for very large B, then the bounds."""
    opt = recipe.opt
    if opt.lr != "auto":
        return float(opt.lr), "explicit: no scaling, no bounds"
    lr = opt.lr_ref * batch_global / opt.lr_ref_batch
    note = f"{opt.lr_ref:g} x {batch_global} / {opt.lr_ref_batch}"
    if batch_global > opt.large_batch_threshold and opt.large_batch_factor != 1:
        lr *= opt.large_batch_factor
        note += f" x {opt.large_batch_factor:g} (large batch)"
    bounded = min(max(lr, opt.lr_min_bound), opt.lr_max_bound)
    if bounded != lr:
        note += f" = {lr:g}, held in [{opt.lr_min_bound:g}, {opt.lr_max_bound:g}]"
    return bounded, note


def fold_numbers(recipe: Recipe) -> list[int]:
    """data.fold as a list."""
    fold = recipe.data.fold
    if fold == "all":
        return list(range(fold_count(recipe)))
    return list(fold) if isinstance(fold, list) else [int(fold)]


def image_sizes(recipe: Recipe) -> list[tuple[int, int]]:
    """data.img_size as (height, width) by stage: 224, [224, 320] or [[32, 64]]."""
    value = recipe.data.img_size
    items = value if isinstance(value, list) else [value]
    sizes = []
    for item in items:
        pair = item if isinstance(item, list) else [item, item]
        if len(pair) != 2 or not all(type(side) is int and side >= 8 for side in pair):
            raise InputError(f"data.img_size = {value}: sizes are whole numbers from 8, or [[height, width]]")
        sizes.append((pair[0], pair[1]))
    if not sizes or any(a[0] * a[1] >= b[0] * b[1] for a, b in zip(sizes, sizes[1:], strict=False)):
        raise InputError(f"data.img_size = {value}: the sizes of the stages must grow")
    return sizes


def fold_count(recipe: Recipe) -> int:
    """The folds of a recipe: one for a ratio split and for validation images of their own."""
    return 1 if recipe.data.split == "ratio" or recipe.data.val else recipe.data.n_splits


def largest_size(recipe: Recipe) -> int:
    """The largest side that training, evaluation or a view asks of a stored image, before the 1.14."""
    sides = [max(size) for size in image_sizes(recipe)]
    square = all(h == w for h, w in image_sizes(recipe))
    return max(sides + (list(recipe.tta.scales) if square else []))


def resize_side(size: int, factor: float) -> int:
    """The short side before the centre crop: 224 -> 255, 320 -> 365, 384 -> 438, 448 -> 511."""
    return round(size * factor)


def mix_final_epoch(recipe: Recipe) -> int | None:
    """The epoch (from 1) from which reg.mix_prob_final holds; None: never."""
    if recipe.reg.mix_final_epoch != "auto":
        return int(recipe.reg.mix_final_epoch)
    sizes = image_sizes(recipe)
    return _stage_ends(recipe, len(sizes))[1] + 1 if len(sizes) > 2 else None


def _stage_ends(recipe: Recipe, stages: int) -> list[int]:
    epochs, ends = recipe.sched.cosine_epochs, recipe.data.size_epochs
    if ends == "auto":
        shares = ([1.0], [15 / 40, 1.0], [15 / 48, 40 / 48, 1.0])
        if stages > len(shares):
            raise InputError(f"data.size_epochs: give the last epoch of each of the {stages} sizes")
        ends = [max(round(share * epochs), position + 1) for position, share in enumerate(shares[stages - 1])]
    if not isinstance(ends, list) or len(ends) != stages or not all(type(end) is int for end in ends):
        raise InputError(
            f"data.size_epochs = {ends}: one last epoch for each of the {stages} sizes of data.img_size"
        )
    if any(a >= b for a, b in zip([0, *ends], ends, strict=False)) or ends[-1] != epochs:
        raise InputError(
            f"data.size_epochs = {ends}: must grow and end at the horizon, sched.cosine_epochs = {epochs}"
        )
    return ends


def _stage_batches(recipe: Recipe, stages: int) -> list[int]:
    batches = recipe.train.stage_batch
    if batches is None:
        return [recipe.train.batch_per_gpu] * stages
    if (
        not isinstance(batches, list)
        or len(batches) != stages
        or not all(type(b) is int and b > 0 for b in batches)
    ):
        raise InputError(
            f"train.stage_batch = {batches}: one batch for each of the {stages} sizes of data.img_size"
        )
    return batches


LEVELS = {"low": ("low",), "medium": ("medium",), "low_medium": ("low", "medium")}  # of robust.level


def combos(kinds: list[str], level: str) -> list[tuple[str, str]]:
    """The (kind, level) pairs of a recipe's robust.kinds and robust.level, kinds first."""
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise InputError(f"robust.kinds = {kinds}: choose from {', '.join(KINDS)}")
    return [(kind, one) for kind in kinds for one in LEVELS[level]]
