"""Correction of probabilities for another class distribution in the images to predict than in training.

A network's probabilities hold for one class distribution, its source. With a target distribution q they become
p * q / source, normalised (Saerens et al. 2002, Neural Computation 14). The source is fitted on out-of-fold images, so
that samplers and losses that balance classes are accounted for (bias-corrected calibration, Alexandari et al. 2020,
arXiv:1901.06852). q is given, uniform, or estimated from the probabilities by expectation-maximisation.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import log_softmax, softmax

from fastflower.core import runs
from fastflower.core.errors import InputError
from fastflower.core.records import read_record
from fastflower.evaluation.ensembles import scoring_parts
from fastflower.evaluation.logits import Logits, LogitsInfo
from fastflower.evaluation.measured import PriorEffect, Priors
from fastflower.evaluation.paired import paired_gain
from fastflower.recipe import Recipe

SMALLEST = 1e-6  # share of a class, so that no probability is impossible
WORDS = ("train", "uniform", "em")  # values of bundle.prior; others are paths
BIAS_STD = 1.0  # of the log of a class's bias; counts like one image


def source_prior(log_p: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The class distribution (C,) for which log-probabilities (N, C) hold, fitted on images with labels (N,).

    The biases b of the classes that minimise the NLL of softmax(log_p + b), with a normal prior on each of them that
    counts like an image; the source is then the distribution of the labels over e^b.
    """
    from scipy.optimize import minimize  # here: half a second, which a refusal does not spend

    n, classes = log_p.shape
    shares = np.bincount(labels, minlength=classes) / n

    def loss(bias: np.ndarray) -> tuple[float, np.ndarray]:
        corrected = log_softmax(log_p + bias, axis=1)
        nll = -corrected[np.arange(n), labels].mean() + (bias**2).sum() / (2 * n * BIAS_STD**2)
        return float(nll), np.exp(corrected).mean(0) - shares + bias / (n * BIAS_STD**2)

    bias = minimize(loss, np.zeros(classes), jac=True, method="L-BFGS-B").x
    return normalised(np.maximum(shares, SMALLEST) * np.exp(-bias))


