"""Suggest a learning rate: `python -m fastflower.lrfind [recipe.yaml or experiment] [key=value ...] [-n N]`.

Trains the recipe's network on its batches while the lr rises from lrfind.low to lrfind.high, plots the losses and
prints the lr at which they fall fastest. Starts one process for each GPU, or N, as train does: the suggestion is for
their global batch. Runs are not affected: the weights are discarded, and only results/results/<exp>/lrfind_<run>.csv
and .png are written.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from fastflower.core import console, errors, files, launcher, runs
from fastflower.core.errors import InputError
from fastflower.core.runs import Run
from fastflower.data.betons.fold_set import check_converted
from fastflower.model.pretrained import check_architecture, check_present
from fastflower.recipe import Recipe, checks, own, parse_command
from fastflower.recipe.derived import Derived, derive, fold_numbers
from fastflower.training import exits

if TYPE_CHECKING:
    from fastflower.optim.lr_range import LrSuggestion


def start(argv: list[str]) -> int:
    """Run the test in this process, or in several that it starts; what can be refused is refused before."""
    count, arguments = launcher.split_ranks(argv)
    if not launcher.is_rank():
        check(arguments)
        count = count or max(1, launcher.gpu_count())
        if count > 1:
            return launcher.launch([sys.executable, "-m", "fastflower.lrfind", *arguments], count)
    return main(arguments)


def check(argv: list[str]) -> Recipe:
    """The recipe of the arguments; raises for all that is known before heavy imports."""
    recipe = parse_command(argv)
    checks.check(recipe)
    own.check_own(recipe)
    if recipe.model.head == "knn":
        raise InputError("model.head = knn: it has no training steps and needs no learning rate; train it")
    check_architecture(recipe.model.backbone)
    check_converted(recipe)
    check_present(recipe)
    return recipe


@exits.rank_zero_reports()
def main(argv: list[str]) -> int:
    """Run the range test, write its files, print the suggestion."""
    recipe = check(argv)
    # here: torch and Composer take ten seconds, which a refusal does not spend
    from fastflower.model.network import fitted
    from fastflower.training import build, fold_data, ranks

    recipe, _ = fitted(recipe)
    machine = ranks.prepare(recipe)
    fold = fold_numbers(recipe)[0]
    derived = derive(recipe, machine.world)
    data = fold_data.open_data(recipe, fold)
    files.check_writable(runs.RESULTS / recipe.exp.name)
    with ranks.network_may_not_fit(recipe, machine):
        rates, losses = build.lr_range_test(recipe, fold=data, machine=machine)
    if machine.rank == 0:
        run = Run(exp=recipe.exp.name, backbone=recipe.model.backbone, fold=fold, seed=recipe.seed)
        setting = report(recipe, derived, run=run, rates=rates, losses=losses)
        console.print_next("train", [*argv, setting])
    machine.close()  # not after an error: it could wait for a rank that hangs
    return 0


def report(recipe: Recipe, derived: Derived, *, run: Run, rates: list[float], losses: list[float]) -> str:
    """Write the table and the plot, print the suggestion, and return it as a change of the recipe.

    Raises InputError when the loss never fell.
    """
    from fastflower.optim.lr_range import lr_range_chart, smoothed, suggest

    suggestion, path = suggest(rates, losses), run.results_dir / f"lrfind_{run.stem}.csv"
    rows = zip(rates, losses, smoothed(losses), strict=True)
    lines = ["lr,loss,smoothed", *(f"{lr:.6g},{loss:.6g},{mean:.6g}" for lr, loss, mean in rows)]
    files.write_atomic(path, "\n".join(lines) + "\n")
    marks = {} if suggestion is None else {"suggested": suggestion.lr, "lowest loss": suggestion.lowest}
    chart = lr_range_chart(rates, losses, smooth=smoothed(losses), marks=marks)
    files.write_atomic(path.with_suffix(".png"), chart.png())
    if suggestion is None:
        raise InputError(
            f"the loss did not fall between {rates[0]:.1e} and {rates[-1]:.1e} ({path}); widen lrfind.low and "
            "lrfind.high, or raise lrfind.steps"
        )
    print("\n".join([*advice(recipe, derived, suggestion), f"wrote {path} and .png"]))
    return f"opt.lr={suggestion.lr:.2g}"


def advice(recipe: Recipe, derived: Derived, suggestion: LrSuggestion) -> list[str]:
    """The suggestion for people, with the recipe key to set."""
    setting = f"opt.lr={suggestion.lr:.2g}"
    if recipe.opt.lr == "auto":
        reference = suggestion.lr * recipe.opt.lr_ref_batch / derived.batch_global
        setting = f"opt.lr_ref={reference:.2g}, or {setting}"
    return [
        f"the loss falls fastest at lr {suggestion.lr:.2g}; it is lowest at {suggestion.lowest:.2g} and rises beyond",
        f"suggested for a global batch of {derived.batch_global}: {setting} (the recipe has {derived.lr:.2g})",
    ]


if __name__ == "__main__":
    launcher.forget_leftovers()
    launcher.follow()  # before the imports that take seconds
    with exits.quick_exit():
        errors.run_command(start)
