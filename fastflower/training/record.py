"""What is written down about a run: meta/ at its start, the header and the summary a person reads."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastflower import __version__
from fastflower.callbacks.checkpoints import FIXED
from fastflower.callbacks.progress import side
from fastflower.callbacks.scoring import Scoring
from fastflower.core import files
from fastflower.core.console import clock
from fastflower.core.runs import Run
from fastflower.data.betons.fold_set import FoldSet
from fastflower.model.network import NetworkSpec
from fastflower.recipe import Recipe, to_yaml
from fastflower.recipe.derived import Derived

PACKAGES = (
    "torch",
    "torchvision",
    "mosaicml",
    "ffcv",
    "timm",
    "numpy",
    "scikit-learn",
    "scipy",
    "numba",
    "pillow",
)


@dataclass
class Facts:
    """Everything about a run that is known before its first step."""

    run: Run
    derived: Derived
    device: str
    precision: str
    parameters: int
    counts: np.ndarray  # (C,) images of each class in the fold's training part
    classes: int
    validation: int
    unlabelled: int  # images that are learned from without a label
    combos: list[list[str]]
    steps: list[int]  # of an epoch, by stage
    groups: list[dict[str, Any]]
    groups_table: list[str]
    notes: list[str]  # where the weights come from, and what else is worth a line


def member_meta(
    recipe: Recipe, run: Run, *, spec: NetworkSpec, d: Derived, fold: FoldSet, counts: np.ndarray, epoch: int
) -> dict[str, Any]:
    """What a checkpoint of an epoch (from 1) says of itself, less kind, weights and scores."""
    stage = d.stage(max(epoch - 1, 0))
    return {
        **spec.meta(),
        "size": [stage.height, stage.width],
        "resize_factor": recipe.eval.resize_factor,
        "stored_side": fold.val.manifest["stored_side"],
        "class_ids": list(fold.classes.ids),
        "class_hash": fold.classes.hash,
        "class_counts": counts.tolist(),
        "folds_hash": fold.folds.hash,
        "exp": run.exp,
        "fold": run.fold,
        "seed": run.seed,
        "epoch": epoch,
        "recipe": to_yaml(recipe),
        "version": __version__,
    }


def versions() -> dict[str, Any]:
    """What is needed to repeat the run elsewhere: packages, git state, Python, devices, command line."""
    cuda = torch.cuda.is_available()
    return {
        "fastflower": __version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "git": git_state(),
        "platform": platform.platform(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        if cuda
        else ["cpu"],
        "cuda": torch.version.cuda if cuda else None,
        "threads": torch.get_num_threads(),
        "command": sys.argv,
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_state() -> dict[str, Any] | None:
    """Commit and whether the tree differs from it; None outside a repository."""
    folder = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=folder, capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def write_meta(recipe: Recipe, facts: Facts, *, advice: list[str], determinism: str) -> None:
    """Freeze recipe, folds, classes, versions and derived numbers in meta/."""
    folder = facts.run.meta_dir
    facts.run.end.unlink(missing_ok=True)  # of a training whose checkpoints were removed or damaged
    files.write_atomic(folder / "recipe.yaml", to_yaml(recipe))
    for name in ("folds.csv", "classes.csv"):
        files.write_atomic(folder / name, (Path(recipe.data.home) / name).read_bytes())
    files.write_json(folder / "versions.json", versions())
    write_derived(facts, advice, determinism)


def write_derived(facts: Facts, advice: list[str], determinism: str) -> None:
    """The run's derived numbers; written again at its end, when it is known whether all operations were exact."""
    content = {
        **facts.derived.as_dict(),
        "backbone": facts.run.backbone,
        "steps": facts.steps,
        "precision": facts.precision,
        "device": facts.device,
        "parameters": facts.parameters,
        "groups": facts.groups,
        "class_counts": facts.counts.tolist(),
        "validation": facts.validation,
        "unlabelled": facts.unlabelled,
        "combos": facts.combos,
        "determinism": determinism,
        "notes": [*facts.notes, *advice],
    }
    files.write_json(facts.run.meta_dir / f"derived_{facts.run.stem}.json", content)


def header(recipe: Recipe, facts: Facts) -> list[str]:
    """What this run is, in about ten lines."""
    d, run = facts.derived, facts.run
    pretrained = "pretrained" if recipe.model.pretrained else "from scratch"
    accum = f" x {recipe.train.grad_accum}" if recipe.train.grad_accum > 1 else ""
    smoothing = f"smoothing {recipe.reg.ls_eps:g}, " if recipe.loss.name != "ce" else ""
    rows = [
        (
            "network",
            f"{run.backbone}, {facts.parameters / 1e6:.1f} M parameters, {pretrained}, {recipe.model.head} head",
        ),
        ("data", _data(facts)),
        ("devices", f"{d.world_size} x {facts.device}, {facts.precision}"),
        ("batch", f"{d.world_size} x {d.stages[0].batch_per_gpu}{accum} = {d.batch_global} global"),
        ("lr", f"{d.lr:.3g} ({d.lr_note}), {recipe.opt.name}, {_schedule(recipe)}"),
        ("epochs", _stages(recipe, facts)),
        ("sampler", recipe.sampler.type),
        (
            "loss",
            f"{recipe.loss.name}, {smoothing}MixUp/CutMix {recipe.reg.mix_prob:g}, erasing {recipe.reg.erase_p:g}",
        ),
        *([("unlabelled", _semi(recipe, facts))] if facts.unlabelled else []),
        ("averages", _averages(recipe)),
        ("best by", _best_by(recipe)),
        ("folders", f"{run.model_dir}, {run.results_dir}"),
    ]
    title = f"fastflower {__version__}   {run.exp}   fold {run.fold}   seed {run.seed}"
    return [title, *(f"  {name:<10} {text}" for name, text in rows)]


