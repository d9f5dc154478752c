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

from fastflower import __version__, runs
from fastflower import recipe as recipes
from fastflower.callbacks.progress import clock, side
from fastflower.callbacks.selection import Best
from fastflower.derived import Derived
from fastflower.recipe import Recipe
from fastflower.runs import Run

PACKAGES = ("torch", "torchvision", "mosaicml", "ffcv", "timm", "numpy", "scikit-learn", "scipy", "pandas", "numba", "pillow")
# keys that say where, how fast or what happens afterwards, not what is learned; their change does not stop a resume
FREE = (
    "exp.", "tta.", "ensembling.", "ts.", "bundle.", "log.", "checks.", "data.root", "data.csv", "data.image_col", "data.label_col",
    "data.home", "data.test", "data.fold", "data.store", "data.raw_share", "data.jpeg_quality", "data.on_bad", "data.workers",
    "eval.batch", "train.batch_per_gpu", "train.world_size", "train.grad_accum", "train.stage_batch", "train.save_every",
    "train.max_nonfinite", "train.compile",
)  # fmt: skip


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
    combos: list[list[str]]
    steps: list[int]  # of an epoch, by stage
    groups: list[dict[str, Any]]
    groups_table: list[str]
    notes: list[str]  # where the weights come from, and what else is worth a line


def identity(recipe: Recipe, derived: Derived, hashes: dict[str, str]) -> dict[str, Any]:
    """What a checkpoint must share with the run that goes on from it."""
    keys = {name: value for name, value, _ in recipes.fields_of(recipe) if not name.startswith(FREE)}
    batches = [stage.batch_per_gpu * derived.world_size * recipe.train.grad_accum for stage in derived.stages]
    return {"recipe": keys, "data": hashes, "global batch": {"by stage": batches}}


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """`opt.lr_ref: 0.0002 -> 0.001` for every entry in which two identities differ."""
    found = []
    for part in now:
        old, new = then.get(part, {}), now[part]
        for name in sorted({*old, *new}):
            if _plain(old.get(name)) != _plain(new.get(name)):
                label = name if part == "recipe" else f"{part} {name}"
                found.append(f"{label}: {old.get(name)} -> {new.get(name)}")
    return found


