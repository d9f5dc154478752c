"""Advice on a recipe that is not wrong: values outside their usual range, starts that will hardly learn."""

from __future__ import annotations

import dataclasses
import math

from fastflower.core import metric
from fastflower.recipe.derived import derive, scaled_lr
from fastflower.recipe.schema import Recipe
from fastflower.recipe.starting_point import from_scratch, layerwise, lr_rule, origin, warmup_epochs

SMALL_BATCH = 8  # images, below which a gradient from scratch is mostly noise
SHORT_SCRATCH = 20  # epochs, below which a training from scratch is nearer to docs/proof.md's nine


def unusual_values(recipe: Recipe) -> list[str]:
    """Lines for values outside their usual range, and for choices that cost what is easily overlooked."""
    advice: list[str] = []
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
    if recipe.opt.sam_rho:
        advice.append(
            f"opt.sam_rho = {recipe.opt.sam_rho:g}: two forward and backward passes a step, so a training takes about "
            "twice the time"
        )
    if recipe.opt.sam_rho > 0.5:
        advice.append(
            f"opt.sam_rho = {recipe.opt.sam_rho:g}: the gradient comes from far away; the usual range is 0.02 to 0.2"
        )
    if recipe.sched.name == "plateau":
        advice += _of_plateau(recipe)
    if "combo" in metric.parse(recipe.select.metric).names and not recipe.robust.enabled:
        advice.append(
            "robust.enabled=false: best is chosen by clean top-1, because S needs the corrupted set"
        )
    return advice


def doubtful_starts(recipe: Recipe) -> list[str]:
    """Lines for settings that cannot work for what the training starts from, with the value to use."""
    advice: list[str] = []
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
    recoloured = recipe.aug.strength and (any(recipe.aug.jitter) or recipe.aug.rotation_deg)
    if from_scratch(recipe) and recipe.sched.cosine_epochs < SHORT_SCRATCH and recoloured:
        advice.append(
            f"{recipe.sched.cosine_epochs} epochs from scratch: aug.jitter and aug.rotation_deg cost 13 points of "
            "top-1 in nine on few photographs (docs/proof.md); start from recipes/scratch_short.yaml, or leave them out"
        )
    return advice


def _of_plateau(recipe: Recipe) -> list[str]:
    advice: list[str] = []
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
    return advice
