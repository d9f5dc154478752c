"""Where a recipe's names meet constructors: data, network, optimizer, algorithms, callbacks, Composer's Trainer."""

from __future__ import annotations

import fcntl
import functools
import itertools
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from composer import Evaluator, Trainer
from composer.core import Event, State
from composer.utils import dist
from torch import Tensor, nn

from fastflower import __version__, derived, seeding
from fastflower import recipe as recipes
from fastflower.algorithms.augmentation import DeviceAugment
from fastflower.algorithms.averaging import Ema, Swa, batch_norms
from fastflower.algorithms.gradients import GradientGuard
from fastflower.algorithms.learning_rate import LearningRate
from fastflower.algorithms.mixing import Mix
from fastflower.algorithms.stages import Stages
from fastflower.callbacks.events import Recorder
from fastflower.callbacks.progress import Console, Progress
from fastflower.callbacks.record import Facts, identity
from fastflower.callbacks.samples import COLUMNS
from fastflower.callbacks.saving import Saving, Stateful, Stop, parse_interval, sweep
from fastflower.callbacks.scoring import CLEAN, CORRUPTED, Scoring
from fastflower.data.augment import augment
from fastflower.data.decode import Crop
from fastflower.data.loaders import EvalLoader, TrainLoader
from fastflower.data.samplers import order
from fastflower.data.sets import FoldSet, open_fold
from fastflower.derived import Derived
from fastflower.errors import EnvironmentFault, InputError
from fastflower.model.classifier import Classifier
from fastflower.model.losses import build_loss
from fastflower.model.network import NetworkSpec, synchronise_norms, training_network
from fastflower.optim.groups import param_groups, table
from fastflower.optim.optimizers import optimizer
from fastflower.recipe import Recipe
from fastflower.runs import Run

TIMEOUT = 600.0  # seconds that a rank waits for another: rank 0 may be reading betons' checksums
SWA_BATCHES = 50  # for BatchNorm's statistics
T = TypeVar("T")


@dataclass(frozen=True)
class Machine:
    """The ranks of this process group and the device of this one."""

    device: str  # "gpu" or "cpu", Composer's words
    world: int
    rank: int
    precision: str
    loose: list[str]  # operations that have no deterministic kernel, as they are met

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device()) if self.device == "gpu" else torch.device("cpu")

    def determinism(self) -> str:
        """off, full, or best effort with the operations that are not."""
        if not torch.are_deterministic_algorithms_enabled():
            return "off"
        return f"best effort: {', '.join(sorted(set(self.loose)))}" if self.loose else "full"

    def close(self) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def prepare(recipe: Recipe) -> Machine:
    """Join the process group and set the switches that are the process's own: threads, determinism, cuDNN.

    Raises EnvironmentFault when there are fewer GPUs than ranks on a machine that has GPUs.
    """
    world, rank, local = dist.get_world_size(), dist.get_global_rank(), dist.get_local_world_size()
    gpus = torch.cuda.device_count()
    if 0 < gpus < local:
        raise EnvironmentFault(f"{local} ranks and {gpus} GPUs; start composer -n {gpus}, or hide the GPUs for the CPU")
    if gpus:
        torch.cuda.set_device(dist.get_local_rank())
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))
    if world > 1:
        dist.initialize_dist("gpu" if gpus else "cpu", timeout=TIMEOUT)
    precision = "fp32"
    if gpus and recipe.train.amp:
        precision = "amp_bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "amp_fp16"
    return Machine("gpu" if gpus else "cpu", world, rank, precision, _switches(recipe))


