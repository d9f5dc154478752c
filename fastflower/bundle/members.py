"""Selects the members of the bundle, their weights and the softmax temperature.

Members are those given, all that match the recipe's pattern, or chosen greedily: first the runs whose mean scores best
out of fold for their cost, then as many folds of each as the limits allow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastflower.core import runs, scores
from fastflower.core.errors import InputError
from fastflower.core.records import read_record
from fastflower.data.folds import read_folds
from fastflower.evaluation import calibration, ensembles, logits, summary
from fastflower.evaluation.agreement import Trained, check_recipe
from fastflower.evaluation.logits import MemberLogits, RunLogits
from fastflower.evaluation.records import TemperatureFit, Temperatures
from fastflower.recipe import Recipe, fields_of
from fastflower.recipe.derived import validates
from fastflower.recipe.explanation import shown

if TYPE_CHECKING:
    from fastflower.model.member import MemberMeta


@dataclass(frozen=True)
class ChosenMembers:
    """Paths of members, their weights (M,) where these were fitted, T for their mean, and the source of T in words."""

    paths: list[Path]
    weights: np.ndarray | None
    temperature: float
    source: str


def choose(recipe: Recipe, requested: list[Path], *, others: Sequence[Recipe] = ()) -> ChosenMembers:
    """Choose the members to hand in: those requested, else all that match the recipe's pattern, or greedily.

    `others` are the recipes of further experiments, whose members join those of the first; the recipe's settings of the
    bundle hold for all. Raises InputError when there is none, when a recipe contradicts the members, or when greedy
    choice has no out-of-fold logits or no room.
    """
    recipes = [recipe, *others]
    check_shared_settings(recipes)
    if others and recipe.bundle.prior != "train":
        raise InputError(
            f"bundle.prior = {recipe.bundle.prior}: evaluate measures it for one experiment; for several give "
            "bundle.prior=train"
        )
    if requested:
        paths = sorted(dict.fromkeys(requested))
        check_recipe(recipe, [Trained.of(path.name, read_meta(path)) for path in paths])
    else:
        found = [matching_members(each) for each in recipes]
        paths = [path for of_experiment in found for path in of_experiment]
        if recipe.bundle.members == "greedy":
            return choose_greedily(recipes, paths)
        for each, of_experiment in zip(recipes, found, strict=True):
            check_recipe(each, [Trained.of(path.name, read_meta(path)) for path in of_experiment])
    weighting = recipe.ensembling.weighting
    if others:
        if weighting not in ("flat", "family"):
            raise InputError(
                f"ensembling.weighting = {weighting}: evaluate fits these weights for one experiment; for several give "
                "ensembling.weighting=flat, family, or bundle.members=greedy"
            )
        temperature, source = joint_temperature(recipes, paths)
        return ChosenMembers(paths=paths, weights=None, temperature=temperature, source=source)
    if weighting in ("flat", "family"):
        temperature, source = temperature_of(recipe, paths)
        return ChosenMembers(paths=paths, weights=None, temperature=temperature, source=source)
    weights = weights_from_runs(recipe, [(meta.backbone, meta.seed) for meta in map(read_meta, paths)])
    kept = [path for path, weight in zip(paths, weights, strict=True) if weight]
    temperature, source = temperature_of(recipe, kept)
    return ChosenMembers(paths=kept, weights=weights[weights > 0], temperature=temperature, source=source)


def matching_members(recipe: Recipe) -> list[Path]:
    """The members of a recipe's experiment that match its pattern; InputError without one."""
    pattern, metric = recipe.ensembling.find_pattern, recipe.select.metric
    paths = runs.find_members(recipe.exp.name, pattern, metric=metric)
    if not paths:
        folder, pattern = runs.MODELS / recipe.exp.name, runs.member_pattern(pattern, metric)
        raise InputError(f"no member in {folder} matches {pattern}; {remedy(recipe)}")
    return paths


def remedy(recipe: Recipe) -> str:
    """The way out for an experiment without a member of the pattern: the kinds of checkpoint that it has."""
    names = map(runs.parse_member, (runs.MODELS / recipe.exp.name).glob("*.pth"))
    kinds = sorted({name.kind for name in names if name})
    if not kinds:
        return "train first or give --members"
    return f"it has {', '.join(kinds)}: name one, such as ensembling.find_pattern={kinds[0]}__*.pth"


def check_shared_settings(recipes: Sequence[Recipe]) -> None:
    """Refuse experiments whose settings for all members of a bundle differ; InputError names the key and a remedy."""
    first, *others = recipes
    shared = ["ensembling.average", "data.home"]
    shared += [f"tta.{field.name}" for field in fields(first.tta) if field.name != "scales"]
    for other in others:
        values = [{name: value for name, value, _ in fields_of(recipe)} for recipe in (first, other)]
        counts = [len(recipe.tta.scales) for recipe in (first, other)]
        for key, mine, theirs in (
            *((key, values[0][key], values[1][key]) for key in shared),
            ("the number of tta.scales", *counts),
        ):
            if mine != theirs:
                raise InputError(
                    f"{key} is {shown(mine)} in {first.exp.name} and {shown(theirs)} in {other.exp.name}, and a bundle "
                    "has one; give it as a change, for both"
                )


