"""Checks that a bundle must pass before it is published: size, isolated run, parity with the trainer, scores, latency.

The predictor itself is run as a process, from a copy in another folder (`sandbox.py`), on the original files of
photographs that the members validated on: on PNGs where images came as numbers, on a .npz for pairs.
"""

from __future__ import annotations

import math
import runpy
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fastflower.bundle import sandbox
from fastflower.bundle.description import BundleDescription, ViewCrop
from fastflower.bundle.hand_in import Gate
from fastflower.bundle.held_out import HeldOut, collect, write_betons
from fastflower.bundle.submission import run_summary, submission_fault
from fastflower.bundle.tracing import CODE
from fastflower.bundle.writer import Member
from fastflower.core import files, processor, scores
from fastflower.core.records import to_plain
from fastflower.data.betons.beton_file import Beton
from fastflower.data.loaders import eval_images
from fastflower.evaluation.inference import load_network
from fastflower.evaluation.logits import Logits, combine, reduce_views
from fastflower.model.member import load_member
from fastflower.recipe import Recipe
from fastflower.recipe.derived import validates

FEWEST_ROWS, SECONDS = 8, 60.0  # photographs in the parity run where networks are slow, and time for it


def check(
    folder: Path,
    bundle: BundleDescription,
    *,
    members: list[Member],
    recipe: Recipe,
    out_of_fold: dict[Path, Logits],
) -> tuple[list[Gate], list[str]]:
    """Run every gate on a bundle that is not yet published; returns the gates and notes on the cost of rounding.

    `out_of_fold` are the logits that evaluate saved, by member file. Raises InputError when the validation betons
    or the original photographs are missing.
    """
    size = sum(path.stat().st_size for path in [*folder.iterdir(), *CODE.glob("*.py")]) / 1e6
    gates = [
        Gate(
            "size",
            got=f"{size:.1f} MB",
            allowed=f"<= {recipe.bundle.max_mb:g} MB",
            passed=size <= recipe.bundle.max_mb,
        )
    ]
    with files.scratch_folder("hand-in") as workspace:
        photographs = collect(workspace / "photographs", recipe, members)
        betons = write_betons(workspace, bundle, photographs)
        expected = trainer_logits(bundle, members, betons=betons, count=len(photographs))
        photographs = photographs.first(len(expected))
        labels, max_loss = photographs.class_idx, recipe.bundle.max_loss
        root = sandbox.copy_hand_in(workspace / "hand-in", folder, photographs.files)
        gates.append(pixel_parity(root, bundle, betons))
        python, environment = sandbox.try_environment(workspace / "venv")
        options = ["--device", "cpu", "--fp32", "--logits", str(root / "logits.npz")]
        fault = sandbox.run_predictor(root, options, python)
        gates.append(
            Gate(
                "bare run", got=fault or f"{environment}, no network", allowed="exit 0", passed=fault is None
            )
        )
        if fault is not None:
            return gates, []
        fault = submission_fault(root, bundle, len(expected))
        gates.append(
            Gate("submission", got=fault or f"{len(expected)} rows", allowed="valid", passed=fault is None)
        )
        got = np.load(root / "logits.npz")["logits"]
        gates.append(parity(got, expected, bundle))
        notes: list[str] = []
        if recipe.bundle.dtype != "fp32":
            gate, notes = stored_precision(
                members, bundle, betons=betons, logits=expected, labels=labels, recipe=recipe
            )
            gates.append(gate)
        if validates(recipe):
            gates.append(
                out_of_fold_agreement(
                    got,
                    bundle,
                    members=members,
                    photographs=photographs,
                    out_of_fold=out_of_fold,
                    max_loss=max_loss,
                )
            )
        else:
            gates.append(Gate("out of fold", got="no image was held out", allowed="", passed=None))
            notes.append(
                f"the {bundle.noun} of the gates are training images; nothing says how well others are predicted"
            )
        for device in half_devices(recipe.bundle.half):
            gate, device_notes = half_precision(
                root, got, bundle=bundle, labels=labels, max_loss=max_loss, python=python, device=device
            )
            gates.append(gate)
            notes += device_notes
        gates.append(latency(root, bundle, allowed=recipe.bundle.max_ms, python=python))
    return gates, notes


