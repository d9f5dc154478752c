"""The scores of a set of logits: of a member, of a run over its folds, or of the fused set.

Every score has its n and a 95% interval. Top-1, recall and precision: Wilson's. NLL: the mean's, by the normal
approximation. Macro recall, macro F1 and ECE: percentiles of a bootstrap of the images, within each class. A mean
over corruptions, and S, count each image once: their spread over images is at most that of a 0/1 score, so Wilson's
interval is never too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from scipy.special import log_softmax

from fastflower.core import scores
from fastflower.core.records import from_plain
from fastflower.data.labels import part_of
from fastflower.evaluation import calibration
from fastflower.evaluation.logits import Logits, LogitsInfo
from fastflower.evaluation.records import (
    ClassRecall,
    ClassScores,
    CleanScores,
    CorruptedScores,
    CorruptionScores,
    FusedScores,
    MeanTop1,
    MemberScores,
    PartScores,
    ReliabilityBin,
    RunScores,
    SetScores,
    Spread,
    Temperature,
    Top1,
    ViewScores,
)
from fastflower.evaluation.selected import metric_score

REPRODUCED = 0.01  # half precision in training may change the prediction of an image or two
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
Data = Logits[LogitsInfo]


def set_scores(
    data: Data,
    alpha: float,
    *,
    bins: int,
    class_counts: np.ndarray,
    fit_on: str | None,
    metric: str = "combo",
) -> SetScores:
    """All scores of one set, and that of select.metric.

    class_counts (C,): images of each class, which decide head, middle and tail; fit_on None: no temperature.
    """
    clean = scores.scores(data.logits, data.class_idx, bins) | intervals(data.logits, data.class_idx, bins)
    single = from_plain(ViewScores, scores.scores(data.single, data.class_idx, bins))
    corrupted = corrupted_scores(data, bins) if len(data.combos) else None
    s = top1_of(scores.combined(single.top1, corrupted.top1 if corrupted else None, alpha), len(data))
    clean_scores = from_plain(CleanScores, clean)
    return SetScores(
        name=data.name,
        n=len(data),
        folds=sorted({int(fold) for fold in data.fold}),
        clean=clean_scores,
        single=single,
        corrupted=corrupted,
        s=s,
        temperature=fit_temperature(data, fit_on, alpha=alpha, bins=bins) if fit_on else None,
        parts=part_scores(data, class_counts),
        selected=metric_score(data, metric, alpha, clean=clean_scores, s=s),
    )


def fit_temperature(data: Data, fit_on: str, *, alpha: float, bins: int) -> Temperature:
    """The fitted temperature, NLL and ECE before and after it, and their intervals after it."""
    fitted = calibration.fit_set(data, fit_on, alpha=alpha, bins=bins)
    after = intervals(data.logits / fitted.t, data.class_idx, bins)
    return Temperature(
        **vars(fitted),
        nll_after_low=after["nll_low"],
        nll_after_high=after["nll_high"],
        ece_after_low=after["ece_low"],
        ece_after_high=after["ece_high"],
    )


def top1_of(value: float, n: int) -> Top1:
    """A mean of n values in 0..1 with its Wilson interval."""
    low, high = scores.wilson(value * n, n)
    return Top1(n=n, top1=value, top1_low=low, top1_high=high)


def corrupted_scores(data: Data, bins: int) -> CorruptedScores:
    """The scores under each (kind, level), how often the prediction stays the clean one, and their means."""
    guess = data.single.argmax(1)
    clean = float((guess == data.class_idx).mean())
    rows = []
    for (kind, level), logits in zip(data.combos, data.corrupt, strict=True):
        measured = scores.scores(logits, data.class_idx, bins)
        described = {
            "kind": str(kind),
            "level": str(level),
            "drop": clean - measured["top1"],
            "consistency": float((logits.argmax(1) == guess).mean()),
        }
        rows.append(from_plain(CorruptionScores, measured | described))

    def mean(name: str) -> float:
        return float(np.mean([getattr(row, name) for row in rows]))

    return CorruptedScores(
        **vars(top1_of(mean("top1"), len(data))),
        top5=mean("top5"),
        macro_recall=mean("macro_recall"),
        macro_f1=mean("macro_f1"),
        nll=mean("nll"),
        ece=mean("ece"),
        drop=clean - mean("top1"),
        consistency=mean("consistency"),
        kinds=_means(rows, "kind"),
        levels=_means(rows, "level"),
        combos=rows,
    )


def _means(rows: list[CorruptionScores], key: str) -> dict[str, MeanTop1]:
    """Means over the rows of each value of `key`: kind or level."""
    means = {}
    for value in dict.fromkeys(getattr(row, key) for row in rows):
        group = [row for row in rows if getattr(row, key) == value]
        means[value] = MeanTop1(
            **vars(top1_of(float(np.mean([row.top1 for row in group])), group[0].n)),
            drop=float(np.mean([row.drop for row in group])),
            consistency=float(np.mean([row.consistency for row in group])),
        )
    return means


def intervals(logits: np.ndarray, labels: np.ndarray, bins: int) -> dict[str, float]:
    """The 95% intervals of top-5, NLL, macro recall, macro F1 and ECE, as `<name>_low` and `<name>_high`."""
    n, probs = len(labels), scores.softmax(logits)
    top5 = scores.scores(logits, labels, bins)["top5"]
    losses = -log_softmax(logits.astype(np.float64), axis=1)[np.arange(n), labels]
    half = scores.Z95 * float(losses.std(ddof=1)) / math.sqrt(n) if n > 1 else math.inf
    ends = {"top5": scores.wilson(top5 * n, n)}
    ends["nll"] = (max(0.0, float(losses.mean()) - half), float(losses.mean()) + half)
    ends |= bootstrap(probs, labels, bins=bins)
    return {
        f"{name}_{side}": pair[i] for name, pair in ends.items() for i, side in enumerate(("low", "high"))
    }


def bootstrap(
    probs: np.ndarray, labels: np.ndarray, *, bins: int, draws: int = 1000
) -> dict[str, tuple[float, float]]:
    """95% percentile intervals of macro recall, macro F1 and ECE of probabilities (N, C); equal on every call.

    Images are drawn within each class, so that a rare class is never lost. Confusions are drawn as counts.
    """
    rng, present = np.random.default_rng(0), np.unique(labels)
    guess, hit, confidence = probs.argmax(1), probs.argmax(1) == labels, probs.max(1)
    support = np.array([(labels == c).sum() for c in present])
    columns = np.unique(np.concatenate([present, guess]))
    predicted = np.zeros((draws, len(columns)), np.int64)
    right = np.empty((draws, len(present)))
    for i, c in enumerate(present):
        fractions = np.array([(guess[labels == c] == column).mean() for column in columns])
        drawn = rng.multinomial(support[i], fractions, size=draws)
        predicted += drawn
        right[:, i] = drawn[:, np.searchsorted(columns, c)]
    recall = (right / support).mean(1)
    f1 = (2 * right / (support + predicted[:, np.searchsorted(columns, present)])).mean(1)
    order = np.argsort(labels, kind="stable")
    first, size = np.repeat(np.cumsum(support) - support, support), np.repeat(support, support)
    index = scores.bin_index(confidence, bins)
    excess = hit - confidence
    ece = np.empty(draws)
    for draw in range(draws):
        rows = order[first + (rng.random(len(labels)) * size).astype(np.int64)]
        ece[draw] = np.abs(np.bincount(index[rows], excess[rows], bins)).sum() / len(labels)
    samples = {"macro_recall": recall, "macro_f1": f1, "ece": ece}
    return {
        name: (float(low), float(high))
        for name, values in samples.items()
        for low, high in [np.percentile(values, [2.5, 97.5])]
    }


def class_scores(
    data: Data, class_ids: list[str], *, class_counts: np.ndarray, names: list[str]
) -> list[ClassScores]:
    """Precision, recall and F1 of each class on the clean images, and its recall on corrupted ones.

    names: of the classes in plain language, empty where there is none.
    """
    from sklearn.metrics import precision_recall_fscore_support  # here: its import takes two seconds

    classes = np.arange(data.logits.shape[1])
    guess = data.logits.argmax(1)
    precision, recall, f1, support = precision_recall_fscore_support(
        data.class_idx, guess, labels=classes, zero_division=0
    )
    rows = []
    for c in classes:
        of_class = data.class_idx == c
        corrupted = drop = None
        if len(data.combos) and of_class.any():
            corrupted = float((data.corrupt[:, of_class].argmax(2) == c).mean())
            drop = float((data.single[of_class].argmax(1) == c).mean()) - corrupted
        guessed = int((guess == c).sum())
        precision_ends = scores.wilson(precision[c] * guessed, guessed)
        recall_ends = scores.wilson(recall[c] * int(support[c]), int(support[c]))
        rows.append(
            ClassScores(
                class_idx=int(c),
                category_id=class_ids[c],
                part=part_of(int(class_counts[c])),
                images=int(class_counts[c]),
                n=int(support[c]),
                precision=float(precision[c]),
                precision_low=float(precision_ends[0]),
                precision_high=float(precision_ends[1]),
                recall=float(recall[c]),
                recall_low=float(recall_ends[0]),
                recall_high=float(recall_ends[1]),
                f1=float(f1[c]),
                corrupted_recall=corrupted,
                drop=drop,
                name=names[c],
            )
        )
    return rows


def class_recalls(data: Data) -> list[ClassRecall]:
    """Recall of every class under every (kind, level)."""
    rows = []
    for (kind, level), logits in zip(data.combos, data.corrupt, strict=True):
        guess = logits.argmax(1)
        for c in np.unique(data.class_idx):
            of_class = data.class_idx == c
            recall = float((guess[of_class] == c).mean())
            n = int(of_class.sum())
            rows.append(ClassRecall(kind=str(kind), level=str(level), class_idx=int(c), n=n, recall=recall))
    return rows


def part_scores(data: Data, class_counts: np.ndarray) -> dict[str, PartScores]:
    """Top-1 and the mean recall of the classes in each part; empty when all classes are in one."""
    parts = np.array([part_of(int(n)) for n in class_counts])
    guess, table = data.logits.argmax(1), {}
    for part in PARTS if len(set(parts)) > 1 else ():
        classes = np.flatnonzero(parts == part)
        rows = np.isin(data.class_idx, classes)
        if rows.any():
            present = [c for c in classes if (data.class_idx == c).any()]
            recall = [float((guess[data.class_idx == c] == c).mean()) for c in present]
            top1 = float((guess[rows] == data.class_idx[rows]).mean())
            table[part] = PartScores(
                **vars(top1_of(top1, int(rows.sum()))),
                classes=len(classes),
                images=(int(class_counts[classes].min()), int(class_counts[classes].max())),
                macro_recall=float(np.mean(recall)),
            )
    return table


def reliability(data: Data, t: float | None, bins: int) -> list[ReliabilityBin]:
    """Mean confidence and top-1 in each occupied bin of confidence, before and (with t) after the temperature."""
    rows = _reliability("before", scores.softmax(data.logits), labels=data.class_idx, bins=bins)
    if t is not None:
        rows += _reliability("after", scores.softmax(data.logits / t), labels=data.class_idx, bins=bins)
    return rows


def _reliability(
    when: Literal["before", "after"], probs: np.ndarray, *, labels: np.ndarray, bins: int
) -> list[ReliabilityBin]:
    confidence, hit = probs.max(1), probs.argmax(1) == labels
    index = scores.bin_index(confidence, bins)
    rows = []
    for b in np.unique(index):
        inside = index == b
        mean, top1 = float(confidence[inside].mean()), float(hit[inside].mean())
        rows.append(ReliabilityBin(when=when, confidence=mean, top1=top1, n=int(inside.sum())))
    return rows


def over_folds(members: Sequence[SetScores]) -> dict[str, Spread]:
    """Mean and sample deviation over a run's members, one for each fold, of the scores that are compared."""
    table = {}
    for dotted in OVER_FOLDS:
        section, name = dotted.split(".")
        values = [getattr(getattr(member, section), name) for member in members if getattr(member, section)]
        if values:
            std = float(np.std(values, ddof=1)) if len(values) > 1 else None
            table[dotted] = Spread(mean=float(np.mean(values)), std=std)
    return table


