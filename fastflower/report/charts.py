"""The report's charts: matplotlib figures, written as SVG in the colours of the page or as PNG.

Charts are 360 units wide, the width of a phone, so their text stays readable with three charts in a row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter, ScalarFormatter

from fastflower.core.charts import LEGEND_ROW, SERIES, TEXT, Chart, canvas, chart_style
from fastflower.evaluation.records import ClassScores, CorruptedScores, ReliabilityBin


class Interval(NamedTuple):
    """A fraction with its interval: one point of one series in one row of the chart."""

    row: str
    series: str
    value: float
    low: float
    high: float


@dataclass
class Lines:
    """Content of one chart over epochs; `series` maps a name to (epochs, values)."""

    title: str
    unit: str = ""
    percent: bool = False  # values are fractions in 0..1
    log: bool = False  # logarithmic when the maxima of the series lie far apart
    steps: bool = False  # the value is constant within an epoch
    best: str = ""  # "max" or "min": mark the best point
    series: dict[str, tuple[list[int], list[float]]] = field(default_factory=dict)

    def format(self, value: float) -> str:
        return f"{100 * value:.1f}%" if self.percent else f"{value:.4g}"


def over_epochs(name: str, lines: Lines, size_changes: list[int]) -> Chart:
    """Curves over epochs with the legend below; `size_changes`: first epoch of each later image size."""
    entry_width = 28 + 4.2 * max(map(len, lines.series))  # points, at a font size of 8.5
    columns = max(1, min(4, int(324 // entry_width)))
    has_legend = len(lines.series) > 1
    rows = -(-len(lines.series) // columns) if has_legend else 0
    with matplotlib.rc_context(chart_style()):
        figure, axes = canvas(layout=None, free_below=LEGEND_ROW * rows)
        descriptions = []
        for position, (label, (epochs, values)) in enumerate(lines.series.items()):
            colour, dash = SERIES[position % len(SERIES)], "-" if position < len(SERIES) else "--"
            marker = "o" if len(epochs) == 1 else None
            steps = "steps-mid" if lines.steps else "default"
            axes.plot(
                epochs, values, dash, color=colour, label=label, marker=marker, markersize=4, drawstyle=steps
            )
            first, last = lines.format(values[0]), lines.format(values[-1])
            descriptions.append(f"{label}: {first} in epoch {epochs[0]}, {last} in epoch {epochs[-1]}")
            if lines.best:
                best = int(np.argmax(values) if lines.best == "max" else np.argmin(values))
                axes.plot(epochs[best], values[best], "o", color=colour, markersize=5)
                descriptions[-1] += f", best {lines.format(values[best])} in epoch {epochs[best]}"
        for epoch in size_changes:
            axes.axvline(epoch - 0.5, color=TEXT, linewidth=0.7, linestyle=(0, (2, 3)))
        peaks = [max(values) for _, values in lines.series.values()]
        if lines.log and min(peaks) > 0 and max(peaks) > 5 * min(peaks):
            axes.set_yscale("log")
            axes.set_ylim(bottom=max(axes.get_ylim()[0], min(peaks) / 100))  # a schedule may end near 0
        elif lines.log:
            axes.yaxis.set_major_formatter("{x:g}")
        if lines.percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1))
        levels = sorted({value for _, values in lines.series.values() for value in values})
        if lines.steps and len(levels) < 6:
            axes.set_yticks(levels)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.set_xlabel("epoch")
        axes.set_ylabel(lines.unit)
        axes.set_title(lines.title)
        if has_legend:
            figure.legend(loc="lower left", bbox_to_anchor=(0.1, 0), ncols=columns, handlelength=1.4)
    return Chart(
        name, title=lines.title, description=f"{lines.title}. {'; '.join(descriptions)}.", figure=figure
    )


def interval_chart(
    name: str, title: str, *, intervals: list[Interval], reference: float | None, description: str
) -> Chart:
    """Fractions with their 95% intervals, one colour per series; a dotted line marks `reference`."""
    rows = list(dict.fromkeys(interval.row for interval in intervals))
    series = list(dict.fromkeys(interval.series for interval in intervals))
    with matplotlib.rc_context(chart_style()):
        figure, axes = canvas(0.9 + max(0.42, 0.1 + 0.16 * len(series)) * len(rows))
        if reference is not None:
            axes.axvline(reference, color=TEXT, linewidth=0.9, linestyle=(0, (2, 3)))
        for position, label in enumerate(series):
            points = [interval for interval in intervals if interval.series == label]
            offset = 0.22 * (position - (len(series) - 1) / 2)
            x, low, high = np.array([(point.value, point.low, point.high) for point in points]).T
            y = [rows.index(point.row) + offset for point in points]
            style: dict[str, Any] = {
                "fmt": "o",
                "color": SERIES[position],
                "markersize": 4,
                "elinewidth": 1.2,
            }
            axes.errorbar(x, y, xerr=np.stack([x - low, high - x]), label=label, **style)
        axes.set_yticks(range(len(rows)), rows)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_title(title)
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        if len(series) > 1:
            figure.legend(loc="outside lower center", ncols=len(series))
    return Chart(name, title=title, description=description, figure=figure)


def robustness(corrupted: CorruptedScores, clean: float) -> Chart:
    """Top-1 by kind and level of corruption; the dotted line is the clean single view."""
    rows = corrupted.combos
    intervals = [
        Interval(
            row.kind.replace("_", " "),
            row.level,
            value=row.top1,
            low=row.top1_low,
            high=row.top1_high,
        )
        for row in rows
    ]
    values = "; ".join(f"{row.kind} {row.level} {100 * row.top1:.1f}%" for row in rows)
    return interval_chart(
        "robustness",
        "Top-1 by corruption (dotted: clean)",
        intervals=intervals,
        reference=clean,
        description=f"Top-1 by corruption, clean {100 * clean:.1f}%: {values}.",
    )


def reliability(bins: list[ReliabilityBin], t: float | None) -> Chart:
    """Accuracy against confidence, before and after temperature scaling."""
    with matplotlib.rc_context(chart_style()):
        figure, axes = canvas(3.2)
        axes.plot([0, 1], [0, 1], color=TEXT, linewidth=0.7, linestyle=(0, (2, 3)))
        for position, (when, label) in enumerate(
            (("before", "T = 1"), ("after", f"T = {t:.3f}" if t else ""))
        ):
            rows = [row for row in bins if row.when == when]
            if rows:
                largest = max(row.n for row in rows)
                size = [6 + 60 * (row.n / largest) ** 0.5 for row in rows]
                x, y = [row.confidence for row in rows], [row.top1 for row in rows]
                axes.plot(x, y, color=SERIES[position], linewidth=1)
                axes.scatter(x, y, s=size, color=SERIES[position], label=label, linewidths=0)
        axes.set(xlim=(0, 1.02), ylim=(0, 1.02), xlabel="confidence", ylabel="accuracy")
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set_title("Reliability (area: images per bin)")
        if t:
            figure.legend(loc="outside lower center", ncols=2)
    description = "Accuracy against confidence; the diagonal is perfect calibration."
    return Chart("reliability", title="Reliability", description=description, figure=figure)


def long_tail(classes: list[ClassScores]) -> Chart:
    """Recall of each class against its number of images, or by rank where all classes have the same number."""
    present = sorted((row for row in classes if row.n), key=lambda row: row.recall)
    images = [row.images for row in present]
    balanced = min(images) == max(images)
    x = list(range(1, len(present) + 1)) if balanced else images
    with matplotlib.rc_context(chart_style()):
        figure, axes = canvas(3.2)
        axes.scatter(x, [row.recall for row in present], s=18, color=SERIES[0], linewidths=0, label="clean")
        corrupted = [row.corrupted_recall for row in present if row.corrupted_recall is not None]
        if len(corrupted) == len(present):
            axes.scatter(x, corrupted, s=18, color=SERIES[1], linewidths=0, marker="v", label="corrupted")
            figure.legend(loc="outside lower center", ncols=2)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        if not balanced and max(x) > 4 * max(min(x), 1):
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(ScalarFormatter())
            axes.xaxis.set_minor_formatter(NullFormatter())
            ticks = [digit * 10**power for power in range(5) for digit in (1, 2, 5)]
            axes.set_xticks([tick for tick in ticks if min(x) <= tick <= max(x)])
        axes.set(ylim=(-0.03, 1.03), ylabel="recall")
        axes.set_xlabel(f"classes, {images[0]} images each" if balanced else "images of the class")
        axes.set_title("Recall by class, worst first" if balanced else "Recall by class size")
    description = f"Recall of {len(present)} classes, lowest {100 * present[0].recall:.1f}%."
    return Chart("tail", title="Classes", description=description, figure=figure)
