"""Score members on out-of-fold images: `python -m fastflower.evaluate [recipe or experiment ...] [key=value ...]`.

Writes results/results/<exp>/oof/*.npz, scores.json, temperature.json, gradcam/ and the tables in reports/, and beside
the members results/model/<exp>/programs/, with which code/predict.py can run them without a bundle. Several experiments
are scored one after another, with a table of all at the end. The exit code is 1 when a threshold of a recipe's accept
section is not reached.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fastflower.core import console, errors, files, runs
from fastflower.core.errors import InputError
from fastflower.core.records import write_record
from fastflower.data.folds import read_folds
from fastflower.data.labels import read_class_rows
from fastflower.data.readers import sources
from fastflower.evaluation import leaks, priors
from fastflower.recipe import checks, parse_several, schema
from fastflower.recipe.own import check_own
from fastflower.recipe.run_record import missing_events

if TYPE_CHECKING:
    from fastflower.evaluation.records import ExperimentScores

REFUSED = 1


def main(argv: list[str]) -> int:
    """Score each experiment, after the checks of all of them: no refusal comes after work has begun."""
    recipes = parse_several(argv)
    for recipe in recipes:
        checks.check_flips(recipe)
        checks.check_views(recipe)
        checks.check_metric(recipe)
        checks.check_scored(recipe, "evaluate")
        check_own(recipe, ["select.metric"])
    paths = [member_paths(recipe) for recipe in recipes]
    for recipe in recipes:
        read_folds(Path(recipe.data.home) / "folds.csv")
        rows = read_class_rows(Path(recipe.data.home) / "classes.csv")
        priors.given_prior(recipe, [row["category_id"] for row in rows])
    # here: torch and timm take seconds, which a refusal does not spend
    from fastflower.evaluation import tables
    from fastflower.evaluation.agreement import Trained, check_recipe
    from fastflower.model.member import load_member

    for recipe, members in zip(recipes, paths, strict=True):
        # all are read first, so that a damaged one stops before any work
        check_recipe(recipe, [Trained.of(path.name, load_member(path).meta) for path in members])
    scored = [score(recipe, members) for recipe, members in zip(recipes, paths, strict=True)]
    if len(scored) > 1:
        print("\n" + console.aligned(tables.experiment_table(scored)))
    combined = len(scored) > 1 or len(scored[0].runs) > 1
    console.print_next("ensemble" if combined else "export", argv)
    passed = all(verdict.passed for scores in scored for verdict in scores.acceptance)
    return 0 if passed else REFUSED


def score(settings: schema.Recipe, paths: list[Path]) -> ExperimentScores:
    """Score the members of an experiment, write its files and print its table."""
    import torch  # here, as below: a refusal does not spend the seconds

    from fastflower.evaluation import acceptance, gradcam, inference, logits, summary, tables, views

    home, folder = Path(settings.data.home), runs.RESULTS / settings.exp.name
    folds, classes = read_folds(home / "folds.csv"), read_class_rows(home / "classes.csv")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    files.check_writable(folder, runs.MODELS / settings.exp.name)
    files.remove_abandoned(folder, below=True)
    print(f"{len(paths)} members of {settings.exp.name} on {device}", flush=True)

    viewed = []
    for path in paths:
        print(f"  {path.name}", flush=True)
        viewed.append(inference.predict_views(path, settings, device))
    view_table = views.measure(viewed, settings.tta, settings.select.metric)
    settings = replace(settings, tta=view_table.kept)
    members = [seen.reduced(settings.tta) for seen in viewed]
    for member in members:
        logits.save_logits(folder / "oof", member)
    together = summary.fused_set(members, folds.fold, settings)
    scores = summary.summarise(members, folds.fold, classes=classes, recipe=settings, fused=together)
    notes: list[str] = []
    events = runs.read_events(folder / "events.jsonl", notes)
    notes += missing_events(folder, events)
    scores = replace(scores, acceptance=acceptance.check(scores, events, settings.accept))
    gradcam.write_gradcam(folder / "gradcam", members, analysis=scores, settings=settings, device=device)
    write_record(folder / "scores.json", scores)
    write_record(folder / "temperature.json", summary.temperatures(scores))
    write_record(folder / views.ViewTable.FILE, view_table)
    fused, fitted = together[1], scores.fused.temperature
    prior_table = priors.measure(fused, fitted.t if fitted else 1.0, settings)
    write_record(folder / priors.Priors.FILE, prior_table)
    leak = leaks.measure(fused, folds, max(2, settings.data.n_splits))
    write_record(folder / leaks.Leak.FILE, leak)
    tables.write_reports(folder / "reports", scores)

    print("\n" + console.aligned(tables.score_table(scores)))
    if view_table.rows:
        print("\n" + console.aligned(views.lines(view_table)))
        print(views.conclusion(view_table))
    if settings.bundle.prior != "train":
        print("\n" + console.aligned(priors.table(prior_table)))
    if leak.line:
        print(f"\n{leak.line}")
    if scores.fused.over_best:
        print(f"\nfused against {scores.fused.over_best.best}, the best run: {scores.fused.over_best.text}")
    for line in [*notes, *scores.advice, *summary.missing_fold_notes(scores), *write_programs(settings)]:
        print(f"note: {line}")
    for line in acceptance.console_lines(scores.acceptance):
        print(line)
    print(f"wrote {folder / 'scores.json'}; python -m fastflower.report {settings.exp.name} shows it")
    return scores


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
