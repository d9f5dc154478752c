"""The summary of an experiment, from its members' saved logits alone: scores.json and temperature.json."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import fastflower
from fastflower.core.errors import InputError
from fastflower.core.records import read_record
from fastflower.evaluation import ensembles, metrics, mistakes
from fastflower.evaluation.logits import (
    FusedInfo,
    Logits,
    LogitsInfo,
    MemberLogits,
    RunLogits,
    assemble,
    check_compatible,
    fuse,
    load_logits,
    logits_path,
    missing_folds,
)
from fastflower.evaluation.records import (
    REMEDY,
    ExperimentScores,
    FusedScores,
    MemberScores,
    RunScores,
    SetScores,
    Temperatures,
)
from fastflower.recipe import Recipe

FusedSet = tuple[list[RunLogits], Logits[FusedInfo], np.ndarray]
DESCRIBED = (  # fields of MemberInfo that MemberScores has too
    "backbone",
    "fold",
    "seed",
    "epoch",
    "checkpoint",
    "weights",
    "head",
    "stored",
    "size",
    "views",
    "mb",
    "ms",
)


def summarise(
    members: list[MemberLogits],
    folds: np.ndarray,
    *,
    classes: list[dict[str, str]],
    recipe: Recipe,
    fused: FusedSet | None = None,
) -> ExperimentScores:
    """All scores of an experiment. `folds` (rows,) is folds.csv's column, `classes` the rows of classes.csv.

    `fused` are the members' runs as `fused_set` gives them, where the caller has them already. Raises InputError for
    members that do not belong together or images that do not occur exactly once.
    """
    runs = members_by_run(members)
    sets, fused_logits, weights = fused or fused_set(members, folds, recipe)
    fit_on = recipe.ts.fit_on if recipe.ts.enabled else None
    alpha, bins = recipe.select.alpha, recipe.eval.ece_bins
    class_counts = np.array([int(row["n"]) for row in classes])

    def set_scores(data: Logits[LogitsInfo]) -> SetScores:
        return metrics.set_scores(
            data,
            alpha,
            bins=bins,
            class_counts=class_counts,
            fit_on=fit_on,
            metric=recipe.select.metric,
        )

    member_scores = [
        MemberScores(**vars(set_scores(member)), **{name: getattr(member.info, name) for name in DESCRIBED})
        for member in members
    ]
    run_scores = [
        RunScores(
            **vars(set_scores(data)),
            backbone=backbone,
            seed=seed,
            missing=missing_folds(runs[backbone, seed], folds),
            over_folds=metrics.over_folds(
                [row for row in member_scores if (row.backbone, row.seed) == (backbone, seed)]
            ),
        )
        for (backbone, seed), data in zip(runs, sets, strict=True)
    ]
    names = fused_logits.info.runs
    run_weights = {name: float(weight) for name, weight in zip(names, weights, strict=True)}
    over_best = ensembles.gain_over_best(fused_logits, sets) if len(sets) > 1 else None
    fused_scores = FusedScores(
        **vars(set_scores(fused_logits)), runs=names, weights=run_weights, over_best=over_best
    )
    every_fold = sorted(set(folds[folds >= 0].tolist()))
    temperature = fused_scores.temperature
    info = members[0].info
    return ExperimentScores(
        fastflower=fastflower.__version__,
        exp=recipe.exp.name,
        alpha=alpha,
        bins=bins,
        weighting=recipe.ensembling.weighting,
        hand_weights=recipe.ensembling.weights,
        space=recipe.ensembling.average,
        class_hash=info.class_hash,
        folds_hash=info.folds_hash,
        folds=every_fold,
        missing=sorted(set(every_fold) - set(fused_scores.folds)),
        sizes=[(fold, int((fused_logits.fold == fold).sum())) for fold in fused_scores.folds],
        members=member_scores,
        runs=run_scores,
        fused=fused_scores,
        acceptance=[],
        advice=metrics.advice(member_scores, run_scores, fused_scores),
        classes=metrics.class_scores(
            fused_logits,
            info.class_ids,
            class_counts=class_counts,
            names=[class_name(row) for row in classes],
        ),
        robust_classes=metrics.class_recalls(fused_logits),
        reliability=metrics.reliability(fused_logits, temperature.t if temperature else None, bins),
        **vars(mistakes.error_analysis(fused_logits, temperature.t if temperature else 1.0)),
    )


def fused_set(members: list[MemberLogits], folds: np.ndarray, recipe: Recipe) -> FusedSet:
    """The runs of these members, their weighted mean as the recipe fuses them, and the weights (M,) to hand in.

    Raises InputError for members that do not belong together.
    """
    _check_members(members)
    sets = [assemble(run_members, folds) for run_members in members_by_run(members).values()]
    by_image, weights = ensembles.run_weights(sets, recipe)
    return sets, fuse(sets, by_image, space=recipe.ensembling.average), weights


def load_member_logits(folder: Path) -> list[MemberLogits]:
    """The saved logits of the members in the scores.json of an experiment's folder; InputError without one."""
    path = folder / "scores.json"
    if not path.is_file():
        raise InputError(f"no {path}; run python -m fastflower.evaluate first")
    return [_saved_logits(folder / "oof", row) for row in read_record(path, ExperimentScores).members]


