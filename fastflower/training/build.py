"""Builds a run from its recipe: data, network, optimizer, algorithms, callbacks, Composer's Trainer."""

from __future__ import annotations

import atexit
import copy
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer import Evaluator, Trainer
from composer.core import Algorithm, Event, State
from torch import Tensor, nn

from fastflower.algorithms.augmentation import DeviceAugment
from fastflower.algorithms.averaging import Ema, Swa
from fastflower.algorithms.fixmatch import FixMatch
from fastflower.algorithms.gradients import GradientGuard
from fastflower.algorithms.learning_rate import LearningRate
from fastflower.algorithms.lr_range import LrRangeTest
from fastflower.algorithms.mixing import MixUpCutMix
from fastflower.algorithms.soft_labels import SoftLabels
from fastflower.algorithms.stages import StageSchedule
from fastflower.bundle.program import try_export
from fastflower.callbacks.checkpoints import CheckpointSaver, Stateful
from fastflower.callbacks.progress import Progress, side
from fastflower.callbacks.recorder import Recorder
from fastflower.callbacks.scoring import Scoring
from fastflower.callbacks.stop import Stop
from fastflower.callbacks.tensorboard_files import TensorBoard
from fastflower.callbacks.trackers import trackers
from fastflower.callbacks.trends import Trends
from fastflower.core import seeding
from fastflower.core.console import Console
from fastflower.core.errors import InputError
from fastflower.core.runs import Run
from fastflower.data.betons.fold_set import FoldSet
from fastflower.data.loaders import EvalLoader, TrainLoader
from fastflower.data.transforms.augment import augment
from fastflower.data.unlabelled import UnlabelledBatches, exclusion_notice
from fastflower.evaluation import distillation, soft_labels
from fastflower.evaluation.views import sizes_of
from fastflower.model.classifier import Classifier
from fastflower.model.losses import build_loss
from fastflower.model.network import (
    Network,
    NetworkSpec,
    batch_norms,
    synchronise_norms,
    training_network,
)
from fastflower.optim.groups import Group, describe_groups, param_groups
from fastflower.optim.optimizers import build_optimizer
from fastflower.optim.schedules import plateau_monitor
from fastflower.recipe import Recipe
from fastflower.recipe.derived import Derived, derive, is_scored, parse_interval
from fastflower.recipe.run_record import ParameterGroup, RunNumbers
from fastflower.recipe.starting_point import reasons
from fastflower.training.features import FrozenFeatures, are_computed_once
from fastflower.training.fold_data import Loaders, Position, class_counts, loaders
from fastflower.training.initial import load_initial
from fastflower.training.memory import MemoryTrial
from fastflower.training.ranks import TIMEOUT, Machine, on_rank_zero, one_may_fail
from fastflower.training.record import RunFacts, member_meta
from fastflower.training.samples import COLUMNS, save_samples
from fastflower.training.trainer import FoldTrainer

SWA_BATCHES = 50  # to re-estimate BatchNorm statistics


@dataclass
class Training:
    """All objects of one run, as the train command drives them."""

    run: Run
    facts: RunFacts
    spec: NetworkSpec
    trainer: Trainer
    memory: MemoryTrial
    network: nn.Module
    data: Loaders
    components: dict[str, Stateful]  # what a resume restores, by the name in `last`
    scoring: Scoring
    recorder: Recorder
    saver: CheckpointSaver
    console: Console

    def close(self) -> None:
        """Stop threads and close files, after success or failure."""
        _close(self.trainer, self.data)


