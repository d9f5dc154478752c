"""The memory trial before training, the errors for want of memory, and what a finished fold leaves behind."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastflower.algorithms.fixmatch import FixMatch
from fastflower.algorithms.stages import StageSchedule
from fastflower.core.errors import EnvironmentFault
from fastflower.recipe.derived import Derived, Stage
from fastflower.training import build, determinism, memory
from fastflower.training.memory import MemoryTrial, out_of_memory, shortage
from support import toy_project

STILL = ("model.drop_rate=0", "model.drop_path=0")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in ..."),
        RuntimeError("ncclUnhandledCudaError: Call to CUDA function failed.\nCuda failure 2 'out of memory'"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_a_want_of_memory_is_recognised_in_any_words(error: Exception):
    assert out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("CUDA error: device-side assert triggered"), ValueError("out of memory"), KeyError()],
)
def test_other_errors_are_not_taken_for_a_want_of_memory(error: Exception):
    assert not out_of_memory(error)


def schedule() -> StageSchedule:
    """Two stages of 10 images a rank: epoch 1 at 32, epochs 2 and 3 at 48 x 64."""
    stages = (Stage(1, 1, 32, 32, 10), Stage(2, 3, 48, 64, 10))
    derived = Derived(world_size=1, epochs=3, stages=stages, batch_global=10, lr=1e-3, lr_note="")
    return StageSchedule(0, derived, lambda epoch: 4)


def test_the_fault_names_size_stage_microbatch_and_three_ways_out():
    stages = schedule()
    stages.microbatches = [10, 3]
    text = str(
        shortage(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 ..."), stages, 1)
    )
    assert text == (
        "size 48x64 (stage 2 of 2): a microbatch of 3 images does not fit into memory (CUDA out of memory. Tried to "
        "allocate 2 GiB); set model.grad_checkpointing=true, a smaller data.img_size or a smaller model.backbone"
    )
    stages.microbatches = [1, 1]
    assert "(stage 1 of 2): a microbatch of 1 image does" in str(shortage(MemoryError(), stages, 0))


def trial(monkeypatch: pytest.MonkeyPatch, largest: tuple[int, int], epoch: int = 0) -> MemoryTrial:
    """A trial of two stages on a stand-in for a GPU that holds `largest` images of each."""
    device = SimpleNamespace(name="gpu", tensor_to_device=lambda tensor: tensor)
    state = SimpleNamespace(device=device, timestamp=SimpleNamespace(epoch=SimpleNamespace(value=epoch)))
    loader = SimpleNamespace(features=None, batches=lambda epoch, step: iter([{"label": torch.zeros(20)}]))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=24 * 2**30)
    )

    def attempt(self: MemoryTrial, batch: object, stage: Stage, microbatch: int) -> tuple[str | None, int]:
        fits = microbatch <= largest[self.stages.derived.stages.index(stage)]
        return (None if fits else "CUDA out of memory"), microbatch * 2**30

    monkeypatch.setattr(MemoryTrial, "_attempt", attempt)
    stages = schedule()
    return MemoryTrial(
        classifier=nn.Linear(1, 1), state=state, loader=loader, eval_batch=1, stages=stages, algorithms=[]
    )  # fmt: skip


def test_the_microbatch_is_halved_until_it_fits_and_one_line_says_so(monkeypatch):
    tried = trial(monkeypatch, (10, 3))
    (line,) = tried.run()
    assert line == (
        "memory of 24.0 GB a GPU: at size 32 20 images in 2 x 10 need 10.0 GB; "
        "at size 48x64 20 images in 7 x 3 need 3.0 GB"
    )
    assert tried.stages.microbatches == [10, 3]
    state = SimpleNamespace(timestamp=SimpleNamespace(epoch=SimpleNamespace(value=1)))
    tried.stages.apply(build.Event.EPOCH_START, state, None)
    assert state.device_train_microbatch_size == 3


def test_a_resumed_run_tries_the_stages_to_come(monkeypatch):
    tried = trial(monkeypatch, (0, 5), epoch=1)
    assert "at size 32" not in tried.run()[0] and tried.stages.microbatches == [10, 5]


def test_an_image_that_does_not_fit_ends_all_ranks_with_one_line(monkeypatch):
    with pytest.raises(
        EnvironmentFault, match=r"size 48x64 \(stage 2 of 2\): a microbatch of 1 image does not fit"
    ):
        trial(monkeypatch, (10, 0)).run()
    monkeypatch.setattr(memory.dist, "get_global_rank", lambda: 1)
    with pytest.raises(SystemExit) as left:
        trial(monkeypatch, (10, 0)).run()
    assert left.value.code == 4


def test_a_rank_halves_when_another_one_has_no_room(monkeypatch):
    def reduce(tensor: torch.Tensor, reduce_operation: str) -> None:
        assert reduce_operation == "MAX"
        tensor[0] = int(tensor[1] > 5 * 2**30)  # as if another rank held 5 images

    monkeypatch.setattr(memory.dist, "all_reduce", reduce)
    tried = trial(monkeypatch, (10, 10))
    tried.run()
    assert tried.stages.microbatches == [5, 5]


def test_synchronised_norms_keep_to_their_rank_during_a_trial():
    norm = nn.SyncBatchNorm(3)
    norm.train()
    with memory._unchanged(norm):
        assert torch.distributed.get_world_size(norm.process_group) == -1  # 1 or less: no collective
        norm(torch.randn(2, 3, 4, 4))
        norm.eval()
    assert norm.process_group is None and norm.training
    assert int(norm.num_batches_tracked) == 0 and not norm.running_mean.any()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return toy_project.project(tmp_path)


def step_on_the_cpu(self: MemoryTrial) -> list[str]:
    """The trial's step and evaluation of each stage, without the questions to a GPU."""
    draws = torch.get_rng_state()
    with memory._unchanged(self.classifier):
        for stage in self.stages.derived.stages:
            batch = next(self.loader.batches(stage.first - 1, 0))
            self._step(batch, stage, 3)
            assert all(p.grad is not None for p in self.classifier.parameters())
            self._evaluate(batch["image"].shape[1:])
            memory._release(self.classifier)
    assert torch.equal(draws, torch.get_rng_state())
    return []


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [(), ("model.backbone=test_resnet", "model.drop_path=0"), ("opt.name=sgd",)]
)
def test_a_trial_changes_nothing_of_the_run(project, monkeypatch, words):
    assert toy_project.fit("exp.name=without", *words) == 0
    monkeypatch.setattr(MemoryTrial, "run", step_on_the_cpu)
    assert toy_project.fit("exp.name=with", *words) == 0
    run = toy_project.run_of("with")
    if words and "resnet" in words[0]:
        monkeypatch.setattr(toy_project, "BACKBONE", "test_resnet")
    without, after = toy_project.last("without"), toy_project.last("with")
    assert toy_project.different(without.tensors, after.tensors) == []
    assert toy_project.different(without.training_state, after.training_state) == []
    assert run.exp == "with" and toy_project.epochs("without") == toy_project.epochs("with")


