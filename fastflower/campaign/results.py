"""Results of a campaign: a row for each training, a line for each combination of values, the best region of a grid."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastflower.campaign.launch import Result
from fastflower.campaign.plan import RUN_KEYS, format_value, short_key
from fastflower.core.console import aligned

Row = dict[str, Any]
SCORES = (
    ("clean", "clean"),
    ("corrupted", "corrupt"),
    ("macro_recall", "macro_recall"),
    ("macro_f1", "macro_f1"),
)


def row(result: Result) -> Row:
    """CSV row of one training: run, varied values, state and scores; None for the scores of a failed training."""
    task, end = result.task, result.end
    scores = {name: end.scores.get(f"{key}_{end.best.weights}") if end else None for name, key in SCORES}
    return {
        "experiment": task.run.exp,
        "backbone": task.run.backbone,
        "seed": task.run.seed,
        "fold": task.run.fold,
        **{key: format_value(value) for key, value in task.settings.items() if key not in RUN_KEYS},
        "state": result.state,
        "score": end.best.score if end and end.best.epoch else None,
        **scores,
        "best_epoch": end.best.epoch if end else None,
        "epochs": end.epochs if end else None,
        "minutes": round(end.seconds / 60, 2) if end else None,
        "reason": result.reason,
    }


def line(result: Result) -> str:
    """One line on the outcome of a training."""
    end = result.end
    outcome = result.reason
    if end:
        best = end.best
        outcome = (
            f"{best.score:.4f} in epoch {best.epoch}" if best.epoch else f"{end.epochs} epochs, not scored"
        )
    return f"{result.state}: {result.task.name}: {outcome}"


@dataclass(frozen=True)
class Combination:
    """Scores of the trainings that differ only in fold and seed; `deviation` is None for a single training."""

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
    """Results grouped by experiment and backbone, in order; NaN scores where every training failed."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.task.run.exp, result.task.run.backbone), []).append(result)
    combined = []
    for (experiment, backbone), group in groups.items():
        ends = [end for result in group if (end := result.end)]
        scores = np.array([end.best.score if end.best.epoch else math.nan for end in ends] or [math.nan])
        settings = group[0].task.settings
        combined.append(
            Combination(
                experiment=experiment,
                backbone=backbone,
                settings={key: value for key, value in settings.items() if key not in RUN_KEYS},
                n=len(ends),
                failed=len(group) - len(ends),
                mean=float(scores.mean()),
                deviation=float(scores.std(ddof=1)) if len(ends) > 1 else None,
                low=float(scores.min()),
                high=float(scores.max()),
                minutes=sum(end.seconds for end in ends) / 60,
            )
        )
    return combined


def summary_table(combined: list[Combination]) -> str:
    """The combinations as aligned text."""
    keys = list(dict.fromkeys(key for item in combined for key in item.settings))
    rows = [["", *(short_key(key, keys) for key in keys), "n", "mean score", "sd", "min", "max", "minutes"]]
    for item in combined:
        values = [format_value(item.settings[key]) if key in item.settings else "" for key in keys]
        sd = "-" if item.deviation is None else f"{item.deviation:.4f}"
        n = f"{item.n}" + (f" ({item.failed} failed)" if item.failed else "")
        known = not math.isnan(item.mean)  # not where nothing was held out
        scores = [f"{item.mean:.4f}", sd, f"{item.low:.4f}", f"{item.high:.4f}"] if known else ["-"] * 4
        rows.append([f"{item.experiment} {item.backbone}", *values, n, *scores, f"{item.minutes:.1f}"])
    return aligned(rows)


@dataclass(frozen=True)
class Grid:
    """Mean scores (Y, X) over two keys, NaN where every training failed; `region` bool (Y, X) marks the best cells."""

    x: str
    y: str
    xs: list[Any]
    ys: list[Any]
    mean: np.ndarray
    best: tuple[int, int]
    region: np.ndarray
    error: float  # standard error of the best cell
    error_source: str
    n: int  # trainings in the fullest cell

    @property
    def caption(self) -> str:
        """Text below the heat map: trainings per cell and meaning of the frames."""
        trainings = "training" if self.n == 1 else "trainings"
        return (
            f"{self.n} {trainings} per cell; framed: within one standard error ({self.error:.4f}) of the best"
        )

    def summary(self) -> list[str]:
        """Lines on the best cell, the best region by row, and the best value of each row."""
        row, column = self.best
        cell = f"{self.x}={format_value(self.xs[column])} {self.y}={format_value(self.ys[row])}"
        lines = [
            f"best {cell}: {self.mean[row, column]:.4f} (n = {self.n} per cell)",
            f"best region, within one standard error ({self.error:.4f}, {self.error_source}) of it:",
        ]
        for y, inside in zip(self.ys, self.region, strict=True):
            if inside.any():
                values = ", ".join(
                    format_value(x) for x, marked in zip(self.xs, inside, strict=True) if marked
                )
                lines.append(f"  {self.y}={format_value(y)}: {self.x} in {values}")
        best_by_row = []
        for y, means in zip(self.ys, self.mean, strict=True):
            if np.isfinite(means).any():
                best_by_row.append(f"{format_value(y)}: {format_value(self.xs[int(np.nanargmax(means))])}")
        lines.append(f"best {self.x} by {self.y}: {', '.join(best_by_row)}")
        return lines


def grid(combined: list[Combination], validation: int) -> Grid | None:
    """The combinations as a grid, if exactly two keys vary for one backbone and recipe; else None.

    The best region follows the one-standard-error rule (Breiman et al. 1984, CART): cells whose mean is at most one
    standard error below the best cell's. The error is that of the best cell's mean over its trainings, or, for a
    single training, the binomial error of a proportion of `validation` images (Agresti and Coull 1998, at z = 1).
    """
    keys = list(dict.fromkeys(key for item in combined for key in item.settings))
    values = {key: _sorted([item.settings[key] for item in combined if key in item.settings]) for key in keys}
    varied = [key for key in keys if len(values[key]) > 1]
    if len(varied) != 2 or all(math.isnan(item.mean) for item in combined):
        return None
    x, y = varied
    cells = {
        (values[y].index(item.settings[y]), values[x].index(item.settings[x])): item for item in combined
    }
    if len(cells) < len(combined):
        return None
    mean = np.full((len(values[y]), len(values[x])), np.nan)
    for cell, item in cells.items():
        mean[cell] = item.mean
    row, column = np.unravel_index(int(np.nanargmax(mean)), mean.shape)
    best = cells[int(row), int(column)]
    error, error_source = best.error, f"of {best.n} trainings"
    if error is None and not 0 <= best.mean <= 1:
        error, error_source = 0.0, "unknown for one training of a metric that is no proportion"
    if error is None:
        n = validation + 1  # adds half a success and half a failure: a perfect score has an error too
        p = (min(max(best.mean, 0.0), 1.0) * validation + 0.5) / n
        error, error_source = math.sqrt(p * (1 - p) / n), f"binomial, {validation} images"
    return Grid(
        x=x,
        y=y,
        xs=values[x],
        ys=values[y],
        mean=mean,
        best=(int(row), int(column)),
        region=np.nan_to_num(mean, nan=-np.inf) >= best.mean - error - 1e-12,
        error=error,
        error_source=error_source,
        n=max(item.n for item in combined),
    )


def _sorted(values: list[Any]) -> list[Any]:
    unique = list(dict.fromkeys(values))
    return sorted(unique) if all(isinstance(value, (int, float)) for value in unique) else unique
