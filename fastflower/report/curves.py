"""Training curves from events.jsonl: a chart for every number that was logged per epoch."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from fastflower.core import scores
from fastflower.core.charts import Chart
from fastflower.report.charts import Lines, over_epochs

Key = tuple[str, int, int]  # backbone, fold, seed
MAIN = ("loss", "clean", "corrupt", "s")  # charts that are looked at first; the page folds the others
NOT_PLOTTED = (
    "epoch",
    "fold",
    "seed",
    "time",
    "best",
    "score",
    "lr_min",
    "lr_max",
)  # shown elsewhere on the page

# (name, chart, pattern of the dotted quantity); the first match wins, a quantity without a match has its own chart
CHARTS: tuple[tuple[str, Lines, str], ...] = (
    ("aux", Lines("Auxiliary columns", percent=True), r"^aux\."),
    ("loss", Lines("Loss"), r"_loss$"),
    ("clean", Lines("Clean top-1", percent=True, best="max"), r"^clean_(raw|ema|swa)$"),
    ("corrupt", Lines("Corrupted top-1", percent=True, best="max"), r"^corrupt_(raw|ema|swa)$"),
    ("s", Lines("S", percent=True, best="max"), r"^s_(raw|ema|swa)$"),
    ("macro", Lines("Macro recall and F1", percent=True, best="max"), r"^macro_(recall|f1)_"),
    ("f1", Lines("F1", percent=True, best="max"), r"^f1_(raw|ema|swa)$"),
    ("auc", Lines("AUC", best="max"), r"^auc_(raw|ema|swa)$"),
    ("kappa", Lines("Quadratic kappa", best="max"), r"^kappa_(raw|ema|swa)$"),
    ("log-loss", Lines("Log loss"), r"^log_loss_(raw|ema|swa)$"),
    ("kind-raw", Lines("Top-1 by corruption, raw", percent=True), r"^per_kind\..*\.raw$"),
    ("kind-ema", Lines("Top-1 by corruption, EMA", percent=True), r"^per_kind\..*\.ema$"),
    ("lr", Lines("Learning rate", log=True), r"^lr_groups\."),
    ("size", Lines("Image size", unit="pixels", steps=True), r"^size"),
    ("speed", Lines("Speed", unit="images/s"), r"^images_per_s$"),
    ("norm", Lines("Gradient norm"), r"^grad_norm$"),
    ("ece", Lines("Calibration error", percent=True), r"^ece_(raw|ema|swa)$"),
    ("top5", Lines("Clean top-5", percent=True), r"^top5_(raw|ema|swa)$"),
    ("train-acc", Lines("Training accuracy, augmented", percent=True), r"^train_acc$"),
    ("patience", Lines("Patience left", unit="epochs", steps=True), r"^patience_left$"),
    ("seconds", Lines("Time", unit="seconds per epoch"), r"seconds$"),
    ("wait", Lines("Time spent waiting for data", percent=True), r"^wait_share$"),
    ("memory", Lines("Peak GPU memory", unit="MB"), r"^gpu_peak_mb$"),
)
# parts of a quantity's name that its chart's title already says
_REDUNDANT = re.compile(
    r"^(clean|corrupt|s|ece|top5|macro)_|^lr_groups\.|^per_kind\.|^aux\.|_loss$|_seconds$|\.(raw|ema|swa)$|, no decay$"
)


@dataclass(frozen=True)
class RunCurves:
    """The charts of one run with its name and a one-line summary."""

    label: str
    note: str
    charts: list[Chart]


def rows_by_run(events: list[dict[str, Any]]) -> dict[Key, list[dict[str, Any]]]:
    """(backbone, fold, seed) -> the events of that run."""
    runs: dict[Key, list[dict[str, Any]]] = {}
    for row in events:
        if all(name in row for name in ("backbone", "fold", "seed")):
            runs.setdefault((str(row["backbone"]), int(row["fold"]), int(row["seed"])), []).append(row)
    return dict(sorted(runs.items()))


def by_run(events: list[dict[str, Any]]) -> dict[Key, dict[int, dict[str, float]]]:
    """(backbone, fold, seed) -> epoch (from 1) -> every number logged in that epoch, by dotted name.

    Runs without an epoch are left out.
    """
    runs: dict[Key, dict[int, dict[str, float]]] = {}
    for key, rows in rows_by_run(events).items():
        for row in rows:
            epoch = row.get("epoch")
            if row.get("event") == "epoch" and type(epoch) is int:
                numbers = flat({name: value for name, value in row.items() if name not in NOT_PLOTTED})
                runs.setdefault(key, {}).setdefault(epoch, {}).update(numbers)
    return runs


def events_by_name(events: list[dict[str, Any]], max_runs: int = 12) -> dict[str, list[dict[str, Any]]]:
    """The events of each run under a short name, for a chart of all runs; empty for one run or for too many."""
    rows, keys = rows_by_run(events), list(by_run(events))
    if not 1 < len(keys) <= max_runs:
        return {}
    varying = [field for field in range(3) if len({key[field] for key in keys}) > 1]
    return {
        " ".join(f"{('', 'fold ', 'seed ')[field]}{key[field]}" for field in varying): rows[key]
        for key in keys
    }


def flat(node: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers of a nested dict by dotted name; a square image size [s, s] is one number, others are two."""
    numbers: dict[str, float] = {}
    for name, value in node.items():
        if isinstance(value, dict):
            numbers |= flat(value, f"{prefix}{name}.")
        elif isinstance(value, list) and len(value) == 2 and all(type(side) is int for side in value):
            sides = {"": value[0]} if value[0] == value[1] else {".height": value[0], ".width": value[1]}
            numbers |= {f"{prefix}{name}{side}": float(number) for side, number in sides.items()}
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            numbers[prefix + name] = float(value)
    return numbers


