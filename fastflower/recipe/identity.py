"""The identity of a run: the recipe keys, data and batches that decide its result. Only an identical run resumes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastflower.recipe.derived import Derived
from fastflower.recipe.own import own_names, own_sources
from fastflower.recipe.schema import Recipe, fields_of
from fastflower.recipe.starting_point import settled

# keys that may change before a resume: they set paths, speed and later commands, not the trained weights;
# data keys are compared by the hashes of the converted data, batch keys by the global batch
FREE = (
    *("exp.", "tta.", "ensembling.", "ts.", "bundle.", "log.", "checks.", "accept.", "lrfind.", "eval.batch"),
    *("data.root", "data.csv", "data.image_col", "data.label_col", "data.home", "data.test", "data.fold"),
    *("data.unlabelled", "data.store", "data.raw_share", "data.jpeg_quality", "data.on_bad", "data.workers"),
    *("train.batch_per_gpu", "train.world_size", "train.grad_accum", "train.stage_batch"),
    *("train.save_every", "train.keep_every", "train.max_nonfinite", "train.compile", "train.extend"),
)


def identity(
    recipe: Recipe,
    derived: Derived,
    data: Mapping[str, str | int],
) -> dict[str, Any]:
    """The values that must be equal in a checkpoint and the run that resumes from it; `data`: hashes of the data."""
    keys = {name: value for name, value, _ in fields_of(recipe) if not name.startswith(FREE)}
    keys |= settled(recipe)  # `auto` and the value that it takes are equal
    batches = [stage.batch_per_gpu * derived.world_size * recipe.train.grad_accum for stage in derived.stages]
    own = {"own source of": own_sources(recipe)} if own_names(recipe) else {}
    return {"recipe": keys, "data": dict(data), "global batch": {"by stage": batches}, **own}


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One line, such as `opt.lr_ref: 0.0002 -> 0.001`, for every entry that differs between two identities."""
    lines = []
    for section in now:
        old, new = then.get(section, {}), now[section]
        for name in sorted({*old, *new}):
            if _plain(old.get(name)) != _plain(new.get(name)):
                label = name if section == "recipe" else f"{section} {name}"
                lines.append(f"{label}: {old.get(name)} -> {new.get(name)}")
    return lines


def _plain(value: Any) -> Any:
    """The value as it is after a round trip through JSON: tuples are lists and keys are text."""
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
