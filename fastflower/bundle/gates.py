"""What a bundle must pass before it is put in place: size, a bare run, parity with the trainer, scores, latency.

The predictor itself is run, as a process from a copy in another folder (`bare.py`), on the original files of
photographs that the members validated on; on PNGs where these came as numbers, and on a .npz of pairs.
"""

from __future__ import annotations

import csv
import json
import math
import platform
import runpy
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fastflower.bundle import sandbox
from fastflower.bundle.held_out import Photographs, held_out, written
from fastflower.bundle.writer import CODE, Member
from fastflower.core import checkpoint, runs, scores
from fastflower.data.betons.beton_file import Beton
from fastflower.data.loaders import eval_images
from fastflower.evaluation.inference import load_network
from fastflower.evaluation.logits import Logits
from fastflower.recipe import Recipe

FEWEST_ROWS, SECONDS = 8, 60.0  # photographs in the parity run where networks are slow, and time for it


@dataclass(frozen=True)
class Gate:
    """One line of the table: what was measured, what is allowed, and whether it passed; None: it could not be seen."""

    name: str
    got: str
    allowed: str
    passed: bool | None


def check(
    folder: Path,
    bundle: dict[str, Any],
    *,
    members: list[Member],
    recipe: Recipe,
    out_of_fold: dict[str, Logits],
) -> tuple[list[Gate], list[str]]:
    """Run every gate on a bundle that lies aside; the gates, and what storing the weights cost each member.

    `out_of_fold` are the logits that evaluate saved, by member file. Raises InputError when the validation betons
    or the original photographs are not there.
    """
    size = sum(path.stat().st_size for path in [*folder.iterdir(), *CODE.glob("*.py")]) / 1e6
    gates = [Gate("size", f"{size:.1f} MB", f"<= {recipe.bundle.max_mb:g} MB", size <= recipe.bundle.max_mb)]
    with tempfile.TemporaryDirectory(prefix="hand-in-") as temporary:
        place = Path(temporary)
        photographs = held_out(place / "photographs", recipe, members)
        betons = written(place, bundle, photographs)
        expected = trainer_logits(bundle, members, betons=betons, count=len(photographs))
        photographs = photographs.first(len(expected))
        root, python = sandbox.copy_hand_in(place / "hand-in", folder, photographs.files), None
        gates.append(pixel_parity(root, bundle, betons))
        where = "other imports blocked"
        try:
            python, where = sandbox.environment(place / "venv"), "fresh venv"
        except (OSError, subprocess.CalledProcessError) as error:
            where += f" (no venv: {' '.join(str(error).split())[:60]})"
        fault = sandbox.run(root, ["--device", "cpu", "--fp32", "--logits", str(root / "logits.npz")], python)
        gates.append(Gate("bare run", fault or f"{where}, no network", "exit 0", fault is None))
        if fault is not None:
            return gates, []
        fault = submission_fault(root, bundle, len(expected))
        gates.append(Gate("submission", fault or f"{len(expected)} rows", "valid", fault is None))
        got = np.load(root / "logits.npz")["logits"]
        gates.append(parity(got, expected, bundle))
        lines: list[str] = []
        if recipe.bundle.dtype != "fp32":
            gate, lines = rounding(
                members, bundle, betons=betons, logits=expected, labels=photographs.class_idx, recipe=recipe
            )
            gates.append(gate)
        gates.append(
            agreement(
                got,
                bundle,
                members=members,
                photographs=photographs,
                out_of_fold=out_of_fold,
                max_loss=recipe.bundle.max_loss,
            )
        )
        for device in halved(recipe.bundle.half):
            gate, more = halving(
                root,
                got,
                bundle=bundle,
                labels=photographs.class_idx,
                max_loss=recipe.bundle.max_loss,
                python=python,
                device=device,
            )
            gates.append(gate)
            lines += more
        gates.append(latency(root, bundle, allowed=recipe.bundle.max_ms, python=python))
    return gates, lines


