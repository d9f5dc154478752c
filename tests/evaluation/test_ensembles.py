from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import lightgbm
import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, log_loss

from fastflower import ensemble
from fastflower.core import runs
from fastflower.core.errors import InputError
from fastflower.core.records import read_record, write_record
from fastflower.core.tables import sealed_rows, write_csv
from fastflower.evaluation import ensembles, logits, meta_learners, summary, tables
from fastflower.evaluation.records import EnsembleComparison, ExperimentScores, MethodScores
from fastflower.recipe import load
from fastflower.recipe.run_record import write_recipe
from support.fake_members import BACKBONES, classes_csv, folds, member, write_folds

FREE = ensembles.Budget(mb=np.ones(3), ms=np.ones(3), max_mb=100, max_ms=100)


def generated(
    n: int = 600, classes: int = 4, noise: tuple[float, ...] = (0.8, 0.9, 6.0)
) -> tuple[np.ndarray, np.ndarray]:
    """A stack (3, n, classes) of two good runs and a useless one, and labels (n,)."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, n)
    stack = np.stack(
        [np.eye(classes)[labels] * 1.5 + scale * rng.normal(size=(n, classes)) for scale in noise]
    )
    return stack.astype(np.float32), labels


def test_means_are_the_formulas() -> None:
    stack, labels = generated()
    np.testing.assert_allclose(
        ensembles.mean_logits(stack, labels)(stack), stack.astype(float).mean(0), atol=1e-12
    )
    by_probability = ensembles.mean_probabilities(stack, labels)(stack)
    np.testing.assert_allclose(np.exp(by_probability), softmax(stack, axis=2).mean(0), rtol=1e-5)
    np.testing.assert_allclose(ensembles.best_single(stack, labels)(stack), stack[0], atol=1e-6)


def test_learned_weights_reach_the_lowest_loss_on_a_grid() -> None:
    stack, labels = generated()
    weights = ensembles.learned_weights(stack, labels)
    assert weights.sum() == pytest.approx(1) and weights[2] < 0.1

    def loss(w: np.ndarray) -> float:
        mean = np.tensordot(w, stack.astype(float), axes=1)
        return min(log_loss(labels, softmax(mean * beta, axis=1)) for beta in np.geomspace(0.2, 8, 25))

    grid = [
        np.array([a, b, 1 - a - b]) for a in np.linspace(0, 1, 6) for b in np.linspace(0, 1, 6) if a + b <= 1
    ]
    assert loss(weights) <= min(map(loss, grid)) + 1e-3


def test_greedy_selection_leaves_out_runs_that_do_not_help_or_fit() -> None:
    stack, labels = generated()
    weights = ensembles.greedy_weights(stack, labels, budget=FREE)
    assert weights.sum() == pytest.approx(1) and weights[2] < min(weights[:2])
    small = ensembles.Budget(mb=np.array([60.0, 50.0, 10.0]), ms=np.ones(3), max_mb=70, max_ms=100)
    chosen = np.flatnonzero(ensembles.greedy_weights(stack, labels, budget=small))
    assert small.mb[chosen].sum() <= 70 and not {0, 1} <= set(chosen)
    slow = ensembles.Budget(mb=np.ones(3), ms=np.array([5.0, 50.0, 5.0]), max_mb=100, max_ms=20)
    assert ensembles.greedy_weights(stack, labels, budget=slow)[1] == 0


class LearnedFusion(torch.nn.Module):
    """Mean over models with softmax-normalised weights: (batch, models, classes) -> (batch, classes)."""

    def __init__(self, models: int) -> None:
        super().__init__()
        self.weights = torch.nn.Parameter(torch.randn(models))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.permute(0, 2, 1) * self.weights.softmax(-1)).sum(2)


def test_the_learned_mixture_is_the_optimum_of_gradient_descent() -> None:
    stack, labels = generated(n=400)
    weights = ensembles.mixture_weights(stack, labels)
    assert weights.sum() == pytest.approx(1) and (weights >= 0).all()
    fusion = LearnedFusion(len(stack)).double()
    x = torch.from_numpy(softmax(stack.astype(np.float64), axis=2)).permute(1, 0, 2)  # (N, M, C)
    adam, y = torch.optim.Adam(fusion.parameters(), lr=0.05), torch.from_numpy(labels)
    for _ in range(600):
        adam.zero_grad()
        loss = torch.nn.functional.nll_loss(fusion(x).log(), y)
        loss.backward()
        adam.step()
    np.testing.assert_allclose(weights, fusion.weights.softmax(-1).detach().numpy(), atol=5e-3)
    probs = np.exp(ensembles.weighted_probabilities(weights)(stack))
    assert log_loss(labels, probs) <= loss.item() + 1e-6
    np.testing.assert_allclose(probs.sum(1), 1)


def test_the_learned_mixture_finds_the_only_useful_run() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 300)
    stack = rng.normal(size=(3, 300, 4))
    stack[1] += 3 * np.eye(4)[labels]
    assert ensembles.mixture_weights(stack, labels)[1] > 0.95


def test_nested_predictions_are_those_of_a_model_fitted_on_the_other_parts() -> None:
    stack, labels = generated(n=200)
    parts = np.arange(200) % 4
    log_p = ensembles.nested_predictions(meta_learners.logistic, stack, labels=labels, parts=parts)
    inside = parts == 2
    model = LogisticRegression(C=0.01, max_iter=100)
    model.fit(meta_learners.features(stack[:, ~inside]), labels[~inside])
    np.testing.assert_allclose(
        np.exp(log_p[inside]), model.predict_proba(meta_learners.features(stack[:, inside])), rtol=1e-6
    )


def test_nothing_is_gained_by_fitting_to_shuffled_labels() -> None:
    stack, labels = generated(n=400, classes=2)
    shuffled = np.random.default_rng(3).permutation(labels)
    log_p = ensembles.nested_predictions(
        meta_learners.logistic, stack, labels=shuffled, parts=np.arange(400) % 5
    )
    assert abs((log_p.argmax(1) == shuffled).mean() - 0.5) < 0.1


def test_classes_that_a_part_lacks_get_a_small_probability() -> None:
    stack, labels = generated(n=200)
    known = labels != 3
    log_p = meta_learners.logistic(stack[:, known], labels[known])(stack)
    assert (log_p[:, 3] < -20).all() and np.isfinite(log_p).all()


def runs_of(*backbones_seeds: tuple[str, int]) -> list[logits.RunLogits]:
    return [
        logits.assemble([member(f, b, s, skill=1.2) for f in range(3)], folds()) for b, s in backbones_seeds
    ]


def rows_of(comparison: EnsembleComparison) -> dict[str, MethodScores]:
    return {row.method: row for row in comparison.rows}


@pytest.mark.slow
def test_the_comparison_has_nested_scores_and_gains_by_fold() -> None:
    sets = runs_of((BACKBONES[0], 1), (BACKBONES[0], 2), (BACKBONES[1], 1))
    comparison = ensembles.compare(sets, FREE)
    rows = rows_of(comparison)
    best, mean = rows["best single"], rows["mean of logits"]
    assert next(iter(rows)) == "best single" and best.gain == 0
    mean_logits = np.mean([s.logits for s in sets], axis=0)
    top1 = accuracy_score(sets[0].class_idx, mean_logits.argmax(1))
    assert mean.top1 == pytest.approx(top1)
    assert mean.nll == pytest.approx(log_loss(sets[0].class_idx, softmax(mean_logits, axis=1)), rel=1e-4)
    assert mean.gain == pytest.approx(top1 - best.top1)
    family = 0.25 * sets[0].logits + 0.25 * sets[1].logits + 0.5 * sets[2].logits
    assert rows["mean by backbone"].top1 == pytest.approx(accuracy_score(sets[0].class_idx, family.argmax(1)))
    assert all(len(row.gains) == comparison.parts == 3 for row in rows.values())
    assert sum(comparison.weights["learned weights"].values()) == pytest.approx(1)
    assert (mean.mb, mean.ms) == (3.0, 3.0)  # of FREE
    assert best.mb == 1.0 and rows["logistic stacking"].mb is None


@pytest.mark.slow
def test_methods_that_exceed_the_limits_are_marked() -> None:
    sets = runs_of((BACKBONES[0], 1), (BACKBONES[1], 1))
    limits = load(None, ["bundle.max_mb=40"]).bundle
    rows = rows_of(ensembles.compare(sets, ensembles.Budget.of(sets, limits)))
    verdicts = {name: tables.hand_in_verdict(row) for name, row in rows.items()}
    assert verdicts["mean of logits"] == "too large" and verdicts["greedy in budget"] == "fits"
    assert verdicts["LightGBM stacking"] == "no predictor"
    none = ensembles.Budget.of(sets, load(None, ["bundle.max_mb=20"]).bundle)
    assert "greedy in budget" not in ensembles.methods(sets, none)


@pytest.mark.slow
def test_lightgbm_stacking_is_that_of_a_booster_fitted_on_the_other_parts() -> None:
    stack, labels = generated(n=240)
    log_p = ensembles.nested_predictions(
        meta_learners.lightgbm, stack, labels=labels, parts=np.arange(240) % 3
    )
    inside = np.arange(240) % 3 == 1
    model = lightgbm.LGBMClassifier(
        n_estimators=50, learning_rate=0.1, num_leaves=7, min_child_samples=5, max_bin=63, random_state=0,
        deterministic=True, force_col_wise=True, n_jobs=0, verbose=-1,
    )  # fmt: skip
    model.fit(meta_learners.features(stack[:, ~inside]), labels[~inside])
    expected = model.booster_.predict(meta_learners.features(stack[:, inside]))
    np.testing.assert_allclose(np.exp(log_p[inside]), expected, rtol=1e-6)
    assert accuracy_score(labels, log_p.argmax(1)) > 0.5  # chance is a quarter


def test_hand_set_weights_are_by_run_or_shared_by_a_backbones_seeds() -> None:
    sets = runs_of((BACKBONES[0], 1), (BACKBONES[0], 2), (BACKBONES[1], 1))
    by_backbone = ensembles.hand_weights(sets, {BACKBONES[0]: 3, BACKBONES[1]: 1})
    np.testing.assert_allclose(by_backbone, [3 / 8, 3 / 8, 1 / 4])
    by_run = ensembles.hand_weights(sets, {BACKBONES[0]: 2, f"{BACKBONES[0]} seed 2": 0, BACKBONES[1]: 1})
    np.testing.assert_allclose(by_run, [1 / 2, 0, 1 / 2])
    row = rows_of(ensembles.compare(sets, FREE, {BACKBONES[0]: 3, BACKBONES[1]: 1}))["hand-set weights"]
    mean = 0.375 * sets[0].logits + 0.375 * sets[1].logits + 0.25 * sets[2].logits
    assert row.top1 == pytest.approx(accuracy_score(sets[0].class_idx, mean.argmax(1)))


@pytest.mark.parametrize(
    "given, pattern",
    [
        (None, "must be a map of weights, one for each of convnextv2_atto"),
        ({"resnet": 1}, "no run is called resnet; give one for each of"),
        ({BACKBONES[0]: 1}, f"none for {BACKBONES[1]} seed 1"),
        *[
            ({BACKBONES[0]: 1, BACKBONES[1]: value}, rf"{value} for .*; weights are numbers from 0")
            for value in (-1, float("nan"), float("inf"), True, "1", None)
        ],
        ({BACKBONES[0]: 0, BACKBONES[1]: 0}, "all are 0; at least one run must count"),
    ],
)
def test_hand_set_weights_that_cannot_be_used_are_refused(given: object, pattern: str) -> None:
    sets = runs_of((BACKBONES[0], 1), (BACKBONES[1], 1))
    with pytest.raises(InputError, match=pattern):
        ensembles.hand_weights(sets, given)


def test_learned_weights_of_an_image_come_from_other_folds() -> None:
    sets = runs_of((BACKBONES[0], 1), (BACKBONES[0], 2), (BACKBONES[1], 1))
    settings = load(None, ["ensembling.weighting=learned"])
    by_image, final = ensembles.run_weights(sets, settings)
    stack, labels, fold = np.stack([s.logits for s in sets]), sets[0].class_idx, sets[0].fold
    np.testing.assert_allclose(final, ensembles.learned_weights(stack, labels))
    for part in range(3):
        expected = ensembles.learned_weights(stack[:, fold != part], labels[fold != part])
        np.testing.assert_allclose(by_image[:, fold == part].T, [expected] * (fold == part).sum())
    members = [
        member(f, b, s, skill=1.2) for b, s in ((BACKBONES[0], 1), (BACKBONES[1], 1)) for f in range(3)
    ]
    scores = summary.summarise(members, folds(), classes=classes_csv(), recipe=settings)
    assert sum(scores.fused.weights.values()) == pytest.approx(1)
    assert summary.temperatures(scores).weights == scores.fused.weights


def test_greedy_weights_are_those_of_selection_within_the_limits() -> None:
    """The third run is too large, so it gets no weight whatever it would add."""
    sets = runs_of((BACKBONES[0], 1), (BACKBONES[0], 2), (BACKBONES[1], 1))
    sets[2] = replace(sets[2], info=replace(sets[2].info, mb=5000.0))
    settings = load(None, ["ensembling.weighting=greedy", "bundle.max_ms=1000"])
    by_image, final = ensembles.run_weights(sets, settings)
    stack, labels, fold = np.stack([s.logits for s in sets]), sets[0].class_idx, sets[0].fold
    np.testing.assert_allclose(final, [*ensembles.greedy_weights(stack[:2], labels), 0])
    for part in range(3):
        expected = [*ensembles.greedy_weights(stack[:2, fold != part], labels[fold != part]), 0]
        np.testing.assert_allclose(by_image[:, fold == part].T, [expected] * (fold == part).sum())
    with pytest.raises(
        InputError, match=r"weighting = greedy: the smallest run takes .* MB and .* ms, allowed"
    ):
        ensembles.run_weights(sets, load(None, ["ensembling.weighting=greedy", "bundle.max_mb=1"]))


@pytest.mark.parametrize(
    ("dtype", "verdict"), [("fp32", "too large"), ("fp16", "too large"), ("int8", "fits")]
)
def test_a_hand_in_is_as_large_as_its_weights_are_stored(dtype: str, verdict: str) -> None:
    """Two runs of 30 MB in half precision each; a fiftieth of 50 MB is reserved for programs and tables."""
    sets = runs_of((BACKBONES[0], 1), (BACKBONES[1], 1))
    limits = load(None, ["bundle.max_mb=50", f"bundle.dtype={dtype}"]).bundle
    budget = ensembles.Budget.of(sets, limits)
    row = rows_of(ensembles.compare(sets, budget))["mean of logits"]
    assert row.mb == 60 * {"fp32": 2, "fp16": 1, "int8": 0.5}[dtype]
    assert tables.hand_in_verdict(row) == verdict and budget.max_mb == pytest.approx(49)


def test_a_single_fold_is_cut_into_stratified_parts() -> None:
    single_fold = logits.assemble([member(0)], folds())
    parts = ensembles.scoring_parts(single_fold.fold, single_fold.class_idx)
    assert len(np.unique(parts)) >= 2 and len(parts) == len(single_fold)
    (run,) = runs_of((BACKBONES[0], 1))
    assert list(ensembles.scoring_parts(run.fold, run.class_idx)) == list(run.fold)


def evaluated_experiment(exp: str, skill: float = 2.0) -> list[str]:
    """Write the logits and scores of an experiment of two backbones, and its folds; returns changes of its recipe."""
    folder = runs.RESULTS / exp
    members = [member(fold, backbone, skill=skill) for backbone in BACKBONES for fold in range(3)]
    for saved in members:
        logits.save_logits(folder / "oof", saved)
    words = [f"exp.name={exp}", f"model.backbone={BACKBONES[0]}", "data.img_size=32"]
    scores = summary.summarise(members, folds(), classes=classes_csv(), recipe=load(None, words))
    write_record(folder / "scores.json", scores)
    write_folds(Path("data/folds.csv"))
    return words


def test_the_command_reads_saved_logits_and_writes_its_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = runs.RESULTS / "example"
    with pytest.raises(InputError, match=r"no .*scores.json; run python -m fastflower.evaluate first"):
        ensemble.main(["exp.name=example"])
    words = evaluated_experiment("example")
    scores = read_record(folder / "scores.json", ExperimentScores)
    ensemble.main(words)
    assert "mean of logits" in capsys.readouterr().out
    comparison = read_record(folder / "ensemble.json", EnsembleComparison)
    assert comparison.rows[0].method == "best single" and comparison.n == scores.fused.n


def test_a_recipe_that_contradicts_the_members_is_refused(tmp_path: Path) -> None:
    words = evaluated_experiment("example")
    for change, pattern in (
        ("model.backbone=resnet18", "model.backbone = resnet18, but the members of example are of"),
        ("model.head=cosface", "model.head = cosface, but .* was trained with linear"),
        ("data.img_size=[64]", r"data.img_size = \[64\], but .* was trained with \[32, 32\]"),
    ):
        with pytest.raises(InputError, match=pattern):
            ensemble.main([*words, change])
    write_folds(Path("data/folds.csv"), count=2)
    with pytest.raises(InputError, match=r"was trained with other folds .* than data holds"):
        ensemble.main(words)
    write_folds(Path("data/folds.csv"))
    rows = [{"class_idx": str(i), "category_id": str(i), "n": "3"} for i in range(2)]
    write_csv(Path("data/classes.csv"), sealed_rows(rows, tuple(rows[0]), count=len(rows)))
    with pytest.raises(InputError, match=r"was trained with other classes \(c0ffee, .*than data holds"):
        ensemble.main(words)


def test_runs_of_two_experiments_are_compared_by_their_names(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    means = {"best single": ensembles.best_single, "mean of logits": ensembles.mean_logits}
    monkeypatch.setattr(ensembles, "methods", lambda *_, **__: means)  # LightGBM takes seconds
    words = {exp: evaluated_experiment(exp, skill) for exp, skill in (("a", 2.0), ("b", 1.5))}
    for exp, changes in words.items():
        write_recipe(runs.RESULTS / exp / "meta" / "recipe.yaml", load(None, changes))
    ensemble.main(["a", "b"])
    comparison = read_record(runs.COMBINATION, EnsembleComparison)
    assert comparison.runs == [f"{exp}/{backbone} seed 42" for exp in "ab" for backbone in BACKBONES]
    assert not (runs.RESULTS / "a" / "ensemble.json").exists()
    assert capsys.readouterr().out.splitlines()[-1].endswith("export a b")
    ensemble.main(["a", "b", "--runs", "b"])
    assert read_record(runs.COMBINATION, EnsembleComparison).runs == comparison.runs[2:]
    with pytest.raises(InputError, match="--save and --predict are for the runs of one experiment"):
        ensemble.main(["a", "b", "--save"])
    with pytest.raises(InputError, match=r"^a and a.yaml are both of the experiment a and differ"):
        Path("a.yaml").write_text("seed: 1\n")
        ensemble.main(["a", "a.yaml"])


def test_the_greedy_choice_follows_the_metric() -> None:
    """Run 0 has the better likelihood and calls every image frequent; run 1 finds the rare class."""
    labels = np.array([0] * 18 + [1] * 2)
    sure = np.tile([2.0, 0.0], (20, 1))
    rare = np.where(labels[:, None] == 1, [0.0, 0.1], [0.1, 0.0])
    stack = np.stack([sure, rare]).astype(np.float32)
    assert ensembles.greedy_weights(stack, labels, metric="log_loss")[0] == 1
    assert ensembles.greedy_weights(stack, labels, metric="clean")[0] == 1  # rated by its likelihood
    assert ensembles.greedy_weights(stack, labels, metric="macro_f1")[1] == 1
    assert ensembles.greedy_weights(stack, labels, metric="0.5*clean + 0.5*macro_recall")[1] == 1
    assert ensembles.best_run(stack, labels, "macro_f1") == 1
    assert ensembles.best_run(stack, labels, "log_loss") == 0
