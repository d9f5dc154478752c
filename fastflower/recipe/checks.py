"""Checks a loaded recipe across keys: contradictions are refused, unusual values get a line of advice."""

from __future__ import annotations

import importlib.util
import re

from fastflower.core import metric, runs
from fastflower.core.errors import EnvironmentFault, InputError
from fastflower.recipe.advice import doubtful_starts, unusual_values
from fastflower.recipe.derived import (
    CORRUPTIONS,
    combos,
    derive,
    fold_count,
    image_sizes,
    parse_interval,
    validates,
)
from fastflower.recipe.method_checks import (
    check_auxiliary,
    check_frozen,
    check_semi,
    check_start,
    check_unscored,
    is_nested,
)
from fastflower.recipe.schema import Recipe
from fastflower.recipe.starting_point import layerwise, lr_bound, warmup_epochs

RESERVED = tuple(
    path.name
    for path in (
        runs.BUNDLE,
        runs.PRETRAINED,
        runs.SUBMISSION,
        runs.COMPARISON,
        runs.COMBINATION,
        runs.FIGURES,
    )
)
LONGEST_NAME = 200  # bytes; a file name holds 255, and temporary files append to it
BALANCING = ("weighted_en", "weighted_inv", "class_balanced", "repeat_factor")


def check(recipe: Recipe) -> list[str]:
    """Refuse contradictions (InputError) and return one line of advice for each doubtful choice."""
    advice: list[str] = []
    derive(recipe, recipe.train.world_size)  # raises for sizes, epochs and batches that do not fit together
    parse_interval(recipe.train.save_every)
    _check_test_folder(recipe)
    check_flips(recipe)
    check_views(recipe)
    check_metric(recipe)
    check_start(recipe)
    check_frozen(recipe)
    check_auxiliary(recipe, advice)
    _check_schedule(recipe)
    _check_balance(recipe, advice)
    _check_ranges(recipe)
    check_unscored(recipe, advice)
    check_semi(recipe, advice)
    return advice + unusual_values(recipe) + doubtful_starts(recipe)


def check_name(name: str) -> None:
    """Refuse an experiment's name that cannot name its folders, or is that of another file or folder."""
    if not re.fullmatch(r"\w[\w.-]*", name):
        fault = "must be letters, digits, _ . - only, and begin with a letter, a digit or _"
    elif name.casefold() in RESERVED:
        fault = "this name is reserved for a file or folder beside the experiments"
    elif name.endswith(".yaml"):
        fault = "must not end in .yaml, as recipes do"
    elif len(name.encode()) > LONGEST_NAME:
        fault = f"must have {LONGEST_NAME} bytes or less, has {len(name.encode())}"
    else:
        return
    shown = name if len(name) <= 60 else f"{name[:60]}..."
    raise InputError(
        f"exp.name = {repr(shown)[1:-1]}: {fault}; it names folders, so set exp.name to another one"
    )


def check_flips(recipe: Recipe) -> None:
    """Refuse flips in training and in views when a mirrored image has another class (data.flips_keep_class=false)."""
    flips = {
        "aug.hflip_p": recipe.aug.hflip_p,
        "aug.vflip_p": recipe.aug.vflip_p,
        "tta.hflip": recipe.tta.hflip,
        "tta.vflip": recipe.tta.vflip,
    }
    on = [name for name, value in flips.items() if value]
    if on and not (recipe.data.flips_keep_class or recipe.checks.allow_flips):
        remedy = " ".join(f"{name}={'false' if name.startswith('tta.') else 0}" for name in on)
        raise InputError(
            f"{on[0]} = {str(flips[on[0]]).lower()}: flips change the class of these images "
            f"(data.flips_keep_class=false); set {remedy}, or allow them by checks.allow_flips=true"
        )


def check_views(recipe: Recipe) -> None:
    """Refuse views at test time that the images cannot have."""
    if not recipe.tta.scales:
        raise InputError("tta.scales is empty; give at least one image size")
    oblong = next((size for size in image_sizes(recipe) if size[0] != size[1]), None)
    if recipe.tta.quarter_turns and oblong:
        raise InputError(
            f"tta.quarter_turns=true turns square images, data.img_size has {oblong[0]} x {oblong[1]}; set it to "
            "false, or use tta.rotations=[180]"
        )


def check_metric(recipe: Recipe) -> None:
    """Refuse a metric of corrupted images where there are none."""
    if metric.parse(recipe.select.metric).needs_corrupted and not recipe.robust.enabled:
        raise InputError(
            f"select.metric = {recipe.select.metric} needs corrupted images; set robust.enabled=true or leave "
            "corrupted out of it"
        )


def check_scored(recipe: Recipe, command: str) -> None:
    """Refuse a command that needs held-out images where every image trains."""
    if not validates(recipe):
        key = "data.fold" if recipe.data.split != "none" else "data.split"
        raise InputError(
            f"{key} = none: every image trained, so {command} has none that was held out; export --members hands "
            "in a checkpoint that nothing has scored, and another data.split with its own data.home gives scores"
        )


def check_trackers(recipe: Recipe) -> None:
    """Raise EnvironmentFault when the recipe logs to a service whose package is not installed."""
    for package, wanted in (("wandb", recipe.log.wandb), ("mlflow", recipe.log.mlflow)):
        if wanted and importlib.util.find_spec(package) is None:
            raise EnvironmentFault(
                f"log.{package}=true, but {package} is not installed; pip install -e '.[{package}]', "
                f"or log.{package}=false"
            )


