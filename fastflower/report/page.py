"""The report's pages: what the files of an experiment say, put into one HTML file that needs nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

import fastflower
from fastflower.core import runs
from fastflower.evaluation.summary import named
from fastflower.recipe import Recipe, fields_of
from fastflower.report import comparison, curves, thumbnails
from fastflower.report.charts import long_tail, reliability, robustness
from fastflower.report.experiment import SHOWN, Experiment


def experiment(found: Experiment) -> str:
    """The page of one experiment."""
    scores = found.scores
    fused = scores["fused"]
    charts = {"tail": long_tail(scores["classes"])}
    charts["reliability"] = reliability(scores["reliability"], (fused["temperature"] or {}).get("t"))
    if fused["corrupted"]:
        charts["robustness"] = robustness(fused["corrupted"], fused["single"]["top1"])
    content = {
        "title": found.name,
        "lead": lead(scores),
        "foot": f"Written by fastflower {fastflower.__version__} from scores.json and events.jsonl of {found.name}.",
        "scores": scores,
        "classes": scores["classes"],
        "longest": max(len(row["category_id"]) for row in scores["classes"]),
        "basis": basis(scores),
        "views": len(scores["members"][0]["views"]),
        "view_names": view_names(scores["members"][0]["views"]),
        "confusions": confusions(scores),
        "crossed": sum(true != guess for true, guess, _ in scores["confusion"]),
        "wrong": len(scores["wrong"]),
        "shown": {
            key: min(SHOWN[key], len(rows))
            for key, rows in (
                *((key, scores[key]) for key in ("mistakes", "suspects")),
                ("copies", found.copies),
            )
        },
        "charts": charts,
        "curves": curves.training(found.events),
        "together": comparison.charts(curves.apart(found.events), "together"),
        "stages": curves.stages(found.events, sizes(scores)),
        "overview": overview(scores),
        "robust": by_class(scores),
        "copies": found.copies,
        "facts": facts(found.derived),
        "ensemble": found.ensemble,
        "cams": cams(found),
        "pictures": found.pictures,
        "samples": found.samples,
        "changed": changed(found.recipe) if found.recipe else [],
        "recipe_text": found.recipe_text,
        "meta": found.meta,
    }
    return render("experiment.html.j2", content | {"sections": sections(content)})


def compare(experiments: list[Experiment]) -> str:
    """The page that sets experiments beside each other."""
    pairs = comparison.pairs([found.scores for found in experiments])
    content = {
        "title": "Comparison",
        "lead": ", ".join(found.name for found in experiments),
        "foot": f"Written by fastflower {fastflower.__version__} from the scores.json of each experiment.",
        "experiments": [found.scores for found in experiments],
        "uneven": len({tuple(found.scores["fused"]["folds"]) for found in experiments}) > 1,
        "classes": [],
        "pictures": {},
        "pairs": pairs,
        "overview": [
            comparison.scores_chart([found.scores for found in experiments]),
            comparison.pairs_chart(pairs),
        ],
        "names": [found.name for found in experiments if found.recipe],
        "differing": comparison.differing(
            {found.name: found.recipe for found in experiments if found.recipe}
        ),
        "charts": comparison.charts({found.name: found.events for found in experiments}, "compare"),
    }
    return render("compare.html.j2", content)


def render(template: str, content: dict[str, Any]) -> str:
    """Fill a template; anything it asks for that is not there is an error, anything inserted is escaped."""
    loader = FileSystemLoader(Path(__file__).parent / "templates")
    escape = select_autoescape(["html.j2", "j2"], default=True)
    environment = Environment(loader=loader, autoescape=escape, undefined=StrictUndefined, trim_blocks=True)
    return environment.get_template(template).render(content)


def sections(content: dict[str, Any]) -> list[tuple[str, str]]:
    """The anchors of the page, those with something to show."""
    return [
        (anchor, label)
        for anchor, label, there in (
            ("scores", "Scores", True),
            ("training", "Training", content["curves"]),
            ("ensemble", "Ensembles", content["ensemble"]),
            ("samples", "Augmentation", content["samples"]),
            ("robustness", "Robustness", content["scores"]["fused"]["corrupted"]),
            ("classes", "Classes", True),
            ("confusion", "Confusion", True),
            ("mistakes", "Mistakes", True),
            ("gradcam", "Grad-CAM", content["cams"]),
            ("copies", "Copies", content["copies"]),
            ("recipe", "Recipe", content["changed"] or content["recipe_text"] or content["meta"]),
        )
        if there
    ]


def sizes(scores: dict[str, Any]) -> dict[int, int]:
    """fold -> the images that are validated on in it."""
    return {member["fold"]: member["n"] for member in scores["members"]}


def overview(scores: dict[str, Any]) -> list[dict[str, Any]]:
    """Every score of the fused set in one table: its name, how it is measured, value, ends of its interval, n."""
    fused = scores["fused"]
    clean, single, corrupted, t = fused["clean"], fused["single"], fused["corrupted"], fused["temperature"]
    views, one = "mean of the views", "single view"

    def row(name: str, how: str, block: dict[str, Any], key: str, percent: bool = True) -> dict[str, Any]:
        known = {"value": block[key], "low": block.get(f"{key}_low"), "high": block.get(f"{key}_high")}
        return {"name": name, "how": how, **known, "n": fused["n"], "percent": percent}

    rows = [row("Clean top-1", views, clean, "top1"), row("Clean top-1", one, single, "top1")]
    if corrupted:
        rows.append(row("Corrupted top-1", f"{one}, mean of {len(corrupted['combos'])}", corrupted, "top1"))
    rows += [
        row("S", one, fused["s"], "top1"),
        row("Clean top-5", views, clean, "top5"),
        row("Macro recall", views, clean, "macro_recall"),
        row("Macro F1", views, clean, "macro_f1"),
        row("NLL", views, clean, "nll", percent=False),
        row("Calibration error", f"{views}, T = 1", clean, "ece"),
    ]
    if t:
        for name, key in (("NLL", "nll"), ("Calibration error", "ece")):
            after = {f"{key}{end}": t[f"{key}_after{end}"] for end in ("", "_low", "_high")}
            rows.append(row(name, f"{views}, T = {t['t']:.3f}", after, key, percent=key == "ece"))
    return rows


def confusions(scores: dict[str, Any], most: int = 100) -> list[dict[str, int]]:
    """The cells beside the diagonal of the confusion matrix, by their share of the true class."""
    n = {row["class_idx"]: row["n"] for row in scores["classes"]}
    cells = [(label, guess, count) for label, guess, count in scores["confusion"] if label != guess]
    cells.sort(key=lambda cell: (-cell[2] / n[cell[0]], -cell[2]))
    return [{"label": label, "guess": guess, "count": count} for label, guess, count in cells[:most]]


def by_class(scores: dict[str, Any]) -> dict[str, Any] | None:
    """Recall of each class under each corruption: columns of (kind, level), rows of values; None without any."""
    rows = scores["robust_classes"]
    columns = list(dict.fromkeys((row["kind"], row["level"]) for row in rows))
    table: dict[int, list[float | None]] = {}
    for row in rows:
        own = table.setdefault(row["class_idx"], [None] * len(columns))
        own[columns.index((row["kind"], row["level"]))] = row["recall"]
    order = sorted(table, key=lambda c: sum(value or 0 for value in table[c]))
    return {"columns": columns, "rows": [(c, table[c]) for c in order]} if rows else None


def lead(scores: dict[str, Any]) -> str:
    """The experiment in a line."""
    backbones = list(dict.fromkeys(row["backbone"] for row in scores["runs"]))
    members, classes = len(scores["members"]), len(scores["classes"])
    return (
        f"{' and '.join(backbones)} · {members} member{'s' if members != 1 else ''} · {classes} classes · "
        f"{scores['fused']['n']} images never trained on by the member that predicts them"
    )


def basis(scores: dict[str, Any]) -> str:
    """Which images the headline scores stand on."""
    fused, missing = scores["fused"], scores["missing"]
    of = f"the mean logits of {len(scores['runs'])} runs" if len(scores["runs"]) > 1 else "one run"
    if missing:
        lacking = f"{named(missing)} {'has' if len(missing) == 1 else 'have'} no member"
        return (
            f"{named(fused['folds']).capitalize()} of {len(scores['folds'])} ({fused['n']} images), {of}; "
            f"{lacking}, so this is not yet a score over all images."
        )
    if len(scores["folds"]) == 1:
        return f"One part held out of training: each of its {fused['n']} images exactly once, {of}."
    return (
        f"Out of fold over all {len(scores['folds'])} folds: each of {fused['n']} images exactly once, {of}."
    )


def view_names(views: list[list[Any]]) -> str:
    sizes = dict.fromkeys(f"{h}" if h == w else f"{h}x{w}" for h, w, _ in views)
    return " and ".join(sizes) + (
        " pixels, plain and mirrored" if any(flip for _, _, flip in views) else " pixels"
    )


def changed(recipe: Recipe) -> list[dict[str, str]]:
    """The recipe's keys that differ from the defaults, with their meaning."""
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


