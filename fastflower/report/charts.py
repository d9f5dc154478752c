"""The report's charts: matplotlib figures, as SVG that takes its colours from the page or as PNG.

Charts are 360 units wide, a phone's width, so that their text stays readable when a page puts three in a row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import matplotlib
import numpy as np
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter, ScalarFormatter

from fastflower.core.charts import LEGEND_ROW, SERIES, STYLE, TEXT, Chart, canvas

Interval = tuple[str, str, float, float, float]  # row, series, value, low and high end


@dataclass
class Lines:
    """What one chart of epochs shows: name -> (epochs, values)."""

    title: str
    unit: str = ""
    percent: bool = False  # a share
    log: bool = False  # where the peaks of the series lie far apart
    steps: bool = False  # the value holds for whole epochs and jumps between them
    best: str = ""  # max or min: mark the best point
    series: dict[str, tuple[list[int], list[float]]] = field(default_factory=dict)

    def said(self, value: float) -> str:
        """A value in words."""
        return f"{100 * value:.1f}%" if self.percent else f"{value:.4g}"


def over_epochs(name: str, lines: Lines, borders: list[int]) -> Chart:
    """Curves over epochs, their names below; `borders` are the first epochs of the later image sizes."""
    columns = max(
        1, min(4, int(324 // (28 + 4.2 * max(map(len, lines.series)))))
    )  # points, of 8.5 point type
    named = len(lines.series) > 1
    rows = -(-len(lines.series) // columns) if named else 0
    with matplotlib.rc_context(STYLE):
        figure, axes = canvas(layout=None, below=LEGEND_ROW * rows)
        words = []
        for position, (label, (epochs, values)) in enumerate(lines.series.items()):
            colour, dash = SERIES[position % len(SERIES)], "-" if position < len(SERIES) else "--"
            alone = "o" if len(epochs) == 1 else None
            steps = "steps-mid" if lines.steps else "default"
            axes.plot(
                epochs, values, dash, color=colour, label=label, marker=alone, markersize=4, drawstyle=steps
            )
            first, last = lines.said(values[0]), lines.said(values[-1])
            words.append(f"{label}: {first} in epoch {epochs[0]}, {last} in epoch {epochs[-1]}")
            if lines.best:
                at = int(np.argmax(values) if lines.best == "max" else np.argmin(values))
                axes.plot(epochs[at], values[at], "o", color=colour, markersize=5)
                words[-1] += f", best {lines.said(values[at])} in epoch {epochs[at]}"
        for border in borders:
            axes.axvline(border - 0.5, color=TEXT, linewidth=0.7, linestyle=(0, (2, 3)))
        peaks = [max(values) for _, values in lines.series.values()]
        if lines.log and min(peaks) > 0 and max(peaks) > 5 * min(peaks):
            axes.set_yscale("log")
            axes.set_ylim(bottom=max(axes.get_ylim()[0], min(peaks) / 100))  # a schedule may end at nearly 0
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
        if named:
            figure.legend(loc="lower left", bbox_to_anchor=(0.1, 0), ncols=columns, handlelength=1.4)
    return Chart(name, lines.title, f"{lines.title}. {'; '.join(words)}.", figure)


def intervals(name: str, title: str, *, rows: list[Interval], line: float | None, words: str) -> Chart:
    """Shares with their 95% intervals, a row for each name, a colour for each series; `line`: what they compare to."""
    names, series = list(dict.fromkeys(row[0] for row in rows)), list(dict.fromkeys(row[1] for row in rows))
    with matplotlib.rc_context(STYLE):
        figure, axes = canvas(0.9 + max(0.42, 0.1 + 0.16 * len(series)) * len(names))
        if line is not None:
            axes.axvline(line, color=TEXT, linewidth=0.9, linestyle=(0, (2, 3)))
        for shift, one in enumerate(series):
            own = [row for row in rows if row[1] == one]
            y = [names.index(row[0]) + 0.22 * (shift - (len(series) - 1) / 2) for row in own]
            x, low, high = (np.array([row[at] for row in own]) for at in (2, 3, 4))
            style: dict[str, Any] = {"fmt": "o", "color": SERIES[shift], "markersize": 4, "elinewidth": 1.2}
            axes.errorbar(x, y, xerr=np.stack([x - low, high - x]), label=one, **style)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_title(title)
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        if len(series) > 1:
            figure.legend(loc="outside lower center", ncols=len(series))
    return Chart(name, title, words, figure)


def robustness(corrupted: dict[str, Any], clean: float) -> Chart:
    """Top-1 by kind and level, beside the clean single view."""
    rows = corrupted["combos"]
    shares = [
        (row["kind"].replace("_", " "), row["level"], row["top1"], row["top1_low"], row["top1_high"])
        for row in rows
    ]
    said = "; ".join(f"{row['kind']} {row['level']} {100 * row['top1']:.1f}%" for row in rows)
    words = f"Top-1 by corruption, clean {100 * clean:.1f}%: {said}."
    return intervals(
        "robustness", "Top-1 by corruption (dotted: clean)", rows=shares, line=clean, words=words
    )


def reliability(bins: list[dict[str, Any]], t: float | None) -> Chart:
    """Accuracy against confidence, before and after the temperature."""
    with matplotlib.rc_context(STYLE):
        figure, axes = canvas(3.2)
        axes.plot([0, 1], [0, 1], color=TEXT, linewidth=0.7, linestyle=(0, (2, 3)))
        for position, (when, label) in enumerate(
            (("before", "T = 1"), ("after", f"T = {t:.3f}" if t else ""))
        ):
            own = [row for row in bins if row["when"] == when]
            if own:
                size = [6 + 60 * (row["n"] / max(r["n"] for r in own)) ** 0.5 for row in own]
                x, y = [row["confidence"] for row in own], [row["top1"] for row in own]
                axes.plot(x, y, color=SERIES[position], linewidth=1)
                axes.scatter(x, y, s=size, color=SERIES[position], label=label, linewidths=0)
        axes.set(xlim=(0, 1.02), ylim=(0, 1.02), xlabel="confidence", ylabel="share that is right")
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set_title("Reliability (area: images in the bin)")
        if t:
            figure.legend(loc="outside lower center", ncols=2)
    words = "Share of right predictions against confidence; the diagonal is honest."
    return Chart("reliability", "Reliability", words, figure)


def long_tail(classes: list[dict[str, Any]]) -> Chart:
    """Recall of each class against its number of images, or in order where all have the same number."""
    present = sorted((row for row in classes if row["n"]), key=lambda row: row["recall"])
    images = [row["images"] for row in present]
    alike = min(images) == max(images)
    x = list(range(1, len(present) + 1)) if alike else images
    with matplotlib.rc_context(STYLE):
        figure, axes = canvas(3.2)
        axes.scatter(
            x, [row["recall"] for row in present], s=18, color=SERIES[0], linewidths=0, label="clean"
        )
        dark = [row["corrupted_recall"] for row in present]
        if None not in dark:
            axes.scatter(x, dark, s=18, color=SERIES[1], linewidths=0, marker="v", label="corrupted")
            figure.legend(loc="outside lower center", ncols=2)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        if not alike and max(x) > 4 * max(min(x), 1):
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(ScalarFormatter())
            axes.xaxis.set_minor_formatter(NullFormatter())
            ticks = [digit * 10**power for power in range(5) for digit in (1, 2, 5)]
            axes.set_xticks([tick for tick in ticks if min(x) <= tick <= max(x)])
        axes.set(ylim=(-0.03, 1.03), ylabel="recall")
        axes.set_xlabel(f"classes, of {images[0]} images each" if alike else "images of the class")
        axes.set_title("Each class, worst first" if alike else "Each class by its size")
    words = f"Recall of {len(present)} classes, lowest {100 * present[0]['recall']:.1f}%."
    return Chart("tail", "Classes", words, figure)
