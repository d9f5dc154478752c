"""The scores of an experiment as its page shows them: lines at the top, rows of tables, sentences on their basis."""

from __future__ import annotations

import time
from typing import Any

from fastflower.core.metric import parse
from fastflower.evaluation.records import ExperimentScores
from fastflower.evaluation.summary import fold_names
from fastflower.report.experiment import Experiment


def lead(experiment: Experiment) -> str:
    """One line on the experiment: backbones, members, classes, images."""
    scores = experiment.scores
    backbones = list(dict.fromkeys(row.backbone for row in scores.runs))
    members, classes = len(scores.members), len(scores.classes)
    return (
        f"{' and '.join(backbones)} · {members} member{'s' if members != 1 else ''} · {classes} classes · "
        f"{scores.fused.n} {experiment.noun}, each predicted by a member that was not trained on it"
    )


def training_facts(experiment: Experiment) -> str:
    """One line on the trainings: their day, device, epochs, minutes and parameters, as far as they are recorded."""
    ends = [row for row in experiment.events if row.get("event") == "end"]
    words = []
    if ends and all(isinstance(row.get("time"), float) for row in ends):
        words.append(time.strftime("trained %Y-%m-%d", time.localtime(max(row["time"] for row in ends))))
    if numbers := experiment.numbers:
        words.append(f"on {numbers.world_size} × {numbers.device}")
        words.append(f"{numbers.parameters / 1e6:.1f} M parameters")
    if ends and all(isinstance(row.get("seconds"), (int, float)) for row in ends):
        minutes = sum(row["seconds"] for row in ends) / 60
        words.append(f"{sum(row['epochs'] for row in ends)} epochs in {minutes:.1f} minutes")
    return " · ".join(words)


def about_s(experiment: Experiment) -> str:
    """The formula of S with its numbers, and the choice that it makes."""
    scores, recipe = experiment.scores, experiment.recipe
    clean, corrupted, s = scores.fused.single, scores.fused.corrupted, scores.fused.s
    if corrupted is None:
        return "S equals clean top-1 at a single view, because no corrupted images were scored."
    formula = (
        f"S = {scores.alpha:.2f} × {100 * clean.top1:.1f} + {1 - scores.alpha:.2f} × {100 * corrupted.top1:.1f} "
        f"= {100 * s.top1:.1f}: clean and corrupted top-1 at a single view, weighted by select.alpha."
    )
    if recipe is None:
        return formula
    if recipe.select.metric == "combo":
        return f"{formula} It chose the best epoch of each run, so that disturbed photographs count too."
    chosen = scores.fused.selected
    value = f", here {chosen.value:.4f} ({chosen.low:.4f} to {chosen.high:.4f})," if chosen else ""
    return f"{formula} It is shown for comparison: select.metric={recipe.select.metric}{value} chose the best epochs."


def fold_sizes(scores: ExperimentScores) -> dict[int, int]:
    """fold -> number of validation images."""
    return {member.fold: member.n for member in scores.members}


def overview(scores: ExperimentScores) -> list[dict[str, Any]]:
    """One row for each score of the fused set: name, how it is measured, value, ends of the interval, n."""
    fused = scores.fused
    clean, single, corrupted, t = fused.clean, fused.single, fused.corrupted, fused.temperature
    views, single_view = "mean of the views", "single view"

    def row(name: str, how: str, *, block: object, key: str, percent: bool = True) -> dict[str, Any]:
        value, low, high = (getattr(block, f"{key}{end}", None) for end in ("", "_low", "_high"))
        return {
            "name": name,
            "how": how,
            "value": value,
            "low": low,
            "high": high,
            "n": fused.n,
            "percent": percent,
        }

    rows = [
        row("Clean top-1", views, block=clean, key="top1"),
        row("Clean top-1", single_view, block=single, key="top1"),
    ]
    if corrupted:
        how = f"{single_view}, mean of {len(corrupted.combos)}"
        rows.append(row("Corrupted top-1", how, block=corrupted, key="top1"))
    rows += [
        row("S", single_view, block=fused.s, key="top1"),
        *by_metric(scores),
        *([row("Clean top-5", views, block=clean, key="top5")] if len(scores.classes) > 5 else []),
        row("Macro recall", views, block=clean, key="macro_recall"),
        row("Macro F1", views, block=clean, key="macro_f1"),
        row("NLL", views, block=clean, key="nll", percent=False),
        row("Calibration error", f"{views}, T = 1", block=clean, key="ece"),
    ]
    if len(scores.classes) == 2:
        second = scores.classes[1].name or scores.classes[1].category_id
        names = {"precision": "Precision", "recall": "Recall", "f1": "F1"}
        rows[-3:-3] = [row(f"{name} of {second}", views, block=clean, key=key) for key, name in names.items()]
    if t:
        how = f"{views}, T = {t.t:.3f}"
        rows.append(row("NLL", how, block=t, key="nll_after", percent=False))
        rows.append(row("Calibration error", how, block=t, key="ece_after"))
    return rows


