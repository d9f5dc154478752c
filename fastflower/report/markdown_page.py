"""The draft of a technical report: Markdown with its figures as PNG, from the same files as the page.

At most ten pages of A4, as contests ask: long tables are cut, and say so or leave the rest to the page.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fastflower.core import files
from fastflower.core.charts import Chart
from fastflower.evaluation import tables
from fastflower.report import comparison, curves, page
from fastflower.report.charts import long_tail, reliability, robustness
from fastflower.report.experiment import Experiment

CURVES = ("loss", "clean", "corrupt", "s", "lr")  # of the first run; the page has those of the others
MOST = {"members": 15, "changes": 25, "facts": 20, "others": 10}  # rows of a table, for ten pages in all


def write(folder: Path, found: Experiment, experiments: list[Experiment]) -> Path:
    """Write report.md and figures/*.png; with several experiments it has their comparison."""
    scores, fused = found.scores, found.scores["fused"]
    charts = [
        reliability(scores["reliability"], (fused["temperature"] or {}).get("t")),
        long_tail(scores["classes"]),
        tables.confusion_chart(scores["confusion"], [row["category_id"] for row in scores["classes"]]),
    ]
    if fused["corrupted"]:
        charts.append(robustness(fused["corrupted"], fused["single"]["top1"]))
    runs_of = curves.training(found.events)
    first = [chart for run in runs_of[:1] for chart in run.charts if chart.name.split("-", 1)[1] in CURVES]
    together = comparison.charts(curves.apart(found.events), "together")
    training = {"All runs": together, **({runs_of[0].label: first} if runs_of else {})}
    for chart in [*charts, *together, *first]:
        files.write_atomic(folder / "figures" / f"{chart.name}.png", chart.png())
    text = (
        _environment()
        .get_template("report.md.j2")
        .render(_content(found, experiments, charts=charts, training=training))
    )
    files.write_atomic(folder / "report.md", text)
    return folder / "report.md"


def _content(
    found: Experiment, experiments: list[Experiment], *, charts: list[Chart], training: dict[str, list[Chart]]
) -> dict[str, Any]:
    others = [other.scores for other in experiments if other.name != found.name]
    return {
        "most": MOST,
        "found": found,
        "scores": found.scores,
        "classes": found.scores["classes"],
        "recipe": found.recipe,
        "basis": page.basis(found.scores),
        "view_names": page.view_names(found.scores["members"][0]["views"]),
        "facts": page.facts(found.derived),
        "changed": page.changed(found.recipe) if found.recipe else [],
        "charts": {chart.name: chart for chart in charts},
        "training": training,
        "others": others,
        "pairs": comparison.pairs([found.scores, *others]) if others else [],
        "differing": comparison.differing(
            {other.name: other.recipe for other in experiments if other.recipe}
        ),
        "names": [other.name for other in experiments if other.recipe],
    }


def cell(value: object) -> str:
    """Text that neither ends a cell of a Markdown table nor begins a tag."""
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