def training(
    recipe: Recipe,
    run: Run,
    *,
    fold: FoldSet,
    machine: Machine,
    stop: Stop,
    console: Console,
    identity: dict[str, Any],
    resuming: bool = False,
) -> Training:
    """Build one run; `identity` decides which checkpoints it may resume from. One that resumes needs no weights."""
    derived, position, counts = derive(recipe, machine.world), Position(), class_counts(recipe, fold)
    begins = not resuming or are_computed_once(recipe)  # features are of the weights that it began with
    network, spec, notes = _network(recipe, counts, machine, fold=fold if begins else None)
    on_rank_zero(lambda: _try_export(recipe, network, spec, images=fold.train.images_per_row))
    notes += exclusion_notice(recipe, fold)
    data = loaders(
        recipe, derived, position=position, fold=fold, interpolation=spec.interpolation, machine=machine
    )
    frozen = _use_features(
        recipe, data, fold=fold, network=network, spec=spec, machine=machine, say=console.write, notes=notes
    )
    groups = param_groups(network, derived.lr, recipe)
    classifier = Classifier(network, build_loss(recipe, counts.tolist()))
    guard = GradientGuard(
        network, recipe.train.clip_grad, limit=recipe.train.max_nonfinite, warn=console.write
    )
    averages = _averages(
        recipe, derived, classifier=classifier, data=data, guard=guard, fill=spec.fill, stop=stop
    )
    networks = {"raw": network, **{name: average.shadow for name, average in averages.items()}}
    rows = {label: len(loader.rows) for label, loader in data.evaluation.items()}
    scoring = Scoring(recipe, derived, networks=networks.values, rows=rows, combos=data.combos)
    schedule = LearningRate(
        recipe,
        derived,
        network=network,
        steps=data.train.steps,
        monitored=lambda: {
            "score": scoring.score,
            "val_loss": scoring.val_loss,
            "train_loss": recorder.meter.mean("loss"),
        }[plateau_monitor(recipe)],
    )
    semi_teacher = averages["ema"].shadow if recipe.semi.teacher == "ema" else None
    semi = (
        {
            "semi": _unlabelled_learning(
                recipe, fold, counts, fill=spec.fill, teacher=semi_teacher, notes=notes
            )
        }
        if recipe.semi.enabled
        else {}
    )
    recorder = Recorder(
        run,
        derived,
        guard=guard,
        scoring=scoring,
        tensorboard=TensorBoard(recipe, run) if recipe.log.tensorboard else None,
        extra_entries=[algorithm.row for algorithm in semi.values()],
    )
    trends = Trends(recipe)
    progress = Progress(console, derived, recorder=recorder, scoring=scoring, trends=trends)
    components: dict[str, Stateful] = {
        **averages,
        "trends": trends,
        "guard": guard,
        "schedule": schedule,
        "scoring": scoring,
        "recorder": recorder,
        "machine": machine,
        **semi,
        **frozen,
    }
    meta = functools.partial(member_meta, recipe, run, spec=spec, derived=derived, fold=fold, counts=counts)
    every, keep = parse_interval(recipe.train.save_every), recipe.train.keep_every
    saver = CheckpointSaver(
        run,
        networks,
        scoring=scoring,
        components=components,
        meta=meta,
        identity=identity,
        every=every,
        stop=stop,
        keep=keep,
    )
    trainer = _trainer(
        recipe, derived, machine=machine, fold=fold, spec=spec, classifier=classifier, data=data, groups=groups,
        algorithms=[*semi.values(), schedule, guard, *averages.values()],
        max_duration=f"{derived.epochs}ep",
        eval_dataloader=[
            _evaluator(label, loader, recipe, derived) for label, loader in data.evaluation.items()
        ],
        callbacks=[scoring, recorder, saver, progress],
        loggers=trackers(recipe, run),
        run_name=f"{run.exp}_{run.stem}",
        compile_config={"dynamic": False} if recipe.train.compile else None,
    )  # fmt: skip
    position.state = trainer.state
    facts = _facts(
        run,
        derived,
        machine=machine,
        network=network,
        fold=fold,
        data=data,
        counts=counts,
        groups=groups,
        notes=notes,
    )
    return Training(
        run=run,
        facts=facts,
        spec=spec,
        trainer=trainer,
        memory=_memory_trial(trainer, classifier, data),
        network=network,
        data=data,
        components=components,
        scoring=scoring,
        recorder=recorder,
        saver=saver,
        console=console,
    )