def trainer_logits(
    bundle: BundleDescription, members: list[Member], *, betons: dict[int, Beton], count: int
) -> np.ndarray:
    """The trainer's logits of the photographs: float32 (n, members, views, C), n as many as a minute allows."""
    rows: list[np.ndarray] = []
    start = time.monotonic()
    for row in range(count):
        views = [
            [
                views_logits(network, betons, row=row, crop=bundle.crops[view.crop], hflip=bundle.hflip)
                for network, view in zip(member.versions, entry.views, strict=True)
            ]
            for member, entry in zip(members, bundle.members, strict=True)
        ]
        rows.append(np.stack([np.concatenate(member_views) for member_views in views]))
        if len(rows) >= FEWEST_ROWS and time.monotonic() - start > SECONDS:
            break
    return np.stack(rows)


@torch.inference_mode()
def views_logits(
    network: nn.Module, betons: dict[int, Beton], *, row: int, crop: ViewCrop, hflip: bool
) -> np.ndarray:
    """Logits (1 or 2, C) of a row as the trainer's evaluation computes them, plain and mirrored."""
    image = torch.from_numpy(trainer_view(betons, row, crop))
    images = torch.cat([image, image.flip(2)]) if hflip else image
    return network(images.permute(0, 3, 1, 2).float()).numpy()


def trainer_view(betons: dict[int, Beton], row: int, crop: ViewCrop) -> np.ndarray:
    """A row as the trainer's evaluation cuts it: uint8 (1, h, w, 3), of pairs (1, h, 2w, 3)."""
    return eval_images(
        betons[crop.stored_side],
        np.array([row]),
        size=(crop.height, crop.width),
        factor=crop.factor,
        interpolation=crop.interpolation,
        threads=1,
    ).numpy()


def pixel_parity(root: Path, bundle: BundleDescription, betons: dict[int, Beton]) -> Gate:
    """Largest difference of a pixel over rows and views between the copy's predictor and the trainer."""
    rows = predictor_input(root, bundle)
    crops = to_plain(bundle.crops)
    gap = 0
    for row, name in enumerate(rows.names):
        views = rows.views(name, crops)
        for view, crop in zip(views, bundle.crops, strict=True):
            difference = view.astype(np.int64) - trainer_view(betons, row, crop)[0]
            gap = max(gap, int(np.abs(difference).max()))
    allowed = bundle.pixel_tolerance
    return Gate(
        "pixels",
        got=f"{gap} of 255 on {len(rows.names)} {rows.noun}",
        allowed=f"<= {allowed}",
        passed=gap <= allowed,
    )


def predictor_input(root: Path, bundle: BundleDescription) -> Any:
    """The rows of test_dataset as the copy's own code/inputs.py reads them."""
    sys.path.insert(0, str(root / "code"))
    try:
        with warnings.catch_warnings():  # the predictor's modules silence Pillow
            open_input = runpy.run_path(str(root / "code/inputs.py"))["open_input"]
    finally:
        sys.path.pop(0)
        sys.modules.pop("pictures", None)
    path = root / ("test_dataset.npz" if bundle.pairs else "test_dataset")
    rows = open_input(str(path), to_plain(bundle.pairs))
    rows.load()
    return rows


