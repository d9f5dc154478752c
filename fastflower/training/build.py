"""Builds a run from its recipe: network and data, optimizer, algorithms, callbacks, Composer's Trainer."""

from __future__ import annotations

import atexit
import copy
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from composer import Evaluator, Trainer
from composer.core import Algorithm, Event, State
from torch import Tensor

from fastflower.algorithms.augmentation import DeviceAugment
from fastflower.algorithms.auxiliary import AuxiliaryHeads
from fastflower.algorithms.averaging import Ema, Swa
from fastflower.algorithms.fixmatch import FixMatch
from fastflower.algorithms.gradients import GradientGuard
from fastflower.algorithms.learning_rate import LearningRate
from fastflower.algorithms.lr_range import LrRangeTest
from fastflower.algorithms.mixing import MixUpCutMix
from fastflower.algorithms.soft_labels import SoftLabels
from fastflower.algorithms.stages import StageSchedule
from fastflower.callbacks.checkpoints import CheckpointSaver, Stateful
from fastflower.callbacks.progress import Progress
from fastflower.callbacks.recorder import Recorder
from fastflower.callbacks.scoring import Scoring
from fastflower.callbacks.stop import Stop
from fastflower.callbacks.tensorboard_files import TensorBoard
from fastflower.callbacks.trackers import trackers
from fastflower.callbacks.trends import Trends
from fastflower.core.console import Console
from fastflower.core.runs import Run
from fastflower.data.betons.fold_set import FoldSet
from fastflower.data.loaders import EvalLoader
from fastflower.data.transforms.augment import augment
from fastflower.data.unlabelled import UnlabelledBatches
from fastflower.evaluation import distillation, soft_labels
from fastflower.model.classifier import Classifier
from fastflower.model.network import Network
from fastflower.optim.groups import Group, describe_groups
from fastflower.optim.optimizers import build_optimizer
from fastflower.optim.schedules import plateau_monitor
from fastflower.recipe import Recipe
from fastflower.recipe.derived import is_scored, parse_interval
from fastflower.recipe.run_record import ParameterGroup, RunNumbers
from fastflower.training.fold_data import Loaders
from fastflower.training.memory import MemoryTrial
from fastflower.training.prepared import Prepared, prepare
from fastflower.training.ranks import TIMEOUT, Machine, one_may_fail
from fastflower.training.record import RunFacts, member_meta
from fastflower.training.trainer import FoldTrainer

SWA_BATCHES = 50  # to re-estimate BatchNorm statistics


@dataclass
class Training:
    """All objects of one run, as the train command drives them."""

    run: Run
    facts: RunFacts
    prepared: Prepared
    trainer: Trainer
    memory: MemoryTrial
    components: dict[str, Stateful]  # what a resume restores, by the name in `last`
    scoring: Scoring
    recorder: Recorder
    saver: CheckpointSaver
    console: Console

    @property
    def network(self) -> Network:
        return self.prepared.network

    @property
    def data(self) -> Loaders:
        return self.prepared.data

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
    prepared = prepare(
        recipe, fold=fold, machine=machine, say=console.write, begins=not resuming, hands_in=True
    )
    network, derived, data = prepared.network, prepared.derived, prepared.data
    groups = prepared.groups()
    classifier = prepared.classifier()
    guard = GradientGuard(
        network, recipe.train.clip_grad, limit=recipe.train.max_nonfinite, warn=console.write
    )
    averages = _averages(prepared, classifier, guard=guard, stop=stop)
    networks = {"raw": network, **{name: average.shadow for name, average in averages.items()}}
    scoring = Scoring(
        recipe,
        derived,
        networks=networks.values,
        rows={label: len(loader.rows) for label, loader in data.evaluation.items()},
        combos=data.combos,
        aux=prepared.fold.aux_targets,
    )

    def monitored() -> float:
        train_loss = recorder.meter.mean("loss")
        values = {"score": scoring.score, "val_loss": scoring.val_loss, "train_loss": train_loss}
        return values[plateau_monitor(recipe)]

    schedule = LearningRate(recipe, derived, network=network, steps=data.train.steps, monitored=monitored)
    semi = _unlabelled_learning(prepared, averages)
    recorder = _recorder(run, prepared, guard=guard, scoring=scoring, semi=list(semi.values()))
    trends = Trends(recipe)
    progress = Progress(console, derived, recorder=recorder, scoring=scoring, trends=trends)
    components: dict[str, Stateful] = {
        **averages, "trends": trends, "guard": guard, "schedule": schedule, "scoring": scoring, "recorder": recorder,
        "machine": machine, **semi, **({"features": prepared.features} if prepared.features else {}),
    }  # fmt: skip
    saver = CheckpointSaver(
        run,
        networks,
        scoring=scoring,
        components=components,
        meta=functools.partial(
            member_meta, recipe, run, spec=prepared.spec, derived=derived, fold=fold, counts=prepared.counts
        ),
        identity=identity,
        every=parse_interval(recipe.train.save_every),
        stop=stop,
        keep=recipe.train.keep_every,
    )
    trainer = _trainer(
        prepared, classifier, groups,
        algorithms=[*semi.values(), schedule, guard, *averages.values()],
        max_duration=f"{derived.epochs}ep",
        eval_dataloader=[_evaluator(label, loader, prepared) for label, loader in data.evaluation.items()],
        callbacks=[scoring, recorder, saver, progress],
        loggers=trackers(recipe, run),
        run_name=f"{run.exp}_{run.stem}",
        compile_config={"dynamic": False} if recipe.train.compile else None,
    )  # fmt: skip
    return Training(
        run=run,
        facts=_facts(run, prepared, groups),
        prepared=prepared,
        trainer=trainer,
        memory=_memory_trial(trainer, classifier, prepared),
        components=components,
        scoring=scoring,
        recorder=recorder,
        saver=saver,
        console=console,
    )


