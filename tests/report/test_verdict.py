"""The verdict and the next steps stay honest: one fold, two classes, nothing corrupted, pairs, a run that broke off."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fastflower.core import runs
from fastflower.core.tables import write_csv
from fastflower.evaluation import summary
from fastflower.evaluation.logits import MemberLogits
from fastflower.evaluation.records import ExperimentScores, Verdict
from fastflower.evaluation.submissions import SubmissionScore
from fastflower.recipe import Recipe, load
from fastflower.report import dataset, hand_in, page, scores_section
from fastflower.report import next_steps as steps
from fastflower.report.dataset import DataFacts
from fastflower.report.experiment import DuplicatePair, Experiment
from fastflower.report.next_steps import next_steps
from fastflower.report.verdict import broken_runs, verdict
from support.fake_members import BACKBONES, classes_csv, event, folds, member
from support.reference_scores import wilson

RECIPE = load(None, ["exp.name=example"])


def experiment(members: list[MemberLogits] | None = None, **changes: Any) -> Experiment:
    """An experiment of these members, of three folds unless told otherwise; `changes` are fields of it."""
    members = members or [member(fold, skill=3.0) for fold in (0, 1, 2)]
    classes = classes_csv()[: members[0].logits.shape[1]]
    scores = summary.summarise(members, folds(), classes=classes, recipe=RECIPE)
    return Experiment("example", scores, changes.pop("events", []), **{"recipe": RECIPE, **changes})


def two_classes(fold: int, skill: float) -> MemberLogits:
    data = member(fold, skill=skill, class_ids=["7", "12"])
    class_idx = np.minimum(data.class_idx, 1)
    rng = np.random.default_rng(fold)
    logits = (skill * np.eye(2)[class_idx] + rng.normal(size=(len(class_idx), 2))).astype(np.float32)
    return replace(
        data, class_idx=class_idx, logits=logits, single=logits, corrupt=np.stack([logits, logits])
    )


def uncorrupted(fold: int) -> MemberLogits:
    data = member(fold)
    return replace(data, combos=np.empty((0, 2), "U8"), corrupt=data.corrupt[:0])


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", text)]


def test_the_first_sentence_names_what_was_scored() -> None:
    whole, split = experiment(), experiment([member(0, skill=3.0)])
    clean = whole.scores.fused.clean
    text = verdict(whole)[0]
    assert "each by members that were not trained on it" in text
    low, high = wilson(clean.top1 * clean.n, clean.n)
    expected = [100 * clean.top1, clean.n, 95, 100 * low, 100 * high, len(whole.scores.wrong)]
    assert numbers(text) == pytest.approx(expected, abs=0.051)
    assert "images of fold 0 of 3 are classified" in verdict(split)[0]
    one_split = replace(split, scores=replace(split.scores, folds=[0], missing=[]))
    assert "images of one held-out split are classified" in verdict(one_split)[0]


def test_one_fold_says_how_wide_its_interval_is_and_several_how_they_scatter() -> None:
    split, whole = experiment([member(0, skill=3.0)]), experiment()
    clean = split.scores.fused.clean
    text = verdict(split)[2]
    assert f"With {clean.n} images of one fold" in text
    assert f"{100 * (clean.top1_high - clean.top1_low):.1f} points wide" in text
    spread = np.std([row.clean.top1 for row in whole.scores.members], ddof=1)
    assert f"standard deviation of {100 * spread:.1f} points over 3 folds" in verdict(whole)[2]


def test_two_classes_are_compared_with_the_more_frequent_one() -> None:
    good, poor = (experiment([two_classes(fold, skill) for fold in (0, 1, 2)]) for skill in (4.0, 0.0))
    largest = max(good.scores.classes, key=lambda row: row.n)
    share = f"{100 * largest.n / good.scores.fused.n:.1f}%"
    name = largest.name or largest.category_id
    assert f"; always answering “{name}” would reach {share}." in verdict(good)[0]
    assert f"which is not certain to be more than always answering “{name}” ({share})." in verdict(poor)[0]
    overview = {row["name"]: row["value"] for row in scores_section.overview(good.scores)}
    assert "Clean top-5" not in overview  # of two classes it says nothing
    guess = np.concatenate([two_classes(fold, 4.0).logits.argmax(1) for fold in (0, 1, 2)])
    truth = np.concatenate([two_classes(fold, 4.0).class_idx for fold in (0, 1, 2)])
    second = (guess == 1) & (truth == 1)
    assert overview["Precision of 12"] == pytest.approx(second.sum() / (guess == 1).sum())
    assert overview["Recall of 12"] == pytest.approx(second.sum() / (truth == 1).sum())
    assert "always answering" not in verdict(experiment())[0]


def test_without_corrupted_images_nothing_is_claimed_about_them() -> None:
    shown = experiment([uncorrupted(fold) for fold in (0, 1, 2)])
    assert verdict(shown)[1].startswith("Nothing is known about disturbed images")
    assert scores_section.about_s(shown).startswith("S equals clean top-1")
    html = page.experiment_page(shown)
    assert 'id="robustness"' not in html and "Corrupted top-1" not in html


def test_pairs_are_called_pairs() -> None:
    shown = experiment(data=DataFacts(noun="pairs"))
    html = page.experiment_page(shown)
    top = html.partition("<header>")[2].partition('id="robustness"')[0]
    assert "pairs, each by members that were not trained on it" in top
    assert " images" not in re.sub(r"<style>.*?</style>|corrupted images", "", top, flags=re.S)
    recipe = load(None, ["data.form=pairs", "data.home=nowhere"])
    assert dataset.noun_of(recipe, shown.scores) == "pairs"
    assert dataset.noun_of(None, shown.scores) == "images"


def test_an_epoch_without_scores_is_no_divergence() -> None:
    rows = [event(epoch, 0) for epoch in (1, 2, 3)]
    rows[1] |= {"val_loss": None, "score": None}
    assert broken_runs(experiment(events=rows)) == []
    rows[1] |= {"val_loss": None, "score": 0.0}
    assert "not finite in epoch 2" in broken_runs(experiment(events=rows))[0]


@pytest.mark.parametrize("kind", ["loss", "end"])
def test_a_training_that_broke_off_comes_first(kind: str) -> None:
    rows = [event(epoch, 0) for epoch in (1, 2, 3)]
    start = {"event": "start", "backbone": BACKBONES[0], "fold": 0, "seed": 42, "epochs": 9}
    if kind == "loss":
        rows[2]["train_loss"] = None
    shown = experiment(events=[start, *rows])
    told = {
        "loss": "fold 0 seed 42 diverged: its loss was not finite in epoch 3",
        "end": "fold 0 seed 42 broke off after epoch 3 of 9",
    }[kind]
    assert told in verdict(shown)[2] and told in next_steps(shown)[0].finding
    assert next_steps(shown)[0].change.startswith("opt.lr")
    end = {**start, "event": "end", "stopped_early": False, "epochs": 9, "best": {"epoch": 3}}
    assert "broke off" not in verdict(experiment(events=[start, *rows, end]))[2]


def test_a_missed_threshold_and_the_test_set_take_the_third_sentence() -> None:
    shown = experiment()
    clean = shown.scores.fused.clean
    score = replace(shown.scores.fused.s, n=50, top1=0.5, top1_low=0.37, top1_high=0.63)
    tested = replace(shown, test_scores=[SubmissionScore("submission.csv", score, 25, 0)])
    assert clean.top1_low > 0.63 and "(95% interval 37.0 to 63.0), below the estimate" in verdict(tested)[2]
    missed = Verdict(
        name="clean top-1", got=clean.top1, n=clean.n, top1_low=clean.top1_low, top1_high=clean.top1_high,
        bound="at least", wanted=0.999, passed=False,
    )  # fmt: skip
    text = verdict(replace(tested, scores=replace(shown.scores, acceptance=[missed])))[2]
    assert text.startswith("The recipe accepts at least 99.9% for clean top-1, which is")


def steps_by_change(shown: Experiment) -> dict[str, Any]:
    return {step.change: step for step in next_steps(shown)}


def test_each_finding_has_its_number_and_the_key_that_acts_on_it() -> None:
    shown = experiment()
    corrupted, clean = shown.scores.fused.corrupted, shown.scores.fused.single.top1
    worst = max(corrupted.combos, key=lambda row: row.drop)  # one level, so a kind is a corruption
    dear = replace(
        corrupted,
        kinds={"gaussian_noise": replace(corrupted.kinds[worst.kind], drop=0.54, top1=clean - 0.54, top1_high=0.3)},
    )  # fmt: skip
    noisy = replace(shown, scores=replace(shown.scores, fused=replace(shown.scores.fused, corrupted=dear)))
    step = steps_by_change(noisy)["aug.corrupt_p=0.3"]
    assert step.finding.startswith("Gaussian noise costs 54 points") and step.anchor == "robustness"
    assert step.points == pytest.approx(100 * 0.3 * 0.54) and f"{step.points:.1f} points of S" in step.finding
    hard = replace(RECIPE, aug=replace(RECIPE.aug, corrupt_p=0.4))
    assert "aug.corrupt_p=0.8" in steps_by_change(replace(noisy, recipe=hard))
    harmless = replace(dear, kinds={"blur": replace(corrupted.kinds[worst.kind], drop=0.01, top1_high=1.0)})
    fused = replace(shown.scores.fused, corrupted=harmless)
    calm = replace(shown, scores=replace(shown.scores, fused=fused))
    assert not any("blur" in step.finding.lower() for step in next_steps(calm))


def test_unscored_images_and_conflicting_duplicates_are_findings() -> None:
    split = experiment([member(0, skill=3.0)])
    split = replace(split, data=DataFacts(images=120, always=2))
    clean = split.scores.fused.clean
    low, high = wilson(clean.top1 * 118, 118)
    (step,) = steps.folds(split)
    assert step.change == "data.fold=all"
    assert numbers(step.finding) == pytest.approx(
        [clean.n, 118, 100 * (clean.top1_high - clean.top1_low), 100 * (high - low)], abs=0.06
    )
    pair = DuplicatePair((None, None), ("a", "b"), ("7", "9"), bits=0, identical=True, conflict=True)
    step = next_steps(replace(split, duplicates=[pair] * 12))[0]
    assert step.anchor == "duplicates" and step.points == pytest.approx(10)
    assert all(len(next_steps(case)) <= 3 for case in (split, experiment()))


def test_training_that_still_rose_learnt_by_heart_or_waited() -> None:
    rows = [{**event(epoch, 0), "train_acc": 0.99, "wait_share": 0.5} for epoch in (1, 2, 3)]
    end = {
        "event": "end", "backbone": BACKBONES[0], "fold": 0, "seed": 42, "stopped_early": False, "epochs": 3,
        "best": {"epoch": 3},
    }  # fmt: skip
    weak = experiment([member(fold, skill=1.0) for fold in (0, 1, 2)], events=[*rows, end])
    looks = (steps.horizon, steps.overfitting, steps.waiting)
    changes = [step.change for look in looks for step in look(weak)]
    assert changes == ["sched.cosine_epochs=60", "aug.strength=1.5", "data.store=raw"]
    assert not [step for look in looks for step in look(experiment(events=[{**end, "best": {"epoch": 2}}]))]


def test_random_weights_are_a_finding_only_where_much_is_wrong_and_others_are_allowed() -> None:
    def found(skill: float, *words: str) -> list[float]:
        shown = experiment([member(fold, skill=skill) for fold in (0, 1, 2)], recipe=load(None, words))
        return [step.points for step in steps.starting_point(shown)]

    (points,) = found(1.0, "model.pretrained=false")
    weak = experiment([member(fold, skill=1.0) for fold in (0, 1, 2)]).scores
    assert points == pytest.approx(100 * len(weak.wrong) / weak.fused.n)
    assert found(6.0, "model.pretrained=false") == found(1.0) == []
    assert found(1.0, "model.pretrained=false", "checks.from_scratch=true") == []


def written(path: Any, **columns: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    write_csv(path, rows, tuple(columns))


def test_only_submissions_of_this_experiment_are_scored() -> None:
    shown = experiment()
    recipe = load(None, ["exp.name=example", "data.home=home"])
    home = runs.RESULTS.parents[1] / "home"
    name = shown.scores.members[0].checkpoint.removesuffix(".pth")
    written(home / "truth.csv", filename=["a", "b", "c"], category_id=["7", "9", "9"])
    written(runs.SUBMISSION, filename=["a", "b"], category_id=["7", "9"])

    def scored(members: list[str]) -> list[SubmissionScore]:
        runs.SUBMISSION.with_suffix(".json").write_text(str({"members": members}).replace("'", '"'))
        return hand_in.read_test_scores("example", recipe, shown.scores, notes=notes)

    notes: list[str] = []
    (row,) = scored([name])
    assert (row.right, row.missing, row.score.n) == (2, 1, 3)
    assert (row.score.top1_low, row.score.top1_high) == pytest.approx(wilson(2, 3))
    assert scored(["another"]) == [] and scored([]) == [] and notes == []
    written(home / "truth.csv", file=["a"], category_id=["7"])
    assert scored([name]) == []
    assert "no column filename, it has file, category_id" in notes[0]


def test_a_weak_model_suspects_no_label() -> None:
    def suspects(skill: float) -> int:
        members = [member(fold, skill=skill) for fold in (0, 1, 2)]
        flipped = members[0].class_idx.copy()
        flipped[np.flatnonzero(flipped == 0)[0]] = 1
        members[0] = replace(members[0], class_idx=flipped)
        return len(_scores(members, RECIPE).suspects)

    assert suspects(6.0) >= 1 and suspects(0.5) == 0


def _scores(members: list[MemberLogits], recipe: Recipe) -> ExperimentScores:
    return summary.summarise(members, folds(), classes=classes_csv(), recipe=recipe)