def _plain(value: Any) -> Any:
    """As JSON gives it back: tuples are lists and keys are text."""
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def versions() -> dict[str, Any]:
    """What is needed to repeat the run elsewhere: packages, git state, Python, devices, command line."""
    cuda = torch.cuda.is_available()
    return {
        "fastflower": __version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "git": git_state(),
        "platform": platform.platform(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else ["cpu"],
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


def write_meta(recipe: Recipe, facts: Facts, advice: list[str], determinism: str) -> None:
    """Freeze recipe, folds, classes, versions and derived numbers in meta/."""
    run, folder = facts.run, facts.run.meta_dir
    runs.write_atomic(folder / "recipe.yaml", recipes.to_yaml(recipe))
    for name in ("folds.csv", "classes.csv"):
        runs.write_atomic(folder / name, (Path(recipe.data.home) / name).read_bytes())
    runs.write_json(folder / "versions.json", versions())
    runs.write_json(
        folder / f"derived_{run.stem}.json",
        {
            **facts.derived.as_dict(),
            "backbone": run.backbone,
            "steps": facts.steps,
            "precision": facts.precision,
            "device": facts.device,
            "parameters": facts.parameters,
            "groups": facts.groups,
            "class_counts": facts.counts.tolist(),
            "validation": facts.validation,
            "combos": facts.combos,
            "determinism": determinism,
            "notes": [*facts.notes, *advice],
        },
    )


def header(recipe: Recipe, facts: Facts) -> list[str]:
    """What this run is, in about ten lines."""
    d, run = facts.derived, facts.run
    present = facts.counts[facts.counts > 0]
    kinds = f" (+ {len(facts.combos)} corrupted copies)" if facts.combos else ""
    stages = ", ".join(
        f"{s.first}-{s.last} at {side([s.height, s.width])} ({n} steps of {s.batch_per_gpu * d.world_size * recipe.train.grad_accum})"
        for s, n in zip(d.stages, facts.steps, strict=True)
    )
    accum = f" x {recipe.train.grad_accum}" if recipe.train.grad_accum > 1 else ""
    pretrained = "pretrained" if recipe.model.pretrained else "from scratch"
    devices = f"{d.world_size} x {facts.device}, {facts.precision}"
    rows = [
        ("network", f"{run.backbone}, {facts.parameters / 1e6:.1f} M parameters, {pretrained}, {recipe.model.head} head"),
        ("data", f"{facts.classes} classes, {int(facts.counts.sum())} training images ({present.max()} to {present.min()} a class), "
                 f"{facts.validation} validation{kinds}"),
        ("devices", devices),
        ("batch", f"{d.world_size} x {d.stages[0].batch_per_gpu}{accum} = {d.batch_global} global"),
        ("lr", f"{d.lr:.3g} ({d.lr_note}), {recipe.opt.name}, {recipe.sched.name}, {recipe.sched.warmup_epochs} epochs of warm-up"),
        ("epochs", stages),
        ("sampler", recipe.sampler.type),
        ("loss", f"{recipe.loss.name}, smoothing {recipe.reg.ls_eps:g}, MixUp/CutMix {recipe.reg.mix_prob:g}, "
                 f"erasing {recipe.reg.erase_p:g}"),
        ("averages", _averages(recipe)),
        ("best by", _best_by(recipe)),
        ("folders", f"{run.model_dir}, {run.results_dir}"),
    ]  # fmt: skip
    title = f"fastflower {__version__}   {run.exp}   fold {run.fold}   seed {run.seed}"
    return [title, *(f"  {name:<9} {text}" for name, text in rows)]


def _averages(recipe: Recipe) -> str:
    ema = f"EMA {recipe.ema.decay:g}{' with ramp' if recipe.ema.warmup else ''}" if recipe.ema.enabled else "no EMA"
    return ema + (f", SWA from {recipe.swa.start:.0%} of the horizon" if recipe.swa.enabled else "")


def _best_by(recipe: Recipe) -> str:
    alpha = recipe.select.alpha
    if recipe.select.metric == "clean" or not recipe.robust.enabled:
        score = "clean top-1"
    else:
        score = f"S = {alpha:g} clean + {1 - alpha:g} corrupted"
    stop = f"patience {recipe.es.patience} of {recipe.es.min_delta:g}" if recipe.es.enabled else "no early stop"
    return f"{score}, {stop}"


def summary(
    run: Run, best: Best, scores: dict[str, float], reason: str, written: dict[str, Path], seconds: float
) -> list[str]:
    """How it ended: best epoch, its scores, why it stopped, what was written."""
    shown = [
        f"{name} {scores[key]:.4f}"
        for name, key in (
            ("clean", f"clean_{best.weights}"),
            ("corrupted", f"corrupt_{best.weights}"),
            ("macro recall", f"macro_recall_{best.weights}"),
            ("macro F1", f"macro_f1_{best.weights}"),
        )
        if key in scores
    ]
    lines = [
        f"done: {reason}, {clock(seconds)}",
        f"  best       epoch {best.epoch}, {best.weights} weights, {best.score:.4f}" + (f" ({', '.join(shown)})" if shown else ""),
    ]
    return lines + [f"  {kind:<10} {path}" for kind, path in sorted(written.items())]


def check_disk(folder: Path, needed: int) -> list[str]:
    """A line when the disk of `folder` has less room than the checkpoints will take."""
    free = shutil.disk_usage(folder).free
    if free >= needed:
        return []
    return [f"the disk of {folder} has {free / 1e9:.1f} GB left, the checkpoints may take {needed / 1e9:.1f} GB"]


def world_note(recipe: Recipe, facts: Facts) -> list[str]:
    """A line when the recipe was written for another number of devices."""
    real = facts.derived.world_size
    if recipe.train.world_size == real:
        return []
    return [f"train.world_size = {recipe.train.world_size}, running on {real}: batch and lr are those of {real}"]


def write_end(run: Run, row: dict[str, Any]) -> None:
    """How the run ended, early or not, beside what it started with."""
    runs.write_json(run.meta_dir / f"early_stop_{run.stem}.json", row)
