"""The parts of the user's own that a recipe names, and the digests of their sources."""

from __future__ import annotations

from collections.abc import Iterable

from fastflower.core import metric, own_parts
from fastflower.core.errors import InputError
from fastflower.recipe.schema import Recipe

OF_TRAINING = ("model.backbone", "loss.name", "opt.name", "sampler.type", "aug.extra", "select.metric")


def own_names(recipe: Recipe) -> list[tuple[str, str]]:
    """(key, name) of each part of the user's own in a recipe, in the order of `own_parts.SIGNATURES`."""
    values: dict[str, Iterable[str]] = {
        "model.backbone": [recipe.model.backbone],
        "loss.name": [recipe.loss.name],
        "opt.name": [recipe.opt.name],
        "sampler.type": [recipe.sampler.type],
        "aug.extra": recipe.aug.extra,
        "robust.kinds": recipe.robust.kinds if recipe.robust.enabled else [],
        "select.metric": metric.parse(recipe.select.metric).names,
    }
    return [(key, name) for key in own_parts.SIGNATURES for name in values[key] if own_parts.is_own(name)]


def check_own(recipe: Recipe, keys: Iterable[str] = OF_TRAINING) -> None:
    """Refuse parts of these keys that cannot be imported or do not take their arguments, before any work."""
    wrong = [name for name in recipe.aug.extra if not own_parts.is_own(name)]
    if wrong:
        raise InputError(
            f"aug.extra = {wrong[0]}: must be module:function; see docs/add_your_own.md for an example"
        )
    for key, name in own_names(recipe):
        if key in keys:
            own_parts.find(key, name)


def own_sources(recipe: Recipe) -> dict[str, str]:
    """`key name` -> digest of the source of its module, of each part of the user's own."""
    return {f"{key} {name}": own_parts.source_digest(key, name) for key, name in own_names(recipe)}
