"""The project's own launcher: environment, output, exit codes and signals of its ranks."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastflower.core import launcher
from fastflower.core.errors import InputError

LAUNCH = """
import sys
from fastflower.core import launcher
raise SystemExit(launcher.launch([sys.executable, "rank.py"], 2))
"""


def start(script: str, repo: Path) -> subprocess.Popen[str]:
    """Launch a script as two ranks from a process of its own."""
    Path("rank.py").write_text(f"import os, signal, sys, time\nrank = int(os.environ['RANK'])\n{script}")
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCH], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={"PYTHONPATH": str(repo), "PATH": ""},
    )  # fmt: skip


def launched(script: str, repo: Path) -> tuple[int, str, str]:
    """Exit code, output and errors of two ranks that run a script."""
    process = start(script, repo)
    output, errors = process.communicate(timeout=60)
    return process.returncode, output, errors


def test_ranks_know_their_place_and_only_the_first_is_heard(repo: Path) -> None:
    names = ["WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "NODE_RANK", "MASTER_ADDR"]
    script = f"print(rank, *(os.environ[name] for name in {names}), int(os.environ['MASTER_PORT']) > 0)"
    assert launched(script, repo) == (0, "0 2 2 0 0 127.0.0.1 True\n", "")


@pytest.mark.parametrize("failing", [0, 1])
def test_the_rank_that_fails_says_why_and_sets_the_exit_code(failing: int, repo: Path) -> None:
    script = f"""
if rank == {failing}:
    where = "" if rank == 0 else "rank 1: "
    print(f"fastflower: {{where}}no room", file=sys.stderr)
    sys.exit(4)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
time.sleep(50)
"""
    code, output, errors = launched(script, repo)
    assert (code, output) == (4, "")
    assert errors == ("fastflower: no room\n" if failing == 0 else "fastflower: rank 1: no room\n")


def test_a_survivor_is_not_taken_for_the_cause(repo: Path) -> None:
    script = f"""
if rank == 0:
    print("fastflower: rank 0 is full", file=sys.stderr)
    sys.exit(4)
signal.signal(signal.SIGTERM, lambda *_: (print("fastflower: rank 1: {launcher.SURVIVOR}"), sys.exit(1)))
time.sleep(50)
"""
    assert launched(script, repo) == (4, "", "fastflower: rank 0 is full\n")


def test_an_unexpected_error_of_another_rank_is_shown_whole(repo: Path) -> None:
    code, _, errors = launched("if rank: raise KeyError('a bug')\ntime.sleep(50)", repo)
    assert code == 1 and "Traceback" in errors and "KeyError: 'a bug'" in errors


def test_a_killed_rank_is_named_with_the_likely_cause(repo: Path) -> None:
    code, _, errors = launched("if rank: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(50)", repo)
    assert code == 128 + signal.SIGKILL
    assert errors == "fastflower: rank 1 was ended by SIGKILL, most likely for want of memory\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_all_ranks_save(number: int, repo: Path) -> None:
    """Ctrl-C reaches a whole process group, as a terminal sends it."""
    script = """
def save(*_):
    time.sleep(0.3)
    open(f"saved{rank}", "w").close()
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, save)
open(f"ready{rank}", "w").close()
time.sleep(50)
"""
    process = start(script, repo)
    while not all(Path(f"ready{rank}").exists() for rank in (0, 1)):
        assert process.poll() is None
        time.sleep(0.05)
    if number == signal.SIGTERM:
        process.send_signal(number)
    else:
        for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            subprocess.run(["/bin/kill", "-INT", child], check=True)
        process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 75 and Path("saved0").exists() and Path("saved1").exists()


def test_the_number_of_ranks_is_taken_out_of_the_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in launcher.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert launcher.split_ranks(["a.yaml", "-n", "2", "seed=1"]) == (2, ["a.yaml", "seed=1"])
    assert launcher.split_ranks(["a.yaml"]) == (None, ["a.yaml"])
    for words in (["-n"], ["-n", "0"], ["-n", "two"]):
        with pytest.raises(InputError, match=r"^-n .*: must be a number of processes from 1"):
            launcher.split_ranks(words)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(InputError, match="got -n inside a launched process"):
        launcher.split_ranks(["-n", "2"])