def stored_precision(
    members: list[Member],
    bundle: BundleDescription,
    *,
    betons: dict[int, Beton],
    logits: np.ndarray,
    labels: np.ndarray,
    recipe: Recipe,
) -> tuple[Gate, list[str]]:
    """The cost of storing weights in fewer bits, on the photographs, one view each.

    The gate is for the members' weighted mean; each member gets a note.
    """
    notes, before, after = [], [], []
    for position, (member, entry) in enumerate(zip(members, bundle.members, strict=True)):
        network = load_network(load_member(member.path), member.path, torch.device("cpu"))
        crop = bundle.crops[entry.views[0].crop]
        exact = np.concatenate(
            [views_logits(network, betons, row=row, crop=crop, hflip=False) for row in range(len(labels))]
        )
        before.append(entry.weight * exact)
        after.append(entry.weight * logits[:, position, 0])
        old, new = scores.scores(exact, labels), scores.scores(logits[:, position, 0], labels)
        notes.append(
            f"{recipe.bundle.dtype} {member.path.stem}: top-1 {old['top1']:.4f} -> {new['top1']:.4f}, "
            f"NLL {old['nll']:.4f} -> {new['nll']:.4f} (n = {len(labels)}), logits move by at most "
            f"{np.abs(exact - logits[:, position, 0]).max():.2g}"
        )
    right_before, right_after = (
        int((np.asarray(sum(weighted)).argmax(1) == labels).sum()) for weighted in (before, after)
    )
    gate = loss_gate(
        recipe.bundle.dtype,
        right_after,
        before=right_before,
        count=len(labels),
        max_loss=recipe.bundle.max_loss,
    )
    return gate, notes


def half_devices(half: str) -> list[str]:
    """Devices that `bundle.half` lets compute in half precision; last the one that the predictor chooses here."""
    both = ["cpu", "gpu"] if torch.cuda.is_available() else ["gpu", "cpu"]
    return {"all": both, "gpu": ["gpu"], "none": []}[half]


def half_precision(
    root: Path,
    exact: np.ndarray,
    *,
    bundle: BundleDescription,
    labels: np.ndarray,
    max_loss: float,
    python: Path | None,
    device: str,
) -> tuple[Gate, list[str]]:
    """The cost of half precision on a device, against the predictor's fp32 logits from the CPU; with notes."""
    name = f"half, {device}"
    if device == "gpu" and not torch.cuda.is_available():
        return Gate(name, got="no GPU here", allowed="", passed=None), []
    logits = root / f"{device}.npz"
    options = ["--device", "cuda" if device == "gpu" else device, "--logits", str(logits)]
    fault = sandbox.run_predictor(root, options, python) or submission_fault(root, bundle, len(labels))
    if fault is not None:
        return Gate(name, got=fault, allowed="valid", passed=False), []
    got, summary = np.load(logits)["logits"], run_summary(root)
    if got.shape != exact.shape or not np.isfinite(got).all():
        return Gate(name, got="logits that are missing or not finite", allowed="none", passed=False), []
    if summary["device"].endswith("fp32"):
        unfit = all(program.half_keeps is None for program in bundle.programs)
        reason = "no bf16 instructions here" if device == "cpu" else f"computed by {summary['device']}"
        reasons = [*summary["notes"], "networks unfit for it" if unfit else reason]
        return Gate(name, got=reasons[0], allowed="", passed=None), []
    weights = [member.weight for member in bundle.members]
    half_classes, exact_classes = (
        np.tensordot(weights, values.mean(axis=2), (0, 1)).argmax(axis=1) for values in (got, exact)
    )
    note = (
        f"{summary['device']}: logits move by at most {np.abs(got - exact).max():.2g}, the largest is "
        f"{np.abs(exact).max():.2g}; another class for {np.sum(half_classes != exact_classes)} of {len(labels)}"
    )
    gate = loss_gate(
        name,
        int((half_classes == labels).sum()),
        before=int((exact_classes == labels).sum()),
        count=len(labels),
        max_loss=max_loss,
    )
    return gate, [note, *summary["notes"]]


