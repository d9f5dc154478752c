"""Scores of every set of weights on clean and corrupted images; each image counts once on any number of ranks."""

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
from fastflower.core import metric, scores
from fastflower.core.errors import CorruptionError, Diverged
from fastflower.core.host_copies import HostCopies
from fastflower.data.auxiliary import AuxTargets
from fastflower.recipe import Recipe
from fastflower.recipe.checks import BALANCING
from fastflower.recipe.derived import Derived, refits

CLEAN, CORRUPTED = "clean", "corrupted"
GUESSES = "auxiliary "  # before the name of weights, of their guesses of auxiliary columns
LOGGED = ("top5", "macro_recall", "macro_f1", *scores.BINARY, "ece")  # of scores.scores, in events.jsonl


@dataclass
class EpochScores:
    """The scores of one epoch by weights (raw, ema, swa); `per_kind` is corrupted top-1 by kind, then weights."""

    epoch: int
    clean: dict[str, dict[str, float]]
    corrupted: dict[str, float] = field(default_factory=dict)
    per_kind: dict[str, dict[str, float]] = field(default_factory=dict)
    measured: dict[str, dict[str, float]] = field(default_factory=dict)  # weights -> terms of select.metric
    aux: dict[str, dict[str, float]] = field(default_factory=dict)  # auxiliary column -> weights -> accuracy
    verdict: Verdict | None = None

    def flat(self) -> dict[str, float]:
        """Scores by metric and weights (clean_raw, corrupt_ema, s_raw, ...), as events and checkpoints have them."""
        flat: dict[str, float] = {}
        for name, row in self.clean.items():
            flat[f"clean_{name}"] = row["top1"]
            flat |= {f"{key}_{name}": row[key] for key in LOGGED if key in row}
            flat |= {f"{term}_{name}": value for term, value in self.measured.get(name, {}).items()}
        flat |= {f"corrupt_{name}": value for name, value in self.corrupted.items()}
        return flat | {f"s_{name}": value for name, value in (self.verdict.s if self.verdict else {}).items()}


def in_row_order(gathered: list[tuple[np.ndarray, ...]], rows: int, label: str) -> tuple[np.ndarray, ...]:
    """Concatenate the (row, ...) arrays of all ranks and sort them by row.

    Raises RuntimeError, naming the loader's `label`, unless every row of the beton occurs exactly once.
    """
    joined = [np.concatenate(column) for column in zip(*gathered, strict=True)]
    order = np.argsort(joined[0], kind="stable")
    if not np.array_equal(joined[0][order], np.arange(rows)):
        raise RuntimeError(
            f"{label}: {len(order)} rows were scored, {len(np.unique(joined[0]))} of {rows} different ones"
        )
    return tuple(column[order] for column in joined)


