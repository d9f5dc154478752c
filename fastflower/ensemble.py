"""Compare ways to combine an experiment's runs: `python -m fastflower.ensemble [recipe.yaml] [key=value ...]`.

Reads the out-of-fold logits that evaluate saved and writes results/results/<exp>/ensemble.json; runs networks only
for ensembling.soup, which averages their weights and writes soup__*.pth beside them where scores agree.
"""

from __future__ import annotations

from pathlib import Path

import torch

from fastflower.core import console, errors, files, runs
from fastflower.data.folds import read_folds
from fastflower.evaluation import ensembles, logits, soups, summary, tables
from fastflower.recipe import parse_command


def main(argv: list[str]) -> None:
    settings = parse_command(argv)
    folder = runs.RESULTS / settings.exp.name
    members = summary.evaluated(folder)
    folds = read_folds(Path(settings.data.home) / "folds.csv")
    sets = logits.common([logits.assemble(own, folds.fold) for own in summary.by_run(members).values()])
    found = ensembles.compare(sets, ensembles.Budget.of(sets, settings.bundle), settings.ensembling.weights)
    files.write_json(folder / "ensemble.json", found)

    print(console.aligned(tables.methods(found)))
    for method, weights in found["weights"].items():
        print(f"{method}: " + ", ".join(f"{name} {weight:.3f}" for name, weight in weights.items()))
    if settings.ensembling.soup != "none":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        for soup in soups.make(settings, members, device):
            print(soup.line)
            for path in soup.files:
                print(f"  wrote {path}")
    print(f"{found['n']} images; fitted on other folds than scored. wrote {folder / 'ensemble.json'}")


if __name__ == "__main__":
    errors.run(main)