def out_of_fold_agreement(
    got: np.ndarray,
    bundle: BundleDescription,
    *,
    members: list[Member],
    photographs: HeldOut,
    out_of_fold: dict[Path, Logits],
    max_loss: float,
) -> Gate:
    """Right answers of the bundle against those of evaluate, each photograph by members that did not train on it.

    `got` are the predictor's logits (n, members, views, C). evaluate read the same images from the betons, with
    unrounded weights.
    """
    count, right_bundle, right_evaluate = 0, 0, 0
    for row, fold in enumerate(photographs.fold):
        predicted, known, weights = [], [], []
        for position, (member, entry) in enumerate(zip(members, bundle.members, strict=True)):
            saved = out_of_fold.get(member.path)
            if saved is not None and member.meta.fold == fold:
                (saved_row,) = np.flatnonzero(saved.index == photographs.index[row])
                predicted.append(reduce_views(list(got[row, position][:, None]), bundle.reduce))
                known.append(saved.logits[[saved_row]])
                weights.append(entry.weight)
        if predicted:
            shares, label = np.array(weights) / sum(weights), photographs.class_idx[row]
            count += 1
            right_bundle += int(combine(predicted, shares, bundle.space).argmax() == label)
            right_evaluate += int(combine(known, shares, bundle.space).argmax() == label)
    if not count:
        return Gate(
            "out of fold", got="no logits; run python -m fastflower.evaluate", allowed="", passed=None
        )
    return loss_gate("out of fold", right_bundle, before=right_evaluate, count=count, max_loss=max_loss)


def loss_gate(name: str, after: int, *, before: int, count: int, max_loss: float) -> Gate:
    """A limit on lost right answers: the fraction `max_loss` of the photographs, and one in any case."""
    fewest = max(0, before - max(1, int(max_loss * count)))
    return Gate(
        name,
        got=f"{after} right of {count}, {before} before",
        allowed=f">= {fewest} right",
        passed=after >= fewest,
    )


def parity(got: np.ndarray, expected: np.ndarray, bundle: BundleDescription) -> Gate:
    """Largest difference of a logit over rows, members and views."""
    gap = float(np.abs(got - expected).max()) if got.shape == expected.shape else float("nan")
    return Gate(
        "parity",
        got=f"{gap:.2g} on {len(expected)} {bundle.noun}",
        allowed=f"<= {bundle.tolerance:g}",
        passed=gap <= bundle.tolerance,
    )


def latency(root: Path, bundle: BundleDescription, *, allowed: float, python: Path | None) -> Gate:
    """Milliseconds a photograph or pair without start-up, on the device that the predictor chooses.

    Tried up to three times, because the machine may be busy.
    """
    # in all other cases the previous run used the options of the evaluator's
    run_first = bundle.half == "none" and torch.cuda.is_available()
    for attempt in range(3):
        fault = sandbox.run_predictor(root, [], python) if run_first or attempt else None
        summary = run_summary(root)
        spent = summary.get("ms_per_image", math.inf)
        if fault is None and spent <= allowed:
            break
    if fault is not None or spent == math.inf:
        return Gate("latency", got=fault or "no run", allowed=f"<= {allowed:g} ms", passed=False)
    device, _, precision = summary["device"].rpartition(", ")
    hardware = (
        torch.cuda.get_device_name()
        if device.startswith("cuda")
        else f"{processor.name()}, {summary['threads']} threads"
    )
    item = "a pair" if bundle.pairs else "an image"
    got = f"{spent:.1f} ms {item} on {hardware}, {precision}"
    return Gate("latency", got=got, allowed=f"<= {allowed:g} ms", passed=spent <= allowed)


def print_table(gates: list[Gate]) -> None:
    """Print the gates as a table."""
    width, allowed = (max(len(getattr(gate, name)) for gate in gates) for name in ("got", "allowed"))
    results = {True: "passed", False: "FAILED", None: "not seen"}
    for gate in gates:
        print(f"  {gate.name:<12}{gate.got:<{width}}  {gate.allowed:<{allowed}}  {results[gate.passed]}")
