"""The heat map of a grid of trainings."""

from __future__ import annotations

import matplotlib
import numpy as np
from matplotlib.patches import Rectangle

from fastflower.campaign.plan import written
from fastflower.campaign.results import Grid
from fastflower.evaluation.figures import STYLE, Chart, canvas


def heat_map(grid: Grid, title: str) -> Chart:
    """Mean scores as colours and numbers, the best region framed, the best cell framed twice."""
    rows, columns = grid.mean.shape
    with matplotlib.rc_context(STYLE):
        figure, axes = canvas(height=max(2.4, 1.3 + 0.42 * rows))
        axes.grid(False)
        low, high = float(np.nanmin(grid.mean)), float(np.nanmax(grid.mean))
        # colours are for the upper half: one diverged cell must not make all others look alike
        floor = max(low, float(np.nanmedian(grid.mean)) - 2 * (high - float(np.nanmedian(grid.mean)) + 1e-3))
        image = axes.imshow(grid.mean, cmap="viridis", vmin=floor, vmax=high, origin="lower", aspect="auto")
        for row in range(rows):
            for column in range(columns):
                value = grid.mean[row, column]
                text = "failed" if np.isnan(value) else f"{value:.4f}"
                dark = not np.isnan(value) and value < floor + 0.6 * (high - floor)
                axes.text(column, row, text, ha="center", va="center", color="white" if dark else "black")
                if grid.region[row, column]:
                    best = (row, column) == grid.best
                    inset = 0.44
                    axes.add_patch(
                        Rectangle(
                            (column - inset, row - inset), 2 * inset, 2 * inset,
                            fill=False, edgecolor="#d1570c", linewidth=3.2 if best else 1.4,
                        )
                    )  # fmt: skip
        axes.set_xticks(range(columns), [written(value) for value in grid.xs])
        axes.set_yticks(range(rows), [written(value) for value in grid.ys])
        axes.set_xlabel(grid.x)
        axes.set_ylabel(grid.y)
        axes.set_title(title)
        for spine in axes.spines.values():
            spine.set_visible(False)
        figure.colorbar(image, ax=axes, label="score", extend="min" if floor > low else "neither")
    return Chart("campaign", title, "; ".join(grid.sentences()), figure)
