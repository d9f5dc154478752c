"""Scores as tables: for the console, and as CSV files with the organiser's category ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from fastflower.core import files
from fastflower.core.charts import Chart, axis_label, canvas, chart_style
from fastflower.core.metric import parse
from fastflower.core.records import to_plain
from fastflower.core.scores import BINARY
from fastflower.core.tables import write_csv
from fastflower.evaluation.records import (
    ClassScores,
    CorruptionScores,
    EnsembleComparison,
    ExperimentScores,
    ImageScores,
    MethodScores,
    SetScores,
)
from fastflower.evaluation.summary import fold_names

Row = dict[str, Any]
Cells = list[tuple[int, int, int]]  # of a confusion matrix: label, guess, images


SCORES = ("n", "single", "views", "95%", "corrupted", "S", "macro F1", "NLL", "ECE", "T", "NLL/T", "ECE/T")

COLUMNS = ("clean", "combo", "macro_f1", "log_loss")  # select.metric of these has a column anyway


def score_table(scores: ExperimentScores) -> list[list[str]]:
    """The console's table of scores: a header, a row for each member, run and the fused set."""
    rows = [
        *(_score_row(f"{row.backbone} fold {row.fold} seed {row.seed}", row) for row in scores.members),
        *(
            _score_row(f"{row.name}, {fold_names(row.folds)}", row)
            for row in scores.runs
            if len(row.folds) > 1
        ),
    ]
    if len(scores.runs) > 1:
        rows.append(_score_row(f"fused, {fold_names(scores.fused.folds)}", scores.fused))
    return [["", *SCORES, *_own_column(scores)], *rows]


def experiment_table(experiments: Sequence[ExperimentScores]) -> list[list[str]]:
    """The console's table of several experiments: a header, and a row for the fused set of each."""
    rows = [
        _score_row(f"{scores.exp}, {fold_names(scores.fused.folds)}", scores.fused)[: len(SCORES) + 1]
        for scores in experiments
    ]
    return [["", *SCORES], *rows]


def _score_row(label: str, row: SetScores) -> list[str]:
    clean, temperature = row.clean, row.temperature
    return [
        label,
        str(row.n),
        _number(row.single.top1),
        _number(clean.top1),
        f"{clean.top1_low:.3f}-{clean.top1_high:.3f}",
        _number(row.corrupted.top1 if row.corrupted else None),
        _number(row.s.top1),
        _number(clean.macro_f1),
        _number(clean.nll),
        _number(clean.ece),
        _number(temperature.t if temperature else None, 3),
        _number(temperature.nll_after if temperature else None),
        _number(temperature.ece_after if temperature else None),
        *([_number(row.selected.value)] if row.selected and row.selected.metric not in COLUMNS else []),
    ]


def _own_column(scores: ExperimentScores) -> list[str]:
    """The heading of select.metric, where it is none of the columns."""
    chosen = scores.fused.selected
    return [parse(chosen.metric).title] if chosen and chosen.metric not in COLUMNS else []


def method_table(comparison: EnsembleComparison) -> list[list[str]]:
    """The console's table of ensembling methods."""
    rows = [["", "top-1", "95%", "macro F1", "NLL", "gain", "95%", "p", "by part", "MB", "ms", "hand-in"]]
    for row in comparison.rows:
        interval, gain = f"{row.top1_low:.3f}-{row.top1_high:.3f}", f"{row.gain:+.4f}"
        by_part = f"{min(row.gains):+.4f} to {max(row.gains):+.4f}"
        over = row.over_best
        paired = [f"{over.low:+.4f} to {over.high:+.4f}", over.p_text] if over else ["-", "-"]
        numbers = [
            _number(row.top1),
            interval,
            _number(row.macro_f1),
            _number(row.nll),
            gain,
            *paired,
            by_part,
        ]
        cost = [_number(row.mb, 1), _number(row.ms, 1), hand_in_verdict(row)]
        rows.append([row.method, *numbers, *cost])
    return rows


def hand_in_verdict(row: MethodScores) -> str:
    """A word or two on whether a method can be handed in."""
    return "no predictor" if row.mb is None else "fits" if row.fits else "too large"


