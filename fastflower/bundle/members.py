"""Which members are handed in, with what say and at which temperature.

All that the recipe finds, a list, or greedily: the runs whose mean says out of fold most for what they cost, then
as many folds of each as the limits hold.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastflower.core import checkpoint, runs, scores
from fastflower.core.errors import InputError
from fastflower.data.folds import read_folds
from fastflower.evaluation import calibration, ensembles, logits, summary
from fastflower.evaluation.logits import Logits
from fastflower.recipe import Recipe


@dataclass(frozen=True)
class Choice:
    """Members' files, the say of each (M,) where one was fitted, T for their mean, and where T comes from."""

    paths: list[Path]
    shares: np.ndarray | None
    temperature: float
    source: str


def choose(recipe: Recipe, given: list[Path]) -> Choice:
    """The members to hand in: those given, else what the recipe's pattern finds, all or greedily.

    Raises InputError when there is none, or when greedy choice has no out-of-fold logits or no room.
    """
    if given:
        paths = sorted(dict.fromkeys(given))
    else:
        paths = runs.find_members(recipe.exp.name, recipe.ensembling.find_pattern)
        if not paths:
            folder, pattern = runs.MODELS / recipe.exp.name, recipe.ensembling.find_pattern
            raise InputError(f"no member in {folder} matches {pattern}; train first or give --members")
        if recipe.bundle.members == "greedy":
            return greedy(recipe, paths)
    if recipe.ensembling.weighting in ("flat", "family"):
        return Choice(paths, None, *temperature_of(recipe, paths))
    shares = by_run(recipe, [(meta["backbone"], meta["seed"]) for meta in map(about, paths)])
    kept = [path for path, share in zip(paths, shares, strict=True) if share]
    return Choice(kept, shares[shares > 0], *temperature_of(recipe, kept))


def about(path: Path) -> dict[str, Any]:
    """A member's description."""
    return checkpoint.load(path).meta


def by_run(recipe: Recipe, members: list[tuple[str, int]]) -> np.ndarray:
    """The say of members (M,), given as (backbone, seed), by the weights with which evaluate fused their runs."""
    path = runs.RESULTS / recipe.exp.name / "temperature.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found, names = known.get("weights", {}), [f"{backbone} seed {seed}" for backbone, seed in members]
    fault = next((f"has no weight for {name}" for name in names if name not in found), "")
    if not fault and not _fitted_so(recipe, known):
        fault = f"has the weights of {_way(known)}"
    if fault:
        raise InputError(
            f"ensembling.weighting = {recipe.ensembling.weighting}: {path} {fault}; "
            "run python -m fastflower.evaluate with this recipe"
        )
    shares = np.array([found[name] / names.count(name) for name in names], dtype=np.float64)
    if not shares.sum():
        raise InputError(
            f"{path}: the weights of {', '.join(dict.fromkeys(names))} are 0; choose other members"
        )
    return shares / shares.sum()


def _fitted_so(recipe: Recipe, known: dict[str, Any]) -> bool:
    """Whether what evaluate left was fused in the way that the recipe asks for."""
    asked = recipe.ensembling
    return known.get("weighting") == asked.weighting and (
        asked.weighting != "hand" or known.get("hand") == asked.weights
    )


def _way(known: dict[str, Any]) -> str:
    """How evaluate weighted the runs, in words."""
    way = str(known.get("weighting", "an older evaluate"))
    return f"{way} {known['hand']}" if way == "hand" else way