def lr_range_test(
    recipe: Recipe, derived: Derived, *, fold: FoldSet, machine: Machine
) -> tuple[list[float], list[float]]:
    """Learning rates tried and their losses, from a training of the recipe's network that writes no files."""
    position, counts = Position(), class_counts(recipe, fold)
    network, spec, _ = _network(recipe, counts, machine, fold=fold)
    data = loaders(
        recipe, derived, position=position, fold=fold, interpolation=spec.interpolation, machine=machine
    )
    _use_features(recipe, data, fold=fold, network=network, spec=spec, machine=machine)
    range_test = LrRangeTest(recipe, derived.lr)
    classifier = Classifier(network, build_loss(recipe, counts.tolist()))
    trainer = _trainer(
        recipe, derived, machine=machine, fold=fold, spec=spec, classifier=classifier, data=data,
        groups=param_groups(network, derived.lr, recipe),
        algorithms=[range_test, GradientGuard(network, recipe.train.clip_grad, limit=recipe.lrfind.steps + 1)],
        max_duration=f"{recipe.lrfind.steps}ba",
    )  # fmt: skip
    position.state = trainer.state
    memory = _memory_trial(trainer, classifier, data)
    try:
        with one_may_fail(machine, memory):
            memory.run()
            trainer.fit()
    finally:
        _close(trainer, data)
    return range_test.tried, range_test.losses


def _use_features(
    recipe: Recipe,
    data: Loaders,
    *,
    fold: FoldSet,
    network: Network,
    spec: NetworkSpec,
    machine: Machine,
    say: Callable[[str], None] = print,
    notes: list[str] | None = None,
) -> dict[str, FrozenFeatures]:
    """Let the loaders give the features of a frozen backbone, where they are computed once; adds a line to `notes`."""
    if not are_computed_once(recipe):
        return {}
    features = FrozenFeatures(recipe, network=network, spec=spec, machine=machine, say=say)
    line = features.use(data, fold)
    if notes is not None:
        notes.append(line)
    return {"features": features}


def _trainer(
    recipe: Recipe,
    derived: Derived,
    *,
    machine: Machine,
    fold: FoldSet,
    spec: NetworkSpec,
    classifier: Classifier,
    data: Loaders,
    groups: list[Group],
    algorithms: list[Algorithm],
    **options: Any,
) -> Trainer:
    """Composer's Trainer with all that a run and an lr range test share; augmentation runs before `algorithms`."""
    return FoldTrainer(
        model=classifier,
        train_dataloader=data.train,
        spin_dataloaders=False,  # on resume it would start and abandon an iterator for every past epoch
        algorithms=[
            DeviceAugment(
                recipe.aug, recipe.reg.erase_p, fill=spec.fill, pairs=fold.train.images_per_row == 2
            ),
            StageSchedule(recipe.seed, derived, data.train.steps),
            MixUpCutMix(recipe, spec.num_classes, distillation.probabilities(recipe, fold, spec.num_classes)),
            *algorithms,
        ],
        optimizers=build_optimizer(groups, recipe, machine.torch_device),
        progress_bar=False,
        device=machine.composer_device(),
        precision=machine.precision,
        device_train_microbatch_size=derived.stages[0].batch_per_gpu,
        seed=recipe.seed,
        dist_timeout=TIMEOUT,
        **options,
    )


def _close(trainer: Trainer, data: Loaders) -> None:
    """Stop threads and close files. Not Trainer.close: it also waits for the other ranks, and one may be gone."""
    trainer.engine.close()
    # Composer registers this at exit with the whole state, which would keep the networks of every finished fold
    atexit.unregister(trainer.engine._close)
    data.close()


