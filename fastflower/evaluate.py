"""Score members on images they never saw: `python -m fastflower.evaluate [recipe.yaml] [key=value ...]`.

Writes results/results/<exp>/oof/*.npz, scores.json, temperature.json, gradcam/ and the tables in reports/, and beside
the members results/model/<exp>/programs/, with which code/predict.py can run them before there is a bundle. The exit
code is 1 when all that is written but a threshold of the recipe's accept section is not reached.
"""

from __future__ import annotations

from pathlib import Path

import torch

from fastflower.bundle import writer
from fastflower.bundle.members import about, choose, shares_of
from fastflower.core import checkpoint, console, errors, files, runs
from fastflower.core.errors import InputError
from fastflower.core.tables import read_csv
from fastflower.data.folds import read_folds
from fastflower.data.readers import sources
from fastflower.evaluation import acceptance, gradcam, inference, logits, summary, tables
from fastflower.recipe import checks, parse_command, schema

REFUSED = 1


def main(argv: list[str]) -> int:
    settings = parse_command(argv)
    checks.check_flips(settings)
    paths = members_of(settings)
    home, folder = Path(settings.data.home), runs.RESULTS / settings.exp.name
    folds, classes = (
        read_folds(home / "folds.csv"),
        read_csv(home / "classes.csv", ("class_idx", "category_id", "n")),
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    files.sweep(folder, below=True)
    print(f"{len(paths)} members of {settings.exp.name} on {device}", flush=True)

    members = []
    for path in paths:
        print(f"  {path.name}", flush=True)
        member = inference.predict(path, settings, device)
        logits.save_logits(logits.member_file(folder / "oof", member.about), member)
        members.append(member)
    found = summary.summarise(members, folds.fold, classes=classes, recipe=settings)
    found["acceptance"] = acceptance.check(found, runs.read_events(folder / "events.jsonl"), settings.accept)
    gradcam.save(folder / "gradcam", members, found=found, settings=settings, device=device)
    files.write_json(folder / "scores.json", found)
    files.write_json(folder / "temperature.json", summary.temperatures(found))
    tables.save(folder / "reports", found)

    print("\n" + console.aligned(tables.console(found)))
    for line in [*found["advice"], *summary.incomplete(found), *leave_programs(settings)]:
        print(f"note: {line}")
    for line in acceptance.lines(found["acceptance"]):
        print(line)
    print(f"wrote {folder / 'scores.json'}; python -m fastflower.report {settings.exp.name} shows it")
    return 0 if all(row["passed"] for row in found["acceptance"]) else REFUSED


def leave_programs(settings: schema.Recipe) -> list[str]:
    """For the predictor: the members that export would choose; a line when they cannot be run without export."""
    try:
        chosen = choose(settings, [])
        names = [about(path)["backbone"] for path in chosen.paths]
        shares = shares_of(chosen, names, settings.ensembling.weighting)
        arrays = sources.pair_arrays(settings)
        writer.leave_programs(
            chosen.paths, shares, recipe=settings, temperature=chosen.temperature, arrays=arrays
        )
    except InputError as error:
        return [f"{error}; code/predict.py needs an export"]
    return []


def members_of(settings: schema.Recipe) -> list[Path]:
    """The members the recipe's pattern finds; each is read whole before any of them is used."""
    paths = runs.find_members(settings.exp.name, settings.ensembling.find_pattern)
    if not paths:
        raise InputError(
            f"no member {settings.ensembling.find_pattern} in {runs.MODELS / settings.exp.name}; "
            "train first, or change ensembling.find_pattern"
        )
    for path in paths:
        checkpoint.load(path)
    return paths


if __name__ == "__main__":
    errors.run(main)