def estimate(log_p: np.ndarray, source: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """The class distribution (C,) of images by expectation-maximisation over their log-probabilities (N, C).

    One image of the source distribution is added, so that few images leave no class impossible. weights: of the images,
    with mean 1.
    """
    # twin of estimate in code/priors.py
    odds, images = softmax(log_p, axis=1) / source, np.ones(len(log_p)) if weights is None else weights
    q = source
    for _ in range(1000):
        joint = odds * q
        before, q = q, images @ (joint / joint.sum(1, keepdims=True)) + source
        q = q / q.sum()
        if np.abs(q - before).sum() < 1e-6:
            break
    return normalised(q)


def normalised(values: np.ndarray) -> np.ndarray:
    """Positive shares that sum to 1."""
    shares = np.maximum(values / values.sum(), SMALLEST)
    result: np.ndarray = shares / shares.sum()
    return result


def corrected(log_p: np.ndarray, source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Log-probabilities (N, C) for the target distribution."""
    result: np.ndarray = log_softmax(log_p + np.log(target / source), axis=1)
    return result


def measure(data: Logits[LogitsInfo], t: float, recipe: Recipe) -> Priors:
    """The source of a set's probabilities and the out-of-fold effect of each correction.

    Each part of the images is corrected with the source fitted on the others, and EM sees the part alone. Raises
    InputError for a file of bundle.prior that does not fit the classes.
    """
    log_p, labels = log_softmax(data.logits.astype(np.float64) / t, axis=1), data.class_idx
    classes = log_p.shape[1]
    counts = np.bincount(labels, minlength=classes)
    shares, uniform = counts / len(labels), (counts > 0) / (counts > 0).sum()
    given = given_prior(recipe, list(data.info.class_ids))
    parts = scoring_parts(data.fold, labels)
    sources = {
        part: source_prior(log_p[parts != part], labels[parts != part])
        if (parts != part).any()
        else normalised(shares)
        for part in np.unique(parts)
    }
    cases = [("as in training", shares, "em"), ("uniform", uniform, "uniform"), ("uniform", uniform, "em")]
    if given is not None:
        present = given * (counts > 0)
        cases += [("as given", present / present.sum(), target) for target in ("as given", "em")]
    return Priors(
        n=len(labels),
        class_ids=list(data.info.class_ids),
        given=None if given is None else given.tolist(),
        source=source_prior(log_p, labels).tolist(),
        rows=[
            _effect(log_p, labels, images=images, truth=truth, target=target, parts=parts, sources=sources)
            for images, truth, target in cases
        ],
    )


def _effect(
    log_p: np.ndarray,
    labels: np.ndarray,
    *,
    images: str,
    truth: np.ndarray,
    target: str,
    parts: np.ndarray,
    sources: dict[int, np.ndarray],
) -> PriorEffect:
    """The effect on images weighted so that their classes are distributed as `truth` (C,)."""
    counts = np.bincount(labels, minlength=log_p.shape[1])
    weights = (truth / np.maximum(counts, 1))[labels] * len(labels)
    after, distances = log_p.copy(), []
    for part, source in sources.items():
        inside = parts == part
        q = normalised(truth)
        if target == "em":
            share = weights[inside] / weights[inside].mean()
            q = estimate(log_p[inside], source, share)
        after[inside] = corrected(log_p[inside], source, q)
        distances.append(np.abs(q - truth).sum() / 2 * inside.mean())
    hits = [values.argmax(1) == labels for values in (log_p, after)]
    rows = np.arange(len(labels))
    return PriorEffect(
        images=images,
        target=target,
        before=float(np.average(hits[0], weights=weights)),
        gain=paired_gain(hits[0], hits[1], weights),
        nll_before=float(np.average(-log_p[rows, labels], weights=weights)),
        nll_after=float(np.average(-after[rows, labels], weights=weights)),
        distance=float(sum(distances)),
    )


def given_prior(recipe: Recipe, class_ids: list[str]) -> np.ndarray | None:
    """The distribution (C,) in the file that bundle.prior names; None where it names none.

    Raises InputError unless the file has a share, a number from 0, for every class once.
    """
    asked, column = recipe.bundle.prior, recipe.data.label_col
    if asked in WORDS:
        return None
    wanted = f"a CSV file with the columns {column} and share and a row for each class"
    try:
        with open(asked, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a CSV file in UTF-8"
        raise InputError(f"bundle.prior = {asked}: {reason}; give {', '.join(WORDS)}, or {wanted}") from None
    shares: dict[str, float] = {}
    try:
        for row in rows:
            name, share = row[column].strip(), float(row["share"])
            if name not in class_ids or name in shares:
                raise ValueError(f"class {name} {'twice' if name in shares else 'is none of classes.csv'}")
            if not 0 <= share < np.inf:
                raise ValueError(f"the share {row['share']} of class {name} is no number from 0")
            shares[name] = share
        absent = [name for name in class_ids if name not in shares]
        if absent or not sum(shares.values()):
            raise ValueError(f"no row for class {absent[0]}" if absent else "all shares are 0")
    except (KeyError, AttributeError, TypeError) as error:
        fault = f"no column {error}" if isinstance(error, KeyError) else "a row is shorter than the header"
        raise InputError(f"bundle.prior = {asked}: {fault}; give {wanted}") from None
    except ValueError as error:
        raise InputError(f"bundle.prior = {asked}: {error}; give {wanted}") from None
    return normalised(np.array([shares[name] for name in class_ids]))


@dataclass(frozen=True)
class Correction:
    """The class distributions (C,) by which the predictor corrects; `effect` is their out-of-fold effect as text."""

    source: list[float]
    target: list[float] | Literal["em"]
    effect: str


def correction(recipe: Recipe, class_ids: list[str]) -> Correction | None:
    """The correction that bundle.prior asks for, as evaluate measured it; None for train.

    Raises InputError when evaluate has not measured it.
    """
    asked = recipe.bundle.prior
    if asked == "train":
        return None
    path, remedy = (
        runs.RESULTS / recipe.exp.name / Priors.FILE,
        "run python -m fastflower.evaluate with it first",
    )
    if not path.is_file():
        raise InputError(
            f"bundle.prior = {asked}: no {path}, which says what it changes out of fold; {remedy}"
        )
    priors, given = read_record(path, Priors), given_prior(recipe, class_ids)
    stale = given is not None and (priors.given is None or not np.allclose(priors.given, given))
    if stale or priors.class_ids != class_ids:
        noun = "table" if stale else "classes"
        raise InputError(f"bundle.prior = {asked}: {path} was measured with other {noun}; {remedy}")
    known = [1 / len(class_ids)] * len(class_ids) if given is None else given.tolist()
    target = "uniform" if asked == "uniform" else "em" if asked == "em" else "as given"
    rows = [row for row in priors.rows if row.target == target]
    return Correction(
        source=priors.source,
        target="em" if asked == "em" else known,
        effect="; ".join(
            f"classes {row.images}: top-1 {row.before:.4f} {row.gain.text} (n = {priors.n}, out of fold)"
            for row in rows
        ),
    )


def table(priors: Priors) -> list[list[str]]:
    """The console's table of corrections: a header, and a row for each."""
    rows = [["classes of the images", "corrected to", "top-1", "gain", "95%", "NLL", "corrected", "off by"]]
    for row in priors.rows:
        interval = f"{row.gain.low:+.4f} to {row.gain.high:+.4f}"
        losses = [f"{row.nll_before:.4f}", f"{row.nll_after:.4f}"]
        gain = [f"{row.before:.4f}", f"{row.gain.gain:+.4f}", interval]
        rows.append([row.images, row.target, *gain, *losses, f"{row.distance:.3f}"])
    return rows
