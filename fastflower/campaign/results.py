"""What came out of many trainings: a row for each, a line for each combination of values, the best region of a grid."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastflower.campaign.launch import Result
from fastflower.campaign.plan import SHARED, short, written
from fastflower.core.console import aligned

Row = dict[str, Any]
SCORES = (
    ("clean", "clean"),
    ("corrupted", "corrupt"),
    ("macro_recall", "macro_recall"),
    ("macro_f1", "macro_f1"),
)


def row(result: Result) -> Row:
    """One training: its run, its own values, and what it wrote at its end; None where it did not get there."""
    task, end = result.task, result.end
    best, scores = end.get("best", {}), end.get("scores", {})
    weights = best.get("weights")
    return {
        "experiment": task.run.exp,
        "backbone": task.run.backbone,
        "seed": task.run.seed,
        "fold": task.run.fold,
        **{key: written(value) for key, value in task.settings.items() if key not in SHARED},
        "state": result.state,
        "score": best.get("score"),
        **{name: scores.get(f"{key}_{weights}") for name, key in SCORES},
        "best_epoch": best.get("epoch"),
        "epochs": end.get("epochs"),
        "minutes": round(end["seconds"] / 60, 2) if end else None,
        "reason": result.reason,
    }


def line(result: Result) -> str:
    """One training's outcome in a line."""
    best = result.end.get("best")
    outcome = f"{best['score']:.4f} in epoch {best['epoch']}" if best else result.reason
    return f"{result.state}: {result.task.name}: {outcome}"


@dataclass(frozen=True)
class Combination:
    """The trainings that differ only in fold and seed: their score's mean, deviation (None for one), least and most."""

    experiment: str
    backbone: str
    settings: dict[str, Any]
    n: int
    failed: int
    mean: float
    deviation: float | None
    low: float
    high: float
    minutes: float

    @property
    def error(self) -> float | None:
        """Standard error of the mean."""
        return None if self.deviation is None else self.deviation / math.sqrt(self.n)


def combinations(results: list[Result]) -> list[Combination]:
    """In the order of the trainings; those of which every training failed have NaN scores."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.task.run.exp, result.task.run.backbone), []).append(result)
    found = []
    for (experiment, backbone), own in groups.items():
        ends = [result.end for result in own if result.end]
        scores = np.array([end["best"]["score"] for end in ends] or [math.nan])
        found.append(
            Combination(
                experiment,
                backbone,
                {key: value for key, value in own[0].task.settings.items() if key not in SHARED},
                len(ends),
                len(own) - len(ends),
                float(scores.mean()),
                float(scores.std(ddof=1)) if len(ends) > 1 else None,
                float(scores.min()),
                float(scores.max()),
                sum(end["seconds"] for end in ends) / 60,
            )
        )
    return found


def table(found: list[Combination]) -> str:
    """The combinations as aligned text."""
    keys = list(dict.fromkeys(key for one in found for key in one.settings))
    rows = [["", *(short(key, keys) for key in keys), "n", "mean score", "sd", "least", "most", "minutes"]]
    for one in found:
        values = [written(one.settings[key]) if key in one.settings else "" for key in keys]
        sd = "-" if one.deviation is None else f"{one.deviation:.4f}"
        n = f"{one.n}" + (f" ({one.failed} failed)" if one.failed else "")
        scores = [f"{one.mean:.4f}", sd, f"{one.low:.4f}", f"{one.high:.4f}"] if one.n else ["-"] * 4
        rows.append([f"{one.experiment} {one.backbone}", *values, n, *scores, f"{one.minutes:.1f}"])
    return aligned(rows)


@dataclass(frozen=True)
class Grid:
    """Mean scores (Y, X) over two keys, NaN where no training ended, and the cells of the best region, bool (Y, X)."""

    x: str
    y: str
    xs: list[Any]
    ys: list[Any]
    mean: np.ndarray
    best: tuple[int, int]
    region: np.ndarray
    error: float
    source: str  # of the error
    n: int  # most trainings in a cell

    @property
    def framed(self) -> str:
        """What the region's frames mean, for below the picture."""
        trainings = "training" if self.n == 1 else "trainings"
        return (
            f"{self.n} {trainings} a cell; framed: within one standard error ({self.error:.4f}) of the best"
        )

    def sentences(self) -> list[str]:
        """The best cell, the region by rows, and the best of each row."""
        row, column = self.best
        cell = f"{self.x}={written(self.xs[column])} {self.y}={written(self.ys[row])}"
        lines = [
            f"best {cell}: {self.mean[row, column]:.4f} (n = {self.n} a cell)",
            f"best region, within one standard error ({self.error:.4f}, {self.source}) of it:",
        ]
        for y, inside in zip(self.ys, self.region, strict=True):
            if inside.any():
                values = ", ".join(written(x) for x, own in zip(self.xs, inside, strict=True) if own)
                lines.append(f"  {self.y}={written(y)}: {self.x} in {values}")
        tops = []
        for y, means in zip(self.ys, self.mean, strict=True):
            if np.isfinite(means).any():
                tops.append(f"{written(y)}: {written(self.xs[int(np.nanargmax(means))])}")
        lines.append(f"best {self.x} by {self.y}: {', '.join(tops)}")
        return lines


def grid(found: list[Combination], validation: int) -> Grid | None:
    """The combinations as a grid, when exactly two keys vary over several values each, of one backbone and recipe.

    The best region is the one-standard-error rule's (Breiman et al. 1984, CART): cells whose mean is at most one
    standard error below the best cell's. The error is that of the best cell's mean over its trainings, or, for a
    single training, the binomial one of a share of `validation` images (Agresti and Coull 1998, at z = 1).
    """
    keys = list(dict.fromkeys(key for one in found for key in one.settings))
    values = {key: _sorted([one.settings[key] for one in found if key in one.settings]) for key in keys}
    varied = [key for key in keys if len(values[key]) > 1]
    if len(varied) != 2 or not any(one.n for one in found):
        return None
    x, y = varied
    cells = {(values[y].index(one.settings[y]), values[x].index(one.settings[x])): one for one in found}
    if len(cells) < len(found):
        return None
    mean, counts = np.full((len(values[y]), len(values[x])), np.nan), max(one.n for one in found)
    for place, one in cells.items():
        mean[place] = one.mean
    row, column = np.unravel_index(int(np.nanargmax(mean)), mean.shape)
    best = cells[int(row), int(column)]
    error, source = best.error, f"of {best.n} trainings"
    if error is None:
        n = validation + 1  # half an image right and half wrong added: a perfect score is not certain either
        p = (min(max(best.mean, 0.0), 1.0) * validation + 0.5) / n
        error, source = math.sqrt(p * (1 - p) / n), f"binomial, {validation} images"
    region = np.nan_to_num(mean, nan=-np.inf) >= best.mean - error - 1e-12
    return Grid(x, y, values[x], values[y], mean, (int(row), int(column)), region, error, source, counts)


def _sorted(values: list[Any]) -> list[Any]:
    unique = list(dict.fromkeys(values))
    return sorted(unique) if all(isinstance(value, (int, float)) for value in unique) else unique
