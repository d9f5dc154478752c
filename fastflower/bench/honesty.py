"""`bench honesty`: is the out-of-fold score, and the interval that evaluate states with it, that of unseen images?

Again and again, with another seed, a fifth of the images is split off as the test set that nothing sees. On the others,
a logistic regression on the frozen features of a pretrained backbone is trained for each fold; its out-of-fold scores
get the intervals of evaluate, and the fold models are scored on the test set, each alone and their mean of logits.

Out of fold, single models are scored, so the test score of single models is what the interval should cover. The test
set is a sample too: an interval that says the truth about all images covers the score of so few less often than 95%,
`expected` says how often, from the two intervals' widths. `widened` is by the test set's own interval: 95% is expected.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.special import ndtr

from fastflower.core import files, scores
from fastflower.core.errors import InputError
from fastflower.evaluation import metrics
from fastflower.recipe import load

SCORES = {"top1": "top-1", "macro_recall": "macro recall", "macro_f1": "macro F1", "nll": "NLL", "ece": "ECE"}
BINS = 15


@dataclass(frozen=True)
class Estimate:
    """A score out of fold with its interval, and of the test set, of single models and of their mean, with its own."""

    score: str
    out_of_fold: float
    low: float
    high: float
    test: float
    test_low: float
    test_high: float
    ensemble: float

    @property
    def covered(self) -> bool:
        """True when the interval covers the test score of single models."""
        return self.low <= self.test <= self.high

    @property
    def widened(self) -> bool:
        """True when it does with the half-width of the test set's own interval added, as independent errors add."""
        error = self.test - self.out_of_fold
        own = self.high - self.out_of_fold if error > 0 else self.out_of_fold - self.low
        theirs = self.test - self.test_low if error > 0 else self.test_high - self.test
        return abs(error) <= math.hypot(own, theirs)

    @property
    def expected(self) -> float:
        """The share of test scores that an honest interval covers, for normal errors of both."""
        own, theirs = self.high - self.low, self.test_high - self.test_low
        share = own / math.hypot(own, theirs) if own or theirs else 1.0
        return float(2 * ndtr(scores.Z95 * share) - 1)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m fastflower.bench honesty",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and train_labels.csv")
    parser.add_argument("--backbone", default="tf_efficientnet_lite0.in1k", help="timm name (%(default)s)")
    parser.add_argument("--size", type=int, default=128, help="side of the images (%(default)s)")
    parser.add_argument("--splits", type=int, default=10, help="test sets (%(default)s)")
    parser.add_argument("--folds", type=int, default=3, help="folds of the other images (%(default)s)")
    parser.add_argument("--images", type=int, help="take so many images of each class (all)")
    parser.add_argument("--write", type=Path, metavar="MD", help="write the table as Markdown")
    args = parser.parse_args(argv)
    for name, value, least in (("splits", args.splits, 1), ("folds", args.folds, 2), ("size", args.size, 16)):
        if value < least:
            raise InputError(f"--{name} {value}: must be {least} or more")
    names, labels = photographs(args.data, args.images)
    start = time.monotonic()
    features = frozen_features([args.data / "train" / name for name in names], args.backbone, args.size)
    print(
        f"{len(labels)} images, features of {args.backbone} in {time.monotonic() - start:.0f} s", flush=True
    )
    estimates = []
    for seed in range(args.splits):
        estimates.append(split_and_score(features, labels, folds=args.folds, seed=seed))
        top1 = estimates[-1][0]
        print(
            f"split {seed}: out of fold {top1.out_of_fold:.4f} ({top1.low:.4f} to {top1.high:.4f}), test "
            f"{top1.test:.4f}, mean of the models {top1.ensemble:.4f}",
            flush=True,
        )
    minutes = (time.monotonic() - start) / 60
    table = "\n".join(table_lines(estimates))
    print(f"\n{table}")
    if args.write:
        command = "python -m fastflower.bench honesty " + " ".join(
            argv[: argv.index("--write")] + argv[argv.index("--write") + 2 :]
        )
        files.write_atomic(args.write, document(args, command, len(labels), table=table, minutes=minutes))


def photographs(folder: Path, per_class: int | None) -> tuple[list[str], np.ndarray]:
    """File names and class indices (N,) of train_labels.csv, of each class the first `per_class`."""
    path = folder / "train_labels.csv"
    if not path.is_file():
        raise InputError(f"--data {folder}: no train_labels.csv; give a folder with it and train/")
    with open(path, encoding="utf-8", newline="") as file:
        rows = [(row["filename"], row["category_id"]) for row in csv.DictReader(file)]
    ids = sorted({category for _, category in rows})
    labels = np.array([ids.index(category) for _, category in rows])
    kept = np.sort(np.concatenate([np.flatnonzero(labels == c)[:per_class] for c in range(len(ids))]))
    return [rows[row][0] for row in kept], labels[kept]