def advice(members: list[MemberScores], runs: list[RunScores], fused: FusedScores) -> list[str]:
    """Warnings derived from the scores: of each member, each run and, with several runs, the fused set.

    That of a temperature is of the fused set, whose temperature is handed in.
    """
    sets: list[SetScores] = [*runs, fused] if len(runs) > 1 else [*runs]
    return [
        *(line for member in members for line in stored_advice(member)),
        *(line for data in sets for line in views_advice(data)),
        *([fused.temperature.note] if fused.temperature and fused.temperature.note else []),
    ]


def views_advice(data: SetScores) -> list[str]:
    """A line when the views predict worse than the single view."""
    lost = data.single.top1 - data.clean.top1
    if lost <= 0:
        return []
    return [
        f"{data.name}: the views (tta.scales, tta.hflip) cost {lost:.4f} top-1 against the single view; "
        "use scales nearer to the trained size"
    ]


def stored_advice(member: MemberScores) -> list[str]:
    """A line when a member's top-1 differs from the one that training stored in its checkpoint."""
    stored, measured = member.stored, member.single.top1
    if stored is None or abs(measured - stored) <= REPRODUCED:
        return []
    return [
        f"{member.name}: training scored {stored:.4f} where this evaluation finds {measured:.4f}; "
        "the betons are not those it was trained with"
    ]