def trainer_logits(
    bundle: dict[str, Any], members: list[Member], *, betons: dict[int, Beton], count: int
) -> np.ndarray:
    """The trainer's evaluation of the photographs: float32 (n, members, views, C), n as many as a minute allows."""
    found: list[np.ndarray] = []
    start = time.monotonic()
    for row in range(count):
        views = [
            [
                views_logits(
                    member.network, betons, row=row, crop=bundle["crops"][view["crop"]], hflip=bundle["hflip"]
                )
                for view in spec["views"]
            ]
            for member, spec in zip(members, bundle["members"], strict=True)
        ]
        found.append(np.stack([np.concatenate(own) for own in views]))
        if len(found) >= FEWEST_ROWS and time.monotonic() - start > SECONDS:
            break
    return np.stack(found)


@torch.inference_mode()
def views_logits(
    network: nn.Module, betons: dict[int, Beton], *, row: int, crop: dict[str, Any], hflip: bool
) -> np.ndarray:
    """Logits (1 or 2, C) of a row as training evaluates it, plain and mirrored."""
    image = torch.from_numpy(trained_view(betons, row, crop))
    images = torch.cat([image, image.flip(2)]) if hflip else image
    return network(images.permute(0, 3, 1, 2).float()).numpy()


def trained_view(betons: dict[int, Beton], row: int, crop: dict[str, Any]) -> np.ndarray:
    """A row as the trainer's evaluation cuts it: uint8 (1, h, w, 3), of pairs (1, h, 2w, 3)."""
    beton, size = betons[crop["stored_side"]], (crop["height"], crop["width"])
    return eval_images(
        beton,
        np.array([row]),
        size=size,
        factor=crop["factor"],
        interpolation=crop["interpolation"],
        threads=1,
    ).numpy()


def pixel_parity(root: Path, bundle: dict[str, Any], betons: dict[int, Beton]) -> Gate:
    """Largest difference of a pixel over rows and views: the copy's predictor against the trainer."""
    given = predictors_input(root, bundle)
    gap = 0
    for row, name in enumerate(given.names):
        views = given.views(name, bundle["crops"])
        for view, crop in zip(views, bundle["crops"], strict=True):
            apart = view.astype(np.int64) - trained_view(betons, row, crop)[0]
            gap = max(gap, int(np.abs(apart).max()))
    allowed = bundle["pixel_tolerance"]
    return Gate("pixels", f"{gap} of 255 on {len(given.names)} {given.noun}", f"<= {allowed}", gap <= allowed)


def predictors_input(root: Path, bundle: dict[str, Any]) -> Any:
    """What the copy's predictor makes of its input, by its own code."""
    sys.path.insert(0, str(root / "code"))
    try:
        with warnings.catch_warnings():  # the predictor's modules silence Pillow
            find = runpy.run_path(str(root / "code/inputs.py"))["find"]
    finally:
        sys.path.pop(0)
        sys.modules.pop("pictures", None)
    given = find(str(root / ("test_dataset.npz" if bundle["pairs"] else "test_dataset")), bundle["pairs"])
    given.load()
    return given


def rounding(
    members: list[Member],
    bundle: dict[str, Any],
    *,
    betons: dict[int, Beton],
    logits: np.ndarray,
    labels: np.ndarray,
    recipe: Recipe,
) -> tuple[Gate, list[str]]:
    """What storing the weights cost on the photographs, one view each: the members' mean, and a line for each."""
    lines, before, after = [], [], []
    for position, (member, spec) in enumerate(zip(members, bundle["members"], strict=True)):
        network = load_network(checkpoint.load(member.path), member.path, torch.device("cpu"))
        crop = bundle["crops"][spec["views"][0]["crop"]]
        exact = np.concatenate(
            [views_logits(network, betons, row=row, crop=crop, hflip=False) for row in range(len(labels))]
        )
        before.append(spec["weight"] * exact)
        after.append(spec["weight"] * logits[:, position, 0])
        old, new = scores.scores(exact, labels), scores.scores(logits[:, position, 0], labels)
        lines.append(
            f"{recipe.bundle.dtype} {member.path.stem}: top-1 {old['top1']:.4f} -> {new['top1']:.4f}, "
            f"NLL {old['nll']:.4f} -> {new['nll']:.4f} (n = {len(labels)}), logits move by at most "
            f"{np.abs(exact - logits[:, position, 0]).max():.2g}"
        )
    right = [int((sum(own).argmax(1) == labels).sum()) for own in (before, after)]
    return loss_gate(
        recipe.bundle.dtype, right[1], before=right[0], count=len(labels), max_loss=recipe.bundle.max_loss
    ), lines


