"""The metric that chooses: one name, a function of the user's own, or a weighted sum of several.

    clean                          top-1 of the clean images
    0.7*clean + 0.3*macro_f1       a weighted sum
    0.5*auc - 0.1*log_loss         a loss is subtracted
    my_module:metric               docs/add_your_own.md

A score is always better when higher: log_loss counts negative, in sums and alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastflower.core import own_parts
from fastflower.core.errors import InputError
from fastflower.core.runs import best_kind

if TYPE_CHECKING:
    import numpy as np

TITLES = {
    "clean": "clean top-1",
    "corrupted": "corrupted top-1",
    "combo": "S",
    "f1": "F1",
    "macro_f1": "macro F1",
    "macro_recall": "macro recall",
    "log_loss": "log loss",
    "auc": "AUC",
    "kappa": "quadratic kappa",
}
LOSS = "log_loss"  # the one that falls as predictions get better
OF_CORRUPTED = ("corrupted", "combo")  # need the corrupted images, too

_NUMBER = r"\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?"
_TERM = re.compile(
    rf"\s*(?P<sign>[+-])?\s*(?:(?P<weight>{_NUMBER})\s*\*\s*)?(?P<name>[A-Za-z_][\w.]*(?::[A-Za-z_]\w*)?)\s*"
)


@dataclass(frozen=True)
class Metric:
    """A weighted sum of metrics; each of `terms` is a weight and a name, and the weight of a loss is negative."""

    text: str
    terms: tuple[tuple[float, str], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its terms."""
        return tuple(name for _, name in self.terms)

    @property
    def kind(self) -> str:
        """The kind of checkpoint that it chooses, such as best_macro_f1."""
        return best_kind(self.text)

    @property
    def title(self) -> str:
        """Its name for people; the score of a loss alone is shown by `shown`."""
        return TITLES.get(self.text, self.text)

    @property
    def needs_corrupted(self) -> bool:
        """True if it cannot be computed without corrupted images; S is clean top-1 without them."""
        return "corrupted" in self.names

    def shown(self, score: float) -> float:
        """A score as people read it: a loss alone is positive."""
        return -score if self.text == LOSS else score

    def measure(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """The value on clean images of each name that it needs: logits (N, C), labels (N,); NaN if not finite."""
        names = [name for name in self.names if name not in OF_CORRUPTED]
        if {"combo"} & set(self.names):
            names.append("clean")
        import numpy as np  # here: every command reads recipes, few measure

        finite = bool(np.isfinite(logits).all())
        return {name: _measured(name, logits, labels) if finite else float("nan") for name in names}

    def score(self, measured: Mapping[str, float], corrupted: float | None, alpha: float) -> float:
        """The score of measured values and of top-1 under corruption, None without corrupted images."""
        from fastflower.core import scores

        values = dict(measured)
        if corrupted is not None:
            values["corrupted"] = corrupted
        if "combo" in self.names:
            values["combo"] = scores.combined(values["clean"], corrupted, alpha)
        return float(sum(weight * values[name] for weight, name in self.terms))


def parse(text: str) -> Metric:
    """The metric of select.metric; InputError, naming the term, for what is none."""
    terms: list[tuple[float, str]] = []
    position = 0
    while position < len(text) or not terms:
        match = _TERM.match(text, position)
        if match is None or (terms and not match["sign"]):
            raise _fault(text, f"cannot be read from {text[position : position + 20]!r}")
        weight = float(match["weight"] or 1) * (-1 if match["sign"] == "-" else 1)
        terms.append((weight, match["name"]))
        position = match.end()
    if terms == [(1.0, LOSS)]:
        terms = [(-1.0, LOSS)]
    for weight, name in terms:
        if name not in TITLES and not own_parts.is_own(name):
            raise _fault(text, f"unknown metric {name}")
        if name == LOSS and weight > 0:
            raise _fault(text, "log_loss falls as predictions get better, so subtract it")
        if name in TITLES and name != LOSS and weight <= 0:
            raise _fault(
                text, f"{name} rises as predictions get better, so its weight must be greater than 0"
            )
    return Metric(text, tuple(terms))


def _fault(text: str, what: str) -> InputError:
    return InputError(
        f"select.metric = {text}: {what}; choose from {', '.join(TITLES)} (macro_recall is balanced accuracy), "
        "module:function, or a weighted sum such as 0.7*clean + 0.3*macro_f1"
    )


def _measured(name: str, logits: np.ndarray, labels: np.ndarray) -> float:
    if name not in TITLES:
        return _own(name, logits, labels)
    from fastflower.core import scores

    functions = {
        "clean": scores.top1,
        "f1": scores.f1,
        "macro_f1": scores.macro_f1,
        "macro_recall": scores.macro_recall,
        "log_loss": scores.nll,
        "auc": scores.auc,
        "kappa": scores.quadratic_kappa,
    }
    return functions[name](logits, labels)


def _own(name: str, logits: np.ndarray, labels: np.ndarray) -> float:
    from fastflower.core import scores

    value = own_parts.call("select.metric", name, scores.softmax(logits), labels)
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise own_parts.fault(
            "select.metric", name, f"returned {type(value).__name__}, must return a number"
        ) from None
    if not math.isfinite(number):
        raise own_parts.fault("select.metric", name, f"returned {number}, must return a finite number")
    return number