def frozen_features(paths: list[Path], backbone: str, size: int) -> np.ndarray:
    """Unit vectors (N, F) of the pretrained backbone; InputError without its weights."""
    from fastflower.model.embeddings import embedder

    recipe = load(
        None,
        [
            f"data.group_backbone={backbone}",
            f"data.img_size={size}",
            f"tta.scales=[{size}]",
            "data.size_epochs=auto",
        ],
    )

    def pictures() -> Iterator[np.ndarray]:
        for path in paths:
            with Image.open(path) as image:
                yield np.asarray(image.convert("RGB"))

    return embedder(recipe)(pictures())


def split_and_score(features: np.ndarray, labels: np.ndarray, *, folds: int, seed: int) -> list[Estimate]:
    """The scores out of fold and on a fifth of the images, split off by the seed."""
    from sklearn.model_selection import StratifiedKFold

    outer = StratifiedKFold(5, shuffle=True, random_state=seed)
    rest, held_out = next(outer.split(features, labels))
    inner = StratifiedKFold(folds, shuffle=True, random_state=seed)
    classes = int(labels.max()) + 1
    out_of_fold, on_test = np.empty((len(rest), classes)), []
    for train, validation in inner.split(rest, labels[rest]):
        predict = fit(features[rest[train]], labels[rest[train]])
        out_of_fold[validation] = predict(features[rest[validation]])
        on_test.append(predict(features[held_out]))
    return estimates_of(out_of_fold, labels[rest], np.stack(on_test), labels[held_out])


def fit(features: np.ndarray, labels: np.ndarray):  # type: ignore[no-untyped-def]
    """A function from features to log-probabilities: logistic regression on standardised features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=100))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=UserWarning)  # 100 steps are enough, converged or not
        model.fit(features, labels)
    return model.predict_log_proba


def estimates_of(
    out_of_fold: np.ndarray, labels: np.ndarray, on_test: np.ndarray, test_labels: np.ndarray
) -> list[Estimate]:
    """Every score out of fold (N, C), as evaluate states it, and on the test set, of fold models (K, M, C)."""

    def scored(logits: np.ndarray, truth: np.ndarray) -> dict[str, float]:
        return scores.scores(logits, truth, BINS) | metrics.intervals(logits, truth, BINS)

    own, mean = scored(out_of_fold, labels), scored(on_test.mean(0), test_labels)
    single = [scored(logits, test_labels) for logits in on_test]

    def average(name: str) -> float:
        return float(np.mean([each[name] for each in single]))

    return [
        Estimate(
            score=title,
            out_of_fold=own[name],
            low=own[f"{name}_low"],
            high=own[f"{name}_high"],
            test=average(name),
            test_low=average(f"{name}_low"),
            test_high=average(f"{name}_high"),
            ensemble=mean[name],
        )
        for name, title in SCORES.items()
    ]


def table_lines(splits: list[list[Estimate]]) -> list[str]:
    """A Markdown table: a row for each score, over the splits."""
    lines = [
        "| score | out of fold | test, single | difference | covered | expected | widened | test, mean of models |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in zip(*splits, strict=True):
        count = len(row)
        difference = np.array([each.test - each.out_of_fold for each in row])
        spread = f" (sd {difference.std(ddof=1):.4f})" if count > 1 else ""
        cells = [
            row[0].score,
            f"{np.mean([each.out_of_fold for each in row]):.4f}",
            f"{np.mean([each.test for each in row]):.4f}",
            f"{difference.mean():+.4f}{spread}",
            f"{sum(each.covered for each in row)} of {count}",
            f"{100 * np.mean([each.expected for each in row]):.0f}%",
            f"{sum(each.widened for each in row)} of {count}",
            f"{np.mean([each.ensemble for each in row]):.4f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def document(args: argparse.Namespace, command: str, images: int, *, table: str, minutes: float) -> str:
    """The page docs/honesty.md."""
    held_out = round(images / 5)
    return f"""# The out-of-fold score against unseen images

`{command}`

Means over {args.splits} splits of {images} photographs: {held_out} are split off as the test set, the others are scored
out of fold in {args.folds} folds. The models are logistic regressions on the frozen features of
{args.backbone} at {args.size} pixels; all took {minutes:.1f} minutes.

{table}

- **covered**: the 95% interval that evaluate states with the out-of-fold score covers the test score of single models.
- **expected**: how often it would if it is honest. The test set is a sample too, so this is less than 95%.
- **widened**: the difference lies within both intervals together, which is expected of 95%.
- The test sets overlap, as all are of the same photographs, so the counts are not those of independent trials.
- Out of fold, single models are scored. The mean of the fold models, the last column, is what is handed in.
"""