def right_answers(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """True for each row (B, C) of finite logits whose largest is that of its label (B,): bool (B,)."""
    return (logits.argmax(1) == labels) & logits.isfinite().all(1)


def split_auxiliary(
    outputs: dict[str, torch.Tensor], sizes: tuple[int, ...]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The main head's logits (B, C) by weights, and the likeliest value of each further column, int64 (B, columns)."""
    main = {name: logits[:, : logits.shape[1] - sum(sizes)] for name, logits in outputs.items()}
    guesses = {
        f"{GUESSES}{name}": torch.stack(
            [own.argmax(1) for own in logits[:, main[name].shape[1] :].split(sizes, 1)], 1
        )
        for name, logits in outputs.items()
    }
    return main, guesses


def auxiliary_accuracies(
    guesses: dict[str, np.ndarray], codes: np.ndarray, names: tuple[str, ...]
) -> dict[str, dict[str, float]]:
    """Column -> weights -> the fraction of right guesses (N, columns) where `codes` has a value; without any, none."""
    return {
        column: {
            name.removeprefix(GUESSES): float((guess[known, place] == codes[known, place]).mean())
            for name, guess in guesses.items()
        }
        for place, column in enumerate(names)
        if (known := codes[:, place] >= 0).any()
    }


def by_kind(hits: np.ndarray, combos: list[list[str]]) -> dict[str, float]:
    """Mean top-1 by kind of corruption; `hits` is bool (combos * images,), combo after combo."""
    means = hits.reshape(len(combos), -1).mean(axis=1)
    kinds = dict.fromkeys(kind for kind, _ in combos)
    return {
        kind: float(np.mean([mean for mean, combo in zip(means, combos, strict=True) if combo[0] == kind]))
        for kind in kinds
    }


def rare_class_remedy(recipe: Recipe) -> str:
    """The change to try when rare classes get worse: a sampler or loss that favours them, where there is none yet."""
    sampler, loss = recipe.sampler.type, recipe.loss.name
    if sampler in BALANCING or loss in ("bsce", "focal"):
        known = f"sampler.type={sampler}" if sampler in BALANCING else f"loss.name={loss}"
        return f"{known} favours them already; select.metric=macro_recall chooses epochs by all classes alike"
    return "try sampler.type=weighted_en or class_balanced, or loss.name=bsce or focal"


class Scoring(Callback):
    """EVAL_BEFORE_ALL: equal buffers on all ranks. EVAL_AFTER_FORWARD: collect. EVAL_END: gather and score.

    EVAL_AFTER_ALL: S, the best so far, early stopping. `latest` has the scores of the last epoch, none where it was not
    evaluated. Raises Diverged when no weights give finite scores: training cannot recover from NaN.
    """

    def __init__(
        self,
        recipe: Recipe,
        derived: Derived,
        *,
        networks: Callable[[], Iterable[nn.Module]],
        rows: dict[str, int],
        combos: list[list[str]],
        aux: AuxTargets | None = None,
    ) -> None:
        self.aux = aux
        self.recipe = recipe
        self.derived = derived
        self.networks = networks
        self.rows = rows
        self.combos = combos
        self.metric = metric.parse(recipe.select.metric)
        self.selection = Selection(
            recipe.select, recipe.es, len(derived.stages), remedy=rare_class_remedy(recipe)
        )
        self.latest: EpochScores | None = None
        self.flat: dict[str, float] = {}  # of the last scored epoch
        self.score = 0.0
        self.val_loss = math.nan
        self.epoch = 0
        self.best_flat: dict[str, float] = {}  # of the best epoch so far
        self._collected: list[dict[str, torch.Tensor]] = []  # on the host once `_copies` has waited
        self._copies = HostCopies()

    def eval_before_all(self, state: State, logger: Logger) -> None:
        check_replicas(self.networks())
        for network in self.networks():
            share_buffers(network)
        self.latest = None

    def eval_start(self, state: State, logger: Logger) -> None:
        self._collected = []

    def eval_after_forward(self, state: State, logger: Logger) -> None:
        batch, outputs = state.batch, cast(dict[str, torch.Tensor], state.outputs)
        if self.aux:
            outputs, guesses = split_auxiliary(outputs, self.aux.sizes)
        if state.dataloader_label == CORRUPTED:  # of which only the right answers count
            outputs = {name: right_answers(logits, batch["label"]) for name, logits in outputs.items()}
        elif self.aux:
            outputs |= guesses
        columns = {name: batch[name] for name in ("valid", "row", "label")} | outputs
        self._collected.append({name: self._copies.add(column) for name, column in columns.items()})

    def eval_end(self, state: State, logger: Logger) -> None:
        label = str(state.dataloader_label)
        self._copies.wait()  # once an evaluation, and not for each batch
        valid, *columns = (
            torch.cat([batch[name] for batch in self._collected]) for name in self._collected[0]
        )
        weights = list(self._collected[0])[3:]
        self._collected = []
        gathered = dist.all_gather_object(tuple(column[valid].numpy() for column in columns))
        _, labels, *outputs = in_row_order(gathered, self.rows[label], label)
        if label == CLEAN:
            logits = dict(zip(weights, outputs, strict=True))
            guesses = {name: logits.pop(name) for name in weights if name.startswith(GUESSES)}
            bins = self.recipe.eval.ece_bins
            clean = {name: scores.scores(values, labels, bins) for name, values in logits.items()}
            self.latest = EpochScores(state.timestamp.epoch.value, clean)
            for name, values in logits.items():
                self.latest.measured[name] = self.metric.measure(values, labels)
            if self.aux and self.aux.val is not None:
                self.latest.aux = auxiliary_accuracies(guesses, self.aux.val, self.aux.names)
            return
        assert self.latest is not None, "the clean images are scored first"
        for name, hits in zip(weights, outputs, strict=True):
            self.latest.corrupted[name] = float(hits.reshape(len(self.combos), -1).mean(axis=1).mean())
            for kind, value in by_kind(hits, self.combos).items():
                self.latest.per_kind.setdefault(kind, {})[name] = value

    def eval_after_all(self, state: State, logger: Logger) -> None:
        epoch = state.timestamp.epoch.value
        if self.latest is None:  # an epoch without an evaluation
            self.epoch, self.latest = epoch, self._unscored(epoch)
            return
        latest = self.latest
        stage = self.derived.stages.index(self.derived.stage(epoch - 1))
        alpha = self.recipe.select.alpha
        candidates = {
            name: Candidate(
                clean=row["top1"],
                corrupted=(corrupted := latest.corrupted.get(name)),
                macro_recall=row["macro_recall"],
                val_loss=row["nll"],
                score=self.metric.score(latest.measured[name], corrupted, alpha),
                finite=bool(np.isfinite(row["nll"])),
            )
            for name, row in latest.clean.items()
        }
        if not any(candidate.finite for candidate in candidates.values()):
            _raise_diverged(epoch)
        verdict = latest.verdict = self.selection.update(epoch, stage, candidates)
        self.epoch, self.flat = epoch, latest.flat()
        self.score = verdict.score
        self.val_loss = latest.clean[verdict.chosen or "raw"]["nll"]
        if self.selection.best.epoch == epoch:
            self.best_flat = self.flat
        if verdict.stop:
            state.stop_training()

    def _unscored(self, epoch: int) -> EpochScores:
        """An epoch without scores; where no image is held out, the averages of the last one are saved: none is best.

        A refit on all images saves one member: the average of weights where the recipe has one, else the raw ones.
        """
        averages = {"ema_best": "ema"} if self.recipe.ema.enabled else {}
        averages |= {"swa": "swa"} if self.recipe.swa.enabled else {}
        if refits(self.recipe):
            averages = {"refit": next(iter(averages.values()), "raw")}
        new = {} if self.rows or epoch < self.derived.epochs else averages
        verdict = Verdict(s={}, score=0.0, chosen="", new=new, stop=False, patience_left=None, notes=[])
        return EpochScores(epoch, {}, verdict=verdict)

    def state_dict(self) -> dict[str, Any]:
        return {"selection": self.selection.state_dict(), **{name: getattr(self, name) for name in STATE}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.selection.load_state_dict(state["selection"])
        for name in STATE:
            setattr(self, name, state[name])


STATE = ("epoch", "flat", "best_flat", "score", "val_loss")


def _raise_diverged(epoch: int) -> NoReturn:
    if dist.get_global_rank():
        raise SystemExit(Diverged.exit_code)  # rank 0 prints the reason
    raise Diverged(f"no weights give finite scores after epoch {epoch}; {Diverged.REMEDY}")


@torch.no_grad()
def share_buffers(network: nn.Module) -> None:
    """Copy rank 0's buffers to all ranks: between evaluations each rank has its own running statistics."""
    if dist.get_world_size() > 1:
        for buffer in network.buffers():
            dist.broadcast(buffer, src=0)


@torch.no_grad()
def checksum(network: nn.Module) -> int:
    """The sum of the parameters' bits, taken as int32: differs between ranks whose weights have drifted apart."""
    bits = [
        parameter.detach().contiguous().view(torch.int32).sum(dtype=torch.int64)
        for parameter in network.parameters()
    ]
    return int(torch.stack(bits).sum())


def check_replicas(networks: Iterable[nn.Module]) -> None:
    """Raise CorruptionError unless every rank holds the same weights."""
    checksums = dist.all_gather_object([checksum(network) for network in networks])
    if any(rank != checksums[0] for rank in checksums):
        raise CorruptionError(
            "the ranks' weights have drifted apart; start the same command again, and check the memory"
        )
