"""The written account of a run: meta/ at its start and end, and the header and summary on the console."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastflower import __version__
from fastflower.callbacks.checkpoints import FIXED_NAMES
from fastflower.callbacks.progress import side
from fastflower.callbacks.scoring import Scoring
from fastflower.core import files, metric
from fastflower.core.console import clock, timestamp
from fastflower.core.errors import InputError
from fastflower.core.records import read_record, to_plain, write_record
from fastflower.core.runs import Run
from fastflower.data.betons.fold_set import FoldSet
from fastflower.model.member import MemberMeta
from fastflower.model.network import NetworkSpec
from fastflower.recipe import Recipe, to_yaml
from fastflower.recipe.derived import Derived, eval_factor, refits, validates
from fastflower.recipe.own import own_sources
from fastflower.recipe.run_record import (
    BestEpoch,
    Environment,
    RunEnd,
    RunNumbers,
    numbers_path,
    write_recipe,
)
from fastflower.recipe.starting_point import origin, warmup_epochs

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


@dataclass(frozen=True)
class RunFacts:
    """The facts of a run that are known before its first step; `group_table` are lines for people."""

    run: Run
    numbers: RunNumbers
    classes: int
    group_table: list[str]


def member_meta(
    recipe: Recipe,
    run: Run,
    *,
    spec: NetworkSpec,
    derived: Derived,
    fold: FoldSet,
    counts: np.ndarray,
    epoch: int,
    kind: str,
    weights: str,
    scores: dict[str, float | None],
) -> MemberMeta:
    """The description of a checkpoint written after an epoch (from 1); `counts` are training images of each class."""
    stage = derived.stage(max(epoch - 1, 0))
    network = replace(spec, size=(stage.height, stage.width))
    return MemberMeta(
        **vars(network),
        resize_factor=eval_factor(recipe),
        stored_side=fold.train.origin.stored_side,
        class_ids=tuple(fold.classes.ids),
        class_hash=fold.classes.hash,
        class_counts=tuple(counts.tolist()),
        folds_hash=fold.folds.hash,
        exp=run.exp,
        fold=run.fold,
        seed=run.seed,
        epoch=epoch,
        recipe=to_yaml(recipe),
        version=__version__,
        kind=kind,
        weights=weights,
        scores=scores,
        time=timestamp(),
    )


def versions(recipe: Recipe) -> Environment:
    """The environment, to repeat a run elsewhere: packages, git state, Python, devices, command line, own parts."""
    cuda = torch.cuda.is_available()
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return Environment(
        fastflower=__version__,
        python=platform.python_version(),
        packages={name: _version(name) for name in PACKAGES},
        git=git_state(),
        platform=platform.platform(),
        devices=gpus if cuda else ["cpu"],
        cuda=torch.version.cuda if cuda else None,
        threads=torch.get_num_threads(),
        command=sys.argv,
        own_sources=own_sources(recipe),
    )


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_state() -> dict[str, Any] | None:
    """The commit, and `dirty` when the working tree differs from it; None outside a repository."""
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def write_meta(recipe: Recipe, facts: RunFacts, *, advice: list[str], determinism: str) -> None:
    """Write recipe, folds, classes, versions and derived numbers to meta/.

    recipe.yaml and versions.json there are those of the experiment's latest start, a refit on all images apart; each
    start of a run, a resume included, keeps its own in meta/<run>/<time>/.
    """
    folder = facts.run.meta_dir
    facts.run.end_path.unlink(missing_ok=True)  # of a training whose checkpoints were removed or damaged
    started = folder / facts.run.stem / timestamp().replace(":", "-").replace(" ", "_")
    environment = versions(recipe)
    follows = (
        refits(recipe) and (folder / "recipe.yaml").is_file()
    )  # or evaluate would take it for the experiment's
    for place in (started,) if follows else (started, folder):
        write_recipe(place / "recipe.yaml", recipe)
        write_record(place / "versions.json", environment)
    for name in ("folds.csv", "classes.csv"):
        files.write_atomic(folder / name, (Path(recipe.data.home) / name).read_bytes())
    write_numbers(facts, advice, determinism)


def write_numbers(facts: RunFacts, advice: list[str], determinism: str) -> None:
    """Write the derived numbers: at the start, and at the end, when all nondeterministic operations are known."""
    notes = (*facts.numbers.notes, *advice)
    numbers = replace(facts.numbers, determinism=determinism, notes=notes)
    write_record(numbers_path(facts.run), numbers)


def write_end(facts: RunFacts, advice: list[str], end: RunEnd) -> None:
    """Write the final derived numbers, then the end: its file marks a run as finished."""
    write_numbers(facts, advice, end.determinism)
    write_record(facts.run.end_path, end)


def end_of_run(
    run: Run,
    scoring: Scoring,
    *,
    seconds: float,
    saving_seconds: float,
    determinism: str,
    identity: dict[str, Any],
) -> RunEnd:
    """The end of a run, early or not, from its scores and files."""
    best, epochs = scoring.selection.best, scoring.epoch
    return RunEnd(
        reason=scoring.selection.stopped or f"all {epochs} epochs",
        stopped_early=bool(scoring.selection.stopped),
        epochs=epochs,
        best=BestEpoch(epoch=best.epoch, score=best.score if best.epoch else 0.0, weights=best.weights),
        idle_epochs=scoring.selection.idle,
        scores=dict(scoring.best_flat),
        last_scores=dict(scoring.flat),
        files={kind: str(paths[-1]) for kind in FIXED_NAMES if (paths := run.checkpoints(kind))},
        seconds=seconds,
        saving_seconds=saving_seconds,
        determinism=determinism,
        identity=identity,
    )


def end_row(end: RunEnd) -> dict[str, Any]:
    """The end as a row of events.jsonl, without the identity."""
    return {
        "event": "end",
        **{name: value for name, value in to_plain(end).items() if name != "identity"},
    }


def summary(end: RunEnd) -> list[str]:
    """The end for people: reason, best epoch, its scores, and the files written."""
    best = end.best
    metrics = (
        ("clean", "clean"),
        ("corrupted", "corrupt"),
        ("macro recall", "macro_recall"),
        ("macro F1", "macro_f1"),
        ("F1", "f1"),
    )
    texts = [
        f"{title} {score:.4f}"
        for title, metric in metrics
        if (score := end.scores.get(f"{metric}_{best.weights}")) is not None
    ]
    detail = f" ({', '.join(texts)})" if texts else ""
    chosen = f"epoch {best.epoch}, {best.weights} weights, {best.score:.4f}{detail}"
    return [
        "",
        f"done: {end.reason}, {clock(end.seconds)}",
        f"  best       {chosen if best.epoch else 'none: no image was held out to be scored'}",
        *(f"  {kind:<10} {path}" for kind, path in end.files.items()),
    ]


def header(recipe: Recipe, facts: RunFacts) -> list[str]:
    """The run for people, in about ten lines."""
    numbers, run = facts.numbers, facts.run
    accum = f" x {recipe.train.grad_accum}" if recipe.train.grad_accum > 1 else ""
    smoothing = f"smoothing {recipe.reg.ls_eps:g}, " if recipe.loss.name != "ce" else ""
    rows = [
        (
            "network",
            f"{run.backbone}, {numbers.parameters / 1e6:.1f} M parameters, {origin(recipe)}, {recipe.model.head} head",
        ),
        ("data", _data(facts)),
        ("devices", f"{numbers.world_size} x {numbers.device}, {numbers.precision}"),
        (
            "batch",
            f"{numbers.world_size} x {numbers.stages[0].batch_per_gpu}{accum} = {numbers.batch_global} global",
        ),
        ("lr", f"{numbers.lr:.3g} ({numbers.lr_note}), {recipe.opt.name}, {_schedule(recipe)}"),
        ("epochs", _stages(recipe, numbers)),
        ("sampler", recipe.sampler.type),
        (
            "loss",
            f"{recipe.loss.name}, {smoothing}MixUp/CutMix {recipe.reg.mix_prob:g}, erasing {recipe.reg.erase_p:g}",
        ),
        *([("unlabelled", _semi(recipe, numbers.unlabelled))] if numbers.unlabelled else []),
        ("averages", _averages(recipe)),
        ("best by", _best_by(recipe)),
        ("folders", f"{run.model_dir}, {run.results_dir}"),
    ]
    title = f"fastflower {__version__}   {run.exp}   fold {run.fold}   seed {run.seed}"
    return [title, *(f"  {name:<10} {text}" for name, text in rows)]


def _data(facts: RunFacts) -> str:
    numbers = facts.numbers
    present = [count for count in numbers.class_counts if count]
    corrupted = f" (+ {len(numbers.combos)} corrupted copies)" if numbers.combos else ""
    training = f"{sum(present)} training images ({max(present)} to {min(present)} per class)"
    return f"{facts.classes} classes, {training}, {numbers.validation} validation{corrupted}"


def _semi(recipe: Recipe, unlabelled: int) -> str:
    semi = recipe.semi
    source = f"from {semi.threshold:g} by {semi.teacher} weights"
    if semi.method == "soft":
        source = f"labels of {semi.soft_teacher} from {semi.floor:g}, to the power of {semi.power:g}"
    ramp = f", rising over {semi.ramp_epochs} epochs" if semi.ramp_epochs else ""
    return (
        f"{unlabelled} images, {semi.mu} beside each labelled one, {semi.method} {source}, "
        f"weight {semi.lambda_u:g}{ramp}"
    )


def _schedule(recipe: Recipe) -> str:
    if recipe.sched.name == "none":
        return "constant"
    if recipe.sched.name == "cyclic":
        return f"cyclic from {recipe.sched.eta_min:g} of it, {recipe.sched.cycle_steps} steps up and as many down"
    return f"{recipe.sched.name}, {warmup_epochs(recipe):g} epochs of warm-up"


def _stages(recipe: Recipe, numbers: RunNumbers) -> str:
    """1-15 at 224 (156 steps of 128), 16-40 at 320 (156 steps of 128)."""
    factor = numbers.world_size * recipe.train.grad_accum
    return ", ".join(
        f"{stage.first}-{stage.last} at {side([stage.height, stage.width])} "
        f"({steps} steps of {stage.batch_per_gpu * factor})"
        for stage, steps in zip(numbers.stages, numbers.steps, strict=True)
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
    if not validates(recipe):
        return "nothing: no image is held out"
    score = metric.parse(recipe.select.metric).title
    if recipe.select.metric == "combo":
        score = f"S = {alpha:g} clean + {1 - alpha:g} corrupted" if recipe.robust.enabled else "clean top-1"
    stop = (
        f"patience {recipe.es.patience} of {recipe.es.min_delta:g} in {recipe.es.monitor}"
        if recipe.es.enabled
        else "no early stop"
    )
    return f"{score}, {stop}"


def change_of_precision(facts: RunFacts) -> list[str]:
    """A line on a resumed run if the record of its start has another precision, else none."""
    numbers = facts.numbers
    try:
        before = read_record(numbers_path(facts.run), RunNumbers)
    except InputError:  # removed or damaged; it is about to be written anew
        return []
    if before.precision == numbers.precision:
        return []
    return [
        f"trained in {before.precision} on {before.device} until now, goes on in {numbers.precision} on "
        f"{numbers.device}: its scores are close to those of one machine, not equal"
    ]


def warnings_before_start(recipe: Recipe, facts: RunFacts) -> list[str]:
    """Warnings for people before the first step: other world size, odd batches, little disk space."""
    real, lines = facts.numbers.world_size, []
    if recipe.train.world_size != real:
        lines.append(
            f"train.world_size = {recipe.train.world_size}, running on {real}: batch and lr are those of {real}"
        )
    per_rank = [stage.batch_per_gpu * recipe.train.grad_accum for stage in facts.numbers.stages]
    if recipe.reg.mix_prob and any(batch % 2 for batch in per_rank):
        lines.append(
            f"an odd batch ({per_rank} images a device) mixes other pairs on another number of devices"
        )
    # two `last` with weights and two moments each, the average, and four members
    needed = 8 * 4 * facts.numbers.parameters * (2 + recipe.ema.enabled)
    free = shutil.disk_usage(facts.run.model_dir).free
    if free < needed:
        lines.append(f"the disk has {free / 1e9:.1f} GB left, the checkpoints may take {needed / 1e9:.1f} GB")
    return lines
