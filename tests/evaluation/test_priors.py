"""Corrections for another class distribution: against known posteriors, a direct maximisation and the predictor."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from fastflower.core import runs
from fastflower.core.errors import InputError
from fastflower.core.records import write_record
from fastflower.evaluation import priors
from fastflower.evaluation.logits import assemble, fuse
from fastflower.recipe import load
from support import fake_members
from support.predictor_runs import IDS, read_rows, save_random_member, write_bundle, write_photographs

SKEWED, UNIFORM = np.array([0.7, 0.2, 0.1]), np.full(3, 1 / 3)


def drawn(n: int, classes: np.ndarray, believed: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels distributed as `classes`, and the exact log-posteriors of one who believes in another distribution."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(3, n, p=classes)
    positions = 1.5 * labels + rng.normal(size=n)
    likelihood = -0.5 * (positions[:, None] - 1.5 * np.arange(3)) ** 2
    return log_softmax(likelihood + np.log(believed), axis=1), labels


def test_the_source_is_the_distribution_that_the_network_believes_in() -> None:
    """True if a sampler balanced it; otherwise it follows the images."""
    for believed in (UNIFORM, SKEWED, np.array([0.2, 0.2, 0.6])):
        log_p, labels = drawn(6000, SKEWED, believed)
        np.testing.assert_allclose(priors.source_prior(log_p, labels), believed, atol=0.04)
    few, labels = drawn(12, SKEWED, UNIFORM)
    assert priors.source_prior(few, labels).min() > 0.05  # the prior on the biases holds


@pytest.mark.parametrize("n", [3, 2000])
def test_em_finds_the_most_likely_distribution(n: int, code) -> None:
    log_p, _ = drawn(n, np.array([0.1, 0.3, 0.6]), SKEWED)
    odds = np.exp(log_p) / SKEWED

    def loss(z: np.ndarray) -> float:
        q = softmax(np.append(z, 0.0))
        return -float(np.log(odds @ q).sum() + SKEWED @ np.log(q))

    wanted = softmax(np.append(minimize(loss, np.zeros(2), method="Nelder-Mead", tol=1e-10).x, 0.0))
    got = priors.estimate(log_p, SKEWED)
    np.testing.assert_allclose(got, wanted, atol=1e-4)
    np.testing.assert_allclose(code.priors.estimate(np.exp(log_p), SKEWED), got, atol=1e-12)
    if n == 2000:
        np.testing.assert_allclose(got, [0.1, 0.3, 0.6], atol=0.04)
    twice = priors.estimate(log_p, SKEWED, np.where(np.arange(n) == 0, 2.0, (n - 2) / (n - 1)))
    assert np.abs(twice - got).max() > 1e-5  # a weight counts


def test_effects_are_measured_on_images_weighted_as_the_target() -> None:
    """A loop over parts and images gives the same; a network trained on the images' own classes gains from uniform."""
    recipe = load(None, [])
    folds = fake_members.folds()
    made = fuse([assemble([fake_members.member(fold, skill=0.7) for fold in (0, 1, 2)], folds)])
    got = priors.measure(made, 1.3, recipe)
    assert [(row.images, row.target) for row in got.rows] == [
        ("as in training", "em"),
        ("uniform", "uniform"),
        ("uniform", "em"),
    ]
    log_p, labels = log_softmax(made.logits.astype(float) / 1.3, axis=1), made.class_idx
    right_before, right_after = np.zeros(len(labels)), np.zeros(len(labels))
    for part in (0, 1, 2):
        source = priors.source_prior(log_p[made.fold != part], labels[made.fold != part])
        for row in np.flatnonzero(made.fold == part):
            right_before[row] = log_p[row].argmax() == labels[row]
            right_after[row] = (log_p[row] - np.log(source)).argmax() == labels[row]
    recalls = [
        np.mean([right[labels == c].mean() for c in np.unique(labels)])
        for right in (right_before, right_after)
    ]
    balanced = got.rows[1]
    assert balanced.before == pytest.approx(recalls[0])
    assert balanced.gain.gain == pytest.approx(recalls[1] - recalls[0]) and balanced.distance < 1e-4
    assert balanced.gain.low < balanced.gain.gain < balanced.gain.high and balanced.gain.p is None
    assert sum(got.source) == pytest.approx(1) and min(got.source) > 0
    assert priors.table(got)[2][:3] == ["uniform", "uniform", f"{recalls[0]:.4f}"]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("category_id,share\n7,1\n012,1\n", r"no row for class rose, red"),
        ("category_id,share\n7,1\n012,1\n9,1\n", r"class 9 is none of classes.csv"),
        ("category_id,share\n7,1\n7,1\n", r"class 7 twice"),
        ("category_id,share\n7,-1\n", r"the share -1 of class 7 is no number from 0"),
        ("category_id,share\n7,many\n", r"could not convert string to float: 'many'"),
        ("category_id,n\n7,3\n", r"no column 'share'"),
        ("category_id,share\n7\n", r"a row is shorter than the header"),
        ('category_id,share\n7,0\n012,0\n"rose, red",0\n', r"all shares are 0"),
    ],
)
def test_tables_that_do_not_fit_are_refused(text: str, fault: str) -> None:
    Path("shares.csv").write_text(text)
    with pytest.raises(
        InputError, match=rf"bundle.prior = shares.csv: {fault}.*; give a CSV file with the col"
    ):
        priors.given_prior(load(None, ["bundle.prior=shares.csv"]), IDS)
    with pytest.raises(
        InputError, match=r"bundle.prior = flat: No such file.*give train, uniform, em, or a CSV"
    ):
        priors.given_prior(load(None, ["bundle.prior=flat"]), IDS)


