"""The weights that a training starts from, and the settings that follow from them where the recipe says `auto`.

Trained weights need a small learning rate, smaller in the first layers, which hold what is worth keeping; random ones
need a large one everywhere. Both are warmed up for a share of the training, so that short ones are not all warm-up.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastflower.recipe.schema import Recipe

LONGEST_WARMUP = 5  # epochs
WARMUP_SHARE = 1 / 8  # of all epochs; 5 of 40


@dataclass(frozen=True)
class LrRule:
    """The learning rate at a batch of opt.lr_ref_batch and its limits; `root`: it grows with the root of the batch.

    `lowest` and `highest` enclose the rates at which a network of any size learns from such a start; `bound` is the
    largest rate that scaling to the batch may reach.
    """

    lr_ref: float
    bound: float
    lowest: float
    highest: float
    root: bool = False


# Adam's steps do not grow with the gradient, so from scratch its rate follows the noise, the root of the batch
TRAINED = LrRule(2e-4, bound=5e-4, lowest=2e-6, highest=3e-3)
SCRATCH = LrRule(2e-3, bound=4e-3, lowest=1e-4, highest=1e-2, root=True)
FROZEN = LrRule(1e-2, bound=4e-2, lowest=3e-4, highest=0.1, root=True)  # a head on features that stay
# Lion's steps have the size of the rate in every weight; its paper (arXiv:2302.06675): a third to a tenth of Adam's
LION_TRAINED = LrRule(4e-5, bound=1e-4, lowest=5e-7, highest=5e-4)
LION_SCRATCH = LrRule(4e-4, bound=8e-4, lowest=2e-5, highest=2e-3, root=True)
SGD_TRAINED = LrRule(1e-2, bound=5e-2, lowest=1e-4, highest=0.2)
SGD_SCRATCH = LrRule(0.1, bound=0.5, lowest=1e-3, highest=2.0)


def from_scratch(recipe: Recipe) -> bool:
    """True if the backbone starts from random weights."""
    return not (recipe.model.pretrained or recipe.model.init)


def origin(recipe: Recipe) -> str:
    """The start in words, for lines that give a reason."""
    if recipe.model.freeze == "backbone":
        return "on frozen features"
    if recipe.model.init:
        return f"from {recipe.model.init}"
    return "from pretrained weights" if recipe.model.pretrained else "from scratch"


def lr_rule(recipe: Recipe) -> LrRule:
    """The rule of the recipe's optimizer for its start."""
    special = {"sgd": (SGD_TRAINED, SGD_SCRATCH), "lion": (LION_TRAINED, LION_SCRATCH)}
    rules = special.get(recipe.opt.name, (TRAINED, SCRATCH))
    if recipe.model.freeze == "backbone":
        return SGD_SCRATCH if recipe.opt.name == "sgd" else FROZEN
    return rules[from_scratch(recipe)]


def lr_bound(recipe: Recipe) -> float:
    """The largest scaled learning rate: opt.lr_max_bound, or the rule's."""
    bound = recipe.opt.lr_max_bound
    return lr_rule(recipe).bound if bound == "auto" else float(bound)


def warmup_epochs(recipe: Recipe) -> float:
    """Epochs of warm-up: sched.warmup_epochs, or an eighth of the training and at most five epochs."""
    asked = recipe.sched.warmup_epochs
    return min(LONGEST_WARMUP, WARMUP_SHARE * recipe.sched.cosine_epochs) if asked == "auto" else float(asked)


def layerwise(recipe: Recipe) -> bool:
    """True if each part of the network has its own learning rate: llrd.enabled, or trained weights that train on."""
    if recipe.llrd.enabled != "auto":
        return bool(recipe.llrd.enabled)
    return not from_scratch(recipe) and recipe.model.freeze == "none"


def settled(recipe: Recipe) -> dict[str, object]:
    """The value in force of each key that may be `auto` here, by its name."""
    lr_ref = recipe.opt.lr_ref
    rule = lr_rule(recipe)
    return {
        "opt.lr_ref": rule.lr_ref if lr_ref == "auto" else lr_ref,
        "opt.lr_max_bound": lr_bound(recipe),
        "sched.warmup_epochs": warmup_epochs(recipe),
        "llrd.enabled": layerwise(recipe),
    }


def reasons(recipe: Recipe) -> list[str]:
    """One line with the values that `auto` took, and why; empty without any."""
    values, start = settled(recipe), origin(recipe)
    lines = []
    if recipe.opt.lr == "auto" and recipe.opt.lr_ref == "auto":
        lines.append(f"opt.lr_ref={values['opt.lr_ref']:g}")
    if recipe.llrd.enabled == "auto":
        lines.append(f"llrd.enabled={str(values['llrd.enabled']).lower()}")
    if recipe.sched.warmup_epochs == "auto" and recipe.sched.name not in ("none", "cyclic"):
        lines.append(
            f"sched.warmup_epochs={values['sched.warmup_epochs']:g} of {recipe.sched.cosine_epochs} epochs"
        )
    return [f"auto, {start}: {', '.join(lines)}"] if lines else []
