"""Where a recipe's names meet constructors: data, network, optimizer, algorithms, callbacks, Composer's Trainer."""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from composer import Evaluator, Trainer
from composer.core import Algorithm, Event, State
from torch import Tensor, nn

from fastflower import derived, seeding
from fastflower.algorithms.augmentation import DeviceAugment
from fastflower.algorithms.averaging import Ema, Swa, batch_norms
from fastflower.algorithms.gradients import GradientGuard
from fastflower.algorithms.learning_rate import LearningRate
from fastflower.algorithms.mixing import Mix
from fastflower.algorithms.stages import Stages
from fastflower.algorithms.sweep import Sweep
from fastflower.algorithms.unlabelled import FixMatch
from fastflower.callbacks.events import Recorder
from fastflower.callbacks.progress import Console, Progress
from fastflower.callbacks.ranks import TIMEOUT, Machine, fit, on_rank_zero
from fastflower.callbacks.record import Facts, member_meta
from fastflower.callbacks.samples import COLUMNS, save_samples
from fastflower.callbacks.saving import Saving, Stateful, Stop, parse_interval
from fastflower.callbacks.scoring import CLEAN, CORRUPTED, Scoring
from fastflower.callbacks.trackers import trackers
from fastflower.data.augment import augment
from fastflower.data.decode import Crop
from fastflower.data.loaders import EvalLoader, TrainLoader
from fastflower.data.samplers import order
from fastflower.data.sets import FoldSet, open_fold
from fastflower.data.unlabelled import Unlabelled, left_out, unlabelled_rows, used_rows
from fastflower.derived import Derived
from fastflower.errors import InputError
from fastflower.evaluation import teacher
from fastflower.model.classifier import Classifier
from fastflower.model.losses import build_loss
from fastflower.model.network import Network, NetworkSpec, synchronise_norms, training_network
from fastflower.optim.groups import Group, param_groups, table
from fastflower.optim.optimizers import optimizer
from fastflower.recipe import Recipe
from fastflower.runs import Run

SWA_BATCHES = 50  # for BatchNorm's statistics


class Clock:
    """Where training stands, for loaders that are built before the Trainer that knows."""

    def __init__(self) -> None:
        self.state: State | None = None

    @property
    def now(self) -> tuple[int, int]:
        """(epoch, step in it) of the next batch."""
        if self.state is None:
            return 0, 0
        return self.state.timestamp.epoch.value, self.state.timestamp.batch_in_epoch.value

    @property
    def scored(self) -> int:
        """The epoch that an evaluation belongs to: the one that has just ended."""
        return max(0, self.now[0] - 1)


@dataclass(frozen=True)
class Loaders:
    """One fold's betons as batches; `combos` are the (kind, level) pairs of the corrupted set."""

    train: TrainLoader
    evaluation: dict[str, EvalLoader]
    combos: list[list[str]]

    def close(self) -> None:
        self.train.close()
        for loader in self.evaluation.values():
            loader.close()


def open_data(recipe: Recipe, fold: int) -> FoldSet:
    """A fold's betons, checked against recipe, labels and folds by rank 0 before the others look."""
    on_rank_zero(lambda: open_fold(recipe, fold) and None)
    return open_fold(recipe, fold)


def verify(fold: FoldSet) -> None:
    """Read the betons against their checksums on rank 0; raises CorruptionError."""

    def work() -> None:
        for beton in (fold.train, fold.val, fold.val_corrupt, fold.unlabelled):
            if beton is not None:
                beton.verify()

    on_rank_zero(work)