def measured(**changes: object) -> priors.Priors:
    """The record that evaluate writes of the predictor's classes."""
    fields = {
        "n": 9, "class_ids": IDS, "given": None, "source": SKEWED.tolist(), "rows": [], **changes,
    }  # fmt: skip
    return priors.Priors(**fields)


def test_export_needs_what_evaluate_measured() -> None:
    recipe = load(None, ["exp.name=exp", "bundle.prior=uniform"])
    with pytest.raises(InputError, match=r"bundle.prior = uniform: no .*priors.json, .*; run .*evaluate"):
        priors.correction(recipe, IDS)
    write_record(runs.RESULTS / "exp" / priors.Priors.FILE, measured())
    assert priors.correction(recipe, IDS).target == UNIFORM.tolist()
    assert priors.correction(load(None, ["exp.name=exp"]), IDS) is None
    with pytest.raises(InputError, match="was measured with other classes"):
        priors.correction(recipe, ["7", "8", "9"])
    Path("shares.csv").write_text('category_id,share\n7,1\n012,1\n"rose, red",0\n')
    recipe = load(None, ["exp.name=exp", "bundle.prior=shares.csv"])
    with pytest.raises(InputError, match="was measured with other table"):
        priors.correction(recipe, IDS)
    given = priors.given_prior(recipe, IDS)
    np.testing.assert_allclose(given, [0.5, 0.5, 0], atol=2e-6)
    write_record(runs.RESULTS / "exp" / priors.Priors.FILE, measured(given=given.tolist()))
    assert priors.correction(recipe, IDS).target == given.tolist()


@pytest.mark.parametrize("asked", ["uniform", "em"])
def test_the_predictor_corrects_as_the_evaluation_does(code, asked: str, capsys) -> None:
    Path("test_dataset").mkdir()
    write_photographs(6)
    path = save_random_member(Path())
    write_record(runs.RESULTS / "exp" / priors.Priors.FILE, measured())
    table = {}
    for prior in ("train", asked):
        words = [
            "exp.name=exp",
            "tta.scales=[32]",
            "tta.hflip=false",
            f"bundle.prior={prior}",
            "bundle.columns=three",
        ]
        write_bundle(Path(prior), [path], *words)
        options = ["--bundle", prior, "--threads", "1", "--logits", f"{prior}.npz"]
        assert code.predict.main(["test_dataset", f"{prior}.csv", *options]) == 0
        table[prior] = read_rows(Path(f"{prior}.csv"))[1:]
    logits = np.load(f"{asked}.npz")["logits"][:, 0, 0]
    np.testing.assert_array_equal(logits, np.load("train.npz")["logits"][:, 0, 0])  # as the network gave them
    log_p = log_softmax(logits.astype(float) / 1.5, axis=1)
    target = UNIFORM if asked == "uniform" else priors.estimate(log_p, SKEWED)
    wanted = np.exp(priors.corrected(log_p, SKEWED, target))
    assert [row[1] for row in table[asked]] == [IDS[best] for best in wanted.argmax(1)]
    np.testing.assert_allclose([float(row[2]) for row in table[asked]], wanted.max(1), atol=2e-6)
    plain = np.exp(log_p)
    np.testing.assert_allclose([float(row[2]) for row in table["train"]], plain.max(1), atol=2e-6)
    summary = json.loads(Path(f"{asked}.json").read_text())
    if asked == "em":
        np.testing.assert_allclose(summary["class_distribution"], target, atol=1e-5)
        assert "class distribution by EM: " in capsys.readouterr().out
    else:
        assert "class_distribution" not in summary


def test_a_bundle_with_a_wrong_correction_is_damaged(code) -> None:
    bundle = {
        "class_ids": IDS, "prior": [1.0] * 3, "columns": "three", "members": [], "labels": IDS, "top_k": 1,
        "separator": " ",
    }  # fmt: skip
    code.bundles.check_references({**bundle, "correction": {"source": [0.5, 0.2, 0.3], "target": "em"}})
    with pytest.raises(ValueError, match=r"correction.target must have a share above 0 for 3 class_ids"):
        code.bundles.check_references(
            {**bundle, "correction": {"source": [0.5, 0.2, 0.3], "target": [1.0, 0.0, 0]}}
        )