def _memory_trial(trainer: Trainer, classifier: Classifier, data: Loaders) -> MemoryTrial:
    """The memory trial of a built trainer, with the algorithms that change a batch or add to the loss."""
    algorithms = trainer.state.algorithms
    return MemoryTrial(
        classifier=classifier,
        state=trainer.state,
        loader=data.train,
        eval_batch=max((loader.batch_size for loader in data.evaluation.values()), default=1),
        stages=next(algorithm for algorithm in algorithms if isinstance(algorithm, StageSchedule)),
        algorithms=[a for a in algorithms if isinstance(a, (DeviceAugment, MixUpCutMix, FixMatch))],
    )


def _network(
    recipe: Recipe, counts: np.ndarray, machine: Machine, *, fold: FoldSet | None
) -> tuple[Network, NetworkSpec, list[str]]:
    """The recipe's network on this rank's device, initialised equally on all ranks, its spec and notes for people.

    `counts` (C,) are the training images of each class. Without `fold`, for a run that resumes, the weights of
    model.init are left out.
    """
    seeding.seed_all(recipe.seed)
    network, spec, notes = training_network(recipe, len(counts), images=int(counts.sum()))
    notes = [*reasons(recipe), *notes]
    if recipe.model.init and fold is not None:
        notes += load_initial(network, spec, recipe=recipe, fold=fold)
    network, synchronised = synchronise_norms(
        network, recipe, device=machine.torch_device, world_size=machine.world
    )
    network.to(machine.torch_device)
    smallest = min(stage.batch_per_gpu for stage in derive(recipe, machine.world).stages)
    if smallest == 1 and batch_norms(network) and not synchronised:
        raise InputError(
            f"a batch of 1 image: the BatchNorm layers of {recipe.model.backbone} need 2 or more; raise "
            "train.batch_per_gpu (or train.stage_batch), or choose a backbone without BatchNorm"
        )
    return network, spec, notes + _norm_notes(network, synchronised, machine)


def _try_export(recipe: Recipe, network: Network, spec: NetworkSpec, *, images: int) -> None:
    """Refuse, before the training, a network that could not be handed in; a row of the data has `images` images."""
    sizes = sizes_of(spec.size, spec.scales(recipe.tta.scales))
    try_export(spec, network, [(height, images * width) for height, width in sizes])


def _facts(
    run: Run,
    derived: Derived,
    *,
    machine: Machine,
    network: nn.Module,
    fold: FoldSet,
    data: Loaders,
    counts: np.ndarray,
    groups: list[Group],
    notes: list[str],
) -> RunFacts:
    extras = data.train.extras
    numbers = RunNumbers(
        **vars(derived),
        backbone=run.backbone,
        steps=tuple(data.train.steps(stage.first - 1) for stage in derived.stages),
        precision=machine.precision,
        device=torch.cuda.get_device_name() if machine.device == "gpu" else "CPU",
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        groups=tuple(
            ParameterGroup(
                name=group["name"],
                part=group["part"],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                tensors=len(group["params"]),
            )
            for group in groups
        ),
        class_counts=tuple(counts.tolist()),
        validation=fold.val.rows if fold.val else 0,
        unlabelled=len(extras.rows) if isinstance(extras, UnlabelledBatches) else 0,
        combos=tuple((kind, level) for kind, level in data.combos),
        determinism=machine.determinism(),
        notes=tuple(notes),
    )
    return RunFacts(run, numbers, classes=len(fold.classes), group_table=describe_groups(groups))


def save_sample_pictures(recipe: Recipe, training: Training) -> None:
    """Save pictures of epoch 0's first samples, samples_<run>.png, and samples_<run>_<size>.png for later sizes."""
    if are_computed_once(recipe) and recipe.model.frozen_views == 1:
        return  # nothing is augmented
    run, stages = training.run, training.scoring.derived.stages
    sizes = list(dict.fromkeys((stage.height, stage.width) for stage in stages))
    for position, size in enumerate(sizes):
        suffix = f"_{side(list(size))}" if position else ""
        _save_sample_picture(recipe, training, size, run.results_dir / f"samples_{run.stem}{suffix}.png")


