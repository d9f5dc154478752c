"""Resume: finds the newest intact `last` of a run and restores the training state from it."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from composer.core import State
from torch import Tensor, nn

from fastflower.callbacks.checkpoints import LAYOUT, ResumeMeta, Stateful, previous_last
from fastflower.core import checkpoint
from fastflower.core.checkpoint import Checkpoint
from fastflower.core.errors import CorruptionError, InputError
from fastflower.core.records import from_plain
from fastflower.core.runs import Run
from fastflower.optim.schedules import lr_factor
from fastflower.recipe import Recipe
from fastflower.recipe.derived import derive
from fastflower.recipe.identity import differences

# keys that say how long a training is: train.extend lets them change
HORIZON = {"sched.cosine_epochs", "sched.warmup_epochs", "data.size_epochs"}


@dataclass(frozen=True)
class ResumePoint:
    """The checkpoint to resume from.

    `finished` is the reason why no training step is left, `done` a line for people when the summary is written, too;
    both are empty otherwise.
    """

    path: Path
    finished: str
    done: str
    extended_from: int = 0  # epochs of the recipe before train.extend; 0: it is the same


def find_resume_point(
    run: Run, identity: dict[str, Any], say: Callable[[str], None], *, longer: Recipe | None = None
) -> ResumePoint | None:
    """The newest intact `last` of a run, or None. Raises InputError when it is of another version, recipe or data.

    `longer` is the recipe where train.extend allows more epochs than the run had.
    """
    newest = load_last(run, say)
    if newest is None:
        return None
    path, last = newest
    check_layout(path, last.meta)
    meta = from_plain(ResumeMeta, {field.name: last.meta[field.name] for field in fields(ResumeMeta)})
    changed = differences(meta.identity, identity)
    then, now = (values["recipe"]["sched.cosine_epochs"] for values in (meta.identity, identity))
    extendable = now > then and {line.partition(":")[0] for line in changed} <= HORIZON
    if extendable and longer is not None:
        _check_stages(meta.identity, last, longer)
        return ResumePoint(path, "", "", extended_from=then)
    if changed:
        more = f"; train.extend=true goes on to {now} epochs" if extendable else ""
        ellipsis = "; ..." if len(changed) > 4 else ""
        raise InputError(
            f"{run.model_dir} holds fold {run.fold}, seed {run.seed} of another recipe or other data "
            f"({'; '.join(changed[:4])}{ellipsis}); undo that or choose another exp.name{more}"
        )
    done = ""
    if meta.finished and run.end_path.exists():
        score = meta.best["score"]  # None where no image was held out
        best = "" if score is None else f": best epoch {meta.best['epoch']} with {score:.4f}"
        done = f"fold {run.fold}, seed {run.seed} of {run.exp} is finished ({meta.finished}){best}; nothing to do"
    return ResumePoint(path, meta.finished, done)


def _check_stages(before: dict[str, Any], last: Checkpoint, recipe: Recipe) -> None:
    """Refuse an extension in which epochs that are over would have had other image sizes."""
    values, done = before["recipe"], last.training_state["parts"]["scoring"]["epoch"]
    old = replace(
        recipe,
        sched=replace(recipe.sched, cosine_epochs=values["sched.cosine_epochs"]),
        data=replace(recipe.data, size_epochs=values["data.size_epochs"]),
    )
    then, now = derive(old, 1), derive(recipe, 1)
    if any(then.stages.index(then.stage(k)) != now.stages.index(now.stage(k)) for k in range(done)):
        ends = [*(stage.last for stage in then.stages[:-1]), now.epochs]
        raise InputError(
            f"data.size_epochs = {recipe.data.size_epochs}: the {done} epochs that are over had other image sizes; to "
            f"extend this run set data.size_epochs={ends}".replace(", ", ",")
        )


def extend(recipe: Recipe, components: dict[str, Any], *, extended_from: int, epoch: int) -> str:
    """Let a restored run go on beyond its end after `epoch` epochs; a line that says how.

    Weights, moments, averages, bests and the state of every schedule are kept. Patience starts anew; SWA too, where
    its first epoch of the longer training is still to come.
    """
    selection, swa = components["scoring"].selection, components.get("swa")
    selection.stopped, selection.idle = "", 0
    if swa is not None and epoch < swa.first_epoch:
        swa.averaged = swa.last_epoch = 0
        swa.shadows.pop("swa", None)
    total = recipe.sched.cosine_epochs
    before = replace(recipe, sched=replace(recipe.sched, cosine_epochs=extended_from))
    factors = [lr_factor(epoch, 0, steps_per_epoch=1000, recipe=one) for one in (before, recipe)]
    return (
        f"extended from {extended_from} to {total} epochs: epoch {epoch + 1} goes on at {factors[1]:.2f} of the peak "
        f"learning rate, where a training of {total} epochs is then; before it was {factors[0]:.2f}"
    )


def load_last(run: Run, say: Callable[[str], None]) -> tuple[Path, Checkpoint] | None:
    """The newest intact `last` with its path, or None when there is no `last` at all; for one rank only.

    A damaged file is reported, renamed to `*.damaged`, and the previous generation is used.
    Raises CorruptionError when all are damaged.
    """
    paths = [path for path in [*reversed(run.checkpoints("last")), previous_last(run)] if path.exists()]
    damaged: list[Path] = []
    for path in paths:
        try:
            last = checkpoint.load(path)
        except InputError as error:
            say(f"WARNING {error}")
            damaged.append(path)
            continue
        for bad in damaged:  # or the next save would keep it as the previous generation
            os.replace(bad, bad.with_name(bad.name + ".damaged"))
            say(f"WARNING resuming from {path.name}, the previous checkpoint")
        return path, last
    if paths:
        raise CorruptionError(
            f"{run.model_dir}: every checkpoint of fold {run.fold}, seed {run.seed} is damaged; restore one, or start "
            "again under another exp.name"
        )
    return None


def restore(last: Checkpoint, state: State, *, network: nn.Module, components: dict[str, Stateful]) -> None:
    """Load a `last` into a freshly built trainer: weights, optimizer, scaler, timestamp and all components.

    Raises InputError when the network or the optimizer's groups differ from the saved ones.
    """
    check_names(last.tensors, network.state_dict())
    network.load_state_dict(last.tensors)
    optimizer, saved = state.optimizers[0], last.training_state["optimizer"]
    now = [(group.get("name"), len(group["params"])) for group in optimizer.param_groups]
    then = [(group.get("name"), len(group["params"])) for group in saved["param_groups"]]
    if now != then:
        raise InputError(
            f"the checkpoint's {len(then)} parameter groups are not this recipe's {len(now)}; change exp.name"
        )
    optimizer.load_state_dict(saved)
    if state.scaler is not None and last.training_state["scaler"]:
        state.scaler.load_state_dict(last.training_state["scaler"])
    times = last.training_state["time"]
    durations = {
        name: datetime.timedelta(seconds=value) for name, value in times.items() if name.endswith("_wct")
    }
    state.timestamp.load_state_dict({**times, **durations})
    states = last.training_state["parts"]
    unmatched = set(components) ^ set(states)
    if unmatched:
        raise InputError(
            f"the checkpoint and this recipe differ in {', '.join(sorted(unmatched))}; change exp.name"
        )
    for name, component in components.items():
        component.load_state_dict(states[name])


def check_layout(path: Path, meta: dict[str, Any]) -> None:
    """Raise InputError unless a `last` holds the training state in this version's layout."""
    layout, writer = meta.get("layout"), meta.get("version", "of unknown version")
    if layout != LAYOUT:
        raise InputError(
            f"{path}: the training state of fastflower {writer} has layout {layout}, this version resumes layout "
            f"{LAYOUT}; finish it with the version that wrote it, or choose another exp.name"
        )


def check_names(saved: dict[str, Tensor], current: dict[str, Tensor]) -> None:
    """Raise InputError unless two state dicts have the same names and shapes."""
    wrong = sorted(
        name
        for name in {*saved, *current}
        if name not in saved or name not in current or saved[name].shape != current[name].shape
    )
    if wrong:
        raise InputError(
            f"the checkpoint holds another network: {len(wrong)} tensors differ, first {wrong[0]}; change exp.name"
        )
