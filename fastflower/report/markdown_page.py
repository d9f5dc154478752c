"""Markdown report of an experiment with figures as PNG: a draft of the technical report that contests ask for.

Contests ask for at most ten A4 pages, so long tables are truncated with a note; the HTML page has all rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fastflower.core import files, runs
from fastflower.core.charts import Chart
from fastflower.core.console import visible
from fastflower.evaluation import tables
from fastflower.recipe import starting_point
from fastflower.report import comparison, curves, data_section, recipe_section, scores_section
from fastflower.report.charts import long_tail, reliability, robustness
from fastflower.report.experiment import Experiment
from fastflower.report.next_steps import next_steps
from fastflower.report.verdict import verdict

CURVES = ("loss", "clean", "corrupt", "s", "lr")  # of the first run; the HTML page has all runs
MAX_ROWS = {"members": 15, "keys": 25, "derived": 20, "others": 10}  # of each table, to stay within ten pages


def write(folder: Path, experiment: Experiment, experiments: list[Experiment]) -> Path:
    """Write report.md and figures/*.png; several experiments are compared in it. Returns the path of report.md."""
    scores, fused = experiment.scores, experiment.scores.fused
    charts = [
        reliability(scores.reliability, fused.temperature.t if fused.temperature else None),
        long_tail(scores.classes),
        tables.confusion_chart(scores.confusion, tables.class_labels(scores.classes)),
    ]
    if fused.corrupted:
        charts.append(robustness(fused.corrupted, fused.single.top1))
    trainings = curves.run_curves(experiment.events)
    first = [chart for run in trainings[:1] for chart in run.charts if chart.name.split("-", 1)[1] in CURVES]
    all_runs = comparison.epoch_charts(curves.events_by_name(experiment.events), "together")
    training = {"All runs": all_runs, **({trainings[0].label: first} if trainings else {})}
    for chart in [*charts, *all_runs, *first]:
        files.write_atomic(folder / "figures" / f"{chart.name}.png", chart.png())
    text = (
        _environment()
        .get_template("report.md.j2")
        .render(_content(experiment, experiments, charts=charts, training=training))
    )
    files.write_atomic(folder / "report.md", visible(text))
    return folder / "report.md"


def write_comparison(experiments: list[Experiment]) -> Path:
    """Write compare.md and its figures below results/results; returns its path."""
    content = comparison.content(experiments) | {"noun": experiments[0].noun}
    for chart in [*filter(None, content["overview"]), *content["charts"]]:
        files.write_atomic(runs.FIGURES / f"{chart.name}.png", chart.png())
    path = runs.COMPARISON.with_suffix(".md")
    files.write_atomic(path, visible(_environment().get_template("compare.md.j2").render(content)))
    return path


def _content(
    experiment: Experiment,
    experiments: list[Experiment],
    *,
    charts: list[Chart],
    training: dict[str, list[Chart]],
) -> dict[str, Any]:
    others = [other.scores for other in experiments if other.name != experiment.name]
    return {
        "max_rows": MAX_ROWS,
        "experiment": experiment,
        "scores": experiment.scores,
        "classes": experiment.scores.classes,
        "recipe": experiment.recipe,
        "in_force": starting_point.settled(experiment.recipe) if experiment.recipe else {},
        "verdict": verdict(experiment),
        "steps": next_steps(experiment),
        "bundle_facts": data_section.bundle_facts(experiment),
        "gates": experiment.bundle.record.gates if experiment.bundle and experiment.bundle.record else [],
        "test_scores": experiment.test_scores,
        "by_metric": scores_section.by_metric(experiment.scores),
        "auxiliary": curves.auxiliary(experiment.events),
        "leak": experiment.leak.line if experiment.leak else "",
        "basis": scores_section.basis(experiment.scores, experiment.noun),
        "view_names": scores_section.view_names(experiment.scores.members[0].views),
        "derived_numbers": recipe_section.derived_numbers(experiment.numbers),
        "changed_keys": recipe_section.changed_keys(experiment.recipe) if experiment.recipe else [],
        "charts": {chart.name: chart for chart in charts},
        "training": training,
        "others": others,
        "differences": comparison.paired_differences([experiment.scores, *others]),
        "differing_keys": comparison.differing_keys(
            {other.name: other.recipe for other in experiments if other.recipe}
        ),
        "names": [other.name for other in experiments if other.recipe],
    }


def cell(value: object) -> str:
    """Text with the characters escaped that end a cell of a Markdown table or begin a tag."""
    return str(value).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = cell
    return environment
