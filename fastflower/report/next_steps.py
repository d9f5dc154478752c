"""The changes most worth making next: findings of an experiment, dearest first, each with the key that acts on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from fastflower.core import scores as intervals
from fastflower.evaluation.summary import fold_names
from fastflower.recipe import Recipe
from fastflower.report import curves
from fastflower.report.experiment import Experiment
from fastflower.report.verdict import broken_runs, interval, kind_name, percent, upper_first

SHOWN = 3
LEAST = 0.3  # points of the score that a finding must be worth
WAITING = 0.25  # fraction of its time that training may wait for data
OVERFIT = 0.15  # training accuracy above clean top-1
LATE = 0.95  # a best epoch this late in the training says that it still rose
URGENT, UNPRICED = 1000.0, 0.0  # points of findings before and behind those with a price
MANY_WRONG = 0.1  # of the images, before the starting point of the training is a finding
FEWEST_CONFUSED, CONFUSED = (
    4,
    0.25,
)  # images, and fraction of all errors, that make a pair of classes a finding


@dataclass(frozen=True)
class Step:
    """A finding with its numbers, an action, the recipe change or command for it, and the place to look at.

    points: of top-1 or of S that are at stake, for a whole training all its errors; URGENT or UNPRICED without a price.
    """

    finding: str
    action: str
    change: str
    anchor: str
    points: float


def next_steps(experiment: Experiment) -> list[Step]:
    """At most SHOWN steps: broken trainings, then those with a price, the dearest first, then the others."""
    found = [step for look in LOOKS for step in look(experiment)]
    return sorted(found, key=lambda step: -step.points)[:SHOWN]


def broken(experiment: Experiment) -> Iterator[Step]:
    for clause in broken_runs(experiment)[:1]:
        lr = experiment.numbers.lr if experiment.numbers else None
        change = f"opt.lr={lr / 4:.2g}" if lr else "opt.lr_ref"
        yield Step(f"{clause}.", "Train again at a quarter of the learning rate.", change, "training", URGENT)


def corruption(experiment: Experiment) -> Iterator[Step]:
    """The costliest kinds whose intervals lie below the clean score, at their weight in S; each change once."""
    scores, recipe = experiment.scores, experiment.recipe
    corrupted, clean = scores.fused.corrupted, scores.fused.single.top1
    if corrupted is None or recipe is None:
        return
    changes = set()
    for kind, row in sorted(corrupted.kinds.items(), key=lambda item: -item[1].drop):
        points = 100 * (1 - scores.alpha) * row.drop / len(corrupted.kinds)
        action, change = augmentation_against(kind, recipe)
        if row.top1_high >= clean or points < LEAST or change in changes:
            continue
        changes.add(change)
        yield Step(
            f"{upper_first(kind_name(kind))} costs {100 * row.drop:.0f} points: {percent(row.top1)} instead of "
            f"{percent(clean)} right (n = {row.n}, {interval(row)}), {points:.1f} points of S.",
            action,
            change,
            "robustness",
            points,
        )


def augmentation_against(kind: str, recipe: Recipe) -> tuple[str, str]:
    """The augmentation that trains against a kind of corruption, in words, and the change to the recipe."""
    if kind in ("gaussian_noise", "blur"):
        return "Train on light blur and noise.", _raised("aug.corrupt_p", recipe.aug.corrupt_p)
    if kind == "occlusion":
        return "Erase more boxes in training.", _raised("reg.erase_p", recipe.reg.erase_p)
    if kind == "brightness":
        jitter = [round(min(1.0, max(0.4, 1.5 * recipe.aug.jitter[0])), 2), *recipe.aug.jitter[1:]]
        return "Vary the brightness more in training.", f"aug.jitter={jitter}".replace(" ", "")
    return (
        "No augmentation is JPEG's own; a mixture of distortions comes nearest.",
        _raised("aug.augmix_p", recipe.aug.augmix_p),
    )


def _raised(key: str, now: float) -> str:
    """A probability raised to 0.3, or doubled where it is that high; beyond 0.9 all augmentation gets stronger."""
    if now >= 0.9:
        return "aug.strength=1.5"
    return f"{key}={min(0.9, 0.3 if now < 0.3 else 2 * now):g}"


def conflicts(experiment: Experiment) -> Iterator[Step]:
    pairs = [pair for pair in experiment.duplicates if pair.conflict]
    if pairs and experiment.data.images:
        points = 100 * len(pairs) / experiment.data.images
        yield Step(
            f"{len(pairs)} pairs of duplicates have different labels; of each pair no model can get both right.",
            "Correct the labels, or remove these files.",
            "data/duplicates.csv",
            "duplicates",
            points,
        )


def tail(experiment: Experiment) -> Iterator[Step]:
    """A tail whose interval lies below that of the head, at the points of top-1 that the gap costs."""
    parts, recipe, n = experiment.scores.fused.parts, experiment.recipe, experiment.scores.fused.n
    if recipe is None or not {"head", "tail"} <= parts.keys():
        return
    head, rare = parts["head"], parts["tail"]
    points = 100 * (head.top1 - rare.top1) * rare.n / n
    if rare.top1_high >= head.top1_low:
        return
    sampler = recipe.sampler
    cap = f"sampler.oversample_cap={2 * sampler.oversample_cap:g}"
    yield Step(
        f"Rare classes lag: {percent(rare.top1)} of {rare.n} {experiment.noun} of the tail are right, "
        f"{percent(head.top1)} of {head.n} of the head.",
        "Draw rare classes more often.",
        cap if sampler.type != "none" else "sampler.type=weighted_en",
        "classes",
        points,
    )


def views(experiment: Experiment) -> Iterator[Step]:
    """Views that predict worse than the single view."""
    fused, members = experiment.scores.fused, experiment.scores.members
    lost = 100 * (fused.single.top1 - fused.clean.top1)
    if lost >= LEAST:
        yield Step(
            f"The mean of the views is right for {percent(fused.clean.top1)}, the single view for "
            f"{percent(fused.single.top1)} (n = {fused.n}).",
            "Use views of the trained size.",
            f"tta.scales=[{max(members[0].size)}]",
            "scores",
            lost,
        )


def confusion(experiment: Experiment) -> Iterator[Step]:
    """Two classes that make up a large part of the errors."""
    scores = experiment.scores
    for pair in scores.pairs[:1]:
        both, errors = pair.a_as_b + pair.b_as_a, len(scores.wrong)
        if both < max(FEWEST_CONFUSED, CONFUSED * errors):
            continue
        a, b = (scores.classes[c].name or scores.classes[c].category_id for c in (pair.a, pair.b))
        yield Step(
            f"“{a}” and “{b}” are {both} of the {errors} errors.",
            "Look at them: a label, more examples of both, or a larger image may separate them.",
            "data.img_size",
            "confusion",
            100 * both / scores.fused.n,
        )


def at_stake(experiment: Experiment) -> float:
    """The points that all errors cost, for findings about the whole training."""
    return 100 * (1 - experiment.scores.fused.clean.top1)


def starting_point(experiment: Experiment) -> Iterator[Step]:
    """A training from random weights that is often wrong, where pretrained ones are allowed."""
    recipe, scores = experiment.recipe, experiment.scores
    if recipe is None or recipe.model.pretrained or recipe.model.init or recipe.checks.from_scratch:
        return
    if len(scores.wrong) > MANY_WRONG * scores.fused.n:
        yield Step(
            f"{len(scores.wrong)} of {scores.fused.n} {experiment.noun} are wrong, and the network began from random "
            "weights.",
            "Start from pretrained weights.",
            "model.pretrained=true",
            "recipe",
            at_stake(experiment),
        )


def overfitting(experiment: Experiment) -> Iterator[Step]:
    """Training accuracy far above clean top-1 in the best epoch of the first run that logged it."""
    recipe, clean = experiment.recipe, experiment.scores.fused.single.top1
    trained = [
        row["train_acc"] for row in _best_epochs(experiment) if isinstance(row.get("train_acc"), float)
    ]
    if recipe is None or not trained:
        return
    mean = sum(trained) / len(trained)
    if mean - clean > OVERFIT:
        yield Step(
            f"Training images are {percent(mean)} right, held-out ones {percent(clean)}: the network learns them by "
            "heart.",
            "Strengthen the augmentation.",
            f"aug.strength={min(2.0, recipe.aug.strength + 0.5):g}",
            "training",
            at_stake(experiment),
        )


def horizon(experiment: Experiment) -> Iterator[Step]:
    """Runs whose best epoch is among the last of a training that ran to its end."""
    ends = [row for row in experiment.events if row.get("event") == "end" and not row.get("stopped_early")]
    late = [row for row in ends if row.get("best") and row["best"]["epoch"] > LATE * row["epochs"]]
    if ends and len(late) == len(ends) and experiment.recipe:
        epochs = experiment.recipe.sched.cosine_epochs
        best = ", ".join(str(row["best"]["epoch"]) for row in late[:5])
        yield Step(
            f"The best epoch is {best} of {late[0]['epochs']}: the score still rose when training ended.",
            "Train longer.",
            f"sched.cosine_epochs={round(1.5 * epochs)}",
            "training",
            at_stake(experiment),
        )


def folds(experiment: Experiment) -> Iterator[Step]:
    """Images that no member is scored on: the interval that all of them would give."""
    scores, recipe, data = experiment.scores, experiment.recipe, experiment.data
    fused = scores.fused
    width = 100 * (fused.clean.top1_high - fused.clean.top1_low)
    everything = data.images if len(scores.folds) == 1 else data.images - data.always
    if recipe is None or everything <= fused.n or recipe.data.val or recipe.data.split == "given":
        return
    low, high = intervals.wilson(fused.clean.top1 * everything, everything)
    if len(scores.folds) == 1:
        change, action = (
            "data.split=stratified_group data.n_splits=5",
            "Hold out every image once, in five folds.",
        )
    else:
        change, action = "data.fold=all", f"Train {fold_names(scores.missing)} too."
    yield Step(
        f"Only {fused.n} of {everything} {experiment.noun} are scored; with all of them the interval would shrink from "
        f"{width:.1f} to about {100 * (high - low):.1f} points.",
        action,
        change,
        "scores",
        UNPRICED,
    )


def waiting(experiment: Experiment) -> Iterator[Step]:
    """Training that waits for its data."""
    shares = [row["wait_share"] for row in experiment.events if isinstance(row.get("wait_share"), float)]
    mean = sum(shares) / len(shares) if shares else 0.0
    if mean > WAITING:
        raw = "data.store=raw" if experiment.data.store != "raw" else "data.workers=0"
        yield Step(
            f"Training waited for data in {percent(mean)} of its time.",
            "Make loading cheaper.",
            raw,
            "training",
            UNPRICED,
        )


def export(experiment: Experiment) -> Iterator[Step]:
    if experiment.bundle is None:
        yield Step(
            "There is no hand-in of this experiment yet.",
            "Write the bundle and have it checked.",
            f"python -m fastflower.export {experiment.name}",
            "scores",
            UNPRICED - 1,
        )


def _best_epochs(experiment: Experiment) -> list[dict[str, Any]]:
    """The logged row of each run's best epoch."""
    rows = []
    for run in curves.rows_by_run(experiment.events).values():
        epochs = [row for row in run if row.get("event") == "epoch"]
        best = epochs[-1].get("best") or {} if epochs else {}
        rows += [row for row in epochs if row["epoch"] == best.get("epoch")][-1:]
    return rows


LOOKS: tuple[Callable[[Experiment], Iterator[Step]], ...] = (
    *(broken, corruption, conflicts, tail, views, confusion),
    *(starting_point, horizon, overfitting, folds, waiting, export),
)
