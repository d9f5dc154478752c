"""Independent computation of a report's numbers from saved logits and events: scikit-learn, torchmetrics or formula."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from scipy.optimize import minimize_scalar
from scipy.special import softmax
from scipy.stats import norm
from sklearn import metrics
from torchmetrics.classification import MulticlassCalibrationError

ALPHA, BINS = 0.7, 15


def p(value: float, digits: int = 1) -> str:
    """A fraction in percent, as tables write it."""
    return f"{100 * value:.{digits}f}"


def kind(name: str) -> str:
    return name.replace("_", " ")


def wilson(hits: float, n: int) -> tuple[float, float]:
    """Wilson's interval as the two roots of (p - x)^2 = z^2 x (1 - x) / n."""
    z, fraction = 1.959963984540054, hits / n
    low, high = sorted(np.roots([1 + z * z / n, -(2 * fraction + z * z / n), fraction * fraction]).real)
    return max(0.0, low), min(1.0, high)


def span(hits: float, n: int) -> str:
    low, high = wilson(hits, n)
    return f"{p(low)}–{p(high)}"


def probabilities(logits: np.ndarray, t: float = 1) -> np.ndarray:
    return softmax(logits.astype(float) / t, axis=-1)


def ece(probs: np.ndarray, labels: np.ndarray) -> float:
    error = MulticlassCalibrationError(probs.shape[1], n_bins=BINS)
    return float(error(torch.from_numpy(probs), torch.from_numpy(labels)))


def nll(probs: np.ndarray, labels: np.ndarray) -> float:
    return metrics.log_loss(labels, probs, labels=range(probs.shape[1]))


def temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """T by a coarse grid and Brent's method on scikit-learn's log loss and SciPy's log density of the prior."""

    def loss(log_t: float) -> float:
        return nll(probabilities(logits, np.exp(log_t)), labels) - norm.logpdf(log_t) / len(labels)

    start = min(np.linspace(-4, 4, 33), key=loss)
    return float(np.exp(minimize_scalar(loss, bracket=(start - 0.25, start, start + 0.25), tol=1e-9).x))


class Set:
    """Logits of a member, a run or the fused set and their scores; images in the order of folds.csv."""

    def __init__(self, members: list[dict[str, Any]]) -> None:
        order = np.argsort(np.concatenate([member["index"] for member in members]))
        self.y, self.index, self.fold, self.filename, self.views, self.single = (
            np.concatenate([member[name] for member in members])[order]
            for name in ("class_idx", "index", "fold", "filename", "logits", "single")
        )
        self.dark = np.concatenate([member["corrupt"] for member in members], axis=1)[:, order]

    @property
    def n(self) -> int:
        return len(self.y)

    @property
    def guess(self) -> np.ndarray:
        return self.views.argmax(1)

    @property
    def t(self) -> float:
        return temperature(self.views, self.y)

    def top1(self, logits: np.ndarray) -> float:
        return metrics.accuracy_score(self.y, logits.argmax(1))

    @property
    def corrupted(self) -> float:
        return float(np.mean([self.top1(logits) for logits in self.dark]))

    @property
    def s(self) -> float:
        return ALPHA * self.top1(self.single) + (1 - ALPHA) * self.corrupted

    @property
    def top5(self) -> float:
        return float(np.mean([y in np.argsort(-z)[:5] for z, y in zip(self.views, self.y, strict=True)]))

    def nll(self, t: float = 1) -> float:
        return nll(probabilities(self.views, t), self.y)

    def ece(self, t: float = 1) -> float:
        return ece(probabilities(self.views, t), self.y)

    def macro(self, score_name: str, logits: np.ndarray | None = None) -> float:
        guess = (self.views if logits is None else logits).argmax(1)
        score = metrics.recall_score if score_name == "recall" else metrics.f1_score
        return score(self.y, guess, labels=np.unique(self.y), average="macro", zero_division=0)

    def nll_span(self, t: float = 1) -> str:
        """The interval of the mean, by the normal approximation."""
        losses = -np.log(probabilities(self.views, t)[np.arange(self.n), self.y])
        half = 1.959964 * losses.std(ddof=1) / np.sqrt(self.n)
        return f"{max(losses.mean() - half, 0):.3f}–{losses.mean() + half:.3f}"  # no loss is below 0

    def bootstrap(self, t: float, draws: int = 400) -> dict[str, np.ndarray]:
        """2.5% and 97.5% percentiles over draws of the images within each class, one by one, with another seed."""
        rng = np.random.default_rng(1)
        by_class = [np.flatnonzero(self.y == c) for c in np.unique(self.y)]
        samples: dict[str, list[float]] = {"recall": [], "f1": [], "ece": [], "ece_after": []}
        before, after = probabilities(self.views), probabilities(self.views, t)
        for _ in range(draws):
            rows = np.concatenate([rng.choice(of_class, len(of_class)) for of_class in by_class])
            y, guess = self.y[rows], self.guess[rows]
            present = np.unique(y)
            samples["recall"].append(metrics.recall_score(y, guess, labels=present, average="macro"))
            samples["f1"].append(metrics.f1_score(y, guess, labels=present, average="macro"))
            samples["ece"].append(ece(before[rows], y))
            samples["ece_after"].append(ece(after[rows], y))
        return {name: np.percentile(values, [2.5, 97.5]) for name, values in samples.items()}


def read_column(path: Path, name: str) -> list[str]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        return [row[name] for row in csv.DictReader(file)]


