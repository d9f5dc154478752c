"""Resume: finds the last whole checkpoint of a run and restores the training state from it."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from composer.core import State
from torch import Tensor, nn

from fastflower.callbacks.checkpoints import LAYOUT, Stateful, previous_last
from fastflower.core import checkpoint
from fastflower.core.checkpoint import Checkpoint
from fastflower.core.errors import CorruptionError, InputError
from fastflower.core.runs import Run
from fastflower.recipe.identity import differences


@dataclass(frozen=True)
class Last:
    """The checkpoint to go on from; `finished` says why no step is left, and `done` that nothing at all is."""

    path: Path
    finished: str
    done: str


def find_last(run: Run, same: dict[str, Any], say: Callable[[str], None]) -> Last | None:
    """The newest whole `last` of a run, or None. Raises InputError when it is of another version, recipe or data."""
    found = load_last(run, say)
    if found is None:
        return None
    path, last = found
    check_layout(path, last.meta)
    changed = differences(last.meta["identity"], same)
    if changed:
        more = "; ..." if len(changed) > 4 else ""
        raise InputError(
            f"{run.model_dir} holds fold {run.fold}, seed {run.seed} of another recipe or other data "
            f"({'; '.join(changed[:4])}{more}); undo that or choose another exp.name"
        )
    best, reason = last.meta["best"], last.meta["finished"]
    line = (
        f"fold {run.fold}, seed {run.seed} of {run.exp} is finished ({reason}): best epoch {best['epoch']} with "
        f"{best['score']:.4f}; nothing to do"
    )
    return Last(path, reason, line if reason and run.end.exists() else "")


def load_last(run: Run, say: Callable[[str], None]) -> tuple[Path, Checkpoint] | None:
    """The newest `last` that is whole, or None when there is none at all; for one process of a run.

    A damaged one costs one line, is set aside as `*.damaged`, and the one before is used.
    Raises CorruptionError when every one is damaged.
    """
    paths = [path for path in [*reversed(run.files("last")), previous_last(run)] if path.exists()]
    damaged: list[Path] = []
    for path in paths:
        try:
            found = checkpoint.load(path)
        except InputError as error:
            say(f"WARNING {error}")
            damaged.append(path)
            continue
        for bad in damaged:  # or the next saving would keep it as the generation before
            os.replace(bad, bad.with_name(bad.name + ".damaged"))
            say(f"WARNING going on from {path.name}, the checkpoint before")
        return path, found
    if paths:
        raise CorruptionError(
            f"{run.model_dir}: no checkpoint of fold {run.fold}, seed {run.seed} is whole; restore one, or start again "
            "under another exp.name"
        )
    return None


def restore(found: Checkpoint, state: State, *, network: nn.Module, parts: dict[str, Stateful]) -> None:
    """Put a `last` back into a freshly built trainer: weights, optimizer, scaler, time and all parts.

    Raises InputError when the network or the optimizer's groups are not those that were saved.
    """
    check_names(found.tensors, network.state_dict())
    network.load_state_dict(found.tensors)
    optimizer, saved = state.optimizers[0], found.more["optimizer"]
    now = [(group.get("name"), len(group["params"])) for group in optimizer.param_groups]
    then = [(group.get("name"), len(group["params"])) for group in saved["param_groups"]]
    if now != then:
        raise InputError(
            f"the checkpoint's {len(then)} parameter groups are not this recipe's {len(now)}; change exp.name"
        )
    optimizer.load_state_dict(saved)
    if state.scaler is not None and found.more["scaler"]:
        state.scaler.load_state_dict(found.more["scaler"])
    times = found.more["time"]
    seconds = {k: datetime.timedelta(seconds=v) for k, v in times.items() if k.endswith("_wct")}
    state.timestamp.load_state_dict({**times, **seconds})
    missing = set(parts) ^ set(found.more["parts"])
    if missing:
        raise InputError(
            f"the checkpoint and this recipe differ in {', '.join(sorted(missing))}; change exp.name"
        )
    for name, part in parts.items():
        part.load_state_dict(found.more["parts"][name])


def check_layout(path: Path, meta: dict[str, Any]) -> None:
    """InputError unless a `last` holds the parts' states as this version writes them."""
    layout, writer = meta.get("layout"), meta.get("version", "of unknown version")
    if layout != LAYOUT:
        raise InputError(
            f"{path}: the training state of fastflower {writer} has layout {layout}, this version goes on from "
            f"{LAYOUT}; finish it with the version that wrote it, or choose another exp.name"
        )


def check_names(saved: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    """InputError unless names and shapes are equal."""
    wrong = sorted(
        n for n in {*saved, *own} if n not in saved or n not in own or saved[n].shape != own[n].shape
    )
    if wrong:
        raise InputError(
            f"the checkpoint holds another network: {len(wrong)} tensors differ, first {wrong[0]}; change exp.name"
        )