def series(epochs: dict[int, dict[str, float]]) -> dict[str, tuple[list[int], list[float]]]:
    """quantity -> (epochs, values), in the order in which they were first logged."""
    quantities: dict[str, tuple[list[int], list[float]]] = {}
    for epoch in sorted(epochs):
        for name, value in epochs[epoch].items():
            xs, ys = quantities.setdefault(name, ([], []))
            xs.append(epoch)
            ys.append(value)
    return quantities


def size_changes(quantities: dict[str, tuple[list[int], list[float]]]) -> list[int]:
    """The first epoch of each later image size."""
    xs, ys = next((s for name, s in quantities.items() if re.match(r"size\b|height", name)), ([], []))
    return [x for x, before, value in zip(xs[1:], ys, ys[1:], strict=False) if value != before]


def charts_of(epochs: dict[int, dict[str, float]], prefix: str) -> list[Chart]:
    """A chart for each group of quantities; an ungrouped quantity that never changes has none."""
    quantities = series(epochs)
    changes = size_changes(quantities)
    groups: dict[str, Lines] = {}
    for name, points in quantities.items():
        key = chart_of(name)
        if key is None and len(set(points[1])) == 1:
            continue
        stem = re.sub(r"_(raw|ema|swa)$", "", name)
        lines = next((lines for known, lines, _ in CHARTS if known == key), Lines(_title(stem)))
        group = groups.setdefault(key or re.sub(r"\W", "-", stem), replace(lines, series={}))
        group.series.setdefault(_label(name), points)  # groups with and without weight decay share their lr
    order = [key for key, _, _ in CHARTS]
    names = sorted(groups, key=lambda key: order.index(key) if key in order else len(order))
    return [over_epochs(f"{prefix}-{key}", groups[key], changes) for key in names]


def chart_of(name: str) -> str | None:
    """Name of the chart that a quantity belongs to; None: a chart of its own."""
    return next((key for key, _, pattern in CHARTS if re.search(pattern, name)), None)


