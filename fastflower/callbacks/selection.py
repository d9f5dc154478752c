"""Best weights and early stopping: a pure state machine over the scores of each epoch.

A best needs a strictly higher score, so ties keep the earlier epoch; between the weights of one epoch ties go to
EMA, then SWA, then raw. With `reset_on_stage`, bests and patience are reset when the image size grows, because
scores at different sizes are not comparable and only the last size is handed in; a run stops only at the last size.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from fastflower.core.runs import best_kind
from fastflower.core.scores import combined
from fastflower.recipe.schema import Es, Select

PREFERENCE = ("ema", "swa", "raw")  # on an exact tie the first of these
MACRO_FALL = 0.01  # of macro recall below its best, for the alarm
TINY = 1e-9  # 0.902 - 0.901 is a little less than 0.001


@dataclass(frozen=True)
class Candidate:
    """The scores of one set of weights at one epoch; corrupted is None without a corrupted set.

    `score` is that of select.metric; None: it is clean or S.
    """

    clean: float
    corrupted: float | None
    macro_recall: float
    val_loss: float
    score: float | None = None
    finite: bool = True


@dataclass
class Best:
    """The highest score so far for one kind of checkpoint."""

    score: float = -math.inf
    epoch: int = 0
    weights: str = ""


@dataclass
class Verdict:
    """The decision after an epoch."""

    s: dict[str, float]  # S by weights
    score: float  # that of select.metric, of the chosen weights; 0 when none is finite
    chosen: str  # the weights with the highest watched score, "" when none is finite
    new: dict[str, str]  # kind of checkpoint to write -> weights to put in it
    stop: bool
    patience_left: int | None
    notes: list[str]
    alarm: bool = False


@dataclass
class Selection:
    """The state machine: a best for each kind of checkpoint, and patience by es.monitor.

    Beside that of select.metric, best_clean, best_combo and ema_best are kept always.
    """

    select: Select
    es: Es
    stages: int
    remedy: str = "give rare classes more weight"  # where frequent classes gain at their cost
    bests: dict[str, Best] = field(default_factory=dict)
    reference: float = -math.inf
    idle: int = 0
    stage: int = -1
    macro_best: float = -math.inf
    s_before: float = math.inf
    alarmed: bool = False
    stopped: str = ""
    scored: int = 0  # the last epoch with scores, 0 before the first

    def update(self, epoch: int, stage: int, candidates: dict[str, Candidate]) -> Verdict:
        """Score an epoch (from 1) at a stage (from 0). `candidates` has "raw" and perhaps "ema" and "swa"."""
        notes: list[str] = []
        if stage != self.stage:
            self._start_stage(stage)
        finite = {name: candidate for name, candidate in candidates.items() if candidate.finite}
        notes += [
            f"{name} weights give non-finite scores and are left out"
            for name in candidates
            if name not in finite
        ]
        s = {
            name: combined(candidate.clean, candidate.corrupted, self.select.alpha)
            for name, candidate in finite.items()
        }
        clean = {name: candidate.clean for name, candidate in finite.items()}
        known = {"best_clean": clean, "best_combo": s}
        kind = best_kind(self.select.metric)
        watched = known.get(kind) or {
            name: candidate.score for name, candidate in finite.items() if candidate.score is not None
        }
        new = self._update_bests(epoch, {**known, kind: watched})
        chosen = prefer(watched)
        monitored = watched.get(chosen, -math.inf)
        if chosen and self.es.monitor == "val_loss":
            monitored = -finite[chosen].val_loss
        stop = self._update_patience(monitored, epoch)
        alarm = bool(chosen) and self._macro_alarm(s[chosen], finite[chosen].macro_recall)
        if alarm:
            notes.append(
                f"S rose to {s[chosen]:.4f} while macro recall fell to {finite[chosen].macro_recall:.4f} "
                f"(best {self.macro_best:.4f}): rare classes got worse in favour of frequent ones; {self.remedy}"
            )
        patience_left = max(0, self.es.patience - self.idle) if self._may_stop else None
        return Verdict(
            s=s,
            score=watched.get(chosen, 0.0),
            chosen=chosen,
            new=new,
            stop=stop,
            patience_left=patience_left,
            notes=notes,
            alarm=alarm,
        )

    @property
    def best(self) -> Best:
        """The best by select.metric."""
        return self.bests.get(best_kind(self.select.metric), Best())

    def _start_stage(self, stage: int) -> None:
        if self.stage < 0 or self.es.reset_on_stage:
            self.bests, self.reference, self.idle = {}, -math.inf, 0
            self.macro_best, self.s_before, self.alarmed = -math.inf, math.inf, False
        self.stage = stage

    def _update_bests(self, epoch: int, by_kind: dict[str, dict[str, float]]) -> dict[str, str]:
        """Kinds with a new best -> its weights, from kind -> scores by weights; select.metric judges averages."""
        new = {}
        watched = by_kind[best_kind(self.select.metric)]
        averages = {
            kind: {name: value for name, value in watched.items() if name == weights}
            for kind, weights in (("ema_best", "ema"), ("swa", "swa"))
        }
        for kind, values in {**by_kind, **averages}.items():
            name = prefer(values)
            if name and values[name] > self.bests.get(kind, Best()).score:
                self.bests[kind] = Best(values[name], epoch, name)
                new[kind] = name
        return new

    def _update_patience(self, value: float, epoch: int) -> bool:
        if value >= self.reference + self.es.min_delta - TINY and value > self.reference:
            self.reference, self.idle = value, 0
        else:
            self.idle += epoch - self.scored if self.scored else 1
        self.scored = epoch
        if self._may_stop and self.idle >= self.es.patience:
            gain = "fall of the validation loss by" if self.es.monitor == "val_loss" else "gain of"
            self.stopped = f"no {gain} {self.es.min_delta:g} in {self.idle} epochs up to epoch {epoch}"
        return bool(self.stopped)

    @property
    def _may_stop(self) -> bool:
        return self.es.enabled and (self.stage == self.stages - 1 or not self.es.reset_on_stage)

    def _macro_alarm(self, s: float, macro: float) -> bool:
        """True once when S exceeds that of the best macro recall, while macro recall lies well below its best."""
        fell = macro < self.macro_best - MACRO_FALL
        alarm = fell and s > self.s_before and not self.alarmed
        self.alarmed = (self.alarmed or alarm) and fell
        if macro > self.macro_best:
            self.macro_best, self.s_before = macro, s
        return alarm

    def state_dict(self) -> dict[str, Any]:
        scalars = {name: getattr(self, name) for name in STATE}
        return {
            **scalars,
            "bests": {kind: asdict(best) for kind, best in self.bests.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in STATE:
            setattr(self, name, state[name])
        self.bests = {kind: Best(**best) for kind, best in state["bests"].items()}


STATE = ("reference", "idle", "stage", "macro_best", "s_before", "alarmed", "scored", "stopped")


def prefer(values: dict[str, float]) -> str:
    """The name of the highest value, ties by PREFERENCE; "" for no values."""
    ordered = [name for name in PREFERENCE if name in values]
    return max(ordered, key=lambda name: values[name], default="")
