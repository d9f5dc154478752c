"""The verdict that opens the page of an experiment: three sentences, each from recorded numbers with n and interval."""

from __future__ import annotations

from typing import Any

from fastflower.evaluation.records import CorruptedScores, ExperimentScores, Top1
from fastflower.evaluation.summary import fold_names
from fastflower.report import curves
from fastflower.report.experiment import Experiment


def verdict(experiment: Experiment) -> list[str]:
    """Three sentences: how often the members are right, what corruptions cost, and what most limits these numbers."""
    return [accuracy(experiment), robustness(experiment.scores), limits(experiment)]


def percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def interval(block: Top1) -> str:
    return f"95% interval {100 * block.top1_low:.1f} to {100 * block.top1_high:.1f}"


def kind_name(kind: str) -> str:
    return {"jpeg": "JPEG"}.get(kind, kind.rpartition(":")[2].replace("_", " "))


def upper_first(text: str) -> str:
    return text[:1].upper() + text[1:]


def accuracy(experiment: Experiment) -> str:
    """Clean top-1 with its basis; beside it what the most frequent class reaches, where that says something."""
    scores, noun = experiment.scores, experiment.noun
    fused, clean = scores.fused, scores.fused.clean
    if scores.missing:
        basis = f"{noun} of {fold_names(fused.folds)} of {len(scores.folds)}"
    elif len(scores.folds) == 1:
        basis = f"{noun} of one held-out split"
    else:
        basis = f"{noun}, each by members that were not trained on it,"
    wrong = f"{len(scores.wrong)} wrong" if scores.wrong else "none wrong"
    text = f"{percent(clean.top1)} of {fused.n} {basis} are classified correctly ({interval(clean)}, {wrong})"
    largest = max(scores.classes, key=lambda row: row.n)
    majority, name = largest.n / fused.n, largest.name or largest.category_id
    if clean.top1_low <= majority:
        text += f", which is not certain to be more than always answering “{name}” ({percent(majority)})"
    elif len(scores.classes) == 2:
        text += f"; always answering “{name}” would reach {percent(majority)}"
    return f"{text}."


def worst_kind(corrupted: CorruptedScores) -> str:
    return max(corrupted.kinds, key=lambda kind: corrupted.kinds[kind].drop)


def robustness(scores: ExperimentScores) -> str:
    """The cost of corruptions and the costliest kind."""
    corrupted, clean = scores.fused.corrupted, scores.fused.single
    if corrupted is None:
        return "Nothing is known about disturbed images: no corrupted copies were scored (robust.enabled)."
    worst = worst_kind(corrupted)
    row, count = corrupted.kinds[worst], len(corrupted.combos)
    mean = f" (mean of {count} corruptions, n = {corrupted.n}, {interval(corrupted)})"
    mean = mean if count > 1 else f" (n = {corrupted.n}, {interval(corrupted)})"
    if corrupted.drop <= 0:
        return f"Corrupted copies cost nothing: {percent(corrupted.top1)} of them are right{mean}."
    text = f"Of corrupted copies {percent(corrupted.top1)} are right{mean}, {100 * corrupted.drop:.1f} points fewer"
    text += f" than the {percent(clean.top1)} of clean ones at the same single view"
    if len(corrupted.kinds) == 1:
        return f"{text}."
    return (
        f"{text}; {kind_name(worst)} costs most, {100 * row.drop:.1f} points "
        f"(to {percent(row.top1)}, {interval(row)})."
    )


def limits(experiment: Experiment) -> str:
    """The strongest limit of the first two sentences: a broken run, a missed threshold, the test set, or the n."""
    scores = experiment.scores
    broken = broken_runs(experiment)
    if broken:
        more = f", and {len(broken) - 1} more runs broke off" if len(broken) > 1 else ""
        return f"{broken[0]}{more}: these are the scores of a training that did not end well."
    missed = [row for row in scores.acceptance if not row.passed]
    if missed:
        row = missed[0]
        amount = (lambda value: f"{value:.4f}") if row.metric else percent
        got = "was not measured" if row.got is None else f"is {amount(row.got)}"
        if row.top1_low is not None and row.top1_high is not None:
            low, high = (amount(end).rstrip("%") for end in (row.top1_low, row.top1_high))
            got += f" (n = {row.n}, 95% interval {low} to {high})"
        more = f"; {len(missed) - 1} more thresholds are missed" if len(missed) > 1 else ""
        return f"The recipe accepts {row.bound} {amount(row.wanted)} for {row.name}, which {got}{more}."
    if experiment.test_scores:
        return test_sentence(experiment)
    return spread_sentence(experiment)


def test_sentence(experiment: Experiment) -> str:
    """The first submission on the labelled test images, against the interval of the held-out ones."""
    row, clean = experiment.test_scores[0], experiment.scores.fused.clean
    score = row.score
    place = (
        "above" if score.top1_low > clean.top1_high else
        "below" if score.top1_high < clean.top1_low else
        "in agreement with"
    )  # fmt: skip
    return (
        f"On {score.n} test {experiment.noun} whose labels are known, {row.name} is right for {percent(score.top1)} "
        f"({interval(score)}), {place} the estimate from held-out {experiment.noun}."
    )


def spread_sentence(experiment: Experiment) -> str:
    """The scatter over folds, or the width of the interval of one split."""
    scores, noun = experiment.scores, experiment.noun
    clean, run = scores.fused.clean, scores.runs[0]
    spread = run.over_folds.get("clean.top1")
    width = f"{100 * (clean.top1_high - clean.top1_low):.1f} points wide"
    if spread is not None and spread.std is not None:
        of = f" of {run.name}" if len(scores.runs) > 1 else ""
        return (
            f"Clean top-1{of} varies by a standard deviation of {100 * spread.std:.1f} points over {len(run.folds)} "
            f"folds, and the interval of all {scores.fused.n} {noun} is {width}: smaller differences between recipes "
            "need a paired comparison."
        )
    return (
        f"With {scores.fused.n} {noun} of one fold the interval is {width}: a recipe that differs by less cannot be "
        "told from this one."
    )


def _losses(row: dict[str, Any]) -> tuple[str, ...]:
    """The losses that an epoch has; one that was not scored has no validation loss."""
    return ("train_loss",) if "score" in row and row["score"] is None else ("train_loss", "val_loss")


def broken_runs(experiment: Experiment) -> list[str]:
    """A clause for each run with a loss that is not finite, or that has no end among the events."""
    clauses = []
    for key, rows in curves.rows_by_run(experiment.events).items():
        name = "{} fold {} seed {}".format(*key)
        lost = [
            row["epoch"]
            for row in rows
            if row.get("event") == "epoch" and any(loss in row and row[loss] is None for loss in _losses(row))
        ]
        start = next((row for row in reversed(rows) if row.get("event") == "start"), None)
        epochs = [row["epoch"] for row in rows if row.get("event") == "epoch"]
        if lost:
            clauses.append(f"{name} diverged: its loss was not finite in epoch {lost[0]}")
        elif start and not any(row.get("event") == "end" for row in rows):
            planned = start.get("epochs", "?")
            clauses.append(f"{name} broke off after epoch {max(epochs, default=0)} of {planned}")
    return clauses