def _switches(recipe: Recipe) -> list[str]:
    """cuDNN and determinism; returns the list to which torch's warnings about loose operations go."""
    loose: list[str] = []
    torch.backends.cudnn.benchmark = recipe.cudnn.benchmark
    torch.backends.cudnn.deterministic = recipe.cudnn.deterministic
    if recipe.cudnn.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(recipe.cudnn.deterministic, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs a pass over every buffer
    show = warnings.showwarning

    def note(message: Warning | str, *args: Any, **kwargs: Any) -> None:
        if "deterministic" in str(message):
            loose.append(str(message).split(" ")[0])
        else:
            show(message, *args, **kwargs)

    warnings.showwarning = note
    for text in ("No batches were trained", "DataloaderNumBatchesWarning"):  # a resume before an evaluation; stages
        warnings.filterwarnings("ignore", message=f".*{text}.*")
    return loose


def on_rank_zero(work: Callable[[], T]) -> T:
    """Run on rank 0 and give every rank its result; its refusal ends all ranks, and only rank 0 says why."""
    box: list[Any] = [None, None]
    if dist.get_global_rank() == 0:
        try:
            box[0] = work()
        except InputError as error:
            box[1] = error
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(box)
    if box[1] is not None:
        raise box[1] if dist.get_global_rank() == 0 else SystemExit(box[1].exit_code)
    return box[0]


def fold_numbers(recipe: Recipe) -> list[int]:
    """data.fold as a list."""
    fold = recipe.data.fold
    if fold == "all":
        return [0] if recipe.data.split == "ratio" else list(range(recipe.data.n_splits))
    return list(fold) if isinstance(fold, list) else [int(fold)]


@contextmanager
def claim(recipe: Recipe, fold: int) -> Iterator[Run]:
    """The run of a fold, held by rank 0's lock while it trains: two processes never write one run.

    The kernel drops the lock of a killed process.
    """
    run = Run(recipe.exp.name, recipe.model.backbone, fold, recipe.seed)
    handles: list[int] = []

    def take() -> None:
        try:
            run.model_dir.mkdir(parents=True, exist_ok=True)
            path = run.model_dir / f".{run.backbone}__{run.stem}.lock"
            handles.append(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644))
        except OSError as error:
            raise EnvironmentFault(f"{run.model_dir}: cannot write there ({error.strerror}); choose another place") from None
        try:
            fcntl.flock(handles[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EnvironmentFault(
                f"{run.model_dir}: another process trains fold {fold}, seed {run.seed} there; wait for it or change exp.name"
            ) from None
        sweep(run)

    on_rank_zero(take)
    try:
        yield run
    finally:
        for handle in handles:
            os.close(handle)


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


@contextmanager
def console(run: Run) -> Iterator[Console]:
    """Rank 0's terminal and log file; other ranks say nothing."""
    rank = dist.get_global_rank()
    shown = Console(None if rank else run.model_dir / f"train_{run.stem}.log", silent=rank > 0)
    try:
        yield shown
    finally:
        shown.close()


@dataclass(frozen=True)
class Loaders:
    """One fold's betons as batches; `combos` are the (kind, level) pairs of the corrupted set."""

    train: TrainLoader
    evaluation: dict[str, EvalLoader]
    combos: list[list[str]]

    def close(self) -> None:
        for loader in (self.train, *self.evaluation.values()):
            loader.close()


def open_data(recipe: Recipe, fold: int) -> FoldSet:
    """A fold's betons, checked against recipe, labels and folds by rank 0 before the others look."""
    on_rank_zero(lambda: open_fold(recipe, fold) and None)
    return open_fold(recipe, fold)


def verify(fold: FoldSet) -> None:
    """Read the betons against their checksums on rank 0; raises CorruptionError."""

    def work() -> None:
        for beton in (fold.train, fold.val, fold.val_corrupt):
            if beton is not None:
                beton.verify()

    on_rank_zero(work)


def loaders(
    recipe: Recipe, d: Derived, clock: Clock, fold: FoldSet, interpolation: str, machine: Machine
) -> Loaders:
    """Batches of a fold from where `clock` stands. Raises InputError when an epoch holds no global batch."""
    labels, number = fold.train.labels, fold.train.manifest["fold"]

    @functools.lru_cache(maxsize=2)  # length and content of an epoch are asked for many times
    def rows(epoch: int) -> np.ndarray:
        return order(recipe.sampler, labels, recipe.seed, epoch, number, per_rank(epoch) * machine.world)

    def per_rank(epoch: int) -> int:
        return d.stage(epoch).batch_per_gpu * recipe.train.grad_accum

    def size(epoch: int) -> tuple[int, int]:
        stage = d.stage(epoch)
        return stage.height, stage.width

    aug, threads = recipe.aug, recipe.data.workers
    crop = Crop((aug.rrc_scale[0], aug.rrc_scale[1]), (aug.rrc_ratio[0], aug.rrc_ratio[1]), min(1.0, aug.hflip_p * aug.strength))
    train = TrainLoader(fold.train, rows, recipe.seed, per_rank, size, crop, machine.rank, machine.world, threads)
    train.cursor = lambda: clock.now
    for stage in d.stages:
        if train.steps(stage.first - 1) == 0:
            raise InputError(
                f"fold {number} has {fold.train.rows} training images, fewer than the global batch of "
                f"{stage.batch_per_gpu * recipe.train.grad_accum * machine.world}; lower train.batch_per_gpu"
            )
    evaluation = {}
    for label, beton in ((CLEAN, fold.val), (CORRUPTED, fold.val_corrupt)):
        if beton is not None:
            batch = recipe.eval.batch or recipe.train.batch_per_gpu
            evaluation[label] = EvalLoader(
                beton, batch, lambda: size(clock.scored), recipe.eval.resize_factor, interpolation, machine.rank, machine.world, threads
            )
    return Loaders(train, evaluation, fold.val_corrupt.manifest["combos"] if fold.val_corrupt else [])




def class_counts(recipe: Recipe, fold: FoldSet) -> np.ndarray:
    """Images of each class in the fold's training part, int64 (C,); C may be more than the classes there are."""
    classes = len(fold.classes) if recipe.data.num_classes == "auto" else int(recipe.data.num_classes)
    return np.bincount(fold.train.labels, minlength=classes)


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
        self.trainer.close()
        self.data.close()


def training(
    recipe: Recipe, run: Run, fold: FoldSet, machine: Machine, stop: Stop, console: Console, same: dict[str, Any]
) -> Training:
    """Everything of one run; `same` is what a checkpoint must share to go on from it."""
    seeding.seed_all(recipe.seed)  # the initial weights, equal on all ranks
    d, clock, counts = derived.derive(recipe, machine.world), Clock(), class_counts(recipe, fold)
    network, spec, notes = training_network(recipe, len(counts))
    network, synchronised = synchronise_norms(network, recipe, machine.torch_device, machine.world)
    network.to(machine.torch_device)
    notes += _norm_notes(network, synchronised, machine)
    data = loaders(recipe, d, clock, fold, spec.interpolation, machine)
    groups = param_groups(network, d.lr, recipe)
    classifier = Classifier(network, build_loss(recipe, counts.tolist()))
    guard = GradientGuard(network, recipe.train.clip_grad, recipe.train.max_nonfinite)
    averages = _averages(recipe, d, network, classifier, data.train, guard, spec)
    networks = {"raw": network, **{name: average.shadow for name, average in averages.items()}}
    rows = {label: loader.beton.rows for label, loader in data.evaluation.items()}
    scoring = Scoring(recipe, d, networks.values, rows, data.combos)
    schedule = LearningRate(recipe, d, network, data.train.steps, lambda: scoring.score)
    recorder = Recorder(run, d, guard, scoring, recipe.log.tensorboard)
    parts: dict[str, Stateful] = {**averages, "guard": guard, "schedule": schedule, "scoring": scoring, "recorder": recorder}
    meta = functools.partial(member_meta, recipe, run, spec, d, fold, counts)
    saving = Saving(run, networks, scoring, parts, meta, same, parse_interval(recipe.train.save_every), stop)
    trainer = Trainer(
        model=classifier,
        train_dataloader=data.train,
        spin_dataloaders=False,  # spinning abandons an iterator for every past epoch
        max_duration=f"{d.epochs}ep",
        algorithms=[
            DeviceAugment(recipe.aug, recipe.reg.erase_p, fill(spec)),
            Stages(recipe.seed, d, data.train.steps),
            Mix(recipe, len(counts)),
            schedule,
            guard,
            *averages.values(),
        ],
        optimizers=optimizer(groups, recipe, machine.torch_device),
        eval_dataloader=[_evaluator(label, loader) for label, loader in data.evaluation.items()],
        callbacks=[scoring, recorder, saving, Progress(console, d, recorder, scoring)],
        run_name=f"{run.exp}_{run.backbone}_{run.stem}",
        progress_bar=False,
        device=machine.device,
        precision=machine.precision,
        device_train_microbatch_size=d.stages[0].batch_per_gpu,
        seed=recipe.seed,
        dist_timeout=TIMEOUT,
        compile_config={"dynamic": False} if recipe.train.compile else None,
    )
    clock.state = trainer.state
    facts = Facts(
        run,
        d,
        device=torch.cuda.get_device_name() if machine.device == "gpu" else "CPU",
        precision=machine.precision,
        parameters=sum(p.numel() for p in network.parameters()),
        counts=counts,
        classes=len(fold.classes),
        validation=fold.val.rows,
        combos=data.combos,
        steps=[data.train.steps(stage.first - 1) for stage in d.stages],
        groups=[{k: v for k, v in group.items() if k != "params"} | {"tensors": len(group["params"])} for group in groups],
        groups_table=table(groups),
        notes=notes,
    )
    return Training(run, facts, spec, trainer, network, data, parts, scoring, recorder, saving, console)


def sample_loader(training: Training) -> TrainLoader:
    """A loader of its own for the first images of epoch 0, as one rank alone would see them."""
    train = training.data.train
    return TrainLoader(train.beton, train.order, train.seed, lambda epoch: COLUMNS, train.size, train.crop)


def fill(spec: NetworkSpec) -> tuple[float, ...]:
    """What erasing paints: 0 after normalisation."""
    return tuple(255 * value for value in spec.mean)


def _averages(
    recipe: Recipe, d: Derived, network: nn.Module, classifier: Classifier, loader: TrainLoader, guard: GradientGuard,
    spec: NetworkSpec,
) -> dict[str, Any]:  # fmt: skip
    """EMA and SWA as the recipe says; EMA is scored from the first epoch, SWA from its first average."""
    averages: dict[str, Any] = {}
    if recipe.ema.enabled:
        averages["ema"] = Ema(network, recipe.ema.decay, recipe.ema.warmup, lambda: guard.skipped)
        classifier.shadows["ema"] = averages["ema"].shadow
    if recipe.swa.enabled:

        def batches(state: State) -> Iterator[Tensor]:
            for batch in itertools.islice(loader, SWA_BATCHES):
                batch = state.device.batch_to_device(batch)
                yield augment(batch["image"], batch["key"], recipe.aug, recipe.reg.erase_p, fill(spec))

        first = min(d.epochs, math.floor(recipe.swa.start * d.epochs) + 1)
        averages["swa"] = Swa(network, first, classifier.shadows, batches)
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


def member_meta(
    recipe: Recipe, run: Run, spec: NetworkSpec, d: Derived, fold: FoldSet, counts: np.ndarray, epoch: int
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
        "recipe": recipes.to_yaml(recipe),
        "version": __version__,
    }


def same_run(recipe: Recipe, fold: FoldSet, machine: Machine) -> dict[str, Any]:
    """The identity of a run: see `record.identity`."""
    hashes = {name: fold.train.manifest[f"{name}_hash"] for name in ("classes", "folds", "labels")}
    return identity(recipe, derived.derive(recipe, machine.world), hashes | {"stored_side": fold.train.manifest["stored_side"]})
