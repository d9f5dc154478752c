"""The facts of the page's sections on data and hand-in, as (name, text)."""

from __future__ import annotations

from collections import Counter

import numpy as np

from fastflower.evaluation.measured import Leak
from fastflower.report.dataset import Sizes
from fastflower.report.experiment import Experiment
from fastflower.report.scores_section import moved_text

Facts = list[tuple[str, str]]


def data_facts(experiment: Experiment) -> Facts:
    """Images, classes, long tail, folds, sizes, storage, duplicates and skipped files."""
    data, noun, classes = experiment.data, experiment.noun, experiment.scores.classes
    counts = np.array([row.images for row in classes])
    parts = Counter(row.part for row in classes)
    imbalance = f"{counts.max() / max(counts.min(), 1):.1f}"
    facts = [
        (noun, f"{data.images or int(counts.sum()):,} of {len(classes)} classes"),
        (f"{noun} of a class", f"{counts.min()} to {counts.max()}, median {np.median(counts):g}"),
        ("largest over smallest class", imbalance),
        ("long tail", ", ".join(f"{parts[part]} {part}" for part in ("head", "middle", "tail"))),
    ]
    if data.folds:
        sizes = ", ".join(f"{count:,}" for _, count in data.folds)
        always = f"; {data.always:,} always train" if data.always else ""
        one = len(data.folds) == 1
        facts.append(("held out" if one else f"{len(data.folds)} folds", f"{sizes}{always}"))
    if data.originals:
        looked = f" ({data.originals.n} files looked at)" if data.originals.n < data.images else ""
        facts.append(("size of the files", size_range(data.originals) + looked))
    if data.stored:
        facts.append(
            ("size in the betons", f"{size_range(data.stored)}, {data.store}, {data.megabytes:.0f} MB")
        )
        enlarged = f"{data.enlarged:,} of {data.stored.n:,} {noun}" if data.enlarged else "none"
        facts.append((f"smaller than the {data.needed} pixels of the largest view", enlarged))
    if data.images:
        pairs = experiment.duplicates
        conflicts = sum(pair.conflict for pair in pairs)
        found = f"{len(pairs):,} pairs, {conflicts} with different labels" if pairs else "none found"
        facts.append(("duplicates and near-duplicates", found))
        if experiment.leak and experiment.leak.copies:
            facts.append(("what they would have added to the score", inflation(experiment.leak)))
        facts.append(("skipped as unreadable", f"{data.skipped_count:,}" if data.skipped_count else "none"))
    return facts


def inflation(leak: Leak) -> str:
    """The leak of a plain split in words."""
    gain = leak.inflation
    return (
        f"up to {100 * gain.gain:+.2f} ({100 * gain.low:+.2f} to {100 * gain.high:+.2f}) percent of top-1: a plain "
        f"split in {leak.splits} trains on copies of {leak.leaked:.0f} of the {leak.n:,} images that it validates, and "
        "a network may answer with their labels"
    )


def size_range(sizes: Sizes) -> str:
    """One size, or the smallest, median and largest, height × width."""
    smallest, median, largest = (f"{h} × {w}" for h, w in (sizes.smallest, sizes.median, sizes.largest))
    return median if smallest == largest else f"{smallest} to {largest}, median {median}"


def bundle_facts(experiment: Experiment) -> Facts:
    """Members, megabytes, views and temperature of the published bundle; empty without one."""
    bundle = experiment.bundle
    if bundle is None:
        return []
    facts = [(name, f"weight {weight:.3f}") for name, weight in bundle.members]
    views = ", ".join(bundle.sizes) + (", plain and mirrored" if bundle.hflip else "")
    factor = 2 if bundle.hflip else 1
    views += moved_text(factor * bundle.views, factor * bundle.crops)
    measured = {gate.name: gate.got for gate in bundle.record.gates} if bundle.record else {}
    return [
        ("members", f"{len(bundle.members)}"),
        *facts,
        ("size", measured.get("size", f"{bundle.megabytes:.1f} MB")),
        *((name, measured[name]) for name in ("latency",) if name in measured),
        *([("weights stored in", bundle.record.dtype)] if bundle.record else []),
        ("views", views),
        ("temperature", f"{bundle.temperature:.3f}"),
    ]
