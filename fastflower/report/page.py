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
from fastflower.data.readers.image_files import thumbnail_jpeg
from fastflower.evaluation import mistakes
from fastflower.evaluation.gradcam import legend
from fastflower.evaluation.records import ExperimentScores
from fastflower.evaluation.summary import fold_names
from fastflower.recipe import Recipe, fields_of
from fastflower.recipe.run_record import RunNumbers
from fastflower.report import comparison, curves, data_section, thumbnails
from fastflower.report.charts import long_tail, reliability, robustness
from fastflower.report.experiment import MAX_IMAGES, Experiment
from fastflower.report.next_steps import next_steps
from fastflower.report.verdict import kind_name, upper_first, verdict


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
        "lead": lead(experiment),
        "facts": training_facts(experiment),
        "written": time.strftime("%Y-%m-%d %H:%M %Z"),
        "command": command,
        "footer": f"fastflower {fastflower.__version__}, from scores.json and events.jsonl of {experiment.name}.",
        "noun": experiment.noun,
        "verdict": verdict(experiment),
        "steps": next_steps(experiment),
        "about_s": about_s(experiment),
        "data": experiment.data,
        "data_facts": data_section.data_facts(experiment),
        "class_bars": sorted(scores.classes, key=lambda row: -row.images),
        "bundle": experiment.bundle,
        "bundle_facts": data_section.bundle_facts(experiment),
        "test_scores": experiment.test_scores,
        "gallery": gallery(experiment),
        "trusted": mistakes.TRUSTED,
        "scores": scores,
        "classes": scores.classes,
        "longest_label": max(len(axis(row.name or row.category_id)) for row in scores.classes),
        "basis": basis(scores, experiment.noun),
        "view_count": len(scores.members[0].views),
        "view_names": view_names(scores.members[0].views),
        "confusions": confusions(scores),
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
        "stages": curves.best_by_stage(experiment.events, fold_sizes(scores)),
        "overview": overview(scores),
        "corrupted_recalls": corrupted_recalls(scores),
        "duplicates": experiment.duplicates,
        "derived_numbers": derived_numbers(experiment.numbers),
        "ensemble": experiment.ensemble,
        "gradcam": gradcam(experiment),
        "thumbnails": experiment.thumbnails,
        "advice": [*experiment.scores.advice, *experiment.notes],
        "augmentation": experiment.augmentation,
        "changed_keys": changed_keys(experiment.recipe) if experiment.recipe else [],
        "recipe_text": experiment.recipe_text,
        "meta": experiment.meta,
    }
    anchors = sections(content)
    return render("experiment.html.j2", content | {"sections": anchors, "anchors": dict(anchors)})


def comparison_page(experiments: list[Experiment], command: str = "") -> str:
    """HTML that compares experiments, the later ones with the first; `command` is the command line that writes it."""
    differences = comparison.paired_differences([experiment.scores for experiment in experiments])
    recipes = {experiment.name: experiment.recipe for experiment in experiments if experiment.recipe}
    content = {
        "title": "Comparison",
        "lead": ", ".join(experiment.name for experiment in experiments),
        "facts": "",
        "written": time.strftime("%Y-%m-%d %H:%M %Z"),
        "command": command,
        "footer": f"fastflower {fastflower.__version__}, from the scores.json of each experiment.",
        "experiments": [experiment.scores for experiment in experiments],
        "folds_differ": len({tuple(experiment.scores.fused.folds) for experiment in experiments}) > 1,
        "classes": [],
        "thumbnails": {},
        "differences": differences,
        "overview": [
            comparison.scores_chart([experiment.scores for experiment in experiments]),
            comparison.differences_chart(differences),
        ],
        "names": list(recipes),
        "differing_keys": comparison.differing_keys(recipes),
        "charts": comparison.epoch_charts(
            {experiment.name: experiment.events for experiment in experiments}, "compare"
        ),
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
            ("augmentation", "Augmentation", content["augmentation"]),
            ("hand-in", "Hand-in", content["bundle"]),
            ("recipe", "Recipe", content["changed_keys"] or content["recipe_text"] or content["meta"]),
        )
        if content_of_section
    ]


def fold_sizes(scores: ExperimentScores) -> dict[int, int]:
    """fold -> number of validation images."""
    return {member.fold: member.n for member in scores.members}


