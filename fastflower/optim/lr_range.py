"""The learning-rate range test (Smith, arXiv:1506.01186): rising rates, and the lr suggested by their losses."""

from __future__ import annotations

import math
from dataclasses import dataclass

import matplotlib
import numpy as np

from fastflower.core.charts import FAINT, SERIES, Chart, canvas, chart_style

SMOOTHING = 0.95  # decay of the running mean of the losses
DIVERGED_RATIO = 4.0  # over the lowest smoothed loss: the test ends


@dataclass(frozen=True)
class LrSuggestion:
    """`lr`: the rate where the loss falls fastest; `lowest`: the rate with the lowest loss, beyond which it rises."""

    lr: float
    lowest: float


def rates(low: float, high: float, steps: int) -> list[float]:
    """`steps` rates in geometric progression from low to high."""
    return np.geomspace(low, high, steps).tolist()


def smoothed(losses: list[float]) -> list[float]:
    """The running mean of the losses, corrected for its start at 0 as in Adam."""
    mean, means = 0.0, []
    for step, loss in enumerate(losses, 1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        means.append(mean / (1 - SMOOTHING**step))
    return means


def has_diverged(losses: list[float]) -> bool:
    """True if the last loss is not finite or the smoothed loss is above DIVERGED_RATIO times its minimum."""
    if not math.isfinite(losses[-1]):
        return True
    means = smoothed(losses)
    return means[-1] > DIVERGED_RATIO * min(means)


def suggest(tried: list[float], losses: list[float]) -> LrSuggestion | None:
    """The rate at which the smoothed loss falls fastest over log(lr), before its minimum; None if it never falls."""
    finite = [(rate, loss) for rate, loss in zip(tried, losses, strict=True) if math.isfinite(loss)]
    if len(finite) < 5:
        return None
    logs, means = np.log([rate for rate, _ in finite]), np.array(smoothed([loss for _, loss in finite]))
    bottom = int(means.argmin())
    if bottom < 2:
        return None
    slopes = np.gradient(means, logs)[: bottom + 1]
    steepest = int(slopes.argmin())
    return LrSuggestion(finite[steepest][0], finite[bottom][0]) if slopes[steepest] < 0 else None


def lr_range_chart(
    tried: list[float], losses: list[float], *, smooth: list[float], marks: dict[str, float]
) -> Chart:
    """Raw and smoothed losses over the learning rate; `marks`, name -> rate, become vertical lines."""
    title = "Loss over the learning rate"
    with matplotlib.rc_context(chart_style()):
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
    description = "; ".join(f"{name} {rate:.2g}" for name, rate in marks.items())
    return Chart("lrfind", title=title, description=description, figure=figure)
