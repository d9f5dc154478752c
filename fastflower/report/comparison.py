"""Comparison of experiments: paired differences on shared images, recipe keys that differ, score and epoch charts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastflower.core import runs
from fastflower.core.charts import Chart
from fastflower.core.errors import InputError
from fastflower.core.records import read_record
from fastflower.evaluation.paired import PairedGain, gain_of_hits
from fastflower.evaluation.records import EnsembleComparison, ExperimentScores
from fastflower.recipe import Recipe, fields_of
from fastflower.report import curves
from fastflower.report.charts import Interval, Lines, interval_chart, over_epochs
from fastflower.report.experiment import Experiment
from fastflower.report.paired_metrics import metric_differences


@dataclass(frozen=True)
class PairedDifference:
    """An experiment against the baseline on the `n` images that both predicted; no difference when n is 0."""

    baseline: str
    experiment: str
    n: int
    difference: PairedGain | None


@dataclass(frozen=True)
class DifferingKey:
    """A recipe key with its value in each experiment, as text."""

    key: str
    values: list[str]


def content(experiments: Sequence[Experiment]) -> dict[str, Any]:
    """The tables and charts of a comparison, as the templates of both formats read them."""
    differences = paired_differences([experiment.scores for experiment in experiments])
    by_metric, incomparable = metric_differences(experiments)
    recipes = {experiment.name: experiment.recipe for experiment in experiments if experiment.recipe}
    return {
        "experiments": [experiment.scores for experiment in experiments],
        "folds_differ": len({tuple(experiment.scores.fused.folds) for experiment in experiments}) > 1,
        "differences": differences,
        "metric_differences": by_metric,
        "incomparable": incomparable,
        "overview": [
            scores_chart([experiment.scores for experiment in experiments]),
            differences_chart(differences),
        ],
        "names": list(recipes),
        "differing_keys": differing_keys(recipes),
        "charts": epoch_charts({experiment.name: experiment.events for experiment in experiments}, "compare"),
        "ensemble": combination([experiment.name for experiment in experiments]),
    }


def combination(names: Sequence[str]) -> EnsembleComparison | None:
    """The record of `ensemble` on the runs of exactly these experiments; None without one, or when it is damaged."""
    try:
        found = read_record(runs.COMBINATION, EnsembleComparison) if runs.COMBINATION.is_file() else None
    except InputError:  # of an earlier version or damaged: ensemble writes it anew
        return None
    return found if found and {run.partition("/")[0] for run in found.runs} == set(names) else None


def paired_differences(summaries: list[ExperimentScores]) -> list[PairedDifference]:
    """Each later experiment against the first, on the images that both predicted."""
    baseline, *others = summaries
    return [paired_difference(baseline, other) for other in others]


def paired_difference(baseline: ExperimentScores, other: ExperimentScores) -> PairedDifference:
    """Top-1 of `other` minus `baseline`, image by image; every image not listed as wrong was right."""
    comparable = all(getattr(baseline, key) == getattr(other, key) for key in ("class_hash", "folds_hash"))
    folds = set(baseline.fused.folds) & set(other.fused.folds) if comparable else set()
    n = sum(count for fold, count in baseline.sizes if fold in folds)
    difference = None
    if n:
        before, after = (
            {index for index, fold in summary.wrong if fold in folds} for summary in (baseline, other)
        )
        difference = gain_of_hits(n, gained=len(before - after), lost=len(after - before))
    return PairedDifference(baseline.exp, other.exp, n=n, difference=difference)


def scores_chart(summaries: list[ExperimentScores]) -> Chart:
    """Clean and corrupted top-1 and S of each experiment."""
    blocks = {"clean": "clean", "corrupted": "corrupted", "S": "s"}
    intervals = [
        Interval(summary.exp, name, value=block.top1, low=block.top1_low, high=block.top1_high)
        for name, key in blocks.items()
        for summary in summaries
        if (block := getattr(summary.fused, key))
    ]
    values = "; ".join(f"{point.row} {point.series} {100 * point.value:.1f}%" for point in intervals)
    return interval_chart(
        "compare-scores",
        "Scores with 95% intervals",
        intervals=intervals,
        reference=None,
        description=f"Scores: {values}.",
    )


def differences_chart(rows: list[PairedDifference]) -> Chart | None:
    """The paired differences with a line at 0; None when no experiment shares images with the baseline."""
    intervals = [
        Interval(
            row.experiment, "", value=row.difference.gain, low=row.difference.low, high=row.difference.high
        )
        for row in rows
        if row.difference
    ]
    if not intervals:
        return None
    values = "; ".join(f"{point.row} {100 * point.value:+.2f} points" for point in intervals)
    return interval_chart(
        "compare-differences",
        "Paired difference of top-1",
        intervals=intervals,
        reference=0.0,
        description=f"Change of top-1 against {rows[0].baseline}: {values}.",
    )


def differing_keys(recipes: dict[str, Recipe]) -> list[DifferingKey]:
    """The keys whose values differ between the recipes, without the experiment's name."""
    values = [{dotted: value for dotted, value, _ in fields_of(recipe)} for recipe in recipes.values()]
    if not values:
        return []
    return [
        DifferingKey(key, [str(recipe[key]) for recipe in values])
        for key, first in values[0].items()
        if key != "exp.name" and any(recipe[key] != first for recipe in values)
    ]


def epoch_charts(events: dict[str, list[dict[str, Any]]], prefix: str) -> list[Chart]:
    """S, clean and corrupted top-1 over epochs, one line per name: the better of raw and EMA, averaged over runs."""
    titles = {"s": "S", "clean": "Clean top-1", "corrupt": "Corrupted top-1"}
    charts = []
    for chart, title in titles.items():
        lines = Lines(title, percent=True, best="max")
        for name, rows in events.items():
            by_epoch: dict[int, list[float]] = {}
            for epochs in curves.by_run(rows).values():
                for epoch, numbers in epochs.items():
                    values = [v for key, v in numbers.items() if curves.chart_of(key) == chart]
                    if values:
                        by_epoch.setdefault(epoch, []).append(max(values))
            if by_epoch:
                order = sorted(by_epoch)
                lines.series[name] = (order, [float(np.mean(by_epoch[epoch])) for epoch in order])
        if lines.series:
            charts.append(over_epochs(f"{prefix}-{chart}", lines, []))
    return charts
