"""Score members on their out-of-fold images: `python -m fastflower.evaluate [recipe or experiment] [key=value ...]`.

Writes results/results/<exp>/oof/*.npz, scores.json, temperature.json, gradcam/ and the tables in reports/, and beside
the members results/model/<exp>/programs/, with which code/predict.py can run them without a bundle. The exit code is
1 when a threshold of the recipe's accept section is not reached.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fastflower.core import console, errors, files, runs
from fastflower.core.errors import InputError
from fastflower.core.records import write_record
from fastflower.data.folds import read_folds
from fastflower.data.labels import read_class_rows
from fastflower.data.readers import sources
from fastflower.recipe import checks, parse_command, schema
from fastflower.recipe.run_record import missing_events

REFUSED = 1


def main(argv: list[str]) -> int:
    settings = parse_command(argv)
    checks.check_flips(settings)
    paths = member_paths(settings)
    home, folder = Path(settings.data.home), runs.RESULTS / settings.exp.name
    folds = read_folds(home / "folds.csv")
    classes = read_class_rows(home / "classes.csv")
    # here: torch and timm take seconds, which a refusal does not spend
    import torch

    from fastflower.evaluation import acceptance, gradcam, inference, logits, summary, tables
    from fastflower.model.member import load_member

    # all are read first, so that a damaged one stops before any work
    inference.check_recipe(settings, {path: load_member(path).meta for path in paths})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    files.remove_abandoned(folder, below=True)
    print(f"{len(paths)} members of {settings.exp.name} on {device}", flush=True)

    members = []
    for path in paths:
        print(f"  {path.name}", flush=True)
        member = inference.predict(path, settings, device)
        logits.save_logits(folder / "oof", member)
        members.append(member)
    scores = summary.summarise(members, folds.fold, classes=classes, recipe=settings)
    notes: list[str] = []
    events = runs.read_events(folder / "events.jsonl", notes)
    notes += missing_events(folder, events)
    scores = replace(scores, acceptance=acceptance.check(scores, events, settings.accept))
    gradcam.write_gradcam(folder / "gradcam", members, analysis=scores, settings=settings, device=device)
    write_record(folder / "scores.json", scores)
    write_record(folder / "temperature.json", summary.temperatures(scores))
    tables.write_reports(folder / "reports", scores)

    print("\n" + console.aligned(tables.score_table(scores)))
    for line in [*notes, *scores.advice, *summary.missing_fold_notes(scores), *write_programs(settings)]:
        print(f"note: {line}")
    for line in acceptance.console_lines(scores.acceptance):
        print(line)
    print(f"wrote {folder / 'scores.json'}; python -m fastflower.report {settings.exp.name} shows it")
    console.print_next("ensemble" if len(scores.runs) > 1 else "export", argv)
    return 0 if all(verdict.passed for verdict in scores.acceptance) else REFUSED


def write_programs(settings: schema.Recipe) -> list[str]:
    """Write the programs of the members that export would choose; a note when the predictor needs an export."""
    from fastflower.bundle import writer
    from fastflower.bundle.members import choose, member_weights, read_meta

    try:
        chosen = choose(settings, [])
        names = [read_meta(path).backbone for path in chosen.paths]
        weights = member_weights(chosen, names, settings.ensembling.weighting)
        arrays = sources.pair_arrays(settings)
        writer.write_programs(
            chosen.paths, weights, recipe=settings, temperature=chosen.temperature, arrays=arrays
        )
    except InputError as error:
        return [f"{error}; code/predict.py needs an export"]
    return []


def member_paths(settings: schema.Recipe) -> list[Path]:
    """The members that match the recipe's pattern; InputError without one."""
    pattern, metric = settings.ensembling.find_pattern, settings.select.metric
    paths = runs.find_members(settings.exp.name, pattern, metric=metric)
    if not paths:
        raise InputError(
            f"no member {runs.member_pattern(pattern, metric)} in {runs.MODELS / settings.exp.name}; "
            "train first, or change ensembling.find_pattern"
        )
    return paths


if __name__ == "__main__":
    errors.run_command(main)
