"""Ranks that fail, are lost, or were never started: causes are shown, and every process ends within bounds."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastflower.callbacks.checkpoints import scaler_state
from fastflower.core import errors, launcher
from fastflower.core.errors import CorruptionError, EnvironmentFault
from fastflower.recipe import load
from fastflower.training import determinism, exits, ranks
from support import forked

NCCL = (
    "NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.hpp:268, unhandled system error, NCCL version 2.21.5\n"
    "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error.\n"
    "Last error:\nError while creating shared memory segment /dev/shm/nccl-7z (size 9637888)\n"
    "Exception raised from create at NCCLUtils.hpp:268 (most recent call first):\nframe #0: c10::Error"
)


@pytest.fixture
def rank_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of rank 0 of two, as a launcher sets it."""
    for name, value in zip(launcher.NEEDED, ("0", "2", "0", "2", "127.0.0.1", "29777"), strict=True):
        monkeypatch.setenv(name, value)


def test_a_failing_first_collective_is_one_fault_with_nccls_words_and_remedies(rank_environment, monkeypatch):
    def fails(tensor: torch.Tensor) -> None:
        raise torch.distributed.DistBackendError(NCCL)

    monkeypatch.setattr(ranks, "composer_device", lambda name: SimpleNamespace(tensor_to_device=lambda t: t))
    monkeypatch.setattr(ranks.dist, "initialize_dist", lambda *_, **__: None)
    monkeypatch.setattr(ranks.dist, "all_reduce", fails)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(EnvironmentFault) as failed:
        ranks._join("gpu")
    text = str(failed.value)
    for said in (
        "/dev/shm/nccl-7z",
        "ncclSystemError",
        "--shm-size",
        "NCCL_P2P_DISABLE=1",
        "NCCL_DEBUG=WARN",
    ):
        assert said in text
    assert "\n" not in text and "frame #0" not in text
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(EnvironmentFault, match="MASTER_ADDR and MASTER_PORT"):
        ranks._join("cpu")


