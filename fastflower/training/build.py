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

from fastflower.algorithms.augmentation import DeviceAugment
from fastflower.algorithms.averaging import Ema, Swa, batch_norms
from fastflower.algorithms.fixmatch import FixMatch
from fastflower.algorithms.gradients import GradientGuard
from fastflower.algorithms.learning_rate import LearningRate
from fastflower.algorithms.lr_range import Sweep
from fastflower.algorithms.mixing import Mix
from fastflower.algorithms.stages import Stages
from fastflower.callbacks.checkpoints import Saving, Stateful, parse_interval
from fastflower.callbacks.progress import Progress
from fastflower.callbacks.recorder import Recorder
from fastflower.callbacks.scoring import Scoring
from fastflower.callbacks.stop import Stop
from fastflower.callbacks.trackers import trackers
from fastflower.core import seeding
from fastflower.core.console import Console
from fastflower.core.runs import Run
from fastflower.data.betons.fold_set import FoldSet
from fastflower.data.loaders import EvalLoader, TrainLoader
from fastflower.data.transforms.augment import augment
from fastflower.data.unlabelled import Unlabelled, left_out
from fastflower.evaluation import distillation
from fastflower.model.classifier import Classifier
from fastflower.model.losses import build_loss
from fastflower.model.network import Network, NetworkSpec, synchronise_norms, training_network
from fastflower.optim.groups import Group, param_groups, table
from fastflower.optim.optimizers import optimizer
from fastflower.recipe import Recipe, derived
from fastflower.recipe.derived import Derived
from fastflower.training.fold_data import Clock, Loaders, class_counts, loaders
from fastflower.training.ranks import TIMEOUT, Machine, fit
from fastflower.training.record import Facts, member_meta
from fastflower.training.samples import COLUMNS, save_samples

SWA_BATCHES = 50  # for BatchNorm's statistics


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
    *,
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
    data = loaders(recipe, d, clock=clock, fold=fold, interpolation=spec.interpolation, machine=machine)
    groups = param_groups(network, d.lr, recipe)
    classifier = Classifier(network, build_loss(recipe, counts.tolist()))
    guard = GradientGuard(network, recipe.train.clip_grad, limit=recipe.train.max_nonfinite, say=console.say)
    averages = _averages(recipe, d, classifier=classifier, data=data, guard=guard, paint=spec.fill, stop=stop)
    networks = {"raw": network, **{name: average.shadow for name, average in averages.items()}}
    rows = {label: loader.beton.rows for label, loader in data.evaluation.items()}
    scoring = Scoring(recipe, d, networks=networks.values, rows=rows, combos=data.combos)
    schedule = LearningRate(
        recipe,
        d,
        network=network,
        steps=data.train.steps,
        watched=lambda: float(getattr(scoring, recipe.sched.monitor)),
    )
    labeller = averages["ema"].shadow if recipe.semi.teacher == "ema" else None
    semi = (
        {"semi": FixMatch(recipe, counts.tolist(), fill=spec.fill, teacher=labeller)}
        if recipe.semi.enabled
        else {}
    )
    recorder = Recorder(
        run,
        d,
        guard=guard,
        scoring=scoring,
        tensorboard=recipe.log.tensorboard,
        more=[part.row for part in semi.values()],
    )
    parts: dict[str, Stateful] = {
        **averages,
        "guard": guard,
        "schedule": schedule,
        "scoring": scoring,
        "recorder": recorder,
        "machine": machine,
        **semi,
    }
    meta = functools.partial(member_meta, recipe, run, spec=spec, d=d, fold=fold, counts=counts)
    every, keep = parse_interval(recipe.train.save_every), recipe.train.keep_every
    saving = Saving(
        run,
        networks,
        scoring=scoring,
        parts=parts,
        meta=meta,
        identity=same,
        every=every,
        stop=stop,
        keep=keep,
    )
    trainer = _trainer(
        recipe, d, machine=machine, fold=fold, spec=spec, classifier=classifier, data=data, groups=groups,
        algorithms=[*semi.values(), schedule, guard, *averages.values()],
        max_duration=f"{d.epochs}ep",
        eval_dataloader=[_evaluator(label, loader) for label, loader in data.evaluation.items()],
        callbacks=[scoring, recorder, saving, Progress(console, d, recorder=recorder, scoring=scoring)],
        loggers=trackers(recipe, run),
        run_name=f"{run.exp}_{run.stem}",
        compile_config={"dynamic": False} if recipe.train.compile else None,
    )  # fmt: skip
    clock.state = trainer.state
    facts = _facts(
        run,
        d,
        machine=machine,
        network=network,
        fold=fold,
        data=data,
        counts=counts,
        groups=groups,
        notes=notes,
    )
    return Training(run, facts, spec, trainer, network, data, parts, scoring, recorder, saving, console)