def loaders(
    recipe: Recipe, d: Derived, clock: Clock, fold: FoldSet, interpolation: str, machine: Machine
) -> Loaders:
    """Batches of a fold from where `clock` stands. Raises InputError when an epoch holds no global batch."""
    number, passes, labelled = fold.train.manifest["fold"], recipe.sampler.passes, used_rows(recipe, fold)
    labels = fold.train.labels[labelled]

    @functools.lru_cache(maxsize=2)  # length and content of an epoch are asked for many times
    def rows(epoch: int) -> np.ndarray:
        batch, turns = per_rank(epoch) * machine.world, range(epoch * passes, (epoch + 1) * passes)
        drawn = [order(recipe.sampler, labels, recipe.seed, turn, number, batch) for turn in turns]
        return labelled[np.concatenate(drawn)]

    def per_rank(epoch: int) -> int:
        return d.stage(epoch).batch_per_gpu * recipe.train.grad_accum

    def size(epoch: int) -> tuple[int, int]:
        stage = d.stage(epoch)
        return stage.height, stage.width

    def steps(epoch: int) -> int:
        return len(labelled) * passes // (per_rank(epoch) * machine.world)

    aug, threads = recipe.aug, recipe.data.workers
    crop = Crop(
        (aug.rrc_scale[0], aug.rrc_scale[1]),
        (aug.rrc_ratio[0], aug.rrc_ratio[1]),
        min(1.0, aug.hflip_p * aug.strength),
    )
    beside = None
    if recipe.semi.enabled:
        weak = replace(crop, scale=(recipe.semi.weak_scale[0], recipe.semi.weak_scale[1]))
        strong = crop if recipe.semi.method == "fixmatch" else None
        beside = Unlabelled(
            *unlabelled_rows(recipe, fold), recipe.seed, number, recipe.semi.mu, per_rank, steps, size, weak, strong,
            machine.rank, machine.world, threads,
        )  # fmt: skip
    train = TrainLoader(
        fold.train,
        rows,
        recipe.seed,
        per_rank,
        size,
        crop,
        machine.rank,
        machine.world,
        threads,
        beside=beside,
    )
    train.cursor = lambda: clock.now
    for stage in d.stages:
        if train.steps(stage.first - 1) == 0:
            raise InputError(
                f"fold {number} has {len(labelled)} training images with labels, fewer than the global batch of "
                f"{stage.batch_per_gpu * recipe.train.grad_accum * machine.world}; lower train.batch_per_gpu"
            )
    evaluation = {}
    for label, beton in ((CLEAN, fold.val), (CORRUPTED, fold.val_corrupt)):
        if beton is not None:
            batch = recipe.eval.batch or recipe.train.batch_per_gpu
            evaluation[label] = EvalLoader(
                beton,
                batch,
                lambda: size(clock.scored),
                recipe.eval.resize_factor,
                interpolation,
                machine.rank,
                machine.world,
                threads,
            )
    return Loaders(train, evaluation, fold.val_corrupt.manifest["combos"] if fold.val_corrupt else [])


def class_counts(recipe: Recipe, fold: FoldSet) -> np.ndarray:
    """Images of each class whose labels are trained on, int64 (C,); C may be more than the classes there are."""
    classes = len(fold.classes) if recipe.data.num_classes == "auto" else int(recipe.data.num_classes)
    return np.bincount(fold.train.labels[used_rows(recipe, fold)], minlength=classes)


@dataclass
class Training:
    """One run, built: what the train command drives."""

    run: Run
    facts: Facts
    spec: NetworkSpec
    trainer: Trainer
    network: nn.Module
    data: Loaders
    parts: dict[str, Stateful]
    scoring: Scoring
    recorder: Recorder
    saving: Saving
    console: Console

    def close(self) -> None:
        """Stop threads and close files, however the run ended."""
        _close(self.trainer, self.data)