def test_a_card_that_torch_has_no_kernels_for_is_refused_with_the_setup_that_has(monkeypatch):
    for name, value in (
        ("device_count", 1),
        ("set_device", None),
        ("get_device_name", "RTX 5090"),
        ("get_device_capability", (12, 0)),
        ("get_arch_list", ["sm_80", "sm_90"]),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    with pytest.raises(EnvironmentFault) as refused:
        ranks.prepare(load(None, []))
    assert str(refused.value) == (
        "RTX 5090 has compute capability 12.0, this torch knows sm_80 sm_90; use make setup NEXT=1, which has a newer "
        "torch"
    )


def test_mixed_precision_on_a_cpu_needs_instructions_for_it_on_all_ranks(monkeypatch):
    recipe, single = load(None, []), load(None, ["train.amp=false"])
    for bf16, words, precision in (
        (True, recipe, "amp_bf16"),
        (False, recipe, "fp32"),
        (True, single, "fp32"),
    ):
        monkeypatch.setattr(ranks.processor, "multiplies_bf16", lambda bf16=bf16: bf16)
        machine = ranks.prepare(words)
        assert (machine.precision, machine.composer_precision) == (precision, "fp32")
        with machine.forward_precision():
            assert torch.is_autocast_enabled("cpu") is (precision == "amp_bf16")
    monkeypatch.setattr(ranks.processor, "multiplies_bf16", lambda: True)
    monkeypatch.setattr(ranks.dist, "all_gather_object", lambda here: [here, False])  # another machine's rank
    assert ranks.prepare(recipe).precision == "fp32"


class FakeWatch:
    """A watch that another rank has told its exit code."""

    def __init__(self, failed: int | None = None) -> None:
        self.failed = failed
        self.announced: list[int] = []

    def failed_code(self) -> int | None:
        return self.failed

    def announce(self, code: int) -> None:
        self.announced.append(code)


def memory() -> SimpleNamespace:
    stage = SimpleNamespace(height=32, width=32)
    stages = SimpleNamespace(at=lambda epoch: (stage, 10), derived=SimpleNamespace(stages=(stage,)))
    return SimpleNamespace(
        stages=stages, state=SimpleNamespace(timestamp=SimpleNamespace(epoch=SimpleNamespace(value=0)))
    )


@pytest.mark.parametrize(
    "error, said",
    [
        (torch.distributed.DistBackendError(NCCL), "/dev/shm/nccl-7z"),
        (RuntimeError("[gloo/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1"), "Connection closed by peer"),
        (torch.distributed.DistNetworkError("recvValueWithTimeout failed"), "recvValueWithTimeout failed"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("failed, code", [(None, 4), (3, 3)])
def test_a_lost_connection_keeps_its_words_and_the_failing_ranks_code(error, said, failed, code):
    watch = FakeWatch(failed)
    with (
        pytest.raises(EnvironmentFault, match="another rank has ended") as caught,
        ranks.one_may_fail(SimpleNamespace(watch=watch), memory()),
    ):
        raise error
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.exit_code == code and watch.announced == [code]


@pytest.mark.parametrize("watch", [None, FakeWatch()])
def test_a_want_of_memory_in_a_step_is_one_line(watch):
    said = r"size 32 \(stage 1 of 1\): a microbatch of 10 images does not fit"
    with (
        pytest.raises(EnvironmentFault, match=said),
        ranks.one_may_fail(SimpleNamespace(watch=watch), memory()),
    ):
        raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")


def test_other_errors_stay_what_they_are(capfd):
    with pytest.raises(ZeroDivisionError), ranks.one_may_fail(SimpleNamespace(watch=None), memory()):
        raise ZeroDivisionError
    watch = FakeWatch()
    with pytest.raises(CorruptionError), ranks.one_may_fail(SimpleNamespace(watch=watch), memory()):
        raise CorruptionError("damaged")
    with pytest.raises(SystemExit), ranks.one_may_fail(SimpleNamespace(watch=watch), memory()):
        raise KeyError("a bug")
    assert watch.announced == [3, 1] and "KeyError: 'a bug'" in capfd.readouterr().err


@pytest.mark.parametrize("precision, kept", [("amp_fp16", True), ("amp_bf16", False), ("fp32", False)])
def test_a_scaler_is_saved_for_fp16_alone(precision: str, kept: bool):
    """Composer's scaler is enabled on GPUs for bfloat16, too, where nothing uses it."""
    scaler = SimpleNamespace(state_dict=lambda: {"scale": 65536.0})
    state = SimpleNamespace(scaler=scaler, precision=ranks_precision(precision))
    assert bool(scaler_state(state)) == kept
    assert scaler_state(SimpleNamespace(scaler=None, precision=ranks_precision(precision))) == {}


def ranks_precision(name: str):
    from composer.core import Precision

    return Precision(name)


@pytest.mark.parametrize(
    "warning, name",
    [
        (
            "upsample_bicubic2d_aa_backward_cuda does not have a deterministic implementation, but you set",
            "upsample_bicubic2d_aa_backward_cuda",
        ),
        (
            "Flash Attention defaults to a non-deterministic algorithm. To explicitly enable determinism call",
            "Flash Attention",
        ),
        (
            "Memory Efficient attention defaults to a non-deterministic algorithm. To",
            "Memory Efficient attention",
        ),
        (
            "Deterministic behavior was enabled with either `torch.use_deterministic_algorithms(True)` or "
            "`at::Context::setDeterministicAlgorithms(true)`, but this operation is not deterministic because it uses "
            "CuBLAS and you have CUDA >= 10.2. To enable deterministic behavior in this case, you must set",
            "CuBLAS",
        ),
        ("An operation is not deterministic here. Be warned", "An operation is not deterministic here"),
    ],
)
def test_the_name_of_a_nondeterministic_operation_is_a_name(warning: str, name: str):
    assert determinism.operation(warning) == name


def test_products_in_float32_are_not_rounded_to_tf32(monkeypatch):
    asked: list[bool] = []
    monkeypatch.setattr(ranks, "DeviceGPU", lambda allow_tf32: asked.append(allow_tf32))
    ranks.composer_device("gpu")
    assert asked == [False]


@pytest.mark.parametrize(
    "setting",
    [
        {"RANK": "1"},
        {"LOCAL_RANK": "1"},
        {"RANK": "0", "WORLD_SIZE": "2"},
        {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29777"},
        dict(zip(launcher.NEEDED, ("2", "2", "0", "2", "127.0.0.1", "29777"), strict=True)),
        dict(zip(launcher.NEEDED, ("x", "2", "0", "2", "127.0.0.1", "29777"), strict=True)),
    ],
)
def test_variables_that_no_launcher_set_are_ignored_with_a_line(setting: dict, monkeypatch, capsys):
    for name in launcher.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in setting.items():
        monkeypatch.setenv(name, value)
    launcher.forget_leftovers()
    assert not {*launcher.VARIABLES} & {*os.environ}
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "no launcher set them" in said
    assert all(f"{name}={value}" in said for name, value in setting.items())
    launcher.forget_leftovers()
    assert capsys.readouterr().err == ""


def test_a_launchers_variables_are_kept(rank_environment, capsys):
    launcher.forget_leftovers()
    assert os.environ["WORLD_SIZE"] == "2" and capsys.readouterr().err == ""


@pytest.mark.parametrize("on_this_machine", ["2", "1"])  # one: two machines, of which no other can come here
def test_a_whole_rank_environment_without_other_ranks_fails_within_seconds(
    rank_environment, monkeypatch, on_this_machine
):
    monkeypatch.setattr(launcher, "PATIENCE", 0.5)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", on_this_machine)
    with pytest.raises(
        EnvironmentFault, match=r"RANK=0, .* no other rank runs on this machine; unset them .* -n 2"
    ):
        launcher.check_siblings()
    sibling = subprocess.Popen(["sleep", "60"], env={**os.environ, "RANK": "1"})
    try:
        launcher.check_siblings()
    finally:
        sibling.kill()
        sibling.wait()


def test_ranks_of_other_machines_are_waited_for(rank_environment, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setenv("MASTER_ADDR", "node7")
    launcher.check_siblings()


@pytest.mark.parametrize("work", ["on_rank_zero", "in a step"])
def test_a_full_disk_on_several_ranks_is_one_fault_of_the_machine(work, monkeypatch):
    monkeypatch.setattr(ranks.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(ranks.dist, "broadcast_object_list", lambda objects: None)
    watch = FakeWatch()

    def fail() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "results/x")

    with pytest.raises(EnvironmentFault, match=r"^results/x: No space left on device; make room") as failed:
        if work == "on_rank_zero":
            ranks.on_rank_zero(fail)
        else:
            with ranks.one_may_fail(SimpleNamespace(watch=watch), memory()):
                fail()
    assert failed.value.exit_code == 4 and watch.announced == ([] if work == "on_rank_zero" else [4])


@pytest.mark.parametrize(
    "error, line",
    [
        (
            OSError(errno.EMFILE, "Too many open files", "a.beton"),
            "a.beton: Too many open files; raise the limit",
        ),
        (CorruptionError("b.beton: row 3 is damaged"), "b.beton: row 3 is damaged"),
    ],
)
def test_an_error_of_one_rank_alone_is_printed_by_it(error, line, monkeypatch, capsys):
    """Rank 0 prints what all ranks are refused for; what only rank 1 meets, nobody else can say."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(exits, "PATIENCE", 0.01)
    monkeypatch.setattr(exits.signal, "signal", lambda *_: None)
    with pytest.raises(exits.RankFailure) as left, exits.rank_zero_reports():
        raise error
    assert left.value.code == (4 if isinstance(error, OSError) else 3)
    assert capsys.readouterr().err.startswith(f"fastflower: rank 1: {line}")


@pytest.mark.parametrize("module", ["train", "lrfind"])
def test_leftovers_of_one_rank_do_not_silence_a_command(module: str, tmp_path: Path):
    environment = {**os.environ, "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
    done = subprocess.run(
        [sys.executable, "-m", f"fastflower.{module}", "opt.lr_reff=1"],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        cwd=Path(ranks.__file__).parents[2],
    )
    assert done.returncode == 2
    assert "ignoring RANK=1" in done.stderr and "did you mean opt.lr_ref?" in done.stderr


ORPHAN = """
import os, sys, time
from fastflower.core import errors, launcher
parent = os.getppid()
os.write(1, b"up ")
while os.getppid() == parent:
    time.sleep(0.05)
launcher._parents.append(parent)  # seen while it lived
launcher.follow()
os.write(1, b"still here")
"""


def test_a_rank_whose_launcher_ended_during_the_imports_exits(rank_environment):
    """The kernel's signal comes too late for it: the parent has ended before the signal is asked for."""
    ours, theirs = os.pipe()
    starter = (
        f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {ORPHAN!r}]); time.sleep(60)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", starter], stdout=theirs, stderr=theirs, cwd=Path(ranks.__file__).parents[2]
    )
    os.close(theirs)
    assert os.read(ours, 3) == b"up "
    parent.kill()
    parent.wait()
    said = b""
    while piece := os.read(ours, 1000):
        said += piece
    os.close(ours)
    assert b"the launcher of this rank has ended" in said and b"still here" not in said


@exits.rank_zero_reports()
def lose_rank_one(argv: list[str]) -> int:
    """End rank 1 while the main thread of rank 0 is in the driver: no exception comes, no signal handler runs."""
    machine = ranks.prepare(load(None, []))
    if machine.rank == 0:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        time.sleep(600)
    time.sleep(1)
    if argv[0] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    with ranks.one_may_fail(machine, None):
        raise CorruptionError("of rank 1 alone")


@pytest.mark.dist
@pytest.mark.parametrize("way, code", [("raise", 3), pytest.param("kill", 4, marks=pytest.mark.slow)])
def test_a_rank_that_waits_in_the_driver_for_a_lost_one_ends_with_its_code(way: str, code: int):
    """Its exit code is that of the rank that failed, or 4 where that one could not announce any."""

    def work() -> None:
        sys.argv = ["lost.py", way]
        with exits.quick_exit():
            errors.run_command(lose_rank_one)

    start = time.monotonic()
    two = forked.Ranks(work)
    assert two.wait(120) == [code, -signal.SIGKILL if way == "kill" else code], two.text()
    assert "rank 0: " in two.text() and "its own message says why" in two.text()
    if way == "raise":
        assert "rank 1: of rank 1 alone" in two.text()
    assert time.monotonic() - start < 120