def _data(facts: Facts) -> str:
    present = facts.counts[facts.counts > 0]
    corrupted = f" (+ {len(facts.combos)} corrupted copies)" if facts.combos else ""
    training = f"{facts.counts.sum()} training images ({present.max()} to {present.min()} a class)"
    return f"{facts.classes} classes, {training}, {facts.validation} validation{corrupted}"


def _semi(recipe: Recipe, facts: Facts) -> str:
    semi = recipe.semi
    ramp = f", rising over {semi.ramp_epochs} epochs" if semi.ramp_epochs else ""
    return (
        f"{facts.unlabelled} images, {semi.mu} beside each labelled one, {semi.method} from {semi.threshold:g} "
        f"by {semi.teacher} weights, weight {semi.lambda_u:g}{ramp}"
    )


def _schedule(recipe: Recipe) -> str:
    if recipe.sched.name == "none":
        return "constant"
    return f"{recipe.sched.name}, {recipe.sched.warmup_epochs} epochs of warm-up"


def _stages(recipe: Recipe, facts: Facts) -> str:
    """1-15 at 224 (156 steps of 128), 16-40 at 320 (156 steps of 128)."""
    images = facts.derived.world_size * recipe.train.grad_accum
    return ", ".join(
        f"{s.first}-{s.last} at {side([s.height, s.width])} ({steps} steps of {s.batch_per_gpu * images})"
        for s, steps in zip(facts.derived.stages, facts.steps, strict=True)
    )


def _averages(recipe: Recipe) -> str:
    ema = (
        f"EMA {recipe.ema.decay:g}{' with ramp' if recipe.ema.warmup else ''}"
        if recipe.ema.enabled
        else "no EMA"
    )
    return ema + (f", SWA from {recipe.swa.start:.0%} of the horizon" if recipe.swa.enabled else "")


def _best_by(recipe: Recipe) -> str:
    alpha = recipe.select.alpha
    if recipe.select.metric == "clean" or not recipe.robust.enabled:
        score = "clean top-1"
    else:
        score = f"S = {alpha:g} clean + {1 - alpha:g} corrupted"
    stop = (
        f"patience {recipe.es.patience} of {recipe.es.min_delta:g}" if recipe.es.enabled else "no early stop"
    )
    return f"{score}, {stop}"


def end(run: Run, scoring: Scoring, *, seconds: float, saving_seconds: float) -> dict[str, Any]:
    """How a run ended, as a row of events.jsonl and for meta/."""
    best, flat = scoring.selection.best, scoring.flat
    epochs = scoring.epoch
    return {
        "event": "end",
        "reason": scoring.selection.stopped or f"all {epochs} epochs",
        "stopped_early": bool(scoring.selection.stopped),
        "epochs": epochs,
        "best": {"epoch": best.epoch, "score": best.score, "weights": best.weights},
        "idle_epochs": scoring.selection.idle,
        "scores": scoring.best_flat,
        "last_scores": flat,
        "files": {kind: str(paths[-1]) for kind in FIXED if (paths := run.files(kind))},
        "seconds": seconds,
        "saving_seconds": saving_seconds,
    }


def summary(row: dict[str, Any]) -> list[str]:
    """The end for people: best epoch, its scores, why it stopped, what was written."""
    best, scores = row["best"], row["scores"]
    columns = (
        ("clean", "clean"),
        ("corrupted", "corrupt"),
        ("macro recall", "macro_recall"),
        ("macro F1", "macro_f1"),
        ("F1", "f1"),
    )
    shown = [
        f"{name} {scores[key]:.4f}"
        for name, part in columns
        if (key := f"{part}_{best['weights']}") in scores
    ]
    detail = f" ({', '.join(shown)})" if shown else ""
    return [
        "",
        f"done: {row['reason']}, {clock(row['seconds'])}",
        f"  best       epoch {best['epoch']}, {best['weights']} weights, {best['score']:.4f}{detail}",
        *(f"  {kind:<10} {path}" for kind, path in row["files"].items()),
    ]


def notes(recipe: Recipe, facts: Facts, advice: list[str]) -> list[str]:
    """What a person should know before the first step."""
    real, lines = facts.derived.world_size, []
    if recipe.train.world_size != real:
        lines.append(
            f"train.world_size = {recipe.train.world_size}, running on {real}: batch and lr are those of {real}"
        )
    per_rank = [stage.batch_per_gpu * recipe.train.grad_accum for stage in facts.derived.stages]
    if recipe.reg.mix_prob and any(batch % 2 for batch in per_rank):
        lines.append(
            f"an odd batch ({per_rank} images a device) mixes other pairs on another number of devices"
        )
    needed = (
        8 * 4 * facts.parameters * (2 + recipe.ema.enabled)
    )  # two `last` of weights, two moments, average; members
    free = shutil.disk_usage(facts.run.model_dir).free
    if free < needed:
        lines.append(f"the disk has {free / 1e9:.1f} GB left, the checkpoints may take {needed / 1e9:.1f} GB")
    return [*lines, *advice]


def write_end(facts: Facts, advice: list[str], *, row: dict[str, Any], same: dict[str, Any]) -> None:
    """Put the end, early or not, beside what the run started with; `same` is its identity."""
    write_derived(facts, advice, row["determinism"])
    files.write_json(facts.run.end, {**row, "identity": same})  # the very last: now nothing is left to do