def greedy(recipe: Recipe, paths: list[Path]) -> Choice:
    """Runs by greedy selection with replacement, each at the price of one member, then folds while there is room.

    The out-of-fold score of a run is that of one member at a time, so it is the same for any number of its folds;
    more of them are better and cost more. A run's say is shared evenly by its chosen folds.
    """
    members = out_of_fold(recipe, paths)
    if len(members) < len(paths):
        raise InputError(
            f"bundle.members=greedy: {len(paths) - len(members)} of {len(paths)} members have no out-of-fold logits; "
            "run python -m fastflower.evaluate first"
        )
    runs_of = list(summary.by_run(list(members.values())).values())
    column = read_folds(Path(recipe.data.home) / "folds.csv").fold
    sets = logits.common([logits.assemble(own, column) for own in runs_of])
    budget = ensembles.Budget.of([own[0] for own in runs_of], recipe.bundle)
    budget.check("bundle.members = greedy", "member")
    stack, labels = np.stack([own.logits for own in sets]), sets[0].class_idx
    weights = ensembles.greedy_weights(stack, labels, budget=budget)
    chosen = folds_within(runs_of, weights, budget)
    shares = {
        str(member.about["checkpoint"]): weight / len(own)
        for own, weight in zip(chosen, weights, strict=True)
        for member in own
    }
    mixed = replace(
        sets[0],
        logits=logits.average([own.logits for own in sets], weights),
        corrupt=logits.average([own.corrupt for own in sets], weights),
    )
    t, source = 1.0, "ts.enabled=false"
    if recipe.ts.enabled:
        fitted = calibration.fit_set(
            mixed, recipe.ts.fit_on, alpha=recipe.select.alpha, bins=recipe.eval.ece_bins
        )
        t, source = fitted["t"], f"fitted on {len(labels)} out-of-fold images of the chosen runs"
    kept = [path for path in paths if path.name in shares]
    return Choice(kept, np.array([shares[path.name] for path in kept]), t, source)


def folds_within(
    by_run: list[list[Logits]], weights: np.ndarray, budget: ensembles.Budget
) -> list[list[Logits]]:
    """For each run the folds to take, best out-of-fold NLL first: one of each chosen run, then turn by turn.

    The next turn is that of the run whose members carry most; a run that no longer fits is passed over.
    """
    waiting = [
        sorted(own, key=lambda m: scores.nll(m.logits, m.class_idx)) if weight else []
        for own, weight in zip(by_run, weights, strict=True)
    ]
    taken: list[list[Logits]] = [[own.pop(0)] if own else [] for own in waiting]
    while True:
        counts = np.array([len(own) for own in taken])
        fitting = [
            run
            for run, own in enumerate(waiting)
            if own
            and counts @ budget.mb + budget.mb[run] <= budget.max_mb
            and counts @ budget.ms + budget.ms[run] <= budget.max_ms
        ]
        if not fitting:
            return taken
        run = max(fitting, key=lambda r: (weights[r] / len(taken[r]), -r))
        taken[run].append(waiting[run].pop(0))


def out_of_fold(recipe: Recipe, paths: list[Path]) -> dict[str, Logits]:
    """What evaluate saved of these members, by file name; those it did not see, as they now are, are missing."""
    folder = runs.RESULTS / recipe.exp.name
    if not (folder / "scores.json").is_file():
        return {}
    seals = {path.name: checkpoint.seal(path) for path in paths}
    known = {str(member.about["checkpoint"]): member for member in summary.evaluated(folder)}
    return {
        name: member
        for name, member in known.items()
        if name in seals and member.about.get("seal", seals[name]) == seals[name]
    }


def shares_of(chosen: Choice, backbones: list[str], weighting: str) -> np.ndarray:
    """The say of each member (M,), summing to 1: the fitted one, or the same, or the same for each backbone."""
    if chosen.shares is not None:
        return chosen.shares
    if weighting == "family":
        return logits.family_weights(backbones)
    return np.full(len(backbones), 1 / len(backbones))


def temperature_of(recipe: Recipe, paths: list[Path]) -> tuple[float, str]:
    """T for these members and where it comes from: evaluate's fit, or 1 and why."""
    path = runs.RESULTS / recipe.exp.name / "temperature.json"
    if not recipe.ts.enabled:
        return 1.0, "ts.enabled=false"
    if not path.is_file():
        return 1.0, f"no {path}; python -m fastflower.evaluate fits it"
    fitted = json.loads(path.read_text(encoding="utf-8"))
    known = fitted["members"]
    if len(paths) == 1 and (known.get(paths[0].name) or {}).get("t"):
        return float(known[paths[0].name]["t"]), f"{path}, this member's"
    if not (fitted["fused"] or {}).get("t"):
        return 1.0, f"{path} holds none"
    source = f"{path}, fused"
    if {path.name for path in paths} != set(known):
        source += f" from other members ({len(known)})"
    elif not _fitted_so(recipe, fitted):
        source += f" with the weights of {_way(fitted)}"
    return float(fitted["fused"]["t"]), source
