"""Limits of the machine: little shared memory, few processes, a port in use, a folder that cannot be written."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest

import fastflower.training.session  # noqa: F401  # once, and not in each fork
from fastflower.bench.forked import ForkedPopen, exit_code, fork
from fastflower.callbacks import tensorboard_files
from fastflower.core import errors, launcher, workers
from fastflower.core.errors import EnvironmentFault
from fastflower.evaluation import meta_learners
from fastflower.recipe import load
from support import toy_project

SHORT = (*toy_project.ONE, "robust.enabled=false")
CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x20000, 1 << 14, 1 << 18


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return toy_project.project(tmp_path)


def ended(work: Callable[[], int | None], *, seconds: float) -> tuple[int | None, str]:
    """Exit code and output of a command in a forked process, which is killed after `seconds`."""
    output = Path("said.txt").absolute()

    def run() -> NoReturn:
        errors.run_command(lambda _: work())
        raise AssertionError

    process, deadline = fork(run, output), time.monotonic() + seconds
    while (code := exit_code(process)) is None and time.monotonic() < deadline:
        time.sleep(0.02)
    if code is None:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    return code, output.read_text()


def launch(*words: str) -> int:
    """The train command on two ranks, which are forked."""
    launcher.check_siblings = lambda: None  # it reads the environment that a process starts with
    launcher.subprocess = types.SimpleNamespace(**{**vars(subprocess), "Popen": ForkedPopen})
    return launcher.launch([sys.executable, "-m", "fastflower.train", "tiny.yaml", *words], 2)


def allow_processes(count: int) -> None:
    """Limit the processes and threads of a user who has no others; root has no limits."""
    resource.setrlimit(resource.RLIMIT_NPROC, (count, count))
    if os.geteuid() == 0:
        os.setuid(100_000 + os.getpid())


def shrink_shared_memory(megabytes: int) -> bool:
    """Mount /dev/shm of this size for this process and its children; False where that is not allowed."""
    libc = ctypes.CDLL(None)
    return (
        libc.unshare(CLONE_NEWNS) == 0
        and libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None) == 0
        and libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"size=%dm" % megabytes) == 0
    )


@pytest.mark.dist
@pytest.mark.slow
def test_two_ranks_train_with_the_shared_memory_of_a_container(project: Path) -> None:
    def work() -> int:
        if not shrink_shared_memory(64):
            return 99
        assert os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize == 64 << 20
        return launch(*SHORT, "data.workers=2")

    code, text = ended(work, seconds=300)
    if code == 99:
        pytest.skip("/dev/shm cannot be mounted here")
    assert code == 0, text
    assert "done: all 1 epochs" in text


@pytest.mark.dist
@pytest.mark.slow
def test_a_port_that_another_program_took_is_one_line(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()

        class Free(socket.socket):
            def getsockname(self) -> tuple[str, int]:
                return ("127.0.0.1", port)

        port = taken.getsockname()[1]
        monkeypatch.setattr(launcher, "socket", types.SimpleNamespace(**{**vars(socket), "socket": Free}))
        code, text = ended(lambda: launch(*SHORT), seconds=120)
    assert code == 4, text
    (line,) = text.splitlines()
    assert f"port: {port}" in line and "address already in use; another program took this port" in line


def test_ranks_that_would_not_end_are_killed_and_the_cause_is_shown(repo: Path) -> None:
    script = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open("up" + os.environ["RANK"], "w").close()
while os.environ["RANK"] == "0" and not os.path.exists("up1"):
    time.sleep(0.01)
if os.environ["RANK"] == "0":
    print("fastflower: no room", file=sys.stderr)
    sys.exit(4)
time.sleep(60)
"""
    Path("rank.py").write_text(script)

    def work() -> int:
        launcher.CLEANUP = 0.2
        return launcher.launch([sys.executable, "rank.py"], 2)

    assert ended(work, seconds=30) == (4, "fastflower: no room\n")


@pytest.mark.parametrize("allowed", [1, 8, 40])
def test_too_few_processes_for_two_ranks_are_one_line_before_they_start(project: Path, allowed: int) -> None:
    def work() -> int:
        allow_processes(allowed)
        return launch(*SHORT)

    code, text = ended(work, seconds=60)
    assert code == 4, text
    (line,) = text.splitlines()
    assert line == (
        f"fastflower: only {allowed - 1} of {2 * launcher.THREADS} threads can be started; raise the limit of "
        "processes (ulimit -u), then repeat the command"
    )


def test_boosted_trees_without_threads_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightgbm")  # imported here, and not under the limit
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    stack = np.random.default_rng(0).normal(size=(2, 60, 3)).astype(np.float32)

    def work() -> None:
        allow_processes(1)
        meta_learners.fit_lightgbm(stack, np.arange(60) % 3)

    code, text = ended(work, seconds=60)
    assert (code, text) == (
        4,
        "fastflower: only 0 of 2 threads can be started; raise the limit of processes (ulimit -u), then repeat the "
        "command\n",
    )


def test_a_tensorboard_folder_that_is_none_is_refused_before_the_first_step(project: Path) -> None:
    folder = toy_project.run_of().results_dir / "tensorboard"
    folder.parent.mkdir(parents=True)
    folder.write_text("")
    code, text = ended(lambda: toy_project.fit(*SHORT, "log.tensorboard=true"), seconds=120)
    line = text.splitlines()[-1]
    assert code == 4 and line.startswith(
        f"fastflower: {folder / toy_project.run_of().stem}: Not a directory; "
    )
    assert "img/s" not in text and not toy_project.run_of().checkpoints("last")


def test_a_tensorboard_folder_without_permission_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(PermissionError, match="Permission denied: 'results/results/tiny/tensorboard/"):
        tensorboard_files.TensorBoard(load(None), toy_project.run_of())


def test_a_training_that_is_told_to_end_while_it_imports_leaves_nothing(repo: Path) -> None:
    """torch makes a temporary folder when it is imported, and removes it only at an exit."""
    script = """
import os, signal, sys, tempfile
from fastflower.core import errors
from fastflower.training import exits

def main(argv):
    exits.exit_on_sigterm()
    folder = tempfile.TemporaryDirectory()
    sys.modules["torch"] = sys.modules["torch.distributed"] = type(sys)("torch")  # half imported
    os.kill(os.getpid(), signal.SIGTERM)
    raise AssertionError(folder)

with exits.quick_exit():
    errors.run_command(main)
"""
    Path("tmp").mkdir()
    environment = {"PYTHONPATH": str(repo), "PATH": "", "TMPDIR": str(Path("tmp").absolute())}
    ended = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (errors.PREEMPTED, "") and not list(Path("tmp").iterdir())


def test_a_check_of_threads_names_their_number_and_ends_them(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    class Thread(threading.Thread):
        def start(self) -> None:
            if len(started) == 3:
                raise RuntimeError("can't start new thread")
            started.append(self)
            super().start()

    monkeypatch.setattr(threading, "Thread", Thread)
    workers.check_threads(3)
    assert len(started) == 3 and not any(thread.is_alive() for thread in started)
    started.clear()
    with pytest.raises(
        EnvironmentFault, match=r"^only 3 of 5 threads can be started; raise the limit of processes"
    ):
        workers.check_threads(5)
    assert not any(thread.is_alive() for thread in started)