def read_meta(path: Path) -> MemberMeta:
    """The meta of a member's checkpoint."""
    from fastflower.model.member import load_member  # here: torch and timm take seconds

    return load_member(path).meta


def weights_from_runs(recipe: Recipe, members: list[tuple[str, int]]) -> np.ndarray:
    """Member weights (M,), from the run weights that `evaluate` saved; `members` are (backbone, seed).

    A run's weight is split evenly over its members.
    """
    path = runs.RESULTS / recipe.exp.name / "temperature.json"
    fitted = read_record(path, Temperatures) if path.is_file() else None
    run_weights = fitted.weights if fitted else {}
    names = [f"{backbone} seed {seed}" for backbone, seed in members]
    fault = next((f"has no weight for {name}" for name in names if name not in run_weights), "")
    if fitted and not fault and not _same_weighting(recipe, fitted):
        fault = f"has the weights of {_weighting_in_words(fitted)}"
    if fault:
        raise InputError(
            f"ensembling.weighting = {recipe.ensembling.weighting}: {path} {fault}; "
            "run python -m fastflower.evaluate with this recipe"
        )
    weights = np.array([run_weights[name] / names.count(name) for name in names], dtype=np.float64)
    if not weights.sum():
        raise InputError(
            f"{path}: the weights of {', '.join(dict.fromkeys(names))} are 0; choose other members"
        )
    return weights / weights.sum()


def _same_weighting(recipe: Recipe, fitted: Temperatures) -> bool:
    """True when evaluate fitted the ensemble by the recipe's weighting."""
    ensembling = recipe.ensembling
    return (fitted.weighting, fitted.space) == (ensembling.weighting, ensembling.average) and (
        ensembling.weighting != "hand" or fitted.hand_weights == ensembling.weights
    )


def _weighting_in_words(fitted: Temperatures) -> str:
    """The weighting by which evaluate fused the runs, in words."""
    weighting = f"hand {fitted.hand_weights}" if fitted.weighting == "hand" else fitted.weighting
    return weighting if fitted.space == "logits" else f"{weighting}, in the mean of probabilities"


def choose_greedily(recipes: Sequence[Recipe], paths: list[Path]) -> ChosenMembers:
    """Choose runs by greedy selection with replacement, each at the cost of one member, then folds while there is room.

    A run's out-of-fold score uses one member per image, so it does not depend on the number of its folds; more folds
    are better and cost more. A run's weight is split evenly over its chosen folds. The limits are the first recipe's.
    """
    recipe = recipes[0]
    members = read_out_of_fold([each.exp.name for each in recipes], paths)
    if len(members) < len(paths):
        raise InputError(
            f"bundle.members=greedy: {len(paths) - len(members)} of {len(paths)} members have no out-of-fold logits; "
            "run python -m fastflower.evaluate first"
        )
    for each in recipes:
        own = [members[path] for path in paths if path.parent.name == each.exp.name]
        check_recipe(each, [Trained.of(member.info.checkpoint, member.info) for member in own])
    members_by_run = _by_run(members)
    sets = _aligned_runs(recipe, members_by_run)
    budget = ensembles.Budget.of([run[0] for run in members_by_run], recipe.bundle)
    budget.check("bundle.members = greedy", "member")
    stack, labels = np.stack([run.logits for run in sets]), sets[0].class_idx
    weights = ensembles.greedy_weights(stack, labels, budget=budget, metric=recipe.select.metric)
    chosen = folds_within(members_by_run, weights, budget)
    weight_of = {
        id(member): weight / len(run) for run, weight in zip(chosen, weights, strict=True) for member in run
    }
    t, source = _fitted_temperature(recipe, sets, weights) if recipe.ts.enabled else (1.0, "ts.enabled=false")
    kept = [path for path in paths if id(members[path]) in weight_of]
    kept_weights = np.array([weight_of[id(members[path])] for path in kept])
    return ChosenMembers(paths=kept, weights=kept_weights, temperature=t, source=source)


def joint_temperature(recipes: Sequence[Recipe], paths: list[Path]) -> tuple[float, str]:
    """The temperature for the members of several experiments, fitted on their out-of-fold logits, and its source."""
    recipe = recipes[0]
    if not (recipe.ts.enabled and all(map(validates, recipes))):
        return temperature_of(recipe, paths)
    members = read_out_of_fold([each.exp.name for each in recipes], paths)
    if len(members) < len(paths):
        missing = next(path for path in paths if path not in members)
        return 1.0, f"no out-of-fold logits of {missing}; python -m fastflower.evaluate writes them"
    by_run = _by_run(members)
    sets = _aligned_runs(recipe, by_run)
    shares = np.full(len(paths), 1 / len(paths))
    if recipe.ensembling.weighting == "family":
        shares = logits.family_weights([member.info.backbone for run in by_run for member in run])
    ends = np.cumsum([len(run) for run in by_run])
    weights = np.array([part.sum() for part in np.split(shares, ends[:-1])])
    return _fitted_temperature(recipe, sets, weights)


