"""Compare ways to combine an experiment's runs: `python -m fastflower.ensemble [recipe.yaml] [key=value ...]`.

`--runs NAME ...` compares these alone: backbones, or `<backbone> seed <seed>`. `--save` keeps the stacking of them,
fitted on all images, in stacking.json; `--predict SOURCE CSV` applies it to a folder of photographs or a .npz of pairs.
Reads the out-of-fold logits that evaluate saved and writes results/results/<exp>/ensemble.json. Only ensembling.soup
runs networks: it averages their weights and writes soup__*.pth beside them when the average scores as well.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fastflower.core import console, errors, runs
from fastflower.core.errors import InputError
from fastflower.core.records import write_record
from fastflower.data.folds import read_folds
from fastflower.evaluation import ensembles, logits, summary
from fastflower.recipe import parse_command


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m fastflower.ensemble", description="Combine runs.")
    parser.add_argument("recipe", nargs="*", help="recipe.yaml and key=value changes")
    parser.add_argument("--runs", nargs="+", default=[], metavar="NAME", help="backbones or runs (all)")
    parser.add_argument("--save", action="store_true", help="keep the stacking, fitted on all images")
    parser.add_argument(
        "--predict", nargs=2, type=Path, metavar=("SOURCE", "CSV"), help="apply the stacking that was kept"
    )
    options = parser.parse_intermixed_args(argv)
    settings = parse_command(options.recipe)
    if options.predict:
        from fastflower.evaluation import stacking

        rows = stacking.predict(settings.exp.name, *options.predict)
        print(f"{rows} rows in {options.predict[1]}")
        return
    folder = runs.RESULTS / settings.exp.name
    members = summary.load_member_logits(folder)
    folds = read_folds(Path(settings.data.home) / "folds.csv")
    run_members = summary.members_by_run(members).values()
    sets = logits.align([logits.assemble(of_run, folds.fold) for of_run in run_members])
    sets = chosen_runs(sets, options.runs)
    budget = ensembles.Budget.of(sets, settings.bundle)
    comparison = ensembles.compare(sets, budget, settings.ensembling.weights)
    write_record(folder / "ensemble.json", comparison)
    from fastflower.evaluation import tables  # here: it imports matplotlib

    print(console.aligned(tables.method_table(comparison)))
    for method, weights in comparison.weights.items():
        print(f"{method}: " + ", ".join(f"{name} {weight:.3f}" for name, weight in weights.items()))
    if options.save:
        from fastflower.evaluation import stacking

        stacker = stacking.fit(sets)
        print(
            f"{stacker.method} of {len(sets)} runs, fitted on all images: {stacking.save(settings.exp.name, stacker)}"
        )
    if settings.ensembling.soup != "none":
        import torch

        from fastflower.evaluation import soups

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        for soup in soups.make_soups(settings, members, device):
            print(soup.line)
            for path in soup.files:
                print(f"  wrote {path}")
    print(f"{comparison.n} images; fitted on other folds than scored. wrote {folder / 'ensemble.json'}")
    console.print_next("export", options.recipe)


def chosen_runs(sets: Sequence[logits.RunLogits], names: Sequence[str]) -> list[logits.RunLogits]:
    """The runs of these names, or all; a backbone means its seeds. InputError for a name of none."""
    known = sorted({*(run.name for run in sets), *(run.info.backbone for run in sets)})
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError(
            f"--runs {unknown[0]}: no run or backbone is called so; choose from {', '.join(known)}"
        )
    return [run for run in sets if not names or {run.name, run.info.backbone} & set(names)]


if __name__ == "__main__":
    errors.run_command(main, parses_help=True)