def overview(scores: ExperimentScores) -> list[dict[str, Any]]:
    """One row for each score of the fused set: name, how it is measured, value, ends of the interval, n."""
    fused = scores.fused
    clean, single, corrupted, t = fused.clean, fused.single, fused.corrupted, fused.temperature
    views, single_view = "mean of the views", "single view"

    def row(name: str, how: str, *, block: object, key: str, percent: bool = True) -> dict[str, Any]:
        value, low, high = (getattr(block, f"{key}{end}", None) for end in ("", "_low", "_high"))
        return {
            "name": name,
            "how": how,
            "value": value,
            "low": low,
            "high": high,
            "n": fused.n,
            "percent": percent,
        }

    rows = [
        row("Clean top-1", views, block=clean, key="top1"),
        row("Clean top-1", single_view, block=single, key="top1"),
    ]
    if corrupted:
        how = f"{single_view}, mean of {len(corrupted.combos)}"
        rows.append(row("Corrupted top-1", how, block=corrupted, key="top1"))
    rows += [
        row("S", single_view, block=fused.s, key="top1"),
        *([row("Clean top-5", views, block=clean, key="top5")] if len(scores.classes) > 5 else []),
        row("Macro recall", views, block=clean, key="macro_recall"),
        row("Macro F1", views, block=clean, key="macro_f1"),
        row("NLL", views, block=clean, key="nll", percent=False),
        row("Calibration error", f"{views}, T = 1", block=clean, key="ece"),
    ]
    if len(scores.classes) == 2:
        second = scores.classes[1].name or scores.classes[1].category_id
        names = {"precision": "Precision", "recall": "Recall", "f1": "F1"}
        rows[-3:-3] = [row(f"{name} of {second}", views, block=clean, key=key) for key, name in names.items()]
    if t:
        how = f"{views}, T = {t.t:.3f}"
        rows.append(row("NLL", how, block=t, key="nll_after", percent=False))
        rows.append(row("Calibration error", how, block=t, key="ece_after"))
    return rows


def confusions(scores: ExperimentScores, max_rows: int = 100) -> list[dict[str, int]]:
    """The off-diagonal cells of the confusion matrix, largest fraction of the true class first."""
    n = {row.class_idx: row.n for row in scores.classes}
    cells = [(label, guess, count) for label, guess, count in scores.confusion if label != guess]
    cells.sort(key=lambda cell: (-cell[2] / n[cell[0]], -cell[2]))
    return [{"label": label, "guess": guess, "count": count} for label, guess, count in cells[:max_rows]]


def corrupted_recalls(scores: ExperimentScores) -> dict[str, Any] | None:
    """Recall of each class (rows) under each (kind, level) of corruption (columns); None without corruptions."""
    rows = scores.robust_classes
    columns = list(dict.fromkeys((row.kind, row.level) for row in rows))
    table: dict[int, list[float | None]] = {}
    for row in rows:
        recalls = table.setdefault(row.class_idx, [None] * len(columns))
        recalls[columns.index((row.kind, row.level))] = row.recall
    order = sorted(table, key=lambda c: sum(value or 0 for value in table[c]))
    return {"columns": columns, "rows": [(c, table[c]) for c in order]} if rows else None


def lead(experiment: Experiment) -> str:
    """One line on the experiment: backbones, members, classes, images."""
    scores = experiment.scores
    backbones = list(dict.fromkeys(row.backbone for row in scores.runs))
    members, classes = len(scores.members), len(scores.classes)
    return (
        f"{' and '.join(backbones)} · {members} member{'s' if members != 1 else ''} · {classes} classes · "
        f"{scores.fused.n} {experiment.noun}, each predicted by a member that was not trained on it"
    )


def training_facts(experiment: Experiment) -> str:
    """One line on the trainings: their day, device, epochs, minutes and parameters, as far as they are recorded."""
    ends = [row for row in experiment.events if row.get("event") == "end"]
    words = []
    if ends and all(isinstance(row.get("time"), float) for row in ends):
        words.append(time.strftime("trained %Y-%m-%d", time.localtime(max(row["time"] for row in ends))))
    if numbers := experiment.numbers:
        words.append(f"on {numbers.world_size} × {numbers.device}")
        words.append(f"{numbers.parameters / 1e6:.1f} M parameters")
    if ends and all(isinstance(row.get("seconds"), (int, float)) for row in ends):
        minutes = sum(row["seconds"] for row in ends) / 60
        words.append(f"{sum(row['epochs'] for row in ends)} epochs in {minutes:.1f} minutes")
    return " · ".join(words)


def about_s(experiment: Experiment) -> str:
    """The formula of S with its numbers, and the choice that it makes."""
    scores, recipe = experiment.scores, experiment.recipe
    clean, corrupted, s = scores.fused.single, scores.fused.corrupted, scores.fused.s
    if corrupted is None:
        return "S equals clean top-1 at a single view, because no corrupted images were scored."
    formula = (
        f"S = {scores.alpha:.2f} × {100 * clean.top1:.1f} + {1 - scores.alpha:.2f} × {100 * corrupted.top1:.1f} "
        f"= {100 * s.top1:.1f}: clean and corrupted top-1 at a single view, weighted by select.alpha."
    )
    if recipe is None:
        return formula
    if recipe.select.metric == "combo":
        return f"{formula} It chose the best epoch of each run, so that disturbed photographs count too."
    return (
        f"{formula} It is shown for comparison: select.metric={recipe.select.metric} chose the best epochs."
    )