def facts(derived: dict[str, Any]) -> list[tuple[str, str]]:
    """The derived numbers as names and short texts, a line for each stage and for each parameter group."""
    rows: list[tuple[str, str]] = []
    for name, value in derived.items():
        if name == "stages":
            steps = derived.get("steps", [])
            for place, stage in enumerate(value, 1):
                size = f"{stage['height']} × {stage['width']}"
                text = f"epochs {stage['first']} to {stage['last']}, {size}, batch {stage['batch_per_gpu']} a device"
                rows.append(
                    (f"stage {place}", text + (f", {steps[place - 1]} steps an epoch" if steps else ""))
                )
        elif name == "groups":
            for group in value:
                text = f"lr {group['lr']:.3g}, weight decay {group['weight_decay']:g}, {group['tensors']} tensors"
                rows.append((f"group {group['name']}", text))
        elif name == "notes":
            rows += [("note", note) for note in value]
        elif isinstance(value, (int, float, str)):
            style = ".6g" if isinstance(value, float) else "," if type(value) is int else ""
            rows.append((name.replace("_", " "), format(value, style)))
    return rows


def cams(found: Experiment) -> dict[str, Any] | None:
    """The saved Grad-CAM pictures, wrong ones first, as data URIs."""
    if not found.cams:
        return None
    folder = runs.RESULTS / found.name / "gradcam"
    groups = []
    for right, word in ((False, "wrong"), (True, "right")):
        for backbone in dict.fromkeys(row["backbone"] for row in found.cams["images"]):
            items = [
                {**row, "uri": thumbnails.data_uri((folder / row["file"]).read_bytes())}
                for row in found.cams["images"]
                if row["backbone"] == backbone and row["right"] is right and (folder / row["file"]).is_file()
            ]
            if items:
                groups.append({"title": f"{backbone}, {word}", "shots": items})
    return {"groups": groups, "border": found.cams["border"], "even": found.cams["even"]}
