"""Two Ray nodes on one machine, of which one is killed: what is made is what one process makes."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastflower import convert
from fastflower.core.files import is_locked
from support import toy_project

RAY = str(Path(sys.executable).with_name("ray"))
QUIET = ("--disable-usage-stats", "--block", "--dashboard-agent-listen-port=0")
PATIENCE = 120.0  # seconds that a node or a training has to begin
FOLDS = ["tiny.yaml", "data.fold=[0,1]"]


class Nodes:
    """A cluster of this machine: a head with one core, and further nodes of one core, each a process group."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.processes = folder, list[subprocess.Popen[bytes]]()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        """Start a node and wait until it says so."""
        log = self.folder / f"node{len(self.processes)}.log"
        command = [RAY, "start", "--num-cpus=1", *QUIET, *words]
        with open(log, "wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, process_group=0)
        self.processes.append(process)
        wait_for(
            lambda: b"Ray runtime started" in log.read_bytes() or process.poll() is not None, str(command)
        )
        assert process.poll() is None, log.read_text()
        return process

    def head(self) -> None:
        """Start the first node."""
        self.start("--head", f"--port={self.port}", f"--temp-dir={self.folder}", "--include-dashboard=false")

    def join(self) -> subprocess.Popen[bytes]:
        """Start a second node."""
        return self.start(f"--address={self.address}")

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """Kill a node: its processes die with the one that started them."""
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    folder = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))  # short: paths of sockets end at 107 characters
    started = Nodes(folder)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", uuid.uuid4().hex)
    try:
        started.head()
        monkeypatch.setenv("RAY_ADDRESS", started.address)
        yield started
    finally:
        for process in reversed(started.processes):
            if process.poll() is None:
                process.terminate()
        for process in started.processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                started.kill(process)
        shutil.rmtree(folder, ignore_errors=True)


def files_of(home: str) -> dict[str, bytes]:
    """The files that a conversion leaves, but for the memory of what it has read."""
    return {
        str(path.relative_to(home)): path.read_bytes()
        for path in Path(home).rglob("*")
        if path.is_file() and path.name not in ("contents.json", ".convert.lock")
    }


@pytest.mark.slow
def test_a_lost_node_changes_neither_a_conversion_nor_a_campaign(nodes: Nodes, tmp_path: Path) -> None:
    toy_project.project(tmp_path)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def command(*words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", *words],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    # a conversion in shards of 16 rows, killed when the first is whole
    second = nodes.join()
    convert.main(["tiny.yaml", "data.home=one", "data.workers=1"])
    process = command("fastflower.convert", "tiny.yaml", "data.home=two", "--ray")
    wait_for(lambda: list(Path("two").rglob("spool-*")) or process.poll() is not None, "no shard")
    nodes.kill(second)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0 and "on Ray: 2 tasks at once; nodes: 2" in output, output
    assert files_of("two") == files_of("one")
    # a campaign of two folds, a node of which is killed while both train
    second = nodes.join()
    process = command("fastflower.campaign", *FOLDS, "--ray", "-n", "1")
    runs = [toy_project.run_of(fold=fold) for fold in (0, 1)]
    wait_for(
        lambda: (
            all(is_locked(run.lock_path) and run.events_path.is_file() for run in runs)
            or process.poll() is not None
        ),
        "two trainings",
    )
    nodes.kill(second)
    output, _ = process.communicate(timeout=2 * PATIENCE)
    assert process.returncode == 0, output
    with open("results/results/tiny/campaign.csv", newline="") as file:
        assert [row["state"] for row in csv.DictReader(file)] == ["done", "done"], output
    for fold, run in enumerate(runs):
        assert toy_project.fit(f"data.fold={fold}", "exp.name=alone") == 0
        assert toy_project.end(run)["best"] == toy_project.end(toy_project.run_of("alone", fold))["best"]
