"""Compare ways to combine an experiment's runs: `python -m fastflower.ensemble [recipe.yaml] [key=value ...]`.

Reads the out-of-fold logits that evaluate saved, runs no network, writes results/results/<exp>/ensemble.json.
"""

from __future__ import annotations

from pathlib import Path

from fastflower import errors, recipe, runs
from fastflower.data.folds import read_folds
from fastflower.evaluation import ensembles, oof, summary, tables


def main(argv: list[str]) -> None:
    settings = recipe.parse_command(argv)
    folder = runs.RESULTS / settings.exp.name
    members = summary.evaluated(folder)
    folds = read_folds(Path(settings.data.home) / "folds.csv")
    sets = oof.common([oof.assemble(own, folds.fold) for own in summary.by_run(members).values()])
    found = ensembles.compare(sets, ensembles.Budget.of(sets, settings.bundle), settings.ensembling.weights)
    runs.write_json(folder / "ensemble.json", found)

    print(tables.aligned(tables.methods(found)))
    for method, weights in found["weights"].items():
        print(f"{method}: " + ", ".join(f"{name} {weight:.3f}" for name, weight in weights.items()))
    print(f"{found['n']} images; fitted on other folds than scored. wrote {folder / 'ensemble.json'}")


if __name__ == "__main__":
    errors.run(main)