def halved(half: str) -> list[str]:
    """Devices that compute in half precision by bundle.half; the one that the predictor chooses here is last."""
    both = ["cpu", "gpu"] if torch.cuda.is_available() else ["gpu", "cpu"]
    return {"all": both, "gpu": ["gpu"], "none": []}[half]


def halving(
    root: Path,
    exact: np.ndarray,
    *,
    bundle: dict[str, Any],
    labels: np.ndarray,
    max_loss: float,
    python: Path | None,
    device: str,
) -> tuple[Gate, list[str]]:
    """What half precision costs on a device, against the predictor's own logits in fp32 on the CPU."""
    name = f"half, {device}"
    if device == "gpu" and not torch.cuda.is_available():
        return Gate(name, "no GPU here", "", None), []
    logits = root / f"{device}.npz"
    words = ["--device", "cuda" if device == "gpu" else device, "--logits", str(logits)]
    fault = sandbox.run(root, words, python) or submission_fault(root, bundle, len(labels))
    if fault is not None:
        return Gate(name, fault, "valid", False), []
    got, run = np.load(logits)["logits"], about(root)
    if got.shape != exact.shape or not np.isfinite(got).all():
        return Gate(name, "logits that are missing or not finite", "none", False), []
    if run["device"].endswith("fp32"):
        unfit = all(program["half_keeps"] is None for program in bundle["programs"])
        why = "no bf16 instructions here" if device == "cpu" else f"computed by {run['device']}"
        return Gate(name, [*run["notes"], "networks unfit for it" if unfit else why][0], "", None), []
    shares = [spec["weight"] for spec in bundle["members"]]
    told = [np.tensordot(shares, own.mean(axis=2), (0, 1)).argmax(axis=1) for own in (got, exact)]
    line = (
        f"{run['device']}: logits move by at most {np.abs(got - exact).max():.2g}, the largest is "
        f"{np.abs(exact).max():.2g}; another class for {np.sum(told[0] != told[1])} of {len(labels)}"
    )
    right = [int((own == labels).sum()) for own in told]
    return loss_gate(name, right[0], before=right[1], count=len(labels), max_loss=max_loss), [
        line,
        *run["notes"],
    ]


def agreement(
    got: np.ndarray,
    bundle: dict[str, Any],
    *,
    members: list[Member],
    photographs: Photographs,
    out_of_fold: dict[str, Logits],
    max_loss: float,
) -> Gate:
    """The bundle's right answers against those out of fold, each photograph by members that did not train on it.

    `got` is what the predictor said: (n, members, views, C). evaluate read the same images from the betons, with
    the weights as they were trained.
    """
    seen, ours, theirs = 0, 0, 0
    for row, fold in enumerate(photographs.fold):
        own, known = 0.0, 0.0
        for position, (member, spec) in enumerate(zip(members, bundle["members"], strict=True)):
            saved = out_of_fold.get(member.path.name)
            if saved is not None and int(member.meta["fold"]) == fold:
                (place,) = np.flatnonzero(saved.index == photographs.index[row])
                own = own + spec["weight"] * got[row, position].mean(axis=0)
                known = known + spec["weight"] * saved.logits[place]
        if isinstance(own, np.ndarray):
            seen += 1
            ours += int(own.argmax() == photographs.class_idx[row])
            theirs += int(np.argmax(known) == photographs.class_idx[row])
    if not seen:
        return Gate("out of fold", "no logits; run python -m fastflower.evaluate", "", None)
    return loss_gate("out of fold", ours, before=theirs, count=seen, max_loss=max_loss)