def _by_run(members: Mapping[Path, MemberLogits]) -> list[list[MemberLogits]]:
    """The members of each run, experiment by experiment: two may have runs of one backbone and seed."""
    folders = dict.fromkeys(path.parent for path in members)
    own = ([member for path, member in members.items() if path.parent == folder] for folder in folders)
    return [run for of_experiment in own for run in summary.members_by_run(of_experiment).values()]


def _aligned_runs(recipe: Recipe, members_by_run: list[list[MemberLogits]]) -> list[RunLogits]:
    column = read_folds(Path(recipe.data.home) / "folds.csv").fold
    return logits.align([logits.assemble(run, column) for run in members_by_run])


def _fitted_temperature(recipe: Recipe, sets: list[RunLogits], weights: np.ndarray) -> tuple[float, str]:
    """The temperature fitted on the weighted mean of runs, and its source."""
    fused = replace(
        sets[0],
        logits=logits.average([run.logits for run in sets], weights),
        corrupt=logits.average([run.corrupt for run in sets], weights),
    )
    fitted = calibration.fit_set(
        fused, recipe.ts.fit_on, alpha=recipe.select.alpha, bins=recipe.eval.ece_bins
    )
    return fitted.t, _source(f"fitted on {len(fused)} out-of-fold images of the chosen runs", fitted)


def folds_within(
    by_run: list[list[MemberLogits]], weights: np.ndarray, budget: ensembles.Budget
) -> list[list[MemberLogits]]:
    """The folds to take of each run, best out-of-fold NLL first: one of each chosen run, then one at a time.

    The next fold is one of the run with the largest weight per member; runs that no longer fit are skipped.
    """
    waiting = [
        sorted(members, key=lambda m: scores.nll(m.logits, m.class_idx)) if weight else []
        for members, weight in zip(by_run, weights, strict=True)
    ]
    taken: list[list[MemberLogits]] = [[members.pop(0)] if members else [] for members in waiting]
    while True:
        counts = np.array([len(members) for members in taken])
        fitting = [
            run
            for run, members in enumerate(waiting)
            if members
            and counts @ budget.mb + budget.mb[run] <= budget.max_mb
            and counts @ budget.ms + budget.ms[run] <= budget.max_ms
        ]
        if not fitting:
            return taken
        run = max(fitting, key=lambda r: (weights[r] / len(taken[r]), -r))
        taken[run].append(waiting[run].pop(0))


def read_out_of_fold(experiments: Sequence[str], paths: list[Path]) -> dict[Path, MemberLogits]:
    """The logits that evaluate saved of these members, without members that have changed since."""
    known: dict[tuple[str, int | None], MemberLogits] = {}
    for exp in experiments:
        folder = runs.RESULTS / exp
        if (folder / "scores.json").is_file():
            members = summary.load_member_logits(folder)
            known |= {(member.info.checkpoint, member.info.seal): member for member in members}
    if not known:
        return {}
    from fastflower.core import checkpoint  # here: it imports torch

    keys = {path: (path.name, checkpoint.seal(path)) for path in paths}
    return {path: known[key] for path, key in keys.items() if key in known}


def member_weights(chosen: ChosenMembers, backbones: list[str], weighting: str) -> np.ndarray:
    """Weights of the members (M,), summing to 1: fitted, equal, or equal for each backbone."""
    if chosen.weights is not None:
        return chosen.weights
    if weighting == "family":
        return logits.family_weights(backbones)
    return np.full(len(backbones), 1 / len(backbones))


def temperature_of(recipe: Recipe, paths: list[Path]) -> tuple[float, str]:
    """The temperature for these members and its source: evaluate's fit, or 1 and the reason."""
    path = runs.RESULTS / recipe.exp.name / "temperature.json"
    if not recipe.ts.enabled:
        return 1.0, "ts.enabled=false"
    if not validates(recipe):
        return 1.0, "no image was held out to fit it"
    if not path.is_file():
        return 1.0, f"no {path}; python -m fastflower.evaluate fits it"
    fitted = read_record(path, Temperatures)
    single = fitted.members.get(paths[0].name) if len(paths) == 1 else None
    if single:
        return single.t, _source(f"{path}, this member's", single)
    if not fitted.fused:
        return 1.0, f"{path} holds none"
    source = f"{path}, fused"
    if {path.name for path in paths} != set(fitted.members):
        source += f" from other members ({len(fitted.members)})"
    elif not _same_weighting(recipe, fitted):
        source += f" with the weights of {_weighting_in_words(fitted)}"
    return fitted.fused.t, _source(source, fitted.fused)


def _source(text: str, fitted: TemperatureFit) -> str:
    """The source of a temperature, with its note."""
    return f"{text}; {fitted.note}" if fitted.note else text
