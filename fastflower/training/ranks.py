"""The ranks of a training: device and process group, work of rank 0, errors of one rank, the lock of a run."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch
from composer.devices import Device, DeviceCPU, DeviceGPU
from composer.utils import dist

from fastflower.callbacks.checkpoints import remove_leftovers
from fastflower.core import cards, launcher, processor
from fastflower.core.console import Console
from fastflower.core.errors import REMEDIES, EnvironmentFault, InputError, lack_of_machine, of_machine
from fastflower.core.files import digest, locked
from fastflower.core.host_memory import keep_freed_memory
from fastflower.core.runs import Run
from fastflower.core.workers import check_threads
from fastflower.model.mixed_precision import autocast_cpu
from fastflower.recipe import Recipe
from fastflower.training import determinism
from fastflower.training.exits import RankFailure
from fastflower.training.memory import MemoryTrial, out_of_memory, shortage
from fastflower.training.watch import Watch

TIMEOUT = 600.0  # seconds that a rank waits for another: rank 0 may be checking the betons' checksums
SILENCE = 15.0  # seconds of waiting for other ranks after which a line says so
T = TypeVar("T")


@dataclass(frozen=True)
class Machine:
    """The ranks of this process group and the device of this one."""

    device: str  # "gpu" or "cpu", as Composer names them
    world: int
    rank: int
    precision: str  # "fp32", "amp_bf16" or "amp_fp16"
    nondeterministic: list[str]  # operations without a deterministic kernel, appended as they run
    watch: Watch | None  # of the other ranks

    @property
    def torch_device(self) -> torch.device:
        return (
            torch.device("cuda", torch.cuda.current_device()) if self.device == "gpu" else torch.device("cpu")
        )

    @property
    def composer_precision(self) -> str:
        """Composer's precision; it knows none but float32 on CPUs, where `forward_precision` sees to bf16."""
        return "fp32" if self.device == "cpu" else self.precision

    def forward_precision(self) -> AbstractContextManager[None]:
        """A context manager for forward passes, inside Composer's."""
        return autocast_cpu() if self.cpu_bf16 else nullcontext()

    @property
    def cpu_bf16(self) -> bool:
        """True for mixed precision on a CPU."""
        return self.device == "cpu" and self.precision == "amp_bf16"

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

    def composer_device(self) -> Device:
        """Composer's device, without TF32, whose 10 bits are too few where float32 is promised.

        Those are train.amp=false and the cosine heads; in mixed precision no other product is in float32.
        """
        return composer_device(self.device)

    def close(self) -> None:
        """Leave the process group together with the other ranks."""
        if self.watch is not None:
            dist.barrier()  # or the watch of a slower rank would see this one end
            self.watch.stop()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def composer_device(name: str) -> Device:
    return DeviceGPU(allow_tf32=False) if name == "gpu" else DeviceCPU()


def prepare(recipe: Recipe) -> Machine:
    """Join the process group and configure this process: memory, threads, determinism, cuDNN.

    A rank saves and exits when its launcher is gone. Raises EnvironmentFault when there are fewer GPUs than ranks on
    a machine that has GPUs, and when the ranks do not find each other.
    """
    # blocks of one size can then hold tensors of another, as at the start of a stage; read when CUDA starts
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    world, rank, local = dist.get_world_size(), dist.get_global_rank(), dist.get_local_world_size()
    gpus = torch.cuda.device_count()
    if 0 < gpus < local:
        raise EnvironmentFault(
            f"{local} ranks and {gpus} GPUs; start composer -n {gpus}, or hide the GPUs for the CPU"
        )
    if gpus:
        torch.cuda.set_device(dist.get_local_rank())
        card, built_for = torch.cuda.get_device_capability(), torch.cuda.get_arch_list()
        if not cards.has_kernels(card, built_for):
            raise EnvironmentFault(f"{torch.cuda.get_device_name()} {cards.lack(card, built_for)}")
    else:
        keep_freed_memory()
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))
    watch = None
    if dist.get_local_rank() == 0:
        check_threads(launcher.THREADS * local)
    if world > 1:
        launcher.follow()
        launcher.check_siblings()
        watch = _join("gpu" if gpus else "cpu")
    return Machine(
        device="gpu" if gpus else "cpu",
        world=world,
        rank=rank,
        precision=_precision(gpus=bool(gpus)) if recipe.train.amp else "fp32",
        nondeterministic=determinism.configure(recipe.cudnn),
        watch=watch,
    )


def _precision(*, gpus: bool) -> str:
    """The mixed precision that all ranks compute well: bf16, else fp16 on GPUs and float32 on CPUs."""
    here = torch.cuda.is_bf16_supported(including_emulation=False) if gpus else processor.multiplies_bf16()
    if all(dist.all_gather_object(here)):
        return "amp_bf16"
    return "amp_fp16" if gpus else "fp32"


