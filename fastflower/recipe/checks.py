"""Checks a loaded recipe across keys: contradictions are refused, unusual values get a line of advice."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re
from pathlib import Path

from fastflower.core import metric, runs
from fastflower.core.errors import EnvironmentFault, InputError
from fastflower.recipe.derived import (
    CORRUPTIONS,
    combos,
    derive,
    fold_count,
    image_sizes,
    parse_interval,
    scaled_lr,
    validates,
)
from fastflower.recipe.schema import Recipe
from fastflower.recipe.starting_point import (
    from_scratch,
    layerwise,
    lr_bound,
    lr_rule,
    origin,
    warmup_epochs,
)

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
SMALL_BATCH = 8  # images, below which a gradient from scratch is mostly noise
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
    _check_start(recipe)
    _check_frozen(recipe)
    _check_schedule(recipe)
    _check_balance(recipe, advice)
    _check_ranges(recipe)
    _check_unscored(recipe, advice)
    _check_semi(recipe, advice)
    _advise(recipe, advice)
    _advise_start(recipe, advice)
    return advice


def check_name(name: str) -> None:
    """Refuse an experiment's name that cannot name its folders, or names what is no experiment."""
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


def _nested(first: str, second: str) -> bool:
    """True if two paths are equal or one is inside the other."""
    a, b = Path(first).resolve(), Path(second).resolve()
    return a == b or a in b.parents or b in a.parents


def _check_test_folder(recipe: Recipe) -> None:
    if _nested(recipe.data.root, recipe.data.test):
        raise InputError(
            f"data.root = {recipe.data.root} and data.test = {recipe.data.test} are one inside the other; "
            "the images to predict must not be trained on, so keep them apart"
        )


def _check_start(recipe: Recipe) -> None:
    start = f"model.init = {recipe.model.init}" if recipe.model.init else "model.pretrained = true"
    if recipe.checks.from_scratch and (recipe.model.pretrained or recipe.model.init):
        raise InputError(
            f"{start}: this recipe trains from scratch (checks.from_scratch=true), as its contest demands; set "
            "model.pretrained=false and no model.init, or checks.from_scratch=false"
        )
    if recipe.model.init and recipe.model.init == recipe.exp.name:
        raise InputError(
            f"model.init = {recipe.model.init}: an experiment cannot start from itself; set another exp.name, or "
            "train.extend=true to train it longer"
        )


