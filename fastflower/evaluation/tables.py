"""scores.json as tables: for the console, and as CSV files with the organiser's category ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from fastflower.core import files
from fastflower.core.charts import STYLE, Chart, canvas
from fastflower.core.tables import write_csv
from fastflower.evaluation.summary import named

Row = dict[str, Any]
Cells = list[list[int]]  # of a confusion matrix: true class_idx, predicted class_idx, images


def console(summary: dict[str, Any]) -> list[list[str]]:
    """The console's table: a header, a row for each member, run and the fused set."""
    header = [
        "",
        "n",
        "single",
        "views",
        "95%",
        "corrupted",
        "S",
        "macro F1",
        "NLL",
        "ECE",
        "T",
        "NLL/T",
        "ECE/T",
    ]
    rows = [header]
    labels = [
        *((f"{row['backbone']} fold {row['fold']} seed {row['seed']}", row) for row in summary["members"]),
        *((f"{row['name']}, {named(row['folds'])}", row) for row in summary["runs"] if len(row["folds"]) > 1),
    ]
    if len(summary["runs"]) > 1:
        labels.append((f"fused, {named(summary['fused']['folds'])}", summary["fused"]))
    for label, row in labels:
        clean, t = row["clean"], row["temperature"] or {}
        rows.append(
            [
                label,
                str(row["n"]),
                _number(row["single"]["top1"]),
                _number(clean["top1"]),
                f"{clean['top1_low']:.3f}-{clean['top1_high']:.3f}",
                _number(row["corrupted"] and row["corrupted"]["top1"]),
                _number(row["s"]["top1"]),
                _number(clean["macro_f1"]),
                _number(clean["nll"]),
                _number(clean["ece"]),
                _number(t.get("t"), 3),
                _number(t.get("nll_after")),
                _number(t.get("ece_after")),
            ]
        )
    return rows


def methods(compared: Row) -> list[list[str]]:
    """The console's table of ensembling methods."""
    rows = [["", "top-1", "95%", "macro F1", "NLL", "gain", "by part", "MB", "ms", "hand-in"]]
    for row in compared["rows"]:
        interval, gain = f"{row['top1_low']:.3f}-{row['top1_high']:.3f}", f"{row['gain']:+.4f}"
        parts = f"{min(row['gains']):+.4f} to {max(row['gains']):+.4f}"
        numbers = [_number(row["top1"]), interval, _number(row["macro_f1"]), _number(row["nll"]), gain, parts]
        cost = [_number(row["mb"], 1), _number(row["ms"], 1), handed_in(row)]
        rows.append([row["method"], *numbers, *cost])
    return rows


def handed_in(row: Row) -> str:
    """Whether a method of ensembling can be handed in, in a word or two."""
    return "no predictor" if row["mb"] is None else "fits" if row["fits"] else "too large"


def _number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def save(folder: Path, summary: dict[str, Any]) -> None:
    """Write every table as CSV and the confusion matrices as PNG too, in place of those of an earlier evaluation."""
    for old in [*folder.glob("*.csv"), *folder.glob("*.png")]:
        old.unlink()
    for name, rows in reports(summary).items():
        write_csv(folder / f"{name}.csv", rows)
    for name, cells in confusions(summary).items():
        picture = confusion_chart(cells, [row["category_id"] for row in summary["classes"]])
        files.write_atomic(folder / f"{name}.png", picture.png())


def confusions(summary: dict[str, Any]) -> dict[str, Cells]:
    """name of the file -> the confusion matrix of the fused set, and of each fold where there are several."""
    by_fold = {f"confusion_fold{fold}": cells for fold, cells in summary["confusion_by_fold"].items()}
    return {"confusion": summary["confusion"], **(by_fold if len(by_fold) > 1 else {})}


def reports(summary: dict[str, Any]) -> dict[str, list[Row]]:
    """name of the CSV file -> its rows: about the fused set, or about each member where the name says so."""
    ids = [row["category_id"] for row in summary["classes"]]
    corrupted = summary["fused"]["corrupted"]
    tables = {
        "per_class": summary["classes"],
        **{name: _matrix(cells, ids) for name, cells in confusions(summary).items()},
        "mistakes": [_mistake(row, ids) for row in summary["mistakes"]],
        "suspects": [{**_mistake(row, ids), "suggested": ids[row["other"]]} for row in summary["suspects"]],
        "corruption": corrupted["combos"] if corrupted else [],
        "corruption_members": [
            {**{key: member[key] for key in ("backbone", "fold", "seed")}, **row}
            for member in summary["members"]
            for row in (member["corrupted"] or {"combos": []})["combos"]
        ],
        "corruption_classes": [
            {"category_id": ids[row["class_idx"]], **row} for row in summary["robust_classes"]
        ],
    }
    return {name: rows for name, rows in tables.items() if rows}


def _matrix(cells: Cells, ids: list[str]) -> list[Row]:
    """A row for each true class, a column for each predicted one, images in the cells."""
    counts = {(true, guess): count for true, guess, count in cells}
    return [
        {"category_id": own, **{other: counts.get((i, j), 0) for j, other in enumerate(ids)}}
        for i, own in enumerate(ids)
    ]


def _mistake(row: Row, ids: list[str]) -> Row:
    return {
        "filename": row["filename"],
        "fold": row["fold"],
        "category_id": ids[row["label"]],
        "predicted": ids[row["guess"]],
        "p_predicted": row["p_guess"],
        "p_label": row["p_label"],
        "loss": row["loss"],
        "top_ids": " ".join(ids[c] for c, _ in row["top"]),
        "top_probabilities": " ".join(f"{p:.6f}" for _, p in row["top"]),
    }


def confusion_chart(cells: list[list[int]], ids: list[str]) -> Chart:
    """The confusion matrix as a picture, rows of true classes scaled to 1, for where there is no page."""
    matrix = np.zeros((len(ids), len(ids)))
    for true, guess, count in cells:
        matrix[true, guess] = count
    matrix /= np.maximum(matrix.sum(1, keepdims=True), 1)
    named, title = len(ids) <= 30, "Confusion matrix, shares of each true class"
    with matplotlib.rc_context(STYLE):
        figure, axes = canvas(4.6)
        axes.grid(False)
        axes.imshow(matrix, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        if named:
            axes.set_xticks(range(len(ids)), ids, rotation=90)
            axes.set_yticks(range(len(ids)), ids)
        what = "category_id" if named else "class_idx"
        axes.set(xlabel=f"predicted {what}", ylabel=f"true {what}", title=title)
    return Chart("confusion", "Confusion matrix", f"{title}.", figure)
