"""GPU memory: a trial before the first step finds the microbatch that fits each stage; errors for want of memory."""

from __future__ import annotations

import contextlib
import copy
import gc
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from composer.core import Algorithm, Event, State, Timestamp, get_precision_context
from composer.utils import dist
from torch import Tensor, nn

from fastflower.algorithms.stages import StageSchedule
from fastflower.callbacks.progress import side
from fastflower.core.errors import EnvironmentFault
from fastflower.data.loaders import Batch, TrainLoader
from fastflower.model.classifier import Classifier
from fastflower.recipe.derived import Stage
from fastflower.training import determinism
from fastflower.training.estimate import GIB, MARGIN, WAYS_OUT, missing_state

# The words of torch's allocators, the CUDA driver and NCCL; cuBLAS and cuDNN fail in many ways when they cannot
# allocate their workspaces, and in no other way in a network that torch has built.
SHORTAGE = re.compile(
    r"out of memory|can't allocate memory|CUBLAS_STATUS_(ALLOC_FAILED|NOT_INITIALIZED)|CUDNN_STATUS_", re.I
)


def out_of_memory(error: BaseException) -> bool:
    """True if an error says, in any of torch's and CUDA's words, that memory was short."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and bool(SHORTAGE.search(str(error)))


def shortage(error: object, stages: StageSchedule, epoch: int) -> EnvironmentFault:
    """The fault for want of memory in an epoch (from 0): size, stage, microbatch and remedies."""
    stage, microbatch = stages.at(epoch)
    size = side([stage.height, stage.width])
    number, count = stages.derived.stages.index(stage) + 1, len(stages.derived.stages)
    images = "1 image" if microbatch == 1 else f"{microbatch} images"
    said = ". ".join(str(error).strip().split("\n")[0].split(". ")[:2])
    return EnvironmentFault(
        f"size {size} (stage {number} of {count}): a microbatch of {images} does not fit into memory "
        f"({said or type(error).__name__}); {WAYS_OUT}"
    )


@dataclass(frozen=True, kw_only=True)
class MemoryTrial:
    """One step and one evaluation batch of each stage before training, with room for all that is allocated later.

    `algorithms` are those that change a batch or add to the loss; they are copied. A step with `twice` as many passes
    (opt.sam_rho) keeps a copy of the weights meanwhile. The step goes around DDP, whose
    gradient buckets exist since it was built, and SyncBatchNorm keeps to its rank: a rank that runs out of memory
    leaves no other one waiting in a collective. Ranks compare their results between trials.
    """

    classifier: Classifier
    state: State
    loader: TrainLoader
    eval_batch: int
    stages: StageSchedule
    algorithms: Sequence[Algorithm]
    twice: bool = False

    def run(self) -> list[str]:
        """Halve the microbatch of each stage to come until a trial fits on all ranks; returns a line for people.

        Weights, buffers, optimizer and random generators are as before. On a CPU, and for features that were computed
        before, nothing is tried and nothing said. Raises EnvironmentFault on every rank when a single image does not
        fit.
        """
        if self.state.device.name != "gpu" or self.loader.features is not None:
            return []
        texts = []
        with _unchanged(self.classifier):
            for number, stage in enumerate(self.stages.derived.stages):
                if stage.last <= self.state.timestamp.epoch.value:
                    continue  # trained before the resume
                batch, peak = self._fit(number, stage)
                microbatch = self.stages.microbatches[number]
                passes = -(-batch // microbatch)
                size = side([stage.height, stage.width])
                needs = f"{batch} images in {passes} x {microbatch} need {peak / GIB:.1f} GB"
                texts.append(f"at size {size} {needs}")
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        return [f"memory of {total / GIB:.1f} GB a GPU: {'; '.join(texts)}"]

    def _fit(self, number: int, stage: Stage) -> tuple[int, int]:
        """Find the stage's microbatch; returns the images of a step and the trial's peak in bytes, both of a rank."""
        batch = next(self.loader.batches(stage.first - 1, 0))
        rows = len(batch["label"])
        while True:
            failure, peak = self._attempt(batch, stage, self.stages.microbatches[number])
            worst = torch.tensor([int(failure is not None), peak], dtype=torch.int64)
            worst = self.state.device.tensor_to_device(worst)
            dist.all_reduce(worst, reduce_operation="MAX")
            if not worst[0]:
                return rows, int(worst[1])
            microbatch = self.stages.microbatches[number]
            if microbatch == 1:
                fault = shortage(failure or "on another rank", self.stages, stage.first - 1)
                raise SystemExit(fault.exit_code) if dist.get_global_rank() else fault  # rank 0 prints it
            self.stages.microbatches[number] = (microbatch + 1) // 2

    def _attempt(self, batch: Batch, stage: Stage, microbatch: int) -> tuple[str | None, int]:
        """Try a step and an evaluation; returns why it did not fit, or None, and the peak without the margin."""
        _release(self.classifier)
        torch.cuda.reset_peak_memory_stats()
        margin = int(MARGIN * torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
        failure: str | None = None
        try:
            held = [self._bytes(margin), self._bytes(missing_state(self.state.optimizers[0]))]
            held += [
                p.detach().clone() for p in self.classifier.parameters() if p.requires_grad and self.twice
            ]
            self._strict_step(batch, stage, microbatch)
            self._evaluate(batch["image"].shape[1:])  # gradients stay until the next step
            torch.cuda.synchronize()
            del held
        except Exception as error:
            if not out_of_memory(error):
                raise
            failure = str(error)
        peak = torch.cuda.max_memory_allocated() - margin
        _release(self.classifier)  # after the handler: the traceback held the tensors of the step
        return failure, peak

    def _bytes(self, *shape: int) -> Tensor:
        device = self.state.device.tensor_to_device(torch.empty(0)).device
        return torch.zeros(shape, dtype=torch.uint8, device=device)

    def _strict_step(self, batch: Batch, stage: Stage, microbatch: int) -> None:
        """A step with deterministic kernels alone, which training then takes too; one as usual where torch refuses."""
        if torch.are_deterministic_algorithms_enabled():
            number = self.stages.derived.stages.index(stage)
            self.stages.strict[number] = False
            try:
                self._step(batch, stage, microbatch, kernels=determinism.strictly)
                self.stages.strict[number] = True
                return
            except RuntimeError as error:
                if not determinism.is_refusal(error):
                    raise
            _release(self.classifier)
        self._step(
            batch, stage, microbatch
        )  # warns where an operation has no deterministic kernel, and names it

    def _step(
        self,
        batch: Batch,
        stage: Stage,
        microbatch: int,
        *,
        kernels: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        """Forward and backward of the first microbatches, as Composer's trainer runs them."""
        algorithms = [copy.copy(algorithm) for algorithm in self.algorithms]
        state: Any = SimpleNamespace(
            batch=dict(batch),
            device=self.state.device,
            timestamp=Timestamp(epoch=stage.first - 1),
            precision=self.state.precision,
            precision_config=self.state.precision_config,
            dataloader_len=self.loader.steps(stage.first - 1),
        )

        def event(name: Event) -> None:
            for algorithm in algorithms:
                if algorithm.match(name, state):
                    algorithm.apply(name, state, None)  # type: ignore[arg-type]

        self.classifier.train()
        event(Event.AFTER_DATALOADER)
        event(Event.BATCH_START)
        columns = {name: column.split(microbatch) for name, column in state.batch.items()}
        parts = [dict(zip(columns, part, strict=True)) for part in zip(*columns.values(), strict=True)]
        for state.batch in parts[:2]:  # the peak is the second's: it starts with the gradients of the first
            cached = copy.deepcopy(state.batch)  # Composer's; of a part it copies the whole batch
            with kernels():
                event(Event.BEFORE_FORWARD)
                with get_precision_context(state.precision, state.precision_config):
                    state.outputs = self.classifier(state.batch)
                event(Event.AFTER_FORWARD)
                with get_precision_context(state.precision, state.precision_config):
                    state.loss = self.classifier.loss(state.outputs, state.batch)
                event(Event.AFTER_LOSS)
                state.loss.mean().backward()
            del cached

    def _evaluate(self, shape: Sequence[int]) -> None:
        """Evaluate one batch of images (H, W, 3) with the network and all its shadows."""
        self.classifier.eval()
        images = self._bytes(self.eval_batch, *shape)
        with torch.no_grad(), get_precision_context(self.state.precision, self.state.precision_config):
            self.classifier.eval_forward({"image": images})


@contextlib.contextmanager
def _unchanged(network: nn.Module) -> Iterator[None]:
    """Context manager after which a network has its buffers and modes, and torch its generators, of before."""
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
    modes = [(module, module.training) for module in network.modules()]
    synchronised = [
        (module, module.process_group) for module in network.modules() if isinstance(module, nn.SyncBatchNorm)
    ]
    for norm, _ in synchronised:
        norm.process_group = torch.distributed.GroupMember.NON_GROUP_MEMBER
    try:
        with torch.random.fork_rng(
            devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []
        ):
            yield
    finally:
        for norm, group in synchronised:
            norm.process_group = group
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def _release(network: nn.Module) -> None:
    """Drop a trial's gradients and give its memory back."""
    for parameter in network.parameters():
        parameter.grad = None
    gc.collect()
    torch.cuda.empty_cache()
