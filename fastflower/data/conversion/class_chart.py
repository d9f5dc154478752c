"""A chart of the class sizes, which shows the imbalance at a glance."""

from __future__ import annotations

import io

import numpy as np

from fastflower.data.labels import HEAD, TAIL, LabelTable, class_stats

COLOURS = {"head": "#2a6f97", "middle": "#61a5c2", "tail": "#e07a5f"}
MAX_LABELLED = 40  # classes; the axis has no room for more ids


def class_chart(table: LabelTable) -> bytes:
    """A PNG of the images of each class, largest first; log scale when the largest has over ten times the smallest."""
    # imported here, because it takes a second that most commands do not need
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from fastflower.core.charts import axis_label, families

    rows = class_stats(table)
    order = np.argsort(-table.counts, kind="stable")
    counts = table.counts[order]
    figure = Figure(figsize=(9, 4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.bar(np.arange(len(counts)), counts, 0.85, color=[COLOURS[rows[k]["part"]] for k in order])
    if counts[0] > 10 * max(counts[-1], 1):
        axes.set_yscale("log")
    for part in COLOURS:
        classes = sum(row["part"] == part for row in rows)
        bounds = {"head": f"over {HEAD}", "middle": f"{TAIL} to {HEAD}", "tail": f"under {TAIL}"}[part]
        axes.bar(0, 0, color=COLOURS[part], label=f"{part}, {bounds} images: {classes} classes")
    axes.legend(frameon=False)
    labelled = len(counts) <= MAX_LABELLED
    axes.set_xticks(np.arange(len(counts)) if labelled else [])
    if labelled:
        ids = [axis_label(table.classes.ids[k], longest=10) for k in order]
        axes.set_xticklabels(ids, fontsize=8, rotation=90 if len(counts) > 20 else 0, family=families())
    axes.set_xlabel("category_id" if labelled else "classes, largest first")
    axes.set_ylabel("images")
    axes.set_xlim(-0.7, len(counts) - 0.3)
    axes.spines[["top", "right"]].set_visible(False)
    imbalance = counts[0] / max(counts[-1], 1)
    axes.set_title(f"{len(table)} images of {len(counts)} classes, imbalance {imbalance:.1f}", loc="left")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