def _join(device: str) -> Watch:
    """Join the process group and meet all ranks once: NCCL connects at its first collective, here and not in a step.

    Signals end this process meanwhile: the wait is in C++, where no Python handler runs, and nothing is to be saved.
    """
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    text = (
        f"fastflower: rank {dist.get_global_rank()} waits for all {dist.get_world_size()} ranks at {address}"
    )
    notice = threading.Timer(SILENCE, print, (text,), {"file": sys.stderr, "flush": True})
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGINT)}
    notice.daemon = True
    notice.start()
    try:
        composer = composer_device(device)
        dist.initialize_dist(composer, timeout=TIMEOUT)
        first = composer.tensor_to_device(torch.ones(1))
        dist.all_reduce(first)
        first.item()
        return Watch()
    except (RuntimeError, ValueError) as error:
        remedies = "; check that all ranks are started with the same MASTER_ADDR and MASTER_PORT"
        if device == "gpu":
            remedies = (
                "; in a container allow more shared memory (--shm-size=8g), set NCCL_P2P_DISABLE=1 for GPUs without "
                "peer access, and NCCL_DEBUG=WARN shows more"
            )
        if os.strerror(errno.EAGAIN) in str(error):
            remedies = f"; {REMEDIES[errno.EAGAIN]}"
        if "EADDRINUSE" in str(error):
            remedies = "; another program took this port: repeat the command, with composer under another --master_port"
        exit_rank(EnvironmentFault(f"the ranks cannot talk to each other: {own_words(error)}{remedies}"))
    finally:
        notice.cancel()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def own_words(error: BaseException) -> str:
    """An error's text in one line, without the C++ frames that torch appends."""
    text = str(error).partition("\nException raised from")[0]
    return " ".join(text.split()) or type(error).__name__


def on_rank_zero(work: Callable[[], T]) -> T:
    """Run `work` on rank 0 and return its result on every rank; an InputError or OSError ends all, printed once."""
    outcome: list[Any] = [None, None]  # result, error
    if dist.get_global_rank() == 0:
        try:
            outcome[0] = work()
        except InputError as error:
            outcome[1] = error
        except OSError as error:
            if dist.get_world_size() == 1:
                raise
            outcome[1] = of_machine(error)  # or the other ranks would wait for this one
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(outcome)
    result, failure = outcome
    if failure is not None:
        raise failure if dist.get_global_rank() == 0 else SystemExit(failure.exit_code)
    return result


def exit_rank(error: InputError) -> NoReturn:
    """Exit this rank alone; `errors.run_command` prints the error of rank 0, this function that of others."""
    rank = dist.get_global_rank()
    if rank == 0:
        raise error
    print(f"fastflower: rank {rank}: {error}", file=sys.stderr, flush=True)
    raise RankFailure(error.exit_code)


@contextmanager
def network_may_not_fit(recipe: Recipe, machine: Machine) -> Iterator[None]:
    """Context manager around the building of a training: a GPU without room for the weights is one line, and exit 4."""
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        if machine.watch is not None:
            machine.watch.announce(EnvironmentFault.exit_code)
        said = str(error).strip().split("\n")[0].split(". ")[0]
        exit_rank(
            EnvironmentFault(
                f"the weights of {recipe.model.backbone} and their averages do not fit into memory "
                f"({said or type(error).__name__}); end other processes on the GPU (nvidia-smi lists them), or set a "
                "smaller model.backbone"
            )
        )


@contextmanager
def one_may_fail(machine: Machine, memory: MemoryTrial) -> Iterator[None]:
    """Context manager around training: a rank that fails prints its error and exits at once; the others follow.

    The first one's exit code becomes that of all, so that it is the launcher's, too.
    """
    try:
        yield
    except Exception as error:
        fault = error if isinstance(error, InputError) else None
        if out_of_memory(error):
            fault = shortage(error, memory.stages, memory.state.timestamp.epoch.value)
        elif machine.watch is None and fault is None:
            raise
        # NCCL's is a DistError, gloo's a RuntimeError
        elif isinstance(error, torch.distributed.DistError) or "onnection" in str(error):
            fault = EnvironmentFault(f"{launcher.SURVIVOR}, or cannot be reached: {own_words(error)}")
            fault.exit_code = (machine.watch and machine.watch.failed_code()) or fault.exit_code
        else:
            fault = fault or lack_of_machine(error)
        if machine.watch is not None:
            machine.watch.announce(fault.exit_code if fault else 1)
        if fault is not None:
            exit_rank(fault)
        # printed before the other ranks report a lost connection
        print(f"fastflower: rank {dist.get_global_rank()}:", file=sys.stderr)
        traceback.print_exc()
        raise RankFailure(1) from None


def check_inputs_agree(identity: dict[str, Any]) -> None:
    """Raise InputError unless the run identity, of recipe and data, is equal on all ranks."""
    digests = dist.all_gather_object(digest(json.dumps(identity, sort_keys=True, default=str)))
    if len(set(digests)) > 1:
        raise InputError("the ranks read different recipes or data; give every machine the same files")


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
                stack.enter_context(locked(run.lock_path, busy))
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