def test_a_trial_of_fixmatch_works_on_a_copy(monkeypatch):
    """The counts that a microbatch leaves for the end of the step are the copy's alone."""
    semi = FixMatch.__new__(FixMatch)
    semi._microbatches = []
    other = memory.copy.copy(semi)
    other._microbatches = [*other._microbatches, torch.zeros(1)]
    assert semi._microbatches == []


@pytest.mark.slow
def test_smaller_microbatches_train_the_same_run(project, monkeypatch):
    """Only the number of passes differs: lr, steps and identity stay, and the runs resume each other."""
    toy_project.fit("exp.name=whole", *STILL)
    passes: list[int] = []

    def narrow(self: MemoryTrial) -> list[str]:
        self.stages.microbatches = [4, 3]
        self.classifier.register_forward_hook(lambda module, args, out: passes.append(len(out)))
        return []

    monkeypatch.setattr(MemoryTrial, "run", narrow)
    toy_project.fit("exp.name=parts", *STILL)
    assert passes == [4, 4, 2] * 4 + [3, 3, 3, 1] * 8
    whole, parts = toy_project.last("whole"), toy_project.last("parts")
    for name, tensor in whole.tensors.items():
        torch.testing.assert_close(parts.tensors[name], tensor, rtol=0, atol=2e-5)
    assert whole.training_state["time"]["batch"] == parts.training_state["time"]["batch"] == 12
    left, right = (dict(last.meta["identity"]) for last in (whole, parts))
    assert left == right
    assert [row["batch_global"] for row in toy_project.epochs("parts")] == [10, 10, 10]


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [(), ("swa.enabled=true", "swa.start=0.1"), ("model.backbone=test_resnet",)]
)
def test_a_finished_fold_leaves_nothing_behind(project, monkeypatch, words):
    """When fold 2 starts, the networks, optimizer and trainer of fold 1 are gone."""
    alive: list[weakref.ref] = []
    counts: list[int] = []
    original = build.training

    def watched(*args, **options):
        counts.append(sum(ref() is not None for ref in alive))
        built = original(*args, **options)
        alive.extend(
            weakref.ref(thing)
            for thing in (built.network, built.trainer.state, built.trainer, built.components["ema"].shadow)
        )
        return built

    monkeypatch.setattr(build, "training", watched)
    still = ("model.drop_path=0",) if any("resnet" in word for word in words) else ()
    assert toy_project.fit("data.fold=[0,1,2]", *toy_project.ONE, *words, *still) == 0
    gc.collect()
    assert counts == [0, 0, 0] and not any(ref() is not None for ref in alive)


