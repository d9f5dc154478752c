"""The ranks of a training: device and determinism, work of rank 0, errors of one rank, the lock of a run."""

from __future__ import annotations

import contextlib
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

from fastflower.callbacks.checkpoints import remove_leftovers
from fastflower.core.console import Console
from fastflower.core.errors import PREEMPTED, EnvironmentFault, InputError
from fastflower.core.files import digest, locked
from fastflower.core.runs import Run
from fastflower.core.workers import die_with_parent
from fastflower.recipe import Recipe

TIMEOUT = 600.0  # seconds that a rank waits for another: rank 0 may be checking the betons' checksums
PATIENCE = 60.0  # seconds that other ranks wait for rank 0 to print why all exit
T = TypeVar("T")


@dataclass(frozen=True)
class Machine:
    """The ranks of this process group and the device of this one."""

    device: str  # "gpu" or "cpu", as Composer names them
    world: int
    rank: int
    precision: str
    nondeterministic: list[str]  # operations without a deterministic kernel, appended as they run

    @property
    def torch_device(self) -> torch.device:
        return (
            torch.device("cuda", torch.cuda.current_device()) if self.device == "gpu" else torch.device("cpu")
        )

    def determinism(self) -> str:
        """Either "off", "full", or "best effort" with the nondeterministic operations that ran."""
        if not torch.are_deterministic_algorithms_enabled():
            return "off"
        return (
            f"best effort: {', '.join(sorted(set(self.nondeterministic)))}"
            if self.nondeterministic
            else "full"
        )

    def state_dict(self) -> dict[str, Any]:
        return {"loose": sorted(set(self.nondeterministic))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.nondeterministic.extend(state["loose"])

    def close(self) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def prepare(recipe: Recipe) -> Machine:
    """Join the process group and configure this process: threads, determinism, cuDNN.

    A rank saves and exits when its launcher is gone: it would hold the run's lock, a GPU and a port.

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
        die_with_parent(signal.SIGTERM)
        dist.initialize_dist("gpu" if gpus else "cpu", timeout=TIMEOUT)
    precision = "fp32"
    if gpus and recipe.train.amp:
        precision = "amp_bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "amp_fp16"
    return Machine(
        device="gpu" if gpus else "cpu",
        world=world,
        rank=rank,
        precision=precision,
        nondeterministic=_configure(recipe),
    )


def _configure(recipe: Recipe) -> list[str]:
    """Set cuDNN and determinism; returns the list that collects the nondeterministic operations torch warns about."""
    nondeterministic: list[str] = []
    torch.backends.cudnn.benchmark = recipe.cudnn.benchmark
    torch.backends.cudnn.deterministic = recipe.cudnn.deterministic
    if recipe.cudnn.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(recipe.cudnn.deterministic, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a pass over memory
    show = warnings.showwarning

    def collect(message: Warning | str, *args: Any, **kwargs: Any) -> None:
        if "deterministic" in str(message):
            nondeterministic.append(str(message).split(" ")[0])
        else:
            show(message, *args, **kwargs)

    warnings.showwarning = collect
    # Composer's warnings after a resume before an evaluation, and at the start of a stage
    for text in ("No batches were trained", "DataloaderNumBatches"):
        warnings.filterwarnings("ignore", message=f".*{text}")
    return nondeterministic


def on_rank_zero(work: Callable[[], T]) -> T:
    """Run `work` on rank 0 and return its result on every rank; an InputError of it ends all ranks, printed once."""
    outcome: list[Any] = [None, None]  # result, error
    if dist.get_global_rank() == 0:
        try:
            outcome[0] = work()
        except InputError as error:
            outcome[1] = error
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(outcome)
    result, failure = outcome
    if failure is not None:
        raise failure if dist.get_global_rank() == 0 else SystemExit(failure.exit_code)
    return result


class RankFailure(SystemExit):
    """An error of one rank, which exits at once because the other ranks are waiting for it."""


def exit_rank(error: InputError) -> NoReturn:
    """Exit this rank during training; `errors.run_command` prints the error of rank 0, this function that of others."""
    rank = dist.get_global_rank()
    if rank == 0:
        raise error
    print(f"fastflower: rank {rank}: {error}", file=sys.stderr, flush=True)
    raise RankFailure(error.exit_code)


def exit_rank_with_traceback() -> NoReturn:
    """Exit on an unexpected error; its traceback is printed before the other ranks report a lost connection."""
    print(f"fastflower: rank {dist.get_global_rank()}:", file=sys.stderr)
    traceback.print_exc()
    sys.stderr.flush()
    raise RankFailure(1)


def fit(trainer: Trainer) -> None:
    """Train to the end. A rank that fails prints its error and exits at once; the others follow."""
    try:
        trainer.fit()
    except torch.OutOfMemoryError as error:
        text = str(error).split(". ")[0]
        advice = "halve train.batch_per_gpu and double train.grad_accum, the global batch stays"
        exit_rank(EnvironmentFault(f"{text}; {advice}"))
    except InputError as error:
        exit_rank(error)
    except Exception as error:
        if dist.get_world_size() == 1:
            raise
        # NCCL's is a DistError, gloo's a RuntimeError
        if isinstance(error, torch.distributed.DistError) or "onnection" in str(error):
            exit_rank(EnvironmentFault("another rank has ended; its own message says why"))
        exit_rank_with_traceback()


def check_inputs_agree(identity: dict[str, Any]) -> None:
    """Raise InputError unless the run identity, of recipe and data, is equal on all ranks."""
    digests = dist.all_gather_object(digest(json.dumps(identity, sort_keys=True, default=str)))
    if len(set(digests)) > 1:
        raise InputError("the ranks read different recipes or data; give every machine the same files")


@contextmanager
def rank_zero_reports() -> Iterator[None]:
    """If every rank rejects the input, rank 0 prints the reason and sets the exit code.

    The others wait: the launcher ends all ranks when one exits, and rank 0 may not have printed yet.
    """
    try:
        yield
    except RankFailure:
        raise
    except (InputError, SystemExit) as error:
        if dist.get_global_rank() and getattr(error, "code", None) != PREEMPTED:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(PATIENCE)
        raise


@contextmanager
def lock_run(recipe: Recipe, fold: int) -> Iterator[Run]:
    """Lock the run of a fold on rank 0 while it trains, so that two processes never write one run.

    The kernel releases the lock of a killed process.
    """
    run = Run(exp=recipe.exp.name, backbone=recipe.model.backbone, fold=fold, seed=recipe.seed)
    busy = (
        f"{run.model_dir}: another process ({{pid}}) trains fold {fold}, seed {run.seed}; "
        "wait for it or change exp.name"
    )
    with contextlib.ExitStack() as stack:

        def acquire() -> None:
            try:
                stack.enter_context(locked(run.model_dir / f".{run.stem}.lock", busy))
            except OSError as error:
                raise EnvironmentFault(
                    f"{run.model_dir}: cannot be written ({error.strerror}); change exp.name"
                ) from None
            remove_leftovers(run)

        on_rank_zero(acquire)
        yield run


@contextmanager
def console(run: Run) -> Iterator[Console]:
    """The console and log file of rank 0; silent on other ranks."""
    rank = dist.get_global_rank()
    output = Console(None if rank else run.model_dir / f"train_{run.stem}.log", silent=rank > 0)
    try:
        yield output
    finally:
        output.close()