def _check_test_folder(recipe: Recipe) -> None:
    if is_nested(recipe.data.root, recipe.data.test):
        raise InputError(
            f"data.root = {recipe.data.root} and data.test = {recipe.data.test} are one inside the other; "
            "the images to predict must not be trained on, so keep them apart"
        )


def _check_schedule(recipe: Recipe) -> None:
    sched = recipe.sched
    if warmup_epochs(recipe) > sched.cosine_epochs / 2:
        raise InputError(
            f"sched.warmup_epochs = {sched.warmup_epochs:g} of {sched.cosine_epochs} epochs: the learning rate would "
            f"hardly have risen when it must fall; use auto or at most {sched.cosine_epochs / 2:g}, or raise "
            "sched.cosine_epochs"
        )
    final = recipe.reg.mix_final_epoch
    if final != "auto" and not 1 <= int(final) <= sched.cosine_epochs:
        raise InputError(
            f"reg.mix_final_epoch = {final}: must be auto or an epoch in 1..{sched.cosine_epochs}"
        )
    unfreeze = recipe.llrd.unfreeze_schedule
    if unfreeze is not None:
        if not layerwise(recipe):
            raise InputError(
                "llrd.unfreeze_schedule needs llrd.enabled=true; enable it or set the schedule to null"
            )
        if not isinstance(unfreeze, dict) or not all(isinstance(parts, list) for parts in unfreeze.values()):
            raise InputError(
                "llrd.unfreeze_schedule: must be a map of epoch -> list of parts, such as {1: [head], 3: [back]}"
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
            f"sampler.undersample_frac is meant for a balancing sampler (sampler.type = {sampler.type})"
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
    if sampler.type in BALANCING and loss.name == "bce" and loss.pos_weight != 1:
        advice.append(
            f"a balancing sampler and loss.pos_weight={loss.pos_weight} both correct the class prior; choose one"
        )
    if sampler.type in BALANCING and loss.name == "focal":
        advice.append(
            f"sampler.type = {sampler.type} and focal loss both favour rare classes; compare macro F1 with "
            "loss.name=lsce and with sampler.type=none"
        )
    strong = _strong_augmentation(recipe)
    if loss.name == "focal" and strong:
        advice.append(f"focal loss with {strong}: both weigh hard examples; compare with loss.name=lsce")
    if loss.name == "focal" and not 1 <= loss.focal_gamma <= 2:
        advice.append(f"loss.focal_gamma = {loss.focal_gamma:g}: the usual range is 1 to 2")


def _strong_augmentation(recipe: Recipe) -> str:
    """The names of the augmentations in use that make images hard, joined by commas."""
    in_use = {
        "MixUp/CutMix": recipe.reg.mix_prob,
        "RandAugment": recipe.aug.randaugment_n,
        "TrivialAugment": recipe.aug.trivial_p,
        "AugMix": recipe.aug.augmix_p,
    }
    return ", ".join(name for name, amount in in_use.items() if amount)


def _check_ranges(recipe: Recipe) -> None:
    combos(recipe.robust.kinds, recipe.robust.level)
    if recipe.sched.name == "plateau" and recipe.eval.every not in ("auto", 1):
        raise InputError(
            f"eval.every = {recipe.eval.every}: sched.name=plateau follows the scores of each epoch; "
            "set it to 1 or auto"
        )
    if recipe.robust.enabled and not recipe.robust.kinds:
        raise InputError(f"robust.kinds = {recipe.robust.kinds}: choose from {', '.join(CORRUPTIONS)}")
    if len(recipe.llrd.multipliers) < 2:
        raise InputError(
            f"llrd.multipliers = {recipe.llrd.multipliers}: must be at least two, from the first layers to the head"
        )
    aug = recipe.aug
    spans = {
        "aug.rrc_scale": aug.rrc_scale,
        "aug.rrc_ratio": aug.rrc_ratio,
        "semi.weak_scale": recipe.semi.weak_scale,
    }
    for name, values, length in (
        *((name, span, 2) for name, span in spans.items()),
        ("aug.jitter", aug.jitter, 4),
        ("aug.translate", aug.translate, 2),
    ):
        if len(values) != length:
            raise InputError(f"{name} = {values}: must have {length} numbers")
    for name, (low, high) in spans.items():
        if low > high:
            raise InputError(f"{name} = [{low:g}, {high:g}]: the first must not exceed the second")
    if recipe.opt.lr_min_bound > lr_bound(recipe):
        raise InputError(
            f"opt.lr_min_bound = {recipe.opt.lr_min_bound:g} is above opt.lr_max_bound = {lr_bound(recipe):g}; "
            "lower the first or raise the second"
        )
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
    if recipe.data.n_splits == 1 and recipe.data.split not in ("given", "none") and not recipe.data.val:
        raise InputError("data.n_splits = 1: must be 2 or more, unless the folds are given")
    count = fold_count(recipe)
    if fold not in ("all", "none") and not (folds and all(type(k) is int and 0 <= k < count for k in folds)):
        raise InputError(f"data.fold = {fold}: must be all, none, or a number (or list) in 0..{count - 1}")
    if len(set(folds)) < len(folds):
        raise InputError(f"data.fold = {fold}: names a fold twice; give each once")
    if recipe.ensembling.average == "probabilities" and "greedy" in (
        recipe.ensembling.weighting,
        recipe.bundle.members,
    ):
        key = "ensembling.weighting" if recipe.ensembling.weighting == "greedy" else "bundle.members"
        raise InputError(
            f"{key} = greedy chooses by the mean of logits; with ensembling.average=probabilities use another, or "
            "ensembling.average=logits"
        )
