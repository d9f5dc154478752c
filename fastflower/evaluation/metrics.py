"""The tables of scores.json: one block of numbers for each member, each run and the fused set.

Every number has its n and a 95% interval. Shares: Wilson's. NLL: the mean's, by the normal approximation. Macro
recall, macro F1 and ECE: percentiles of a bootstrap of the images, within each class. A mean over corruptions, and
S, count each image once: their spread over images is at most that of a share, so Wilson's is never too narrow.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy.special import log_softmax
from sklearn.metrics import precision_recall_fscore_support

from fastflower.core import scores
from fastflower.data.labels import HEAD, TAIL
from fastflower.evaluation import calibration
from fastflower.evaluation.logits import Logits

REPRODUCED = 0.01  # half precision in training may turn an image or two
PARTS = ("head", "middle", "tail")
OVER_FOLDS = (
    "single.top1",
    "clean.top1",
    "corrupted.top1",
    "s.top1",
    "clean.macro_recall",
    "clean.macro_f1",
    "clean.nll",
    "clean.ece",
)


def block(data: Logits, alpha: float, *, bins: int, counts: np.ndarray, fit_on: str | None) -> dict[str, Any]:
    """Every number about one set of logits.

    clean: mean over the views; single, corrupted, s: one view at the trained size, as in training;
    counts (C,): images of each class, which decide head, middle and tail; fit_on None: no temperature.
    """
    clean = scores.scores(data.logits, data.class_idx, bins) | intervals(data.logits, data.class_idx, bins)
    single = scores.scores(data.single, data.class_idx, bins)
    corrupted = corruption(data, bins) if len(data.combos) else None
    s = scores.combined(single["top1"], corrupted["top1"] if corrupted else None, alpha)
    return {
        "name": data.name,
        "n": len(data),
        "folds": sorted({int(fold) for fold in data.fold}),
        "clean": clean,
        "single": single,
        "corrupted": corrupted,
        "s": share(s, len(data)),
        "temperature": calibrated(data, fit_on, alpha=alpha, bins=bins) if fit_on else None,
        "parts": by_part(data, counts),
    }


def calibrated(data: Logits, fit_on: str, *, alpha: float, bins: int) -> dict[str, Any]:
    """The fitted temperature, NLL and ECE before and after it, and their intervals after it."""
    found = calibration.fit_set(data, fit_on, alpha=alpha, bins=bins)
    after = intervals(data.logits / found["t"], data.class_idx, bins)
    ends = {
        f"{name}_after_{side}": after[f"{name}_{side}"] for name in ("nll", "ece") for side in ("low", "high")
    }
    return {**found, **ends}


def share(value: float, n: int) -> dict[str, float]:
    """A mean of n values in 0..1 with its Wilson interval."""
    low, high = scores.wilson(value * n, n)  # type: ignore[arg-type]  # the formula holds for fractions
    return {"n": n, "top1": value, "top1_low": low, "top1_high": high}


def corruption(data: Logits, bins: int) -> dict[str, Any]:
    """Top-1 under each (kind, level), how often the prediction stays what it was, and their means."""
    guess, n = data.single.argmax(1), len(data)
    clean = float((guess == data.class_idx).mean())
    rows = []
    for (kind, level), logits in zip(data.combos, data.corrupt, strict=True):
        own = scores.scores(logits, data.class_idx, bins)
        kept = float((logits.argmax(1) == guess).mean())
        rows.append(
            {"kind": str(kind), "level": str(level), **own, "drop": clean - own["top1"], "consistency": kept}
        )
    keys = ("top5", "macro_recall", "macro_f1", "nll", "ece")
    mean = {key: float(np.mean([row[key] for row in rows])) for key in keys}
    return {
        **share(float(np.mean([row["top1"] for row in rows])), n),
        **mean,
        "drop": clean - float(np.mean([row["top1"] for row in rows])),
        "consistency": float(np.mean([row["consistency"] for row in rows])),
        "kinds": _means(rows, "kind", n),
        "levels": _means(rows, "level", n),
        "combos": rows,
    }


def _means(rows: list[dict[str, Any]], key: str, n: int) -> dict[str, dict[str, float]]:
    """Top-1 with its interval, drop and consistency of each kind over its levels, or the other way round."""
    table = {}
    for value in dict.fromkeys(row[key] for row in rows):
        own = [row for row in rows if row[key] == value]
        top1, drop, kept = (
            float(np.mean([row[what] for row in own])) for what in ("top1", "drop", "consistency")
        )
        table[value] = {**share(top1, n), "drop": drop, "consistency": kept}
    return table


def intervals(logits: np.ndarray, labels: np.ndarray, bins: int) -> dict[str, float]:
    """The low and high ends of the 95% intervals of top-5, NLL, macro recall, macro F1 and ECE."""
    n, probs = len(labels), scores.softmax(logits)
    top5 = scores.scores(logits, labels, bins)["top5"]
    losses = -log_softmax(logits.astype(np.float64), axis=1)[np.arange(n), labels]
    half = scores.Z * float(losses.std(ddof=1)) / math.sqrt(n) if n > 1 else math.inf
    ends = {"top5": scores.wilson(top5 * n, n)}  # type: ignore[arg-type]
    ends["nll"] = (max(0.0, float(losses.mean()) - half), float(losses.mean()) + half)
    ends |= bootstrap(probs, labels, bins=bins)
    return {
        f"{name}_{side}": pair[i] for name, pair in ends.items() for i, side in enumerate(("low", "high"))
    }


def bootstrap(
    probs: np.ndarray, labels: np.ndarray, *, bins: int, draws: int = 1000
) -> dict[str, tuple[float, float]]:
    """95% percentile intervals of macro recall, macro F1 and ECE of probabilities (N, C); the same on every call.

    Images are drawn within each class, so that a rare class is never lost. Confusions are drawn as counts.
    """
    rng, present = np.random.default_rng(0), np.unique(labels)
    guess, hit, confidence = probs.argmax(1), probs.argmax(1) == labels, probs.max(1)
    support = np.array([(labels == c).sum() for c in present])
    columns = np.unique(np.concatenate([present, guess]))
    predicted = np.zeros((draws, len(columns)), np.int64)
    right = np.empty((draws, len(present)))
    for place, c in enumerate(present):
        share_of = np.array([(guess[labels == c] == column).mean() for column in columns])
        drawn = rng.multinomial(support[place], share_of, size=draws)
        predicted += drawn
        right[:, place] = drawn[:, np.searchsorted(columns, c)]
    recall = (right / support).mean(1)
    f1 = (2 * right / (support + predicted[:, np.searchsorted(columns, present)])).mean(1)
    order = np.argsort(labels, kind="stable")
    first, size = np.repeat(np.cumsum(support) - support, support), np.repeat(support, support)
    index = scores.bins_of(confidence, bins)
    excess = hit - confidence
    ece = np.empty(draws)
    for draw in range(draws):
        own = order[first + (rng.random(len(labels)) * size).astype(np.int64)]
        ece[draw] = np.abs(np.bincount(index[own], excess[own], bins)).sum() / len(labels)
    found = {"macro_recall": recall, "macro_f1": f1, "ece": ece}
    return {
        name: (float(low), float(high))
        for name, values in found.items()
        for low, high in [np.percentile(values, [2.5, 97.5])]
    }


def per_class(data: Logits, class_ids: list[str], counts: np.ndarray) -> list[dict[str, Any]]:
    """Precision, recall and F1 of each class on the clean images, and its recall on corrupted ones."""
    classes = np.arange(data.logits.shape[1])
    guess = data.logits.argmax(1)
    precision, recall, f1, support = precision_recall_fscore_support(
        data.class_idx, guess, labels=classes, zero_division=0
    )
    part = parts_of(counts)
    rows = []
    for c in classes:
        own = data.class_idx == c
        row: dict[str, Any] = {
            "class_idx": int(c),
            "category_id": class_ids[c],
            "part": part[c],
            "images": int(counts[c]),
            "n": int(support[c]),
            "precision": float(precision[c]),
            **ends("precision", precision[c], int((guess == c).sum())),
            "recall": float(recall[c]),
            **ends("recall", recall[c], int(support[c])),
            "f1": float(f1[c]),
            "corrupted_recall": None,
            "drop": None,
        }
        if len(data.combos) and own.any():
            single = float((data.single[own].argmax(1) == c).mean())
            corrupted = float((data.corrupt[:, own].argmax(2) == c).mean())
            row |= {"corrupted_recall": corrupted, "drop": single - corrupted}
        rows.append(row)
    return rows


def ends(name: str, value: float, n: int) -> dict[str, float]:
    """The Wilson interval of a share of n, by the names it has in a row."""
    low, high = scores.wilson(value * n, n)  # type: ignore[arg-type]
    return {f"{name}_low": low, f"{name}_high": high}


def by_class_and_corruption(data: Logits) -> list[dict[str, Any]]:
    """Recall of every class under every (kind, level), with the n it stands on."""
    rows = []
    for (kind, level), logits in zip(data.combos, data.corrupt, strict=True):
        guess = logits.argmax(1)
        for c in np.unique(data.class_idx):
            own = data.class_idx == c
            rows.append(
                {
                    "kind": str(kind),
                    "level": str(level),
                    "class_idx": int(c),
                    "n": int(own.sum()),
                    "recall": float((guess[own] == c).mean()),
                }
            )
    return rows


def parts_of(counts: np.ndarray) -> list[str]:
    """Head, middle or tail of each class by its images (C,), where convert draws the lines."""
    return ["head" if n > HEAD else "tail" if n < TAIL else "middle" for n in counts]


def by_part(data: Logits, counts: np.ndarray) -> dict[str, dict[str, Any]]:
    """Top-1 with its interval and the mean recall of the classes in each part; empty when all are in one."""
    parts = np.array(parts_of(counts))
    guess, rows = data.logits.argmax(1), {}
    for part in PARTS if len(set(parts)) > 1 else ():
        classes = np.flatnonzero(parts == part)
        own = np.isin(data.class_idx, classes)
        if own.any():
            present = [c for c in classes if (data.class_idx == c).any()]
            recall = [float((guess[data.class_idx == c] == c).mean()) for c in present]
            rows[part] = {
                "classes": len(classes),
                "images": [int(counts[classes].min()), int(counts[classes].max())],
                **share(float((guess[own] == data.class_idx[own]).mean()), int(own.sum())),
                "macro_recall": float(np.mean(recall)),
            }
    return rows


def reliability(data: Logits, t: float | None, bins: int) -> list[dict[str, Any]]:
    """Mean confidence and top-1 in each occupied bin of confidence, before and (with t) after the temperature."""
    rows = []
    for when, divisor in (("before", 1.0), ("after", t)):
        if divisor is None:
            continue
        probs = scores.softmax(data.logits / divisor)
        confidence, hit = probs.max(1), probs.argmax(1) == data.class_idx
        place = scores.bins_of(confidence, bins)
        for b in np.unique(place):
            own = place == b
            means = {"confidence": float(confidence[own].mean()), "top1": float(hit[own].mean())}
            rows.append({"when": when, **means, "n": int(own.sum())})
    return rows


def over_folds(blocks: list[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Mean and sample deviation over folds of the numbers that are compared."""
    table: dict[str, dict[str, float | None]] = {}
    for dotted in OVER_FOLDS:
        section, key = dotted.split(".")
        values = [block[section][key] for block in blocks if block[section]]
        if values:
            std = float(np.std(values, ddof=1)) if len(values) > 1 else None
            table[dotted] = {"mean": float(np.mean(values)), "std": std}
    return table


def advice(members: list[dict[str, Any]], runs: list[dict[str, Any]], fused: dict[str, Any]) -> list[str]:
    """What the blocks of members, runs and, of several runs, the fused set give reason to say."""
    sets = [*runs, fused] if len(runs) > 1 else runs
    return [
        *(line for member in members for line in stored_advice(member)),
        *(line for own in sets for line in views_advice(own)),
    ]


def views_advice(block: dict[str, Any]) -> list[str]:
    """A line when the views predict worse than the single view."""
    lost = block["single"]["top1"] - block["clean"]["top1"]
    if lost <= 0:
        return []
    return [
        f"{block['name']}: the views (tta.scales, tta.hflip) cost {lost:.4f} top-1 against the single view; "
        "use scales nearer to the trained size"
    ]


def stored_advice(member: dict[str, Any]) -> list[str]:
    """A line when a member does not score what its checkpoint says of it."""
    stored, found = member["stored"], member["single"]["top1"]
    if stored is None or abs(found - stored) <= REPRODUCED:
        return []
    return [
        f"{member['name']}: training scored {stored:.4f} where this evaluation finds {found:.4f}; "
        "the betons are not those it was trained with"
    ]