def training(
    recipe: Recipe,
    run: Run,
    fold: FoldSet,
    machine: Machine,
    stop: Stop,
    console: Console,
    same: dict[str, Any],
) -> Training:
    """Everything of one run; `same` is what a checkpoint must share to go on from it."""
    d, clock, counts = derived.derive(recipe, machine.world), Clock(), class_counts(recipe, fold)
    network, spec, notes = _network(recipe, len(counts), machine)
    notes += left_out(recipe, fold)
    data = loaders(recipe, d, clock, fold, spec.interpolation, machine)
    groups = param_groups(network, d.lr, recipe)
    classifier = Classifier(network, build_loss(recipe, counts.tolist()))
    guard = GradientGuard(network, recipe.train.clip_grad, recipe.train.max_nonfinite, console.say)
    averages = _averages(recipe, d, classifier, data, guard, spec.fill, stop)
    networks = {"raw": network, **{name: average.shadow for name, average in averages.items()}}
    rows = {label: loader.beton.rows for label, loader in data.evaluation.items()}
    scoring = Scoring(recipe, d, networks.values, rows, data.combos)
    schedule = LearningRate(
        recipe, d, network, data.train.steps, lambda: float(getattr(scoring, recipe.sched.monitor))
    )
    labeller = averages["ema"].shadow if recipe.semi.teacher == "ema" else None
    semi = {"semi": FixMatch(recipe, counts.tolist(), spec.fill, labeller)} if recipe.semi.enabled else {}
    recorder = Recorder(run, d, guard, scoring, recipe.log.tensorboard, [part.row for part in semi.values()])
    parts: dict[str, Stateful] = {
        **averages,
        "guard": guard,
        "schedule": schedule,
        "scoring": scoring,
        "recorder": recorder,
        "machine": machine,
        **semi,
    }
    meta = functools.partial(member_meta, recipe, run, spec, d, fold, counts)
    every, keep = parse_interval(recipe.train.save_every), recipe.train.keep_every
    saving = Saving(run, networks, scoring, parts, meta, same, every, stop, keep)
    trainer = _trainer(
        recipe, d, machine, fold, spec, classifier, data, groups,
        [*semi.values(), schedule, guard, *averages.values()],
        max_duration=f"{d.epochs}ep",
        eval_dataloader=[_evaluator(label, loader) for label, loader in data.evaluation.items()],
        callbacks=[scoring, recorder, saving, Progress(console, d, recorder, scoring)],
        loggers=trackers(recipe, run),
        run_name=f"{run.exp}_{run.stem}",
        compile_config={"dynamic": False} if recipe.train.compile else None,
    )  # fmt: skip
    clock.state = trainer.state
    facts = _facts(run, d, machine, network, fold, data, counts, groups, notes)
    return Training(run, facts, spec, trainer, network, data, parts, scoring, recorder, saving, console)


def lr_sweep(recipe: Recipe, d: Derived, fold: FoldSet, machine: Machine) -> tuple[list[float], list[float]]:
    """Rates and the losses that they met, from a training of the recipe's network that leaves nothing behind."""
    clock, counts = Clock(), class_counts(recipe, fold)
    network, spec, _ = _network(recipe, len(counts), machine)
    data = loaders(recipe, d, clock, fold, spec.interpolation, machine)
    sweep = Sweep(recipe, d.lr)
    trainer = _trainer(
        recipe, d, machine, fold, spec, Classifier(network, build_loss(recipe, counts.tolist())), data,
        param_groups(network, d.lr, recipe),
        [sweep, GradientGuard(network, recipe.train.clip_grad, recipe.lrfind.steps + 1)],
        max_duration=f"{recipe.lrfind.steps}ba",
    )  # fmt: skip
    clock.state = trainer.state
    try:
        fit(trainer)
    finally:
        _close(trainer, data)
    return sweep.tried, sweep.losses


def _trainer(
    recipe: Recipe,
    d: Derived,
    machine: Machine,
    fold: FoldSet,
    spec: NetworkSpec,
    classifier: Classifier,
    data: Loaders,
    groups: list[Group],
    algorithms: list[Algorithm],
    **more: Any,
) -> Trainer:
    """Composer's Trainer with what every training of a recipe has: its batches, made as the recipe says, come first."""
    return Trainer(
        model=classifier,
        train_dataloader=data.train,
        spin_dataloaders=False,  # spinning abandons an iterator for every past epoch
        algorithms=[
            DeviceAugment(recipe.aug, recipe.reg.erase_p, spec.fill, fold.train.images == 2),
            Stages(recipe.seed, d, data.train.steps),
            Mix(recipe, spec.num_classes, teacher.probabilities(recipe, fold, spec.num_classes)),
            *algorithms,
        ],
        optimizers=optimizer(groups, recipe, machine.torch_device),
        progress_bar=False,
        device=machine.device,
        precision=machine.precision,
        device_train_microbatch_size=d.stages[0].batch_per_gpu,
        seed=recipe.seed,
        dist_timeout=TIMEOUT,
        **more,
    )


def _close(trainer: Trainer, data: Loaders) -> None:
    """Stop threads and close files; Trainer.close would also wait for the other ranks, and one may be gone."""
    trainer.engine.close()
    data.close()


