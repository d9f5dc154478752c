"""Scores of all weights on clean and corrupted images, each image exactly once on any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NoReturn, cast

import numpy as np
import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from torch import nn

from fastflower.callbacks.selection import Candidate, Selection, Verdict
from fastflower.core import scores
from fastflower.core.errors import CorruptionError, Diverged
from fastflower.recipe import Recipe
from fastflower.recipe.derived import Derived

CLEAN, CORRUPTED = "clean", "corrupted"
SHOWN = ("top5", "macro_recall", "macro_f1", *scores.BINARY, "ece")  # of scores.scores, in an epoch's row


@dataclass
class Scoreboard:
    """All scores of one epoch by weights; `per_kind` is corrupted top-1 by kind, then by weights."""

    epoch: int
    clean: dict[str, dict[str, float]]
    corrupted: dict[str, float] = field(default_factory=dict)
    per_kind: dict[str, dict[str, float]] = field(default_factory=dict)
    verdict: Verdict | None = None

    def flat(self) -> dict[str, float]:
        """clean_raw, corrupt_ema, s_raw and so on, for file names, events and checkpoints."""
        flat: dict[str, float] = {}
        for name, row in self.clean.items():
            flat[f"clean_{name}"] = row["top1"]
            flat |= {f"{key}_{name}": row[key] for key in SHOWN if key in row}
        flat |= {f"corrupt_{name}": value for name, value in self.corrupted.items()}
        return flat | {f"s_{name}": value for name, value in (self.verdict.s if self.verdict else {}).items()}


def in_row_order(parts: list[tuple[np.ndarray, ...]], rows: int, what: str) -> tuple[np.ndarray, ...]:
    """Join (row, ...) arrays of all ranks and sort them by row.

    Raises RuntimeError unless every row of the beton occurs exactly once.
    """
    joined = [np.concatenate(column) for column in zip(*parts, strict=True)]
    order = np.argsort(joined[0], kind="stable")
    if not np.array_equal(joined[0][order], np.arange(rows)):
        raise RuntimeError(
            f"{what}: {len(order)} rows were scored, {len(np.unique(joined[0]))} of {rows} different ones"
        )
    return tuple(column[order] for column in joined)


def by_kind(hits: np.ndarray, combos: list[list[str]]) -> dict[str, float]:
    """Mean top-1 by kind of corruption; hits is bool (combos * images,), combo after combo."""
    means = hits.reshape(len(combos), -1).mean(axis=1)
    kinds = dict.fromkeys(kind for kind, _ in combos)
    return {
        kind: float(np.mean([m for m, (k, _) in zip(means, combos, strict=True) if k == kind]))
        for kind in kinds
    }


class Scoring(Callback):
    """EVAL_BEFORE_ALL: equal buffers on all ranks. EVAL_AFTER_FORWARD: collect. EVAL_END: gather and score.

    EVAL_AFTER_ALL: S, the best so far, early stopping. `latest` is the last epoch's Scoreboard. Raises Diverged
    when no weights give finite scores: what has become NaN trains no further.
    """

    def __init__(
        self,
        recipe: Recipe,
        derived: Derived,
        *,
        networks: Callable[[], Iterable[nn.Module]],
        rows: dict[str, int],
        combos: list[list[str]],
    ) -> None:
        self.recipe = recipe
        self.derived = derived
        self.networks = networks
        self.rows = rows
        self.combos = combos
        self.selection = Selection(recipe.select, recipe.es, len(derived.stages))
        self.latest: Scoreboard | None = None
        self.flat: dict[str, float] = {}  # of the last epoch that was judged
        self.score = 0.0
        self.val_loss = math.nan
        self.epoch = 0
        self.best_flat: dict[str, float] = {}  # of the best epoch so far
        self._collected: list[dict[str, Any]] = []

    def eval_before_all(self, state: State, logger: Logger) -> None:
        check_replicas(self.networks())
        for network in self.networks():
            share_buffers(network)
        self.latest = None

    def eval_start(self, state: State, logger: Logger) -> None:
        self._collected = []

    def eval_after_forward(self, state: State, logger: Logger) -> None:
        batch = state.batch
        valid = batch["valid"].cpu()
        columns: dict[str, Any] = {
            "row": batch["row"].cpu()[valid].numpy(),
            "label": batch["label"].cpu()[valid].numpy(),
        }
        outputs = cast(dict[str, torch.Tensor], state.outputs)
        for name, logits in outputs.items():
            columns[name] = logits.float().cpu()[valid].numpy()
        self._collected.append(columns)

    def eval_end(self, state: State, logger: Logger) -> None:
        label = str(state.dataloader_label)
        names = list(self._collected[0])
        mine = tuple(np.concatenate([part[name] for part in self._collected]) for name in names)
        self._collected = []
        parts = dist.all_gather_object(mine)
        _, labels, *logits = in_row_order(parts, self.rows[label], label)
        weights = names[2:]
        if label == CLEAN:
            bins = self.recipe.eval.ece_bins
            clean = {
                name: scores.scores(own, labels, bins) for name, own in zip(weights, logits, strict=True)
            }
            self.latest = Scoreboard(state.timestamp.epoch.value, clean)
            return
        assert self.latest is not None, "the clean images are scored first"
        for name, values in zip(weights, logits, strict=True):
            hits = (values.argmax(axis=1) == labels) & np.isfinite(values).all(axis=1)
            self.latest.corrupted[name] = float(hits.reshape(len(self.combos), -1).mean(axis=1).mean())
            for kind, value in by_kind(hits, self.combos).items():
                self.latest.per_kind.setdefault(kind, {})[name] = value

    def eval_after_all(self, state: State, logger: Logger) -> None:
        assert self.latest is not None
        board, epoch = self.latest, state.timestamp.epoch.value
        stage = self.derived.stages.index(self.derived.stage(epoch - 1))
        candidates = {
            name: Candidate(
                row["top1"], board.corrupted.get(name), row["macro_recall"], bool(np.isfinite(row["nll"]))
            )
            for name, row in board.clean.items()
        }
        if not any(candidate.finite for candidate in candidates.values()):
            _give_up(epoch)
        board.verdict = self.selection.update(epoch, stage, candidates)
        self.epoch, self.flat = epoch, board.flat()
        self.score = board.verdict.s.get(board.verdict.chosen, 0.0)
        self.val_loss = board.clean[board.verdict.chosen or "raw"]["nll"]
        if self.selection.best.epoch == epoch:
            self.best_flat = self.flat
        if board.verdict.stop:
            state.stop_training()

    def state_dict(self) -> dict[str, Any]:
        return {"selection": self.selection.state_dict(), **{name: getattr(self, name) for name in STATE}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.selection.load_state_dict(state["selection"])
        for name in STATE:
            setattr(self, name, state[name])


STATE = ("epoch", "flat", "best_flat", "score", "val_loss")


def _give_up(epoch: int) -> NoReturn:
    if dist.get_global_rank():
        raise SystemExit(Diverged.exit_code)  # rank 0 says why
    raise Diverged(
        f"no weights give finite scores after epoch {epoch}; lower opt.lr_ref or opt.lr (a quarter, say), and start "
        "again under another exp.name"
    )


@torch.no_grad()
def share_buffers(network: nn.Module) -> None:
    """Give every rank rank 0's buffers: running statistics are each rank's own between evaluations."""
    if dist.get_world_size() > 1:
        for buffer in network.buffers():
            dist.broadcast(buffer, src=0)


@torch.no_grad()
def checksum(network: nn.Module) -> int:
    """The sum of the parameters' bits: equal on all ranks, or their weights have drifted apart."""
    bits = [p.detach().contiguous().view(torch.int32).sum(dtype=torch.int64) for p in network.parameters()]
    return int(torch.stack(bits).sum())


def check_replicas(networks: Iterable[nn.Module]) -> None:
    """Raise CorruptionError unless every rank holds the same weights."""
    seen = dist.all_gather_object([checksum(network) for network in networks])
    if any(other != seen[0] for other in seen):
        raise CorruptionError(
            "the ranks' weights have drifted apart; start the same command again, and check the memory"
        )
