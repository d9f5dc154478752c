"""The photographs of a page with their scores: one under each corruption, and Grad-CAM maps by backbone."""

from __future__ import annotations

from typing import Any

from fastflower.data.readers.image_files import thumbnail_jpeg
from fastflower.evaluation.gradcam import legend
from fastflower.report import thumbnails
from fastflower.report.experiment import Experiment
from fastflower.report.verdict import kind_name, upper_first


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