def _check_frozen(recipe: Recipe) -> None:
    """Refuse what contradicts a backbone, or weights of a backbone, that stay as they are."""
    model, lora = recipe.model, recipe.model.lora
    if model.head == "knn" and (model.freeze == "none" or not model.frozen_views):
        raise InputError(
            "model.head = knn finds neighbours by features that stay as they are; set model.freeze=backbone and "
            "model.frozen_views to 1 or more"
        )
    if lora.targets != "auto" and not (
        isinstance(lora.targets, list)
        and lora.targets
        and all(isinstance(part, str) for part in lora.targets)
    ):
        raise InputError(
            f"model.lora.targets = {lora.targets}: must be auto or a list of layer names, such as [qkv, proj]"
        )
    setting = "model.freeze = backbone" if model.freeze == "backbone" else f"model.lora.rank = {lora.rank}"
    if model.freeze == "none" and not lora.rank:
        return
    if from_scratch(recipe) and ":" not in model.backbone:  # an own network's function may load weights
        raise InputError(
            f"{setting} keeps weights that are random here; set model.pretrained=true or model.init, or train them"
        )
    if model.freeze == "none":
        return
    idle = {
        "model.lora.rank=0": lora.rank > 0,
        "model.drop_path=0": model.drop_path > 0,
        "model.grad_checkpointing=false": model.grad_checkpointing,
        "llrd.enabled=auto": recipe.llrd.enabled is True,
        "llrd.unfreeze_schedule=null": recipe.llrd.unfreeze_schedule is not None,
        "model.frozen_views=0": recipe.semi.enabled and model.frozen_views > 0,
        "distill.teacher=[]": bool(recipe.distill.teacher) and model.head == "knn",
    }
    wrong = [remedy for remedy, asked in idle.items() if asked]
    if wrong:
        keys = ", ".join(remedy.partition("=")[0] for remedy in wrong)
        raise InputError(
            f"{setting}, with head {model.head}, contradicts {keys}; set {' '.join(wrong)}, or model.freeze=none"
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
    if sampler.type in BALANCING and loss.name == "bce" and loss.pos_weight == "auto":
        advice.append("a balancing sampler and loss.pos_weight=auto both correct the class prior; choose one")
    if loss.name == "focal" and recipe.reg.mix_prob > 0:
        advice.append("focal loss with MixUp/CutMix: both weigh hard examples; compare with loss.name=lsce")
    if loss.name == "focal" and not 1 <= loss.focal_gamma <= 2:
        advice.append(f"loss.focal_gamma = {loss.focal_gamma:g}: the usual range is 1 to 2")


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
    if recipe.ensembling.average == "probabilities" and "greedy" in (
        recipe.ensembling.weighting,
        recipe.bundle.members,
    ):
        key = "ensembling.weighting" if recipe.ensembling.weighting == "greedy" else "bundle.members"
        raise InputError(
            f"{key} = greedy chooses by the mean of logits; with ensembling.average=probabilities use another, or "
            "ensembling.average=logits"
        )


def _check_unscored(recipe: Recipe, advice: list[str]) -> None:
    """Refuse and explain what training on every image takes away."""
    if validates(recipe):
        return
    monitor = (
        f"; the plateau schedule follows the training loss instead of sched.monitor={recipe.sched.monitor}"
        if recipe.sched.name == "plateau"
        else ""
    )
    if recipe.data.split != "none":
        if recipe.distill.teacher:
            raise InputError(
                "data.fold = none: distill.teacher is known out of fold only, and a training on all images has no "
                "fold; leave out one of them"
            )
        advice.append(
            f"data.fold=none: no image is held out, so nothing scores this training, which follows its folds{monitor}"
        )
        return
    if recipe.data.val:
        raise InputError(
            f"data.val = {recipe.data.val} and data.split = none: the first names validation images, the second trains "
            "on every image; leave one of them out"
        )
    advice.append(
        f"data.split=none: no image is held out, so all {recipe.sched.cosine_epochs} epochs are trained and none is "
        f"the best: robust, es and select have no effect{monitor}"
    )


def _check_semi(recipe: Recipe, advice: list[str]) -> None:
    semi = recipe.semi
    if not semi.enabled and not semi.rounds:
        return
    if semi.enabled and semi.method == "soft" and not semi.soft_teacher:
        raise InputError(
            "semi.method=soft needs semi.soft_teacher, the experiment that labels the unlabelled images; with "
            "semi.rounds, python -m fastflower.campaign sets it"
        )
    if bool(recipe.data.unlabelled) == (recipe.data.labels_per_class is not None):
        raise InputError(
            f"{'semi.enabled=true' if semi.enabled else f'semi.rounds = {semi.rounds}'} learns from data.unlabelled or "
            "from the images that data.labels_per_class leaves unlabelled; "
            f"got {'both, give one' if recipe.data.unlabelled else 'neither, give one or set semi.enabled=false'}"
        )
    nested = recipe.data.unlabelled and _nested(recipe.data.unlabelled, recipe.data.test)
    if nested and not recipe.checks.allow_unlabelled_test:
        raise InputError(
            f"data.unlabelled = {recipe.data.unlabelled} and data.test = {recipe.data.test} are one inside the other; "
            "keep them apart, or set checks.allow_unlabelled_test=true if the contest's rules allow it"
        )
    if recipe.loss.name == "bce":
        raise InputError(
            "semi.enabled=true needs a softmax over the classes, which loss.name = bce does not train; use lsce or ce"
        )
    if semi.teacher == "ema" and not recipe.ema.enabled:
        raise InputError("semi.teacher = ema needs ema.enabled=true; enable it or use semi.teacher=raw")
    if semi.ramp_epochs >= recipe.sched.cosine_epochs:
        advice.append(
            f"semi.ramp_epochs = {semi.ramp_epochs}: the weight of unlabelled images never reaches semi.lambda_u in "
            f"{recipe.sched.cosine_epochs} epochs"
        )


def _advise(recipe: Recipe, advice: list[str]) -> None:
    if recipe.model.head in ("arcface", "cosface") and not 0.2 <= recipe.model.margin <= 0.4:
        advice.append(f"model.margin = {recipe.model.margin:g}: the usual range is 0.2 to 0.4")
    if recipe.aug.corrupt_p > 0 and recipe.robust.enabled:
        advice.append(
            "aug.corrupt_p trains on corruptions that robust.kinds scores; they are no longer unseen"
        )
    if not recipe.ema.warmup and recipe.ema.enabled:
        advice.append(
            f"ema.warmup=false: at decay {recipe.ema.decay:g} half of the initial weights remain after "
            f"{math.log(0.5) / math.log(recipe.ema.decay):.0f} steps"
        )
    if recipe.sched.name == "plateau":
        _advise_plateau(recipe, advice)
    if "combo" in metric.parse(recipe.select.metric).names and not recipe.robust.enabled:
        advice.append(
            "robust.enabled=false: best is chosen by clean top-1, because S needs the corrupted set"
        )


def _advise_start(recipe: Recipe, advice: list[str]) -> None:
    """Lines for settings that cannot work for what the training starts from, with the value to use."""
    numbers, rule, start = derive(recipe, recipe.train.world_size), lr_rule(recipe), origin(recipe)
    if not rule.lowest <= numbers.lr <= rule.highest:
        side = "barely learns" if numbers.lr < rule.lowest else "diverges or forgets what it knows"
        open_keys = dataclasses.replace(recipe.opt, lr="auto", lr_ref="auto", lr_max_bound="auto")
        usual, _ = scaled_lr(dataclasses.replace(recipe, opt=open_keys), numbers.batch_global)
        advice.append(
            f"lr {numbers.lr:.3g} {start} {side} ({recipe.opt.name} learns at {rule.lowest:g} to {rule.highest:g}); "
            f"use opt.lr={usual:.2g}, or the rate that python -m fastflower.lrfind suggests"
        )
    if from_scratch(recipe) and layerwise(recipe) and min(recipe.llrd.multipliers) < 1:
        advice.append(
            f"llrd.enabled=true from scratch holds the first layers, which know nothing, at "
            f"{min(recipe.llrd.multipliers):g} of the learning rate; use llrd.enabled=auto"
        )
    if from_scratch(recipe) and numbers.batch_global < SMALL_BATCH:
        advice.append(
            f"a global batch of {numbers.batch_global} from scratch learns from noise; raise train.batch_per_gpu or "
            f"train.grad_accum to {SMALL_BATCH} images or more"
        )


def _advise_plateau(recipe: Recipe, advice: list[str]) -> None:
    sched, batch = recipe.sched, recipe.train.batch_per_gpu
    if sched.patience < 5:
        advice.append(
            f"sched.patience = {sched.patience}: scores may fluctuate for longer than that; try 5 to 10"
        )
    if sched.factor <= 0.5:
        advice.append(f"sched.factor = {sched.factor:g}: the learning rate falls fast; 0.7 or 0.8 is gentler")
    if not warmup_epochs(recipe):
        advice.append("sched.warmup_epochs = 0: plateau without warm-up; 5 epochs stabilise the start")
    if batch >= 4096 and recipe.opt.lr != "auto" and recipe.opt.lr <= 1e-4:
        advice.append(f"opt.lr = {recipe.opt.lr:g} at {batch} images a device may be small; try 2e-4 or 3e-4")