REFUSAL = (
    "upsample_bicubic2d_aa_backward_cuda does not have a deterministic implementation, but you set "
    "'torch.use_deterministic_algorithms(True)'. You can turn off determinism just for this operation, or ..."
)


@pytest.mark.slow
@pytest.mark.parametrize("words, asked", [((), True), (("cudnn.deterministic=false",), False)])
def test_a_stage_is_strict_where_the_trial_found_deterministic_kernels(project, monkeypatch, words, asked):
    """Torch refuses those of the second size once; training takes the fast ones there and names them."""
    modes: list[tuple[int, str]] = []

    def mode() -> str:
        if not torch.are_deterministic_algorithms_enabled():
            return "off"
        return "warn" if torch.is_deterministic_algorithms_warn_only_enabled() else "strict"

    def watched(module: nn.Module, args: tuple) -> None:
        size = args[0].shape[-1]
        modes.append((size, mode()))
        if size == 48 and mode() == "strict":
            raise RuntimeError(REFUSAL)

    def trial(self: MemoryTrial) -> list[str]:
        self.classifier.network.register_forward_pre_hook(watched)
        for stage in self.stages.derived.stages:
            self._strict_step(next(self.loader.batches(stage.first - 1, 0)), stage, 10)
            memory._release(self.classifier)
        modes.append((0, mode()))
        return []

    monkeypatch.setattr(MemoryTrial, "run", trial)
    assert toy_project.fit(*words, "train.batch_per_gpu=20", *STILL) == 0
    after = [mode for size, mode in modes[modes.index((0, "warn" if asked else "off")) + 1 :] if size == 32]
    assert set(after[:2]) == {"strict" if asked else "off"} and mode() == ("warn" if asked else "off")
    tried = [entry for entry in modes if entry[0] == 48][: 2 if asked else 1]
    assert tried == ([(48, "strict"), (48, "warn")] if asked else [(48, "off")])
    assert (48, "strict") not in modes[modes.index((0, "warn" if asked else "off")) :]


def test_a_refusal_is_no_want_of_memory_and_other_errors_are_no_refusals(monkeypatch):
    assert not out_of_memory(RuntimeError(REFUSAL)) and determinism.is_refusal(RuntimeError(REFUSAL))
    assert not determinism.is_refusal(RuntimeError("CUDA out of memory")) and not determinism.is_refusal(
        KeyError()
    )


def test_weights_that_do_not_fit_are_one_line(project, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB. GPU 0 has a total ...")

    monkeypatch.setattr(build, "_averages", full)
    with pytest.raises(EnvironmentFault) as refused:
        toy_project.fit()
    assert str(refused.value) == (
        "the weights of test_vit and their averages do not fit into memory (CUDA out of memory); end other processes "
        "on the GPU (nvidia-smi lists them), or set a smaller model.backbone"
    )
