"""Paired differences of two experiments by every metric, from the saved logits of the images that both predicted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastflower.core import metric, runs
from fastflower.core.errors import InputError
from fastflower.core.tables import read_csv
from fastflower.evaluation import mistakes, summary
from fastflower.evaluation.logits import FusedInfo, Logits
from fastflower.evaluation.selected import bootstrapped, scorer
from fastflower.report.experiment import Experiment

Fused = Logits[FusedInfo]
ALWAYS = ("corrupted", "combo", "macro_recall", "macro_f1", "log_loss")  # top-1 has a table of its own


@dataclass(frozen=True)
class MetricDifference:
    """An experiment's value of a metric, the baseline's, and their difference with its 95% interval, on n images.

    `better` is None where the interval includes 0. A loss is positive, and better where it falls.
    """

    experiment: str
    metric: str
    n: int
    baseline: float
    value: float
    difference: float
    low: float
    high: float
    better: bool | None


def metric_differences(experiments: Sequence[Experiment]) -> tuple[list[MetricDifference], list[str]]:
    """Each later experiment against the first by every metric, and notes on what could not be compared."""
    rows, notes = [], []
    first, *others = experiments
    try:
        before = fused(first)
    except InputError as error:
        return [], [f"{first.name}: {error}"]
    for other in others:
        try:
            rows += list(_compared(first, before, other=other, after=fused(other)))
        except InputError as error:
            notes.append(f"{other.name}: {error}")
    return rows, notes


def fused(experiment: Experiment) -> Fused:
    """The fused out-of-fold logits that an experiment's scores.json describes; InputError when they are not there."""
    folder, scores = runs.RESULTS / experiment.name, experiment.scores
    if experiment.recipe is None:
        raise InputError("its recipe cannot be read, so its runs cannot be fused")
    used: dict[str, Any] = {
        "weighting": scores.weighting,
        "weights": scores.hand_weights,
        "average": scores.space,
    }
    ensembling = replace(experiment.recipe.ensembling, **used)
    folds = np.array([int(row["fold"]) for row in read_csv(folder / "meta" / "folds.csv", ("fold",))])
    members = summary.load_member_logits(folder)
    _, together, _ = summary.fused_set(members, folds, replace(experiment.recipe, ensembling=ensembling))
    if sorted(mistakes.wrong_images(together)) != sorted(scores.wrong):
        raise InputError(
            "its saved logits are not those of scores.json; run python -m fastflower.evaluate again"
        )
    return together


def _compared(
    first: Experiment, before: Fused, *, other: Experiment, after: Fused
) -> Iterator[MetricDifference]:
    """The differences on the images of the folds that both predicted; none where their folds or classes differ."""
    if any(getattr(first.scores, key) != getattr(other.scores, key) for key in ("class_hash", "folds_hash")):
        return
    shared = np.intersect1d(before.index, after.index)
    if not len(shared):
        return
    pair = [data.take(np.flatnonzero(np.isin(data.index, shared))) for data in (before, after)]
    pair = [data.take(np.argsort(data.index)) for data in pair]
    same_corruptions = all(np.array_equal(data.combos, pair[0].combos) and len(data.combos) for data in pair)
    chosen = [experiment.recipe.select.metric for experiment in (first, other) if experiment.recipe]
    for text in dict.fromkeys((*ALWAYS, *chosen)):
        if text == "clean" or (metric.parse(text).needs_corrupted and not same_corruptions):
            continue
        if text == "combo" and not same_corruptions:
            continue  # it would be clean top-1
        row = _difference(text, pair, alpha=first.scores.alpha)
        if row is not None:
            yield replace(row, experiment=other.name)


def _difference(text: str, pair: Sequence[Fused], *, alpha: float) -> MetricDifference | None:
    """The difference of two sets of the same images in the same order; None where a value is not finite."""
    ours, theirs = (scorer(data, text, alpha) for data in pair)
    everything = np.arange(len(pair[0]))
    baseline, value = ours(everything), theirs(everything)
    if not np.isfinite([baseline, value]).all():
        return None
    low, high = bootstrapped(pair[0].class_idx, lambda rows: theirs(rows) - ours(rows))
    rise = None if low <= 0 <= high else low > 0
    falls = text == metric.LOSS
    title = metric.parse(text).title
    return MetricDifference(
        experiment="",
        metric=title[:1].upper() + title[1:],
        n=len(everything),
        baseline=baseline,
        value=value,
        difference=value - baseline,
        low=low,
        high=high,
        better=rise if rise is None else rise != falls,
    )