def _saved_logits(folder: Path, row: MemberScores) -> MemberLogits:
    """The logits of a member of scores.json; InputError when the file holds those of another."""
    path = logits_path(folder, backbone=row.backbone, fold=row.fold, seed=row.seed)
    saved = load_logits(path)
    if saved.info.checkpoint != row.checkpoint:
        raise InputError(
            f"{path} holds the logits of {saved.info.checkpoint}, scores.json those of {row.checkpoint}; {REMEDY}"
        )
    return saved


def members_by_run(members: list[MemberLogits]) -> dict[tuple[str, int], list[MemberLogits]]:
    """Members by (backbone, seed), sorted by it, and within a run by fold."""
    runs: dict[tuple[str, int], list[MemberLogits]] = {}
    for member in sorted(members, key=lambda m: (*m.run, m.info.fold)):
        runs.setdefault(member.run, []).append(member)
    return runs


def class_name(row: dict[str, str]) -> str:
    """The name in a row of classes.csv, from its English column of names or else the first; empty without one."""
    columns = sorted(
        (key for key in row if "name" in key.lower()), key=lambda key: "english" not in key.lower()
    )
    return next((row[key] for key in columns if row[key]), "")


def temperatures(scores: ExperimentScores) -> Temperatures:
    """The content of temperature.json."""
    return Temperatures(
        fused=scores.fused.temperature,
        weighting=scores.weighting,
        hand_weights=scores.hand_weights,
        space=scores.space,
        weights=scores.fused.weights,
        folds=scores.fused.folds,
        missing=scores.missing,
        runs={row.name: row.temperature for row in scores.runs},
        members={row.checkpoint: row.temperature for row in scores.members},
    )


def missing_fold_notes(scores: ExperimentScores) -> list[str]:
    """A line for each run that lacks folds, so that scores of some folds are not taken for those of all."""
    return [
        f"{row.name}: no member of {fold_names(row.missing)} of {len(scores.folds)}; "
        "its scores are those of single folds, not of the whole training set"
        for row in scores.runs
        if row.missing
    ]


def fold_names(folds: list[int]) -> str:
    """fold 0, or folds 0, 2."""
    return f"fold {folds[0]}" if len(folds) == 1 else f"folds {', '.join(map(str, folds))}"


def _check_members(members: list[MemberLogits]) -> None:
    check_compatible(members)
    linear = {member.info.head == "linear" for member in members}
    if len(linear) > 1:
        raise InputError(
            "members with linear and with cosine heads have logits of different kinds; narrow ensembling.find_pattern "
            "to one of them, or combine them with python -m fastflower.ensemble"
        )
