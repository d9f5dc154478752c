"""HTML pages of the report: one self-contained file per experiment, and one that compares experiments."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

import fastflower
from fastflower.core.charts import Chart
from fastflower.core.console import shortened, text_width
from fastflower.evaluation import mistakes
from fastflower.report import (
    comparison,
    curves,
    data_section,
    picture_sections,
    recipe_section,
    scores_section,
)
from fastflower.report.charts import long_tail, reliability, robustness
from fastflower.report.experiment import MAX_IMAGES, Experiment
from fastflower.report.next_steps import next_steps
from fastflower.report.verdict import verdict


def experiment_page(experiment: Experiment, command: str = "") -> str:
    """HTML of one experiment; `command` is the command line that writes it."""
    scores = experiment.scores
    fused = scores.fused
    charts = {"tail": long_tail(scores.classes)}
    charts["reliability"] = reliability(
        scores.reliability, fused.temperature.t if fused.temperature else None
    )
    if fused.corrupted:
        charts["robustness"] = robustness(fused.corrupted, fused.single.top1)
    content = {
        "title": experiment.name,
        "lead": scores_section.lead(experiment),
        "facts": scores_section.training_facts(experiment),
        "written": time.strftime("%Y-%m-%d %H:%M %Z"),
        "command": command,
        "footer": f"fastflower {fastflower.__version__}, from scores.json and events.jsonl of {experiment.name}.",
        "noun": experiment.noun,
        "verdict": verdict(experiment),
        "steps": next_steps(experiment),
        "about_s": scores_section.about_s(experiment),
        "data": experiment.data,
        "data_facts": data_section.data_facts(experiment),
        "class_bars": sorted(scores.classes, key=lambda row: -row.images),
        "bundle": experiment.bundle,
        "bundle_facts": data_section.bundle_facts(experiment),
        "test_scores": experiment.test_scores,
        "gallery": picture_sections.gallery(experiment),
        "trusted": mistakes.TRUSTED,
        "scores": scores,
        "classes": scores.classes,
        "longest_label": max(text_width(axis(row.name or row.category_id)) for row in scores.classes),
        "basis": scores_section.basis(scores, experiment.noun),
        "view_count": len(scores.members[0].views),
        "view_names": scores_section.view_names(scores.members[0].views),
        "confusions": scores_section.confusions(scores),
        "confusion_count": sum(true != guess for true, guess, _ in scores.confusion),
        "wrong_count": len(scores.wrong),
        "image_counts": {
            name: min(MAX_IMAGES[name], len(items))
            for name, items in (
                ("mistakes", scores.mistakes),
                ("suspects", scores.suspects),
                ("duplicates", experiment.duplicates),
            )
        },
        "charts": charts,
        "curves": folded_curves(experiment.events),
        "all_runs": comparison.epoch_charts(curves.events_by_name(experiment.events), "together"),
        "auxiliary": curves.auxiliary(experiment.events),
        "stages": curves.best_by_stage(experiment.events, scores_section.fold_sizes(scores)),
        "overview": scores_section.overview(scores),
        "corrupted_recalls": scores_section.corrupted_recalls(scores),
        "duplicates": experiment.duplicates,
        "derived_numbers": recipe_section.derived_numbers(experiment.numbers),
        "ensemble": experiment.ensemble,
        "view_table": experiment.views,
        "prior_table": experiment.priors,
        "gradcam": picture_sections.gradcam(experiment),
        "thumbnails": experiment.thumbnails,
        "advice": [*experiment.scores.advice, *experiment.notes],
        "augmentation": experiment.augmentation,
        "changed_keys": recipe_section.changed_keys(experiment.recipe) if experiment.recipe else [],
        "recipe_text": experiment.recipe_text,
        "meta": experiment.meta,
    }
    anchors = sections(content)
    return render("experiment.html.j2", content | {"sections": anchors, "anchors": dict(anchors)})


def comparison_page(experiments: list[Experiment], command: str = "") -> str:
    """HTML that compares experiments, the later ones with the first; `command` is the command line that writes it."""
    content = {
        "title": "Comparison",
        "lead": ", ".join(experiment.name for experiment in experiments),
        "facts": "",
        "written": time.strftime("%Y-%m-%d %H:%M %Z"),
        "command": command,
        "footer": f"fastflower {fastflower.__version__}, from the scores.json of each experiment.",
        "noun": experiments[0].noun,
        "classes": [],
        "thumbnails": {},
        **comparison.content(experiments),
    }
    return render("compare.html.j2", content)


def render(template: str, content: dict[str, Any]) -> str:
    """Fill a template; an undefined variable is an error, every inserted value is escaped."""
    loader = FileSystemLoader(Path(__file__).parent / "templates")
    escape = select_autoescape(["html.j2", "j2"], default=True)
    environment = Environment(loader=loader, autoescape=escape, undefined=StrictUndefined, trim_blocks=True)
    environment.filters |= {"axis": axis, "asides": asides}
    return environment.get_template(template).render(content)


def sections(content: dict[str, Any]) -> list[tuple[str, str]]:
    """(anchor, label) of each section of the page that has content."""
    return [
        (anchor, label)
        for anchor, label, content_of_section in (
            ("verdict", "Verdict", True),
            ("scores", "Scores", True),
            ("robustness", "Robustness", content["scores"].fused.corrupted),
            ("classes", "Classes", True),
            ("confusion", "Confusion", True),
            ("mistakes", "Mistakes", True),
            ("gradcam", "Grad-CAM", content["gradcam"]),
            ("data", "Data", True),
            ("duplicates", "Duplicates", content["duplicates"]),
            ("training", "Training", content["curves"]),
            ("ensemble", "Ensembles", content["ensemble"]),
            ("test-time", "Test time", content["view_table"] or content["prior_table"]),
            ("augmentation", "Augmentation", content["augmentation"]),
            ("hand-in", "Hand-in", content["bundle"]),
            ("recipe", "Recipe", content["changed_keys"] or content["recipe_text"] or content["meta"]),
        )
        if content_of_section
    ]


@dataclass(frozen=True)
class FoldedRun:
    """The charts of one run: the four that are looked at first, and the others."""

    label: str
    note: str
    main: list[Chart]
    more: list[Chart]


def folded_curves(events: list[dict[str, Any]]) -> list[FoldedRun]:
    return [
        FoldedRun(
            run.label,
            run.note,
            [chart for chart in run.charts if chart.name.partition("-")[2] in curves.MAIN],
            [chart for chart in run.charts if chart.name.partition("-")[2] not in curves.MAIN],
        )
        for run in curves.run_curves(events)
    ]


def asides(sentence: str) -> Markup:
    """A sentence whose parentheses are set in smaller type; everything in it is escaped."""
    parts = re.split(r"(\([^()]*\))", sentence)
    return Markup("").join(
        Markup('<span class="aside">{}</span>').format(part) if number % 2 else part
        for number, part in enumerate(parts)
    )


def axis(name: str, longest: int = 16) -> str:
    """A class name as short as an axis of the page allows."""
    return shortened(name, longest)