def _save_sample_picture(recipe: Recipe, training: Training, size: tuple[int, int], path: Path) -> None:
    """Save the picture of a size, through a separate loader that reads as a single rank would."""
    train, spec = training.data.train, training.spec
    extras = train.extras
    if isinstance(extras, UnlabelledBatches):
        extras = replace(extras, batch=lambda epoch: COLUMNS, size=lambda epoch: size, mu=1, rank=0, world=1)
    loader = TrainLoader(
        train.beton,
        train.order,
        seed=train.seed,
        batch=lambda epoch: COLUMNS,
        size=lambda epoch: size,
        crop=train.crop,
        extras=extras,
    )
    save_samples(
        path,
        recipe,
        loader=loader,
        num_classes=len(training.facts.numbers.class_counts),
        interpolation=spec.interpolation,
        fill=spec.fill,
    )


def _averages(
    recipe: Recipe,
    derived: Derived,
    *,
    classifier: Classifier,
    data: Loaders,
    guard: GradientGuard,
    fill: tuple[float, ...],
    stop: Stop,
) -> dict[str, Any]:
    """The recipe's EMA and SWA; EMA is scored from the first epoch, SWA from its first average."""
    network = classifier.network
    averages: dict[str, Any] = {}
    if recipe.ema.enabled:
        averages["ema"] = Ema(
            network, recipe.ema.decay, warmup=recipe.ema.warmup, skipped=lambda: guard.skipped
        )
        classifier.shadows["ema"] = averages["ema"].shadow
    if recipe.swa.enabled:

        def batches(state: State) -> Iterator[Tensor]:
            """The first SWA_BATCHES augmented batches of the epoch that has just ended."""
            loader = copy.copy(data.train)
            loader.cursor = lambda: (state.timestamp.epoch.value - 1, 0)
            for batch in itertools.islice(loader, SWA_BATCHES):
                pairs = data.train.beton.images_per_row == 2
                yield augment(
                    state.device.batch_to_device(batch["image"]),
                    batch["key"],
                    aug=recipe.aug,
                    erase_p=recipe.reg.erase_p,
                    fill=fill,
                    pairs=pairs,
                )

        first = min(derived.epochs, math.floor(recipe.swa.start * derived.epochs) + 1)
        averages["swa"] = Swa(
            network, first, shadows=classifier.shadows, batches=batches, stopping=stop.requested_on_any_rank
        )
    return averages


def _unlabelled_learning(
    recipe: Recipe,
    fold: FoldSet,
    counts: np.ndarray,
    *,
    fill: tuple[float, ...],
    teacher: nn.Module | None,
    notes: list[str],
) -> FixMatch:
    """The algorithm by which the run learns from unlabelled images; a line on its soft labels goes to `notes`."""
    if recipe.semi.method != "soft":
        return FixMatch(recipe, counts.tolist(), fill=fill, teacher=teacher)
    labels = soft_labels.soft_labels(recipe, fold, len(counts))
    notes.append(labels.line)
    return SoftLabels(recipe, counts.tolist(), fill=fill, targets=labels.targets)


def _evaluator(label: str, loader: EvalLoader, recipe: Recipe, derived: Derived) -> Evaluator:
    """A Composer Evaluator that runs at the end of the epochs of eval.every; `Scoring` computes the metrics."""

    def due(state: State, event: Event) -> bool:
        return event == Event.EPOCH_END and is_scored(recipe, derived, state.timestamp.epoch.value)

    return Evaluator(
        label=label,
        dataloader=loader,
        metric_names=[],
        eval_interval=due,
    )


def _norm_notes(network: nn.Module, synchronised: int, machine: Machine) -> list[str]:
    if synchronised:
        return [f"{synchronised} BatchNorm layers are synchronised over the ranks"]
    norms = len(batch_norms(network))
    if norms and machine.world > 1:
        return [f"{norms} BatchNorm layers keep each rank's own statistics; rank 0's are scored and saved"]
    return []