def loss_gate(name: str, after: int, *, before: int, count: int, max_loss: float) -> Gate:
    """Right answers that may be lost: a share of the photographs, and always one."""
    fewest = before - max(1, int(max_loss * count))
    return Gate(name, f"{after} right of {count}, {before} before", f">= {fewest} right", after >= fewest)


def submission_fault(root: Path, bundle: dict[str, Any], rows: int) -> str | None:
    """What is wrong with the table of the copy, or None."""
    with open(root / runs.SUBMISSION, encoding="utf-8", newline="") as file:
        header, *table = list(csv.reader(file))
    width = 2 if bundle["columns"] == "two" else 3
    if len(header) != width or any(len(row) != width for row in table):
        return f"columns {header}"
    if bundle.get("pairs"):
        names = [f"test_dataset/{row:0{len(str(rows - 1))}d}" for row in range(rows)]
    else:
        names = sorted(path.name for path in (root / "test_dataset").iterdir())
    if [row[0] for row in table] != names or len(names) != rows:
        return f"{len(table)} rows for {rows} {noun(bundle)}"
    if not {row[1] for row in table} <= set(bundle["class_ids"]):
        return "category ids that are not in the training labels"
    if bundle["columns"] == "binary":
        second = bundle["class_ids"][1]
        if not all(0 <= float(row[2]) <= 1 for row in table):
            return "a probability outside [0, 1]"
        if any((row[1] == second) != (float(row[2]) > 0.5) for row in table if row[2] != "0.500000000"):
            return "a probability on the other side of 0.5 than its class"
    elif width == 3 and not all(0 < float(row[2]) <= 1 for row in table):
        return "a confidence outside (0, 1]"
    unreadable = about(root)["unreadable"]
    return f"{len(unreadable)} {noun(bundle)} unreadable" if unreadable else None


def parity(got: np.ndarray, expected: np.ndarray, bundle: dict[str, Any]) -> Gate:
    """Largest difference of a logit over rows, members and views."""
    tolerance = bundle["tolerance"]
    gap = float(np.abs(got - expected).max()) if got.shape == expected.shape else float("nan")
    return Gate(
        "parity", f"{gap:.2g} on {len(expected)} {noun(bundle)}", f"<= {tolerance:g}", gap <= tolerance
    )


def noun(bundle: dict[str, Any]) -> str:
    return "pairs" if bundle.get("pairs") else "photographs"


def latency(root: Path, bundle: dict[str, Any], *, allowed: float, python: Path | None) -> Gate:
    """Milliseconds a photograph or pair, start-up apart, on the device that the predictor chooses, with its name.

    Tried up to three times: that a machine is busy is not the bundle's fault.
    """
    unseen = bundle["half"] == "none" and torch.cuda.is_available()
    for attempt in range(3):
        # else the run before was one as the evaluator's will be
        fault = sandbox.run(root, [], python) if unseen or attempt else None
        run = about(root)
        spent = run.get("ms_per_image", math.inf)
        if fault is None and spent <= allowed:
            break
    if fault is not None or spent == math.inf:
        return Gate("latency", fault or "no run", f"<= {allowed:g} ms", False)
    device, _, precision = run["device"].rpartition(", ")
    own = (
        torch.cuda.get_device_name()
        if device.startswith("cuda")
        else f"{cpu_name()}, {run['threads']} threads"
    )
    where = f"{own}, {precision}"
    what = "a pair" if bundle["pairs"] else "an image"
    return Gate("latency", f"{spent:.1f} ms {what} on {where}", f"<= {allowed:g} ms", spent <= allowed)


def about(root: Path) -> dict[str, Any]:
    """What the copy's predictor wrote beside its table."""
    return json.loads((root / runs.SUBMISSION).with_suffix(".json").read_text(encoding="utf-8"))


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def table(gates: list[Gate], say: Callable[[str], None] = print) -> None:
    """Print the gates as a table."""
    width = max(len(gate.got) for gate in gates)
    words = {True: "passed", False: "FAILED", None: "not seen"}
    for gate in gates:
        say(f"  {gate.name:<12}{gate.got:<{width}}  {gate.allowed:<12}{words[gate.passed]}")