def by_metric(scores: ExperimentScores) -> list[dict[str, Any]]:
    """The row of the score by select.metric, unless that has a row of its own."""
    chosen = scores.fused.selected
    if chosen is None or chosen.metric in ("clean", "combo"):
        return []
    title = parse(chosen.metric).title
    values = {"value": chosen.value, "low": chosen.low, "high": chosen.high}
    return [
        {
            "name": title[:1].upper() + title[1:],
            "how": "select.metric, mean of the views",
            **values,
            "n": chosen.n,
            "percent": False,
        }
    ]


def confusions(scores: ExperimentScores, max_rows: int = 100) -> list[dict[str, int]]:
    """The off-diagonal cells of the confusion matrix, largest fraction of the true class first."""
    n = {row.class_idx: row.n for row in scores.classes}
    cells = [(label, guess, count) for label, guess, count in scores.confusion if label != guess]
    cells.sort(key=lambda cell: (-cell[2] / n[cell[0]], -cell[2]))
    return [{"label": label, "guess": guess, "count": count} for label, guess, count in cells[:max_rows]]


def corrupted_recalls(scores: ExperimentScores) -> dict[str, Any] | None:
    """Recall of each class (rows) under each (kind, level) of corruption (columns); None without corruptions."""
    rows = scores.robust_classes
    columns = list(dict.fromkeys((row.kind, row.level) for row in rows))
    table: dict[int, list[float | None]] = {}
    for row in rows:
        recalls = table.setdefault(row.class_idx, [None] * len(columns))
        recalls[columns.index((row.kind, row.level))] = row.recall
    order = sorted(table, key=lambda c: sum(value or 0 for value in table[c]))
    return {"columns": columns, "rows": [(c, table[c]) for c in order]} if rows else None


def basis(scores: ExperimentScores, noun: str = "images") -> str:
    """The images or pairs that the headline scores are computed on, in a sentence."""
    fused, missing = scores.fused, scores.missing
    method = f"the mean logits of {len(scores.runs)} runs" if len(scores.runs) > 1 else "one run"
    if missing:
        incomplete = f"{fold_names(missing)} {'has' if len(missing) == 1 else 'have'} no member"
        return (
            f"{fold_names(fused.folds).capitalize()} of {len(scores.folds)} ({fused.n} {noun}), {method}; "
            f"{incomplete}, so these scores do not cover all {noun}."
        )
    if len(scores.folds) == 1:
        return f"One held-out split: each of its {fused.n} {noun} exactly once, {method}."
    return f"Out-of-fold over all {len(scores.folds)} folds: each of {fused.n} {noun} exactly once, {method}."


def view_names(views: list[tuple[int, int, bool]]) -> str:
    sizes = dict.fromkeys(f"{h}" if h == w else f"{h}x{w}" for h, w, _ in views)
    mirrored = " pixels, plain and mirrored" if any(flip for _, _, flip in views) else " pixels"
    return " and ".join(sizes) + mirrored + moved_text(len(views), len(set(views)))


def moved_text(views: int, plain: int) -> str:
    """The number of views where some of them are turned, shifted or cut; empty where all are plain."""
    return f"; {views} views with those that are turned, shifted or cut" if views > plain else ""
