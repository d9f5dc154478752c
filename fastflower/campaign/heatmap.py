"""Heat map of a grid of trainings."""

from __future__ import annotations

import matplotlib
import numpy as np
from matplotlib.patches import Rectangle

from fastflower.campaign.plan import format_value
from fastflower.campaign.results import Grid
from fastflower.core.charts import SERIES, Chart, canvas, chart_style

INSET = 0.44  # half the side of a frame, as a fraction of its cell


def heat_map(grid: Grid, title: str) -> Chart:
    """Mean scores as colours and numbers; the best region is framed, the best cell with a bold frame."""
    rows, columns = grid.mean.shape
    with matplotlib.rc_context(chart_style()):
        figure, axes = canvas(height=max(2.6, 1.5 + 0.42 * rows))
        low, high = float(np.nanmin(grid.mean)), float(np.nanmax(grid.mean))
        median = float(np.nanmedian(grid.mean))
        # the colour range covers the upper half, so that one diverged cell does not make all others look equal
        floor = max(low, median - 2 * (high - median + 1e-3))
        image = axes.imshow(grid.mean, cmap="viridis", vmin=floor, vmax=high, origin="lower", aspect="auto")
        size = min(9.0, 60 / columns)  # points, so that a number fits its cell
        for (row, column), value in np.ndenumerate(grid.mean):
            text = "failed" if np.isnan(value) else f"{value:.4f}"
            bright = np.isnan(value) or np.dot(image.to_rgba(value)[:3], (0.299, 0.587, 0.114)) > 0.5
            colour = "black" if bright else "white"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=size)
            if grid.region[row, column]:
                width = 3.2 if (row, column) == grid.best else 1.4
                corner = column - INSET, row - INSET
                frame = Rectangle(
                    corner, 2 * INSET, 2 * INSET, fill=False, edgecolor=SERIES[1], linewidth=width
                )
                axes.add_patch(frame)
        axes.set_xticks(range(columns), [format_value(value) for value in grid.xs], fontsize=size)
        axes.set_yticks(range(rows), [format_value(value) for value in grid.ys])
        axes.set_xticks(np.arange(columns - 1) + 0.5, minor=True)
        axes.set_yticks(np.arange(rows - 1) + 0.5, minor=True)
        axes.grid(False)
        axes.grid(True, which="minor", color="white", linewidth=1.5)
        axes.tick_params(which="both", length=0)
        axes.set_xlabel(grid.x)
        axes.set_ylabel(grid.y)
        axes.set_title(title)
        axes.spines[:].set_visible(False)
        figure.colorbar(image, ax=axes, label="score", extend="min" if floor > low else "neither")
        figure.supxlabel(grid.caption, fontsize=8)
    return Chart("campaign", title=title, description="; ".join(grid.summary()), figure=figure)
