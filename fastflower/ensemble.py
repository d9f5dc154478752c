"""Compare ways to combine runs: `python -m fastflower.ensemble [recipe.yaml or experiment ...] [key=value ...]`.

`--runs NAME ...` compares these alone: backbones, experiments, or `<backbone> seed <seed>`. `--save` keeps the stacking
of them, fitted on all images, in stacking.json; `--predict SOURCE CSV` applies it to a folder of photographs or a .npz
of pairs; both are for one experiment. Reads the out-of-fold logits that evaluate saved and writes
results/results/<exp>/ensemble.json, of several experiments results/results/ensemble.json. Only ensembling.soup runs
networks: it averages their weights and writes soup__*.pth beside them when the average scores as well.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fastflower.core import console, errors, runs
from fastflower.core.errors import InputError
from fastflower.core.records import write_record
from fastflower.data.folds import read_folds
from fastflower.evaluation import agreement, ensembles, logits, summary
from fastflower.evaluation.logits import MemberLogits, RunLogits
from fastflower.recipe import Recipe, checks, parse_several
from fastflower.recipe.own import check_own


def main(argv: list[str]) -> None:
    options = parse(argv)
    recipes = parse_several(options.recipe)
    for recipe in recipes:
        checks.check_scored(recipe, "ensemble")
        checks.check_metric(recipe)
        check_own(recipe, ["select.metric"])
    first, several = recipes[0], len(recipes) > 1
    if several and (options.save or options.predict):
        raise InputError(
            "--save and --predict are for the runs of one experiment; give one, or leave them out"
        )
    if options.predict:
        from fastflower.evaluation import stacking

        rows = stacking.predict(first.exp.name, *options.predict)
        print(f"{rows} rows in {options.predict[1]}")
        return
    members = {recipe.exp.name: read_members(recipe) for recipe in recipes}
    sets: list[RunLogits] = []
    for recipe in recipes:
        own = runs_of(recipe, members[recipe.exp.name])
        sets += [logits.of_experiment(run, recipe.exp.name) for run in own] if several else own
    sets = chosen_runs(logits.align(sets), options.runs)
    budget = ensembles.Budget.of(sets, first.bundle)
    comparison = ensembles.compare(sets, budget, first.ensembling.weights, metric=first.select.metric)
    target = runs.COMBINATION if several else runs.RESULTS / first.exp.name / "ensemble.json"
    write_record(target, comparison)
    from fastflower.evaluation import tables  # here: it imports matplotlib

    print(console.aligned(tables.method_table(comparison)))
    for method, weights in comparison.weights.items():
        print(f"{method}: " + ", ".join(f"{name} {weight:.3f}" for name, weight in weights.items()))
    if options.save:
        from fastflower.evaluation import stacking

        stacker = stacking.fit(sets)
        path = stacking.save(first.exp.name, stacker)
        print(f"{stacker.method} of {len(sets)} runs, fitted on all images: {path}")
    for recipe in recipes:
        if recipe.ensembling.soup != "none":
            make_soups(recipe, members[recipe.exp.name])
    print(f"{comparison.n} images; fitted on other folds than scored. wrote {target}")
    console.print_next("export", options.recipe)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fastflower.ensemble", description="Combine runs.")
    parser.add_argument(
        "recipe", nargs="*", help="recipe.yaml or experiment, one or several, and key=value changes"
    )
    parser.add_argument(
        "--runs", nargs="+", default=[], metavar="NAME", help="backbones, experiments or runs (all)"
    )
    parser.add_argument("--save", action="store_true", help="keep the stacking, fitted on all images")
    parser.add_argument(
        "--predict", nargs=2, type=Path, metavar=("SOURCE", "CSV"), help="apply the stacking that was kept"
    )
    return parser.parse_intermixed_args(argv)


def read_members(recipe: Recipe) -> list[MemberLogits]:
    """The saved logits of an experiment's members; InputError when the recipe contradicts their training."""
    members = summary.load_member_logits(runs.RESULTS / recipe.exp.name)
    agreement.check_recipe(
        recipe, [agreement.Trained.of(member.info.checkpoint, member.info) for member in members]
    )
    return members


def runs_of(recipe: Recipe, members: list[MemberLogits]) -> list[RunLogits]:
    """The runs of an experiment, each assembled from its members."""
    fold = read_folds(Path(recipe.data.home) / "folds.csv").fold
    return [logits.assemble(of_run, fold) for of_run in summary.members_by_run(members).values()]


def chosen_runs(sets: Sequence[RunLogits], names: Sequence[str]) -> list[RunLogits]:
    """The runs of these names, or all; a backbone or an experiment means its runs. InputError for a name of none."""
    of_run = [{run.name, run.info.backbone, *filter(None, [run.name.rpartition("/")[0]])} for run in sets]
    known = sorted(set().union(*of_run))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError(
            f"--runs {unknown[0]}: no run, backbone or experiment is called so; choose from {', '.join(known)}"
        )
    return [run for run, own in zip(sets, of_run, strict=True) if not names or own & set(names)]


def make_soups(recipe: Recipe, members: list[MemberLogits]) -> None:
    """Average the weights of an experiment's members by its recipe, and print the outcome."""
    import torch  # here: a comparison runs no network

    from fastflower.evaluation import soups

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for soup in soups.make_soups(recipe, members, device):
        print(soup.line)
        for path in soup.files:
            print(f"  wrote {path}")


if __name__ == "__main__":
    errors.run_command(main, parses_help=True)
