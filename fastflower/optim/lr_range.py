"""The learning-rate range test (Smith, arXiv:1506.01186): rates that rise step by step, and what their losses say."""

from __future__ import annotations

import math
from dataclasses import dataclass

import matplotlib
import numpy as np

from fastflower.core.charts import FAINT, SERIES, STYLE, Chart, canvas

MEMORY = 0.95  # of the running mean that smooths the losses
RUINED = 4.0  # times the lowest smoothed loss: the sweep has seen enough


@dataclass(frozen=True)
class Suggestion:
    """lr: where the loss falls fastest. lowest: where it was lowest; from there on it rises."""

    lr: float
    lowest: float


def rates(low: float, high: float, steps: int) -> list[float]:
    """`steps` rates from low to high, each the same multiple of the one before."""
    return np.geomspace(low, high, steps).tolist()


def smoothed(losses: list[float]) -> list[float]:
    """Their running mean, without the pull towards 0 of its beginning."""
    mean, found = 0.0, []
    for step, loss in enumerate(losses, 1):
        mean = MEMORY * mean + (1 - MEMORY) * loss
        found.append(mean / (1 - MEMORY**step))
    return found


def ruined(losses: list[float]) -> bool:
    """Whether the last loss is not finite, or its running mean lies far above the lowest so far."""
    if not math.isfinite(losses[-1]):
        return True
    means = smoothed(losses)
    return means[-1] > RUINED * min(means)


def suggest(tried: list[float], losses: list[float]) -> Suggestion | None:
    """The rate at which the smoothed loss falls fastest per factor of lr, before its minimum; None: it never does."""
    finite = [(rate, loss) for rate, loss in zip(tried, losses, strict=True) if math.isfinite(loss)]
    if len(finite) < 5:
        return None
    logs, means = np.log([rate for rate, _ in finite]), np.array(smoothed([loss for _, loss in finite]))
    bottom = int(means.argmin())
    if bottom < 2:
        return None
    slopes = np.gradient(means, logs)[: bottom + 1]
    at = int(slopes.argmin())
    return Suggestion(finite[at][0], finite[bottom][0]) if slopes[at] < 0 else None


def rate_chart(
    tried: list[float], losses: list[float], *, smooth: list[float], marks: dict[str, float]
) -> Chart:
    """Losses over the learning rate; `marks` are rates with a name."""
    title = "Loss over the learning rate"
    with matplotlib.rc_context(STYLE):
        figure, axes = canvas()
        axes.plot(tried, losses, color=FAINT, linewidth=1)
        axes.plot(tried, smooth, color=SERIES[0], label="smoothed")
        for position, (name, rate) in enumerate(marks.items(), 1):
            axes.axvline(rate, color=SERIES[position], linewidth=1.2, label=f"{name} {rate:.2g}")
        low, high = min(smooth), smooth[0]
        axes.set_ylim(low - 0.15 * (high - low), high + 0.6 * (high - low))
        axes.set_xscale("log")
        axes.set_xlabel("learning rate")
        axes.set_ylabel("training loss")
        axes.set_title(title)
        axes.legend()
    return Chart("lrfind", title, "; ".join(f"{name} {rate:.2g}" for name, rate in marks.items()), figure)
