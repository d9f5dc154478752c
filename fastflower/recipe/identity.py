"""What makes two trainings the same run: the keys that decide what is learned, the data, the global batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastflower.recipe.derived import Derived
from fastflower.recipe.schema import Recipe, fields_of

# keys that say where, how fast or what happens afterwards, not what is learned: their change does not stop a resume;
# what the data keys made is compared by its hashes, what the batch keys make by the global batch
FREE = (
    *("exp.", "tta.", "ensembling.", "ts.", "bundle.", "log.", "checks.", "accept.", "lrfind.", "eval.batch"),
    *("data.root", "data.csv", "data.image_col", "data.label_col", "data.home", "data.test", "data.fold"),
    *("data.unlabelled", "data.store", "data.raw_share", "data.jpeg_quality", "data.on_bad", "data.workers"),
    *("train.batch_per_gpu", "train.world_size", "train.grad_accum", "train.stage_batch"),
    *("train.save_every", "train.keep_every", "train.max_nonfinite", "train.compile"),
)


def identity(
    recipe: Recipe,
    derived: Derived,
    *,
    manifest: Mapping[str, Any],
    unlabelled: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What a checkpoint must share with the run that goes on from it; the manifests are those of the betons."""
    keys = {name: value for name, value, _ in fields_of(recipe) if not name.startswith(FREE)}
    batches = [stage.batch_per_gpu * derived.world_size * recipe.train.grad_accum for stage in derived.stages]
    data = {name: manifest[name] for name in ("classes_hash", "folds_hash", "labels_hash", "stored_side")}
    if unlabelled is not None:
        data["unlabelled_hash"] = unlabelled["inputs_hash"]
    return {"recipe": keys, "data": data, "global batch": {"by stage": batches}}


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """`opt.lr_ref: 0.0002 -> 0.001` for every entry in which two identities differ."""
    found = []
    for part in now:
        old, new = then.get(part, {}), now[part]
        for name in sorted({*old, *new}):
            if _plain(old.get(name)) != _plain(new.get(name)):
                label = name if part == "recipe" else f"{part} {name}"
                found.append(f"{label}: {old.get(name)} -> {new.get(name)}")
    return found


def _plain(value: Any) -> Any:
    """As JSON gives it back: tuples are lists and keys are text."""
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