def lr_range_test(recipe: Recipe, *, fold: FoldSet, machine: Machine) -> tuple[list[float], list[float]]:
    """Learning rates tried and their losses, from a training of the recipe's network that writes no files."""
    prepared = prepare(recipe, fold=fold, machine=machine)
    network, data = prepared.network, prepared.data
    range_test = LrRangeTest(recipe, prepared.derived.lr)
    classifier = prepared.classifier()
    guard = GradientGuard(network, recipe.train.clip_grad, limit=recipe.lrfind.steps + 1)
    trainer = _trainer(
        prepared,
        classifier,
        prepared.groups(),
        algorithms=[range_test, guard],
        max_duration=f"{recipe.lrfind.steps}ba",
    )
    memory = _memory_trial(trainer, classifier, prepared)
    try:
        with one_may_fail(machine, memory):
            memory.run()
            trainer.fit()
    finally:
        _close(trainer, data)
    return range_test.tried, range_test.losses


def _trainer(
    prepared: Prepared,
    classifier: Classifier,
    groups: list[Group],
    *,
    algorithms: list[Algorithm],
    **options: Any,
) -> Trainer:
    """Composer's Trainer with all that a run and an lr range test share; augmentation runs before `algorithms`."""
    recipe, derived, data, machine = prepared.recipe, prepared.derived, prepared.data, prepared.machine
    classes, aux = prepared.num_classes, prepared.fold.aux_targets
    trainer = FoldTrainer(
        model=classifier,
        train_dataloader=data.train,
        spin_dataloaders=False,  # on resume it would start and abandon an iterator for every past epoch
        algorithms=[
            DeviceAugment(**prepared.augmentation),
            StageSchedule(recipe.seed, derived, data.train.steps),
            MixUpCutMix(recipe, classes, distillation.probabilities(recipe, prepared.fold, classes), aux=aux),
            *([AuxiliaryHeads(recipe, aux)] if aux else []),
            *algorithms,
        ],
        optimizers=build_optimizer(groups, recipe, machine.torch_device),
        progress_bar=False,
        device=machine.composer_device(),
        precision=machine.composer_precision,
        device_train_microbatch_size=derived.stages[0].batch_per_gpu,
        seed=recipe.seed,
        dist_timeout=TIMEOUT,
        **options,
    )
    trainer.sharpness = prepared.sharpness
    prepared.position.state = trainer.state
    return trainer


def _close(trainer: Trainer, data: Loaders) -> None:
    """Stop threads and close files. Not Trainer.close: it also waits for the other ranks, and one may be gone."""
    trainer.engine.close()
    # Composer registers this at exit with the whole state, which would keep the networks of every finished fold
    atexit.unregister(trainer.engine._close)
    data.close()


def _memory_trial(trainer: Trainer, classifier: Classifier, prepared: Prepared) -> MemoryTrial:
    """The memory trial of a built trainer, with the algorithms that change a batch or add to the loss."""
    algorithms, data = trainer.state.algorithms, prepared.data
    return MemoryTrial(
        classifier=classifier,
        state=trainer.state,
        loader=data.train,
        twice=prepared.sharpness is not None,
        eval_batch=max((loader.batch_size for loader in data.evaluation.values()), default=1),
        stages=next(algorithm for algorithm in algorithms if isinstance(algorithm, StageSchedule)),
        algorithms=[
            a for a in algorithms if isinstance(a, (DeviceAugment, MixUpCutMix, AuxiliaryHeads, FixMatch))
        ],
    )


