"""python -m fastflower.lrfind [recipe.yaml] [key=value ...]: a learning rate for a recipe, from one short sweep.

Trains the recipe's own network on its own batches while the lr rises from lrfind.low to lrfind.high, draws the
losses, and says where they fall fastest. Also `composer -n 2 -m fastflower.lrfind ...`. Nothing of it enters a
run: the weights are thrown away, and only results/results/<exp>/lrfind_<run>.csv and .png are written.
"""

from __future__ import annotations

from fastflower.core import errors, files
from fastflower.core.errors import InputError
from fastflower.core.runs import Run
from fastflower.optim.lr_range import Suggestion, rate_chart, smoothed, suggest
from fastflower.recipe import Recipe, checks, derived, parse_command
from fastflower.training import build, fold_data, ranks


@ranks.rank_zero_speaks()
def main(argv: list[str]) -> int:
    """Sweep, write, suggest."""
    recipe = parse_command(argv)
    checks.check(recipe)
    machine = ranks.prepare(recipe)
    fold = derived.fold_numbers(recipe)[0]
    d = derived.derive(recipe, machine.world)
    tried, losses = build.lr_sweep(recipe, d, fold=fold_data.open_data(recipe, fold), machine=machine)
    if machine.rank == 0:
        tell(
            recipe,
            d,
            run=Run(recipe.exp.name, recipe.model.backbone, fold, recipe.seed),
            tried=tried,
            losses=losses,
        )
    machine.close()  # not after an error: it may wait for a rank that is stuck
    return 0


def tell(recipe: Recipe, d: derived.Derived, *, run: Run, tried: list[float], losses: list[float]) -> None:
    """The table, the plot and the suggestion; InputError when the loss fell nowhere."""
    found, place = suggest(tried, losses), run.results_dir / f"lrfind_{run.stem}.csv"
    rows = zip(tried, losses, smoothed(losses), strict=True)
    lines = ["lr,loss,smoothed", *(f"{lr:.6g},{loss:.6g},{mean:.6g}" for lr, loss, mean in rows)]
    files.write_atomic(place, "\n".join(lines) + "\n")
    marks = {} if found is None else {"suggested": found.lr, "lowest loss": found.lowest}
    chart = rate_chart(tried, losses, smooth=smoothed(losses), marks=marks)
    files.write_atomic(place.with_suffix(".png"), chart.png())
    if found is None:
        raise InputError(
            f"the loss did not fall between {tried[0]:.1e} and {tried[-1]:.1e} ({place}); widen lrfind.low and "
            "lrfind.high, or raise lrfind.steps"
        )
    print("\n".join([*advice(recipe, d, found), f"wrote {place} and .png"]))


def advice(recipe: Recipe, d: derived.Derived, found: Suggestion) -> list[str]:
    """The suggestion in the recipe's own words."""
    word = f"opt.lr={found.lr:.2g}"
    if recipe.opt.lr == "auto":
        word = f"opt.lr_ref={found.lr * recipe.opt.lr_ref_batch / d.batch_global:.2g}, or {word}"
    return [
        f"the loss falls fastest at lr {found.lr:.2g} and is lowest at {found.lowest:.2g}, beyond which it rises",
        f"suggested for a global batch of {d.batch_global}: {word} (the recipe has {d.lr:.2g})",
    ]


if __name__ == "__main__":
    errors.run(main)
