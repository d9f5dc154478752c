"""The ranks that train together: their device and switches, what rank 0 does for all, who owns a run."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch
from composer import Trainer
from composer.utils import dist

from fastflower.callbacks.checkpoints import sweep
from fastflower.core.console import Console
from fastflower.core.errors import PREEMPTED, EnvironmentFault, InputError
from fastflower.core.files import digest
from fastflower.core.runs import Run
from fastflower.recipe import Recipe

TIMEOUT = 600.0  # seconds that a rank waits for another: rank 0 may be reading betons' checksums
PATIENCE = 60.0  # seconds that another rank waits for rank 0 to say why all are leaving
PR_SET_PDEATHSIG = 1
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
        return (
            torch.device("cuda", torch.cuda.current_device()) if self.device == "gpu" else torch.device("cpu")
        )

    def determinism(self) -> str:
        """off, full, or best effort with the operations that are not."""
        if not torch.are_deterministic_algorithms_enabled():
            return "off"
        return f"best effort: {', '.join(sorted(set(self.loose)))}" if self.loose else "full"

    def state_dict(self) -> dict[str, Any]:
        return {"loose": sorted(set(self.loose))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loose.extend(state["loose"])

    def close(self) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def prepare(recipe: Recipe) -> Machine:
    """Join the process group and set the switches that are the process's own: threads, determinism, cuDNN.

    A rank whose launcher is gone is told to save and leave: it would hold the run's lock, a GPU and a port.

    Raises EnvironmentFault when there are fewer GPUs than ranks on a machine that has GPUs.
    """
    world, rank, local = dist.get_world_size(), dist.get_global_rank(), dist.get_local_world_size()
    gpus = torch.cuda.device_count()
    if 0 < gpus < local:
        raise EnvironmentFault(
            f"{local} ranks and {gpus} GPUs; start composer -n {gpus}, or hide the GPUs for the CPU"
        )
    if gpus:
        torch.cuda.set_device(dist.get_local_rank())
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))
    if world > 1:
        _outlive_no_launcher()
        dist.initialize_dist("gpu" if gpus else "cpu", timeout=TIMEOUT)
    precision = "fp32"
    if gpus and recipe.train.amp:
        precision = "amp_bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "amp_fp16"
    return Machine("gpu" if gpus else "cpu", world, rank, precision, _switches(recipe))


def _outlive_no_launcher() -> None:
    """Have the kernel send SIGTERM when the parent ends, be it by SIGKILL; only Linux can."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _switches(recipe: Recipe) -> list[str]:
    """cuDNN and determinism; returns the list to which torch's warnings about loose operations go."""
    loose: list[str] = []
    torch.backends.cudnn.benchmark = recipe.cudnn.benchmark
    torch.backends.cudnn.deterministic = recipe.cudnn.deterministic
    if recipe.cudnn.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(recipe.cudnn.deterministic, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs a pass
    show = warnings.showwarning

    def note(message: Warning | str, *args: Any, **kwargs: Any) -> None:
        if "deterministic" in str(message):
            loose.append(str(message).split(" ")[0])
        else:
            show(message, *args, **kwargs)

    warnings.showwarning = note
    for text in (
        "No batches were trained",
        "DataloaderNumBatches",
    ):  # when resumed before an evaluation; at a stage
        warnings.filterwarnings("ignore", message=f".*{text}")
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


class Alone(SystemExit):
    """One rank's own trouble: it leaves at once, for the others are waiting for it."""


def leave(error: InputError) -> NoReturn:
    """End this rank in the middle of a training; rank 0's words are printed by `errors.run`, another rank's here."""
    rank = dist.get_global_rank()
    if rank == 0:
        raise error
    print(f"fastflower: rank {rank}: {error}", file=sys.stderr, flush=True)
    raise Alone(error.exit_code)


def leave_with_trace() -> NoReturn:
    """End this rank on an error that nobody foresaw, shown before the other ranks complain about its absence."""
    print(f"fastflower: rank {dist.get_global_rank()}:", file=sys.stderr)
    traceback.print_exc()
    sys.stderr.flush()
    raise Alone(1)


def fit(trainer: Trainer) -> None:
    """Train to the end. A rank in trouble of its own says so and leaves at once; the others follow it."""
    try:
        trainer.fit()
    except torch.OutOfMemoryError as error:
        text = str(error).split(". ")[0]
        advice = "halve train.batch_per_gpu and double train.grad_accum, the global batch stays"
        leave(EnvironmentFault(f"{text}; {advice}"))
    except InputError as error:
        leave(error)
    except Exception as error:
        if dist.get_world_size() == 1:
            raise
        # NCCL's is a DistError, gloo's a RuntimeError
        if isinstance(error, torch.distributed.DistError) or "onnection" in str(error):
            leave(EnvironmentFault("another rank has ended; its own message says why"))
        leave_with_trace()


def check_alike(same: dict[str, Any]) -> None:
    """Raise InputError unless all ranks read the same recipe and the same data."""
    seen = dist.all_gather_object(digest(json.dumps(same, sort_keys=True, default=str)))
    if len(set(seen)) > 1:
        raise InputError("the ranks read different recipes or data; give every machine the same files")


@contextmanager
def rank_zero_speaks() -> Iterator[None]:
    """When all ranks are refused, the first says why and its exit code counts.

    The others wait: the launcher ends all as soon as one leaves, and rank 0 may not have spoken yet.
    """
    try:
        yield
    except Alone:
        raise
    except (InputError, SystemExit) as error:
        if dist.get_global_rank() and getattr(error, "code", None) != PREEMPTED:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(PATIENCE)
        raise


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
            path = run.model_dir / f".{run.stem}.lock"
            handles.append(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644))
        except OSError as error:
            raise EnvironmentFault(
                f"{run.model_dir}: cannot write there ({error.strerror}); choose another place"
            ) from None
        try:
            fcntl.flock(handles[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EnvironmentFault(
                f"{run.model_dir}: another process trains fold {fold}, seed {run.seed} there; "
                "wait for it or change exp.name"
            ) from None
        sweep(run)

    on_rank_zero(take)
    try:
        yield run
    finally:
        for handle in handles:
            os.close(handle)


@contextmanager
def console(run: Run) -> Iterator[Console]:
    """Rank 0's terminal and log file; other ranks say nothing."""
    rank = dist.get_global_rank()
    shown = Console(None if rank else run.model_dir / f"train_{run.stem}.log", silent=rank > 0)
    try:
        yield shown
    finally:
        shown.close()