def lr_sweep(
    recipe: Recipe, d: Derived, *, fold: FoldSet, machine: Machine
) -> tuple[list[float], list[float]]:
    """Rates and the losses that they met, from a training of the recipe's network that leaves nothing behind."""
    clock, counts = Clock(), class_counts(recipe, fold)
    network, spec, _ = _network(recipe, len(counts), machine)
    data = loaders(recipe, d, clock=clock, fold=fold, interpolation=spec.interpolation, machine=machine)
    sweep = Sweep(recipe, d.lr)
    trainer = _trainer(
        recipe, d, machine=machine, fold=fold, spec=spec,
        classifier=Classifier(network, build_loss(recipe, counts.tolist())), data=data,
        groups=param_groups(network, d.lr, recipe),
        algorithms=[sweep, GradientGuard(network, recipe.train.clip_grad, limit=recipe.lrfind.steps + 1)],
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
    *,
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
            DeviceAugment(recipe.aug, recipe.reg.erase_p, fill=spec.fill, pairs=fold.train.images == 2),
            Stages(recipe.seed, d, data.train.steps),
            Mix(recipe, spec.num_classes, distillation.probabilities(recipe, fold, spec.num_classes)),
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
    network, synchronised = synchronise_norms(
        network, recipe, device=machine.torch_device, world_size=machine.world
    )
    network.to(machine.torch_device)
    return network, spec, notes + _norm_notes(network, synchronised, machine)


def _facts(
    run: Run,
    d: Derived,
    *,
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
        train.beton,
        train.order,
        seed=train.seed,
        batch=lambda epoch: COLUMNS,
        size=train.size,
        crop=train.crop,
        beside=beside,
    )
    path = run.results_dir / f"samples_{run.stem}.png"
    save_samples(
        path,
        recipe,
        loader=loader,
        num_classes=len(training.facts.counts),
        interpolation=spec.interpolation,
        fill=spec.fill,
    )


def _averages(
    recipe: Recipe,
    d: Derived,
    *,
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
        averages["ema"] = Ema(
            network, recipe.ema.decay, warmup=recipe.ema.warmup, skipped=lambda: guard.skipped
        )
        classifier.shadows["ema"] = averages["ema"].shadow
    if recipe.swa.enabled:

        def batches(state: State) -> Iterator[Tensor]:
            """The first batches of the epoch that has just ended, at its size."""
            loader = copy.copy(data.train)
            loader.cursor = lambda: (state.timestamp.epoch.value - 1, 0)
            for batch in itertools.islice(loader, SWA_BATCHES):
                batch = state.device.batch_to_device(batch)
                pairs = data.train.beton.images == 2
                yield augment(
                    batch["image"],
                    batch["key"],
                    aug=recipe.aug,
                    erase_p=recipe.reg.erase_p,
                    fill=paint,
                    pairs=pairs,
                )

        first = min(d.epochs, math.floor(recipe.swa.start * d.epochs) + 1)
        averages["swa"] = Swa(network, first, shadows=classifier.shadows, batches=batches, asked=stop.agreed)
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
