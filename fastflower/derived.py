"""Numbers that follow from a recipe: stages, batches, lr, epochs. Computed here once, printed and stored by train.

`check` refuses contradictions between keys and returns the advice that seed 000 gives.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastflower.errors import InputError
from fastflower.recipe import Recipe

BALANCING = ("weighted_en", "weighted_inv", "class_balanced", "repeat_factor")
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


def check(recipe: Recipe) -> list[str]:
    """Refuse contradictions (InputError) and return one line of advice for each doubtful choice."""
    advice: list[str] = []
    derive(recipe, recipe.train.world_size)
    _check_test_folder(recipe)
    check_flips(recipe)
    _check_schedule(recipe)
    _check_balance(recipe, advice)
    _check_ranges(recipe)
    _check_semi(recipe, advice)
    _check_seed_advice(recipe, advice)
    return advice


def check_flips(recipe: Recipe) -> None:
    """Where mirrored images are of other classes, neither training nor a view may flip."""
    flips = {
        "aug.hflip_p": recipe.aug.hflip_p,
        "aug.vflip_p": recipe.aug.vflip_p,
        "tta.hflip": recipe.tta.hflip,
    }
    on = [name for name, value in flips.items() if value]
    if on and not (recipe.data.flips_keep_class or recipe.checks.allow_flips):
        remedy = " ".join(f"{name}={'false' if name == 'tta.hflip' else 0}" for name in on)
        raise InputError(
            f"{on[0]} = {str(flips[on[0]]).lower()}: flips change the class of these images "
            f"(data.flips_keep_class=false); set {remedy}, or force them by checks.allow_flips=true"
        )


def _nested(one: str, other: str) -> bool:
    """Whether two paths are the same or one lies in the other."""
    a, b = Path(one).resolve(), Path(other).resolve()
    return a == b or a in b.parents or b in a.parents


def _check_test_folder(recipe: Recipe) -> None:
    if _nested(recipe.data.root, recipe.data.test):
        raise InputError(
            f"data.root = {recipe.data.root} and data.test = {recipe.data.test} lie in one another; "
            "the images to be predicted are never trained on, so keep them apart"
        )


def _check_schedule(recipe: Recipe) -> None:
    sched = recipe.sched
    if sched.warmup_epochs >= sched.cosine_epochs:
        raise InputError(
            f"sched.warmup_epochs = {sched.warmup_epochs} is not below sched.cosine_epochs = {sched.cosine_epochs}, "
            "the whole horizon; lower the first or raise the second"
        )
    final = recipe.reg.mix_final_epoch
    if final != "auto" and not 1 <= int(final) <= sched.cosine_epochs:
        raise InputError(
            f"reg.mix_final_epoch = {final}: must be auto or an epoch in 1..{sched.cosine_epochs}"
        )
    unfreeze = recipe.llrd.unfreeze_schedule
    if unfreeze is not None:
        if not recipe.llrd.enabled:
            raise InputError(
                "llrd.unfreeze_schedule needs llrd.enabled=true; enable it or set the schedule to null"
            )
        if not isinstance(unfreeze, dict) or not all(isinstance(parts, list) for parts in unfreeze.values()):
            raise InputError(
                "llrd.unfreeze_schedule: a map of epoch -> list of parts, such as {1: [head], 3: [back]}"
            )
        epochs = range(1, sched.cosine_epochs + 1)
        late = [epoch for epoch in unfreeze if not str(epoch).isdecimal() or int(epoch) not in epochs]
        if late:
            raise InputError(f"llrd.unfreeze_schedule: epoch {late[0]} is outside 1..{sched.cosine_epochs}")


def _check_balance(recipe: Recipe, advice: list[str]) -> None:
    sampler, loss = recipe.sampler, recipe.loss
    if sampler.type in BALANCING and loss.name == "bsce" and not recipe.checks.allow_double_correction:
        raise InputError(
            f"sampler.type = {sampler.type} and loss.name = bsce both correct the class prior; "
            "choose one, or set checks.allow_double_correction=true"
        )
    if sampler.undersample_frac and sampler.type not in ("weighted_en", "weighted_inv", "class_balanced"):
        advice.append(
            f"sampler.undersample_frac has no balancing sampler to go with (sampler.type = {sampler.type})"
        )
    if sampler.type in BALANCING and recipe.reg.mix_prob == 0:
        advice.append(
            "a balancing sampler repeats images; MixUp/CutMix (reg.mix_prob) limits overfitting on them"
        )
    if sampler.oversample_cap > 3:
        advice.append(
            f"sampler.oversample_cap = {sampler.oversample_cap:g}: above 3, repeats invite overfitting"
        )
    if sampler.beta < 0.9 and sampler.type == "weighted_en":
        advice.append(f"sampler.beta = {sampler.beta:g}: the usual range is 0.9 to 0.999")
    if sampler.type in BALANCING and loss.name == "bce" and loss.pos_weight == "auto":
        advice.append("a balancing sampler and loss.pos_weight=auto both correct the class prior; choose one")
    if loss.name == "focal" and recipe.reg.mix_prob > 0:
        advice.append("focal loss with MixUp/CutMix: both weigh hard examples; compare with loss.name=lsce")
    if loss.name == "focal" and not 1 <= loss.focal_gamma <= 2:
        advice.append(f"loss.focal_gamma = {loss.focal_gamma:g}: the usual range is 1 to 2")


def _check_ranges(recipe: Recipe) -> None:
    unknown = [kind for kind in recipe.robust.kinds if kind not in KINDS]
    if unknown or (recipe.robust.enabled and not recipe.robust.kinds):
        raise InputError(f"robust.kinds = {recipe.robust.kinds}: choose from {', '.join(KINDS)}")
    if len(recipe.llrd.multipliers) < 2:
        raise InputError(f"llrd.multipliers = {recipe.llrd.multipliers}: at least two, front to head")
    aug = recipe.aug
    spans = {
        "aug.rrc_scale": aug.rrc_scale,
        "aug.rrc_ratio": aug.rrc_ratio,
        "semi.weak_scale": recipe.semi.weak_scale,
    }
    for name, values, length in (
        *((name, span, 2) for name, span in spans.items()),
        ("aug.jitter", aug.jitter, 4),
    ):
        if len(values) != length:
            raise InputError(f"{name} = {values}: must have {length} numbers")
    for name, (low, high) in spans.items():
        if low > high:
            raise InputError(f"{name} = [{low:g}, {high:g}]: the first must not exceed the second")
    if recipe.opt.lr_min_bound > recipe.opt.lr_max_bound:
        raise InputError("opt.lr_min_bound is above opt.lr_max_bound; swap them")
    if recipe.lrfind.low >= recipe.lrfind.high:
        raise InputError(
            f"lrfind.low = {recipe.lrfind.low:g} is not below lrfind.high = {recipe.lrfind.high:g}; swap them"
        )
    if recipe.opt.lr != "auto" and not recipe.opt.lr > 0:
        raise InputError(f"opt.lr = {recipe.opt.lr}: must be auto or > 0")
    for name in ("mean", "std"):
        value = getattr(recipe.data, name)
        numbers = (
            isinstance(value, list) and len(value) == 3 and all(isinstance(v, (int, float)) for v in value)
        )
        if value != "auto" and not (numbers and all(0 < v < 1 for v in value)):
            raise InputError(f"data.{name} = {value}: must be auto or three numbers in 0..1")
    fold = recipe.data.fold
    folds = fold if isinstance(fold, list) else [fold]
    if recipe.data.n_splits == 1 and recipe.data.split != "given" and not recipe.data.val:
        raise InputError("data.n_splits = 1: must be 2 or more, unless the folds are given")
    count = fold_count(recipe)
    if fold != "all" and not (folds and all(type(k) is int and 0 <= k < count for k in folds)):
        raise InputError(f"data.fold = {fold}: must be all, or a number (or list) in 0..{count - 1}")
    if not recipe.tta.scales:
        raise InputError("tta.scales is empty; give at least one image size")


def _check_semi(recipe: Recipe, advice: list[str]) -> None:
    semi = recipe.semi
    if not semi.enabled:
        return
    if bool(recipe.data.unlabelled) == (recipe.data.labels_per_class is not None):
        raise InputError(
            "semi.enabled=true learns from the images of data.unlabelled or from those that data.labels_per_class "
            f"leaves; got {'both, give one' if recipe.data.unlabelled else 'neither, give one or set it to false'}"
        )
    nested = recipe.data.unlabelled and _nested(recipe.data.unlabelled, recipe.data.test)
    if nested and not recipe.checks.allow_unlabelled_test:
        raise InputError(
            f"data.unlabelled = {recipe.data.unlabelled} and data.test = {recipe.data.test} lie in one another; keep "
            "them apart, or set checks.allow_unlabelled_test=true where the contest's rules allow it"
        )
    if recipe.loss.name == "bce":
        raise InputError(
            "semi.enabled=true reads probabilities over the classes, and loss.name = bce trains none; use lsce or ce"
        )
    if semi.teacher == "ema" and not recipe.ema.enabled:
        raise InputError("semi.teacher = ema needs ema.enabled=true; enable it or use semi.teacher=raw")
    if semi.ramp_epochs >= recipe.sched.cosine_epochs:
        advice.append(
            f"semi.ramp_epochs = {semi.ramp_epochs}: the weight of unlabelled images never reaches semi.lambda_u in "
            f"{recipe.sched.cosine_epochs} epochs"
        )


def _check_seed_advice(recipe: Recipe, advice: list[str]) -> None:
    if recipe.model.head != "linear" and not 0.2 <= recipe.model.margin <= 0.4:
        advice.append(f"model.margin = {recipe.model.margin:g}: the usual range is 0.2 to 0.4")
    if recipe.aug.corrupt_p > 0 and recipe.robust.enabled:
        advice.append(
            "aug.corrupt_p trains on kinds that robust.kinds scores; corrupted scores are no longer unseen"
        )
    if not recipe.ema.warmup and recipe.ema.enabled:
        advice.append(
            f"ema.warmup=false: at decay {recipe.ema.decay:g} half of the initial weights remain after "
            f"{math.log(0.5) / math.log(recipe.ema.decay):.0f} steps"
        )
    if recipe.sched.name == "plateau":
        _advise_plateau(recipe, advice)
    if recipe.select.metric == "combo" and not recipe.robust.enabled:
        advice.append("robust.enabled=false: best is chosen by clean top-1, S needs the corrupted set")


def _advise_plateau(recipe: Recipe, advice: list[str]) -> None:
    """Seed 001, sections 3 and 4."""
    sched, batch = recipe.sched, recipe.train.batch_per_gpu
    if sched.patience < 5:
        advice.append(
            f"sched.patience = {sched.patience}: the course of scores may wobble longer; try 5 to 10"
        )
    if sched.factor <= 0.5:
        advice.append(f"sched.factor = {sched.factor:g}: the lr falls fast; 0.7 or 0.8 is gentler")
    if not sched.warmup_epochs:
        advice.append("sched.warmup_epochs = 0: plateau without warm-up; 5 epochs steady the start")
    if batch >= 4096 and recipe.opt.lr != "auto" and recipe.opt.lr <= 1e-4:
        advice.append(f"opt.lr = {recipe.opt.lr:g} at {batch} images a device may be small; try 2e-4 or 3e-4")


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
