"""Compare ways to combine an experiment's runs: `python -m fastflower.ensemble [recipe.yaml] [key=value ...]`.

Reads the out-of-fold logits that evaluate saved and writes results/results/<exp>/ensemble.json. Only ensembling.soup
runs networks: it averages their weights and writes soup__*.pth beside them when the average scores as well.
"""

from __future__ import annotations

from pathlib import Path

from fastflower.core import console, errors, runs
from fastflower.core.records import write_record
from fastflower.data.folds import read_folds
from fastflower.evaluation import ensembles, logits, summary
from fastflower.recipe import parse_command


def main(argv: list[str]) -> None:
    settings = parse_command(argv)
    folder = runs.RESULTS / settings.exp.name
    members = summary.load_member_logits(folder)
    folds = read_folds(Path(settings.data.home) / "folds.csv")
    run_members = summary.members_by_run(members).values()
    sets = logits.align([logits.assemble(of_run, folds.fold) for of_run in run_members])
    budget = ensembles.Budget.of(sets, settings.bundle)
    comparison = ensembles.compare(sets, budget, settings.ensembling.weights)
    write_record(folder / "ensemble.json", comparison)
    from fastflower.evaluation import tables  # here: it imports matplotlib

    print(console.aligned(tables.method_table(comparison)))
    for method, weights in comparison.weights.items():
        print(f"{method}: " + ", ".join(f"{name} {weight:.3f}" for name, weight in weights.items()))
    if settings.ensembling.soup != "none":
        import torch

        from fastflower.evaluation import soups

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        for soup in soups.make_soups(settings, members, device):
            print(soup.line)
            for path in soup.files:
                print(f"  wrote {path}")
    print(f"{comparison.n} images; fitted on other folds than scored. wrote {folder / 'ensemble.json'}")


if __name__ == "__main__":
    errors.run_command(main)
