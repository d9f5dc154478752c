"""Metrics that choose: values against scikit-learn, the grammar of weighted sums, and refusals in one line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from sklearn import metrics as reference

from fastflower.core import metric, runs, scores
from fastflower.core.errors import InputError
from fastflower.recipe import checks, load

OWN = """
import numpy as np

def hits(probabilities, labels):
    return (probabilities.argmax(1) == labels).sum()

def nothing(probabilities, labels): return None
def infinite(probabilities, labels): return np.inf
def raises(probabilities, labels): raise KeyError("rare")
def one(probabilities): return 1.0
"""


@pytest.fixture
def own_module(tmp_path: Path) -> Iterator[None]:
    Path("my_metrics.py").write_text(OWN)
    yield
    sys.modules.pop("my_metrics", None)
    sys.path[:] = [entry for entry in sys.path if entry != str(tmp_path)]


def random_logits(classes: int, n: int = 300) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(classes)
    labels = rng.integers(0, classes, n)
    logits = rng.normal(size=(n, classes)).astype(np.float32)
    logits[np.arange(n), labels] += 1.0
    logits[1] = logits[0]  # a tie
    return logits, labels


def score(text: str, logits: np.ndarray, labels: np.ndarray, corrupted: float | None = None) -> float:
    parsed = metric.parse(text)
    return parsed.score(parsed.measure(logits, labels), corrupted, 0.7)


@pytest.mark.parametrize("classes", [2, 5])
def test_values_are_those_of_scikit_learn(classes: int) -> None:
    logits, labels = random_logits(classes)
    probs, guess = scores.softmax(logits), logits.argmax(1)
    binary = classes == 2
    wanted = {
        "clean": reference.accuracy_score(labels, guess),
        "macro_recall": reference.balanced_accuracy_score(labels, guess),
        "macro_f1": reference.f1_score(labels, guess, average="macro"),
        "f1": reference.f1_score(labels, guess, average="binary" if binary else "macro"),
        "log_loss": -reference.log_loss(labels, probs),
        "auc": reference.roc_auc_score(
            labels, probs[:, 1] if binary else probs, multi_class="ovr", average="macro"
        ),
        "kappa": reference.cohen_kappa_score(labels, guess, weights="quadratic"),
    }
    for name, value in wanted.items():
        assert score(name, logits, labels) == pytest.approx(value, abs=1e-9), name


def test_auc_is_the_mean_of_the_classes_that_occur() -> None:
    logits, labels = random_logits(5)
    logits, labels = logits[labels < 3], labels[labels < 3]  # scikit-learn refuses
    probs = scores.softmax(logits)
    each = [reference.roc_auc_score(labels == c, probs[:, c]) for c in range(3)]
    assert scores.auc(logits, labels) == pytest.approx(np.mean(each))
    assert scores.auc(logits[:4], np.zeros(4, int)) == 0.5
    assert scores.quadratic_kappa(np.eye(3), np.arange(3)) == 1.0


def test_a_sum_weighs_its_terms_and_a_loss_is_subtracted() -> None:
    logits, labels = random_logits(5)
    value = {name: score(name, logits, labels) for name in ("clean", "macro_f1", "auc", "log_loss")}
    assert score("0.7*clean + 0.3*macro_f1", logits, labels) == pytest.approx(
        0.7 * value["clean"] + 0.3 * value["macro_f1"]
    )
    assert score(" auc-.1 * log_loss ", logits, labels) == pytest.approx(
        value["auc"] + 0.1 * value["log_loss"]
    )
    assert score("combo", logits, labels, 0.5) == pytest.approx(0.7 * value["clean"] + 0.3 * 0.5)
    assert score("combo", logits, labels) == value["clean"]
    assert score("2e-1*corrupted+auc", logits, labels, 0.5) == pytest.approx(0.1 + value["auc"])
    assert metric.parse("log_loss").shown(value["log_loss"]) > 0
    logits[3, 1] = np.nan
    assert np.isnan(score("auc", logits, labels))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (
            "balanced_accuracy",
            r"unknown metric balanced_accuracy; choose from clean, .*macro_recall is balanced",
        ),
        ("", "cannot be read from ''"),
        ("0.7*clean 0.3*auc", "cannot be read from '0.3\\*auc'"),
        ("clean * auc", "cannot be read from '\\* auc'"),
        ("__import__('os').system('true')", "cannot be read from"),
        ("(clean + auc)", "cannot be read from"),
        ("0.5*clean + 0.5*log_loss", "log_loss falls as predictions get better, so subtract it"),
        ("clean - auc", "auc rises as predictions get better, so its weight must be greater than 0"),
        ("0*clean", "its weight must be greater than 0"),
    ],
)
def test_what_is_no_metric_is_refused_in_one_line(text: str, fault: str) -> None:
    with pytest.raises(InputError, match=fault) as refused:
        checks.check(
            load(None, [f"select.metric='{text}'"] if "'" not in text else [f'select.metric="{text}"'])
        )
    assert "\n" not in str(refused.value)


def test_corrupted_images_must_be_there() -> None:
    checks.check(load(None, ["select.metric=0.5*corrupted+auc"]))
    with pytest.raises(
        InputError, match=r"select.metric = corrupted needs corrupted images; set robust.enabled"
    ):
        checks.check(load(None, ["select.metric=corrupted", "robust.enabled=false"]))


def test_the_kind_of_its_checkpoint_can_be_read_back() -> None:
    for text in (*metric.TITLES, "0.7*clean+0.3*auc", "my_metrics:hits", "my_metrics:hits + clean"):
        kind = metric.parse(text).kind
        assert kind in runs.METRIC_KINDS
        path = runs.Run(exp="e", backbone="net", fold=0, seed=1).checkpoint_path(kind, 3, -0.25)
        name = runs.parse_member(path)
        assert name is not None and (name.kind, name.score) == (kind, -0.25)
        assert runs.member_pattern("auto", text) == f"{kind}__*.pth"
    assert {runs.best_kind(name) for name in metric.TITLES} == set(runs.METRIC_KINDS) - {
        "best_weighted",
        "best_own",
    }


@pytest.mark.usefixtures("own_module")
def test_a_metric_of_ones_own() -> None:
    logits, labels = random_logits(5)
    hits = (logits.argmax(1) == labels).sum()
    assert score("my_metrics:hits", logits, labels) == hits
    assert score("0.5*my_metrics:hits - log_loss", logits, labels) == pytest.approx(
        0.5 * hits + score("log_loss", logits, labels)
    )
    for name, fault in (
        ("nothing", "returned NoneType, must return a number"),
        ("infinite", "returned inf, must return a finite number"),
        ("raises", "raised KeyError: 'rare'"),
        ("one", r"takes \(probabilities\), and is called with \(probabilities, labels\)"),
        ("absent", "my_metrics has no function absent"),
    ):
        with pytest.raises(InputError, match=f"select.metric = my_metrics:{name}: {fault}"):
            score(f"my_metrics:{name}", logits, labels)