def gallery(experiment: Experiment) -> list[dict[str, Any]]:
    """The photograph clean and under each corruption, with the scores of all images under it."""
    fused = experiment.scores.fused
    rows = {(row.kind, row.level): row for row in fused.corrupted.combos} if fused.corrupted else {}
    return [
        {
            **vars(sample),
            "title": upper_first(kind_name(sample.kind)) or "Clean",
            "score": rows.get((sample.kind, sample.level), fused.single),
        }
        for sample in experiment.corrupted
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
    return name if len(name) <= longest else name[: longest - 1] + "…"


def basis(scores: ExperimentScores, noun: str = "images") -> str:
    """The images or pairs that the headline scores are computed on, in a sentence."""
    fused, missing = scores.fused, scores.missing
    method = f"the mean logits of {len(scores.runs)} runs" if len(scores.runs) > 1 else "one run"
    if missing:
        incomplete = f"{fold_names(missing)} {'has' if len(missing) == 1 else 'have'} no member"
        return (
            f"{fold_names(fused.folds).capitalize()} of {len(scores.folds)} ({fused.n} {noun}), {method}; "
            f"{incomplete}, so these scores do not cover all {noun}."
        )
    if len(scores.folds) == 1:
        return f"One held-out split: each of its {fused.n} {noun} exactly once, {method}."
    return f"Out-of-fold over all {len(scores.folds)} folds: each of {fused.n} {noun} exactly once, {method}."


def view_names(views: list[tuple[int, int, bool]]) -> str:
    sizes = dict.fromkeys(f"{h}" if h == w else f"{h}x{w}" for h, w, _ in views)
    return " and ".join(sizes) + (
        " pixels, plain and mirrored" if any(flip for _, _, flip in views) else " pixels"
    )


def changed_keys(recipe: Recipe) -> list[dict[str, str]]:
    """The keys whose values differ from the defaults, with both values and the key's description."""
    defaults = {dotted: value for dotted, value, _ in fields_of(Recipe())}
    return [
        {
            "key": dotted,
            "value": str(value),
            "default": str(defaults[dotted]),
            "doc": str(spec.metadata["doc"]),
        }
        for dotted, value, spec in fields_of(recipe)
        if value != defaults[dotted]
    ]


def derived_numbers(numbers: RunNumbers | None) -> list[tuple[str, str]]:
    """Derived numbers as (name, text), one line for each stage and for each parameter group."""
    rows: list[tuple[str, str]] = []
    if numbers is None:
        return rows
    for name, value in vars(numbers).items():
        if name == "stages":
            for number, (stage, steps) in enumerate(zip(numbers.stages, numbers.steps, strict=True), 1):
                size = f"{stage.height} × {stage.width}"
                text = f"epochs {stage.first} to {stage.last}, {size}, batch {stage.batch_per_gpu} per device"
                rows.append((f"stage {number}", f"{text}, {steps} steps per epoch"))
        elif name == "groups":
            for group in numbers.groups:
                text = f"lr {group.lr:.3g}, weight decay {group.weight_decay:g}, {group.tensors} tensors"
                rows.append((f"group {group.name}", text))
        elif name == "notes":
            rows += [("note", note) for note in value]
        elif isinstance(value, (int, float, str)):
            style = ".6g" if isinstance(value, float) else "," if type(value) is int else ""
            rows.append((name.replace("_", " "), format(value, style)))
    return rows


def gradcam(experiment: Experiment) -> dict[str, Any] | None:
    """The saved Grad-CAM images as data URIs, by backbone, misclassified ones first."""
    if not experiment.gradcam:
        return None
    rows = [row for row in experiment.gradcam.images if row.file in experiment.maps]
    groups = []
    for right, outcome in ((False, "misclassified"), (True, "correct")):
        for backbone in dict.fromkeys(row.backbone for row in rows):
            images: dict[int, list[dict[str, Any]]] = {}
            for row in rows:
                if row.backbone == backbone and row.right is right:
                    uri = thumbnails.data_uri(experiment.maps[row.file])
                    images.setdefault(row.index, []).append({**vars(row), "uri": uri})
            if images:
                groups.append({"title": f"{backbone}, {outcome}", "images": list(images.values())})
    return {
        "groups": groups,
        "border": experiment.gradcam.border,
        "uniform": experiment.gradcam.even,
        "legend": thumbnails.data_uri(thumbnail_jpeg(legend(), quality=92)),
    }