class Evaluated:
    """An experiment from its oof/*.npz, events.jsonl and meta/; `classes` are the rows of classes.csv."""

    def __init__(self, folder: Path, classes: list[dict[str, str]]) -> None:
        self.folder, self.name = folder, folder.name
        self.members = [self._read(path) for path in sorted((folder / "oof").glob("*.npz"))]
        self.members.sort(key=lambda member: (member["backbone"], member["seed"], member["fold_of"]))
        lines = (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
        self.events = [json.loads(line) for line in lines]
        self.recipe = yaml.safe_load((folder / "meta" / "recipe.yaml").read_text(encoding="utf-8"))
        self.counts = [int(row["n"]) for row in classes]
        self.ids = [row["category_id"] for row in classes]
        self.called = [row.get("english_name", "") for row in classes]
        self.names = [f"{a} {b}".strip() for a, b in zip(self.called, self.ids, strict=True)]
        self.plain = [a or b for a, b in zip(self.called, self.ids, strict=True)]
        self.combos = [tuple(pair) for pair in self.members[0]["combos"]]
        self.folds = sorted({member["fold_of"] for member in self.members})
        column = read_column(folder / "meta" / "folds.csv", "fold")
        self.all_folds = sorted({int(fold) for fold in column} - {-1})

    @staticmethod
    def _read(path: Path) -> dict[str, Any]:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        info = json.loads(str(arrays.pop("info")))
        return {
            **arrays,
            "info": info,
            "backbone": info["backbone"],
            "seed": info["seed"],
            "fold_of": info["fold"],
        }

    @property
    def runs(self) -> list[tuple[str, int]]:
        return list(dict.fromkeys((member["backbone"], member["seed"]) for member in self.members))

    def of(self, backbone: str, seed: int, fold: int | None = None) -> Set:
        """A run, or its member of one fold."""
        of_run = [m for m in self.members if (m["backbone"], m["seed"]) == (backbone, seed)]
        return Set([member for member in of_run if fold is None or member["fold_of"] == fold])

    @property
    def fused(self) -> Set:
        """The mean over runs, image by image."""
        sets = [self.of(*run) for run in self.runs]
        fused = sets[0]
        for name in ("views", "single", "dark"):
            mean = np.mean([getattr(data, name).astype(float) for data in sets], axis=0)
            setattr(fused, name, mean.astype(np.float32))
        return fused

    def epochs(self, backbone: str, seed: int, fold: int) -> list[dict[str, Any]]:
        """The events of one training by epoch; of a repeated epoch the last."""
        rows = {
            row["epoch"]: row
            for row in self.events
            if row["event"] == "epoch"
            and (row["backbone"], row["seed"], row["fold"]) == (backbone, seed, fold)
        }
        return [rows[epoch] for epoch in sorted(rows)]

    @property
    def trainings(self) -> list[tuple[str, int, int]]:
        """(backbone, fold, seed) of each training, sorted."""
        rows = (row for row in self.events if row["event"] == "epoch")
        return sorted({(row["backbone"], row["fold"], row["seed"]) for row in rows})


LOGGED = {  # chart -> legend -> name in the event; a single line has no legend
    "loss": {"train": "train_loss", "validation": "val_loss"},
    "clean": {"raw": "clean_raw", "EMA": "clean_ema"},
    "corrupt": {"raw": "corrupt_raw", "EMA": "corrupt_ema"},
    "s": {"raw": "s_raw", "EMA": "s_ema"},
    "macro": {
        "recall raw": "macro_recall_raw", "F1 raw": "macro_f1_raw", "recall EMA": "macro_recall_ema",
        "F1 EMA": "macro_f1_ema",
    },
    "ece": {"raw": "ece_raw", "EMA": "ece_ema"},
    "top5": {"raw": "top5_raw", "EMA": "top5_ema"},
    "seconds": {"all": "seconds", "evaluation": "eval_seconds"},
    "size": {"": "size"}, "speed": {"": "images_per_s"}, "norm": {"": "grad_norm"}, "wait": {"": "wait_share"},
    "train-acc": {"": "train_acc"}, "patience": {"": "patience_left"},
}  # fmt: skip


def logged(row: dict[str, Any], chart: str, label: str) -> float | None:
    """The value that a chart's line must have in an epoch; None when it was not logged."""
    if chart in ("kind-raw", "kind-ema"):
        table = {kind(name): scores[chart[5:]] for name, scores in row["per_kind"].items()}
        return table[label] if label else next(iter(table.values()))
    if chart == "lr":
        table = row["lr_groups"]
        return table[label] if label else next(iter(table.values()))
    known = LOGGED.get(chart, {"": chart})
    known = known if label else {"": next(key for key in known.values() if key in row)}
    value = row.get(known[label])
    return None if value is None else float(np.ravel(value)[0])


def check_words(description: str, label: str, course: dict[int, float]) -> None:
    """Assert that a chart's description has a line's first, last and (where it is given) best value."""
    name, point = re.escape(label) or "[^:;]*", r"(.*?) in epoch (\d+)"
    match = re.search(rf"[.;] {name}: {point}, {point}(?:, best {point})?[.;]", description)
    assert match, (description, label)
    expected = [min(course), max(course), max(course, key=lambda epoch: (course[epoch], -epoch))]
    for text, epoch, expected_epoch in zip(match.groups()[::2], match.groups()[1::2], expected, strict=True):
        if text is not None:
            value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
            assert int(epoch) == expected_epoch
            assert value == pytest.approx(course[expected_epoch], rel=6e-4, abs=6e-4)