def _network(recipe: Recipe, classes: int, machine: Machine) -> tuple[Network, NetworkSpec, list[str]]:
    """The recipe's network on its device, with initial weights that are equal on all ranks, and notes on it."""
    seeding.seed_all(recipe.seed)
    network, spec, notes = training_network(recipe, classes)
    network, synchronised = synchronise_norms(network, recipe, machine.torch_device, machine.world)
    network.to(machine.torch_device)
    return network, spec, notes + _norm_notes(network, synchronised, machine)


def _facts(
    run: Run,
    d: Derived,
    machine: Machine,
    network: nn.Module,
    fold: FoldSet,
    data: Loaders,
    counts: np.ndarray,
    groups: list[Group],
    notes: list[str],
) -> Facts:
    plain = [
        {k: v for k, v in group.items() if k != "params"} | {"tensors": len(group["params"])}
        for group in groups
    ]
    return Facts(
        run,
        d,
        device=torch.cuda.get_device_name() if machine.device == "gpu" else "CPU",
        precision=machine.precision,
        parameters=sum(p.numel() for p in network.parameters()),
        counts=counts,
        classes=len(fold.classes),
        validation=fold.val.rows,
        unlabelled=len(data.train.beside.rows) if isinstance(data.train.beside, Unlabelled) else 0,
        combos=data.combos,
        steps=[data.train.steps(stage.first - 1) for stage in d.stages],
        groups=plain,
        groups_table=table(groups),
        notes=notes,
    )


def picture(recipe: Recipe, training: Training) -> None:
    """Save the samples of epoch 0, through a loader of its own: the first images as one rank alone would see them."""
    train, spec, run = training.data.train, training.spec, training.run
    beside = train.beside
    if isinstance(beside, Unlabelled):
        beside = replace(beside, batch=lambda epoch: COLUMNS, mu=1, rank=0, world=1)
    loader = TrainLoader(
        train.beton, train.order, train.seed, lambda epoch: COLUMNS, train.size, train.crop, beside=beside
    )
    path = run.results_dir / f"samples_{run.stem}.png"
    save_samples(path, recipe, loader, len(training.facts.counts), spec.interpolation, spec.fill)


def _averages(
    recipe: Recipe,
    d: Derived,
    classifier: Classifier,
    data: Loaders,
    guard: GradientGuard,
    paint: tuple[float, ...],
    stop: Stop,
) -> dict[str, Any]:
    """EMA and SWA as the recipe says; EMA is scored from the first epoch, SWA from its first average."""
    network = classifier.network
    averages: dict[str, Any] = {}
    if recipe.ema.enabled:
        averages["ema"] = Ema(network, recipe.ema.decay, recipe.ema.warmup, lambda: guard.skipped)
        classifier.shadows["ema"] = averages["ema"].shadow
    if recipe.swa.enabled:

        def batches(state: State) -> Iterator[Tensor]:
            """The first batches of the epoch that has just ended, at its size."""
            loader = copy.copy(data.train)
            loader.cursor = lambda: (state.timestamp.epoch.value - 1, 0)
            for batch in itertools.islice(loader, SWA_BATCHES):
                batch = state.device.batch_to_device(batch)
                pairs = data.train.beton.images == 2
                yield augment(batch["image"], batch["key"], recipe.aug, recipe.reg.erase_p, paint, pairs)

        first = min(d.epochs, math.floor(recipe.swa.start * d.epochs) + 1)
        averages["swa"] = Swa(network, first, classifier.shadows, batches, stop.agreed)
    return averages


def _evaluator(label: str, loader: EvalLoader) -> Evaluator:
    """An evaluator that runs once at the end of each epoch and leaves the scores to `Scoring`."""
    return Evaluator(
        label=label,
        dataloader=loader,
        metric_names=[],
        eval_interval=lambda state, event: event == Event.EPOCH_END,
    )


def _norm_notes(network: nn.Module, synchronised: int, machine: Machine) -> list[str]:
    if synchronised:
        return [f"{synchronised} BatchNorm layers are synchronised over the ranks"]
    norms = len(batch_norms(network))
    if norms and machine.world > 1:
        return [f"{norms} BatchNorm layers keep each rank's own statistics; rank 0's are scored and saved"]
    return []
