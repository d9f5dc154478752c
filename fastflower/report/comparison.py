"""Experiments beside each other: paired differences on the images they share, keys that differ, curves of S."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fastflower.core import scores
from fastflower.core.charts import Chart
from fastflower.recipe import Recipe, fields_of
from fastflower.report import curves
from fastflower.report.charts import Lines, intervals, over_epochs


def pairs(summaries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every later experiment against the first, on the images that both predicted.

    The interval is that of a mean of paired differences (-1, 0, 1); whether an image is right is in
    scores.json as the list of wrong ones.
    """
    first, rows = summaries[0], []
    for other in summaries[1:]:
        alike = all(first[key] == other[key] for key in ("class_hash", "folds_hash"))
        folds = set(first["fused"]["folds"]) & set(other["fused"]["folds"]) if alike else set()
        row: dict[str, Any] = {"a": first["exp"], "b": other["exp"]}
        row["n"] = sum(count for fold, count in first["sizes"] if fold in folds)
        if row["n"]:
            before, after = (
                {index for index, fold in summary["wrong"] if fold in folds} for summary in (first, other)
            )
            row |= {"gained": len(before - after), "lost": len(after - before)}
            row |= difference(row["gained"], row["lost"], row["n"])
        rows.append(row)
    return rows


def difference(gained: int, lost: int, n: int) -> dict[str, float]:
    """Mean paired difference of top-1 with its 95% interval (normal approximation)."""
    mean = (gained - lost) / n
    spread = scores.Z * math.sqrt(max((gained + lost) / n - mean**2, 0) / n)
    return {"difference": mean, "low": mean - spread, "high": mean + spread}


def scores_chart(summaries: list[dict[str, Any]]) -> Chart:
    """Clean and corrupted top-1 and S of each experiment."""
    blocks = {"clean": "clean", "corrupted": "corrupted", "S": "s"}
    rows = [
        (summary["exp"], name, own["top1"], own["top1_low"], own["top1_high"])
        for name, key in blocks.items()
        for summary in summaries
        if (own := summary["fused"][key])
    ]
    said = "; ".join(f"{exp} {name} {100 * value:.1f}%" for exp, name, value, *_ in rows)
    return intervals(
        "compare-scores", "Scores with 95% intervals", rows=rows, line=None, words=f"Scores: {said}."
    )


def pairs_chart(rows: list[dict[str, Any]]) -> Chart | None:
    """The paired differences beside none; None where nothing is shared."""
    known = [(row["b"], "", row["difference"], row["low"], row["high"]) for row in rows if row["n"]]
    if not known:
        return None
    said = "; ".join(f"{exp} {100 * value:+.2f} points" for exp, _, value, *_ in known)
    words = f"Change of top-1 against {rows[0]['a']}: {said}."
    return intervals("compare-pairs", "Change of top-1, image by image", rows=known, line=0.0, words=words)


def differing(recipes: dict[str, Recipe]) -> list[dict[str, Any]]:
    """The keys whose values are not the same in all recipes; the experiment's name apart."""
    values = {
        name: {dotted: value for dotted, value, _ in fields_of(recipe)} for name, recipe in recipes.items()
    }
    keys = next(iter(values.values()), {})
    return [
        {"key": key, "values": [str(own[key]) for own in values.values()]}
        for key in keys
        if key != "exp.name" and any(own[key] != keys[key] for own in values.values())
    ]


def charts(events: dict[str, list[dict[str, Any]]], prefix: str) -> list[Chart]:
    """S, clean and corrupted top-1 of the better of raw and EMA, a line for each name: the mean over its runs."""
    wanted = {"s": "S", "clean": "Clean top-1", "corrupt": "Corrupted top-1"}
    found = []
    for stem, title in wanted.items():
        lines = Lines(title, percent=True, best="max")
        for name, rows in events.items():
            by_epoch: dict[int, list[float]] = {}
            for epochs in curves.by_run(rows).values():
                for epoch, numbers in epochs.items():
                    own = [v for key, v in numbers.items() if curves.chart_of(key) == stem]
                    if own:
                        by_epoch.setdefault(epoch, []).append(max(own))
            if by_epoch:
                order = sorted(by_epoch)
                lines.series[name] = (order, [float(np.mean(by_epoch[epoch])) for epoch in order])
        if lines.series:
            found.append(over_epochs(f"{prefix}-{stem}", lines, []))
    return found