def run_curves(events: list[dict[str, Any]]) -> list[RunCurves]:
    """Curves of every run of an experiment."""
    runs, rows_of = [], rows_by_run(events)
    for position, ((backbone, fold, seed), epochs) in enumerate(by_run(events).items()):
        rows = rows_of[backbone, fold, seed]
        note = f"{max(epochs)} epochs"
        best: dict[str, Any] = next((row["best"] for row in reversed(rows) if row.get("best")), {})
        if best.get("score") is not None:
            note += f", best {best['score']:.4f} in epoch {best['epoch']} ({best['weights']})"
        note += "".join(
            f"; {row['reason']}" for row in rows if row.get("event") == "end" and row.get("stopped_early")
        )
        runs.append(
            RunCurves(f"{backbone} fold {fold} seed {seed}", note, charts_of(epochs, f"run{position}"))
        )
    return runs


def best_by_stage(events: list[dict[str, Any]], fold_sizes: dict[int, int]) -> list[dict[str, Any]]:
    """The best epoch of each run at each image size, by the score that chose it (S where none is recorded).

    Clean and corrupted top-1 and S with Wilson intervals; `fold_sizes`: validation images of each fold.
    """
    table = []
    rows = rows_by_run(events)
    for (backbone, fold, seed), epochs in by_run(events).items():
        choices = {
            epoch: _choice(row) for row in rows[backbone, fold, seed] if (epoch := row.get("epoch")) in epochs
        }
        starts = [min(epochs), *size_changes(series(epochs)), max(epochs) + 1]
        for first, after in zip(starts[:-1], starts[1:], strict=True):
            within = [
                (choice, epoch) for epoch, choice in choices.items() if choice and first <= epoch < after
            ]
            if not within or fold not in fold_sizes:
                continue
            (_, weights), epoch = max(within, key=lambda item: (item[0][0], -item[1]))
            numbers, n = epochs[epoch], fold_sizes[fold]
            row: dict[str, Any] = {"backbone": backbone, "fold": fold, "seed": seed, "first": first}
            row |= {"last": after - 1, "epoch": epoch, "weights": weights, "n": n}
            row["size"] = next((numbers[k] for k in ("size", "size.height") if k in numbers), None)
            for key, value in (
                ("clean", numbers.get(f"clean_{weights}")),
                ("corrupted", numbers.get(f"corrupt_{weights}")),
                ("s", numbers.get(f"s_{weights}")),
            ):
                low, high = scores.wilson(value * n, n) if value is not None else (None, None)
                row[key] = value if value is None else {"top1": value, "top1_low": low, "top1_high": high}
            table.append(row)
    return table


def auxiliary(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The validation accuracy of each auxiliary column in the best epoch of each run: run, epoch, weights, column."""
    table = []
    for (backbone, fold, seed), rows in rows_by_run(events).items():
        epochs = [row for row in rows if row.get("event") == "epoch" and row.get("aux")]
        best = next((row["best"]["epoch"] for row in reversed(epochs) if row.get("best")), None)
        row = next((row for row in reversed(epochs) if row["epoch"] == best), None)
        if row is None:
            continue
        run = {"run": f"{backbone} fold {fold} seed {seed}", "epoch": row["epoch"], "weights": row["chosen"]}
        table += [
            {**run, "column": column, "accuracy": values.get(row["chosen"])}
            for column, values in row["aux"].items()
        ]
    return table


def _choice(row: dict[str, Any]) -> tuple[float, str] | None:
    """The score of an epoch's chosen weights and their name; of the highest S, EMA first, where neither is recorded."""
    if row.get("score") is not None and row.get("chosen"):
        return float(row["score"]), str(row["chosen"])
    found = [
        (row[f"s_{name}"], name == "ema", name)
        for name in ("raw", "swa", "ema")
        if row.get(f"s_{name}") is not None
    ]
    return (max(found)[0], max(found)[2]) if found else None


def _title(name: str) -> str:
    return name.replace("_", " ").replace(".", " ").strip().capitalize()


def _label(name: str) -> str:
    """Name of a line in the legend, without the words of the chart's title."""
    label = re.sub(r"[._]", " ", _REDUNDANT.sub("", name)).strip()
    label = {"seconds": "all", "eval": "evaluation", "val": "validation"}.get(label, label)
    return re.sub(r"\bema\b", "EMA", re.sub(r"\bf1\b", "F1", label)) or name
