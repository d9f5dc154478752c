"""Which weights are best and when to stop: a pure state machine over the scores of each epoch.

Best means a strictly higher score, so ties keep the earlier epoch; between the weights of one epoch ties go to
EMA, then SWA, then raw. With `reset_on_stage`, bests and patience start anew when the image size grows, because
scores at different sizes do not compare and only the last size is handed in; and no earlier size ends a run.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from fastflower.core.scores import combined
from fastflower.recipe.schema import Es, Select

PREFERENCE = ("ema", "swa", "raw")  # on an exact tie the earlier of these
MACRO_FALL = 0.01
TINY = 1e-9  # 0.902 - 0.901 is a little less than 0.001


@dataclass(frozen=True)
class Candidate:
    """The scores of one set of weights at one epoch; corrupted is None without a corrupted set."""

    clean: float
    corrupted: float | None
    macro_recall: float
    finite: bool = True


@dataclass
class Best:
    """The highest score so far of one kind."""

    score: float = -math.inf
    epoch: int = 0
    weights: str = ""


@dataclass
class Verdict:
    """What an epoch's scores mean. `new`: kinds of checkpoint to write now, with the weights that go in."""

    s: dict[str, float]
    chosen: str
    new: dict[str, str]
    stop: bool
    patience_left: int | None
    notes: list[str]
    alarm: bool = False


@dataclass
class Selection:
    """The state machine; `best` is what select.metric says, the four kinds of checkpoint are kept beside it."""

    select: Select
    es: Es
    stages: int
    bests: dict[str, Best] = field(default_factory=dict)
    reference: float = -math.inf
    idle: int = 0
    stage: int = -1
    macro_best: float = -math.inf
    s_before: float = math.inf
    alarmed: bool = False
    stopped: str = ""

    def update(self, epoch: int, stage: int, candidates: dict[str, Candidate]) -> Verdict:
        """Judge an epoch (from 1) at a stage. `candidates` has "raw" and perhaps "ema" and "swa"."""
        notes: list[str] = []
        if stage != self.stage:
            self._enter(stage)
        finite = {name: c for name, c in candidates.items() if c.finite}
        notes += [
            f"{name} weights give non-finite scores and are left out"
            for name in candidates
            if name not in finite
        ]
        s = {name: combined(c.clean, c.corrupted, self.select.alpha) for name, c in finite.items()}
        clean = {name: c.clean for name, c in finite.items()}
        new = self._raise_bests(epoch, s, clean)
        watched = s if self.select.metric == "combo" else clean
        chosen = prefer(watched)
        stop = self._wait(watched.get(chosen, -math.inf), epoch)
        alarm = bool(chosen) and self._alarm(s[chosen], finite[chosen].macro_recall)
        if alarm:
            notes.append(
                f"S rose to {s[chosen]:.4f} while macro recall fell to {finite[chosen].macro_recall:.4f} "
                f"(best {self.macro_best:.4f}): rare classes pay for frequent ones"
            )
        left = max(0, self.es.patience - self.idle) if self._armed else None
        return Verdict(s, chosen, new, stop, left, notes, alarm)

    @property
    def best(self) -> Best:
        """The best by select.metric."""
        return self.bests.get("best_combo" if self.select.metric == "combo" else "best_clean", Best())

    def _enter(self, stage: int) -> None:
        if self.stage < 0 or self.es.reset_on_stage:
            self.bests, self.reference, self.idle = {}, -math.inf, 0
            self.macro_best, self.s_before, self.alarmed = -math.inf, math.inf, False
        self.stage = stage

    def _raise_bests(self, epoch: int, s: dict[str, float], clean: dict[str, float]) -> dict[str, str]:
        new = {}
        averages = {name: value for name, value in s.items() if name == "ema"}
        swa = {name: value for name, value in s.items() if name == "swa"}
        for kind, values in (("best_clean", clean), ("best_combo", s), ("ema_best", averages), ("swa", swa)):
            name = prefer(values)
            if name and values[name] > self.bests.get(kind, Best()).score:
                self.bests[kind] = Best(values[name], epoch, name)
                new[kind] = name
        return new

    def _wait(self, value: float, epoch: int) -> bool:
        if value >= self.reference + self.es.min_delta - TINY and value > self.reference:
            self.reference, self.idle = value, 0
        else:
            self.idle += 1
        if self._armed and self.idle >= self.es.patience:
            self.stopped = f"no gain of {self.es.min_delta:g} in {self.idle} epochs up to epoch {epoch}"
        return bool(self.stopped)

    @property
    def _armed(self) -> bool:
        return self.es.enabled and (self.stage == self.stages - 1 or not self.es.reset_on_stage)

    def _alarm(self, s: float, macro: float) -> bool:
        fell = macro < self.macro_best - MACRO_FALL
        alarm = fell and s > self.s_before and not self.alarmed
        self.alarmed = (self.alarmed or alarm) and fell
        self.macro_best, self.s_before = max(self.macro_best, macro), s
        return alarm

    def state_dict(self) -> dict[str, Any]:
        plain = {name: getattr(self, name) for name in STATE}
        return {**plain, "bests": {kind: asdict(best) for kind, best in self.bests.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in STATE:
            setattr(self, name, state[name])
        self.bests = {kind: Best(**best) for kind, best in state["bests"].items()}


STATE = ("reference", "idle", "stage", "macro_best", "s_before", "alarmed", "stopped")


def prefer(values: dict[str, float]) -> str:
    """The name of the highest value, ties by PREFERENCE; "" when there is none."""
    ordered = [name for name in PREFERENCE if name in values]
    return max(ordered, key=lambda name: values[name], default="")