def _number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def write_reports(folder: Path, scores: ExperimentScores) -> None:
    """Write every table as CSV and the confusion matrices also as PNG; those of an earlier evaluation are deleted."""
    for old in [*folder.glob("*.csv"), *folder.glob("*.png")]:
        old.unlink()
    for name, rows in csv_tables(scores).items():
        write_csv(folder / f"{name}.csv", rows)
    for name, cells in confusion_matrices(scores).items():
        chart = confusion_chart(cells, class_labels(scores.classes))
        files.write_atomic(folder / f"{name}.png", chart.png())


def confusion_matrices(scores: ExperimentScores) -> dict[str, Cells]:
    """File name -> the confusion matrix of the fused set, and of each fold where there are several."""
    by_fold = {f"confusion_fold{fold}": cells for fold, cells in scores.confusion_by_fold.items()}
    return {"confusion": scores.confusion, **(by_fold if len(by_fold) > 1 else {})}


def csv_tables(scores: ExperimentScores) -> dict[str, list[Row]]:
    """Name of the CSV file -> its rows; of the fused set, or of each member where the name says so."""
    ids = [row.category_id for row in scores.classes]
    corrupted = scores.fused.corrupted
    tables: dict[str, list[Row]] = {
        "per_class": [to_plain(row) for row in scores.classes],
        **{name: _matrix(cells, ids) for name, cells in confusion_matrices(scores).items()},
        "mistakes": [_mistake(row, ids) for row in scores.mistakes],
        "suspects": [{**_mistake(row, ids), "suggested": ids[row.suggested]} for row in scores.suspects],
        "corruption": [_corruption(row) for row in corrupted.combos] if corrupted else [],
        "corruption_members": [
            {"backbone": member.backbone, "fold": member.fold, "seed": member.seed, **_corruption(row)}
            for member in scores.members
            for row in (member.corrupted.combos if member.corrupted else [])
        ],
        "corruption_classes": [
            {"category_id": ids[row.class_idx], **to_plain(row)} for row in scores.robust_classes
        ],
    }
    return {name: rows for name, rows in tables.items() if rows}


def _corruption(row: CorruptionScores) -> Row:
    """The columns of a corruption; those of two classes only where there are two."""
    first = {"kind": row.kind, "level": row.level}
    scores = {name: value for name, value in vars(row).items() if value is not None or name not in BINARY}
    return first | scores


def _matrix(cells: Cells, ids: list[str]) -> list[Row]:
    """A row for each true class, a column for each predicted one, images in the cells."""
    counts = {(label, guess): count for label, guess, count in cells}
    return [
        {"category_id": label_id, **{guess_id: counts.get((i, j), 0) for j, guess_id in enumerate(ids)}}
        for i, label_id in enumerate(ids)
    ]


def _mistake(row: ImageScores, ids: list[str]) -> Row:
    return {
        "filename": row.filename,
        "fold": row.fold,
        "category_id": ids[row.label],
        "predicted": ids[row.guess],
        "p_predicted": row.p_guess,
        "p_label": row.p_label,
        "loss": row.loss,
        "top_ids": " ".join(ids[c] for c, _ in row.top),
        "top_probabilities": " ".join(f"{p:.6f}" for _, p in row.top),
    }


def class_labels(classes: list[ClassScores]) -> list[str]:
    """The names of classes on an axis, or their ids where there is no name, or none that the font can draw."""
    return [axis_label(row.name, row.category_id) for row in classes]


def confusion_chart(cells: Cells, labels: list[str]) -> Chart:
    """The confusion matrix as a picture, rows of true classes scaled to 1; for reports without a page."""
    matrix = np.zeros((len(labels), len(labels)))
    for label, guess, count in cells:
        matrix[label, guess] = count
    matrix /= np.maximum(matrix.sum(1, keepdims=True), 1)
    named, title = len(labels) <= 30, "Confusion matrix"  # short: long names of classes leave it little room
    with matplotlib.rc_context(chart_style()):
        figure, axes = canvas(4.6)
        axes.grid(False)
        axes.imshow(matrix, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        if named:
            axes.set_xticks(range(len(labels)), labels, rotation=90)
            axes.set_yticks(range(len(labels)), labels)
        unit = "class" if named else "class_idx"
        axes.set(xlabel=f"predicted {unit}", ylabel=f"true {unit}", title=title)
    return Chart(
        "confusion",
        title="Confusion matrix",
        description=f"{title}, fractions of each true class.",
        figure=figure,
    )