def _recorder(
    run: Run, prepared: Prepared, *, guard: GradientGuard, scoring: Scoring, semi: Sequence[FixMatch]
) -> Recorder:
    """The recorder of a run's events, with the draws of each class and what is learned without labels."""

    def class_draws() -> dict[str, Any]:
        epoch, classes = prepared.position.scored_epoch, len(prepared.counts)
        return {"class_draws": prepared.data.train.class_draws(epoch, classes)}

    recipe = prepared.recipe
    return Recorder(
        run,
        prepared.derived,
        guard=guard,
        scoring=scoring,
        tensorboard=TensorBoard(recipe, run) if recipe.log.tensorboard else None,
        extra_entries=[class_draws, *(algorithm.row for algorithm in semi)],
        repeating=lambda: prepared.sharpness is not None and prepared.sharpness.away,
    )


def _facts(run: Run, prepared: Prepared, groups: list[Group]) -> RunFacts:
    derived, data, machine, fold = prepared.derived, prepared.data, prepared.machine, prepared.fold
    extras = data.train.extras
    numbers = RunNumbers(
        **vars(derived),
        backbone=run.backbone,
        steps=tuple(data.train.steps(stage.first - 1) for stage in derived.stages),
        precision=machine.precision,
        device=torch.cuda.get_device_name() if machine.device == "gpu" else "CPU",
        parameters=sum(parameter.numel() for parameter in prepared.network.parameters()),
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
        class_counts=tuple(prepared.counts.tolist()),
        validation=fold.val.rows if fold.val else 0,
        unlabelled=len(extras.rows) if isinstance(extras, UnlabelledBatches) else 0,
        combos=tuple((kind, level) for kind, level in data.combos),
        determinism=machine.determinism(),
        notes=tuple(prepared.notes),
    )
    return RunFacts(run, numbers, classes=len(fold.classes), group_table=describe_groups(groups))


def _averages(
    prepared: Prepared, classifier: Classifier, *, guard: GradientGuard, stop: Stop
) -> dict[str, Any]:
    """The recipe's EMA and SWA; EMA is scored from the first epoch, SWA from its first average."""
    recipe, network, epochs = prepared.recipe, classifier.network, prepared.derived.epochs
    averages: dict[str, Any] = {}
    if recipe.ema.enabled:
        averages["ema"] = Ema(
            network, recipe.ema.decay, warmup=recipe.ema.warmup, skipped=lambda: guard.skipped
        )
        classifier.shadows["ema"] = averages["ema"].shadow
    if recipe.swa.enabled:

        def batches(state: State) -> Iterator[Tensor]:
            """The first SWA_BATCHES augmented batches of the epoch that has just ended."""
            loader = copy.copy(prepared.data.train)
            loader.cursor = lambda: (state.timestamp.epoch.value - 1, 0)
            for batch in itertools.islice(loader, SWA_BATCHES):
                images = state.device.batch_to_device(batch["image"])
                yield augment(images, batch["key"], **prepared.augmentation)

        first = min(epochs, math.floor(recipe.swa.start * epochs) + 1)
        averages["swa"] = Swa(
            network, first, shadows=classifier.shadows, batches=batches, stopping=stop.requested_on_any_rank
        )
    return averages


def _unlabelled_learning(prepared: Prepared, averages: dict[str, Any]) -> dict[str, FixMatch]:
    """The algorithm by which the run learns from unlabelled images, if any; adds a line on soft labels to the notes."""
    recipe, counts, fill = prepared.recipe, prepared.counts.tolist(), prepared.spec.fill
    if not recipe.semi.enabled:
        return {}
    if recipe.semi.method != "soft":
        teacher = averages["ema"].shadow if recipe.semi.teacher == "ema" else None
        precision = prepared.machine.forward_precision
        return {"semi": FixMatch(recipe, counts, fill=fill, teacher=teacher, precision=precision)}
    labels = soft_labels.soft_labels(recipe, prepared.fold, prepared.num_classes)
    prepared.notes.append(labels.line)
    return {"semi": SoftLabels(recipe, counts, fill=fill, targets=labels.targets)}


def _evaluator(label: str, loader: EvalLoader, prepared: Prepared) -> Evaluator:
    """A Composer Evaluator that runs at the end of the epochs of eval.every; `Scoring` computes the metrics."""

    def due(state: State, event: Event) -> bool:
        epoch = state.timestamp.epoch.value
        return event == Event.EPOCH_END and is_scored(prepared.recipe, prepared.derived, epoch)

    return Evaluator(label=label, dataloader=loader, metric_names=[], eval_interval=due)
