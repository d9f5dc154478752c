"""errors.run_command: one line and an exit code for errors that a user can correct, a traceback for bugs."""

from __future__ import annotations

import ast
import errno
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastflower import ensemble
from fastflower.core import checkpoint, errors, runs, tables
from fastflower.report import __main__ as report
from fastflower.report import page  # noqa: F401  # its libraries write caches when they are imported
from support import fake_members


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (errors.InputError("bad"), 2),
        (errors.CorruptionError("torn"), 3),
        (errors.EnvironmentFault("full"), 4),
    ],
)
def test_bad_input_is_one_line_and_its_exit_code(raised, code, capsys, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)

    def main(argv: list[str]) -> None:
        raise raised

    with pytest.raises(SystemExit) as stop:
        errors.run_command(main)
    assert stop.value.code == code
    assert capsys.readouterr().err == f"fastflower: {raised}\n"


def test_only_the_first_rank_prints_the_error(capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")

    def main(argv: list[str]) -> None:
        raise errors.InputError("once")

    with pytest.raises(SystemExit) as stop:
        errors.run_command(main)
    assert stop.value.code == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (5, 5)])
def test_main_gets_the_arguments_and_returns_the_exit_code(returned, code, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["command", "a=1"])
    received: list[str] = []

    def main(argv: list[str]) -> int | None:
        received.extend(argv)
        return returned

    with pytest.raises(SystemExit) as stop:
        errors.run_command(main)
    assert stop.value.code == code
    assert received == ["a=1"]


def test_interrupt_is_130():
    def main(argv: list[str]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        errors.run_command(main)
    assert stop.value.code == 130


def test_a_bug_keeps_its_traceback():
    def main(argv: list[str]) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        errors.run_command(main)


@pytest.mark.parametrize(
    ("raised", "line"),
    [
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a/b"),
            "a/b: No space left on device; make room on this disk",
        ),
        (
            OSError(errno.EROFS, os.strerror(errno.EROFS), "x\n"),
            r"x\n: Read-only file system; make the disk writable",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "t", None, "p"),
            "p: Permission denied; give yourself",
        ),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "q"),
            "q: No such file or directory; check the",
        ),
        (OSError("odd"), "odd; check"),
        (
            RuntimeError("can't start new thread"),
            "can't start new thread; raise the limit of processes (ulimit -u)",
        ),
        (
            BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"),
            "Resource temporarily unavailable; raise",
        ),
        (MemoryError(), "out of memory; free some"),
    ],
)
def test_an_error_of_the_machine_is_one_line(raised, line, capsys, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)

    def main(argv: list[str]) -> None:
        raise raised

    with pytest.raises(SystemExit) as stop:
        errors.run_command(main)
    assert stop.value.code == 4
    text = capsys.readouterr().err
    assert text.startswith(f"fastflower: {line}") and text.count("\n") == 1


@pytest.mark.parametrize("command", ["report", "report md", "ensemble", "checkpoint", "csv"])
def test_a_disk_that_is_full_is_one_line_with_the_file(command, capsys, monkeypatch):
    """By the limit of file sizes, which stops writes at any byte as a full disk does."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    fake_members.experiment(
        runs.RESULTS / "a", [fake_members.member(fold) for fold in range(3)], [], ["data.home=d"]
    )
    table = [{"fold": str(fold)} for fold in fake_members.folds()]
    fake_members.write_folds(Path("d/folds.csv"))
    fitting = [f"model.backbone={fake_members.BACKBONES[0]}", "data.img_size=32"]
    mains = {
        "report": lambda _: report.main(["a"]),
        "report md": lambda _: report.main(["a", "--format", "md"]),
        "ensemble": lambda _: ensemble.main(["exp.name=a", "data.home=d", *fitting]),
        "checkpoint": lambda _: checkpoint.save(Path("c.pth"), {"w": torch.zeros(9999)}, {}),
        "csv": lambda _: tables.write_csv(Path("t.csv"), table * 99),
    }
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (999, hard))
    try:
        with pytest.raises(SystemExit) as stop:
            errors.run_command(mains[command])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert stop.value.code == 4
    written = {
        "report": "report.html", "report md": r"figures/[\w-]+.png", "ensemble": "ensemble.json",
        "checkpoint": "c.pth", "csv": "t.csv",
    }[command]  # fmt: skip
    err = capsys.readouterr().err
    assert re.fullmatch(rf"fastflower: \S*{written}: File too large; [^\n]*\n", err), err
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


def test_a_closed_pipe_is_not_a_failure(repo: Path):
    loop = "def main(argv):\n  for _ in range(100000): print('x' * 80)"
    program = f"from fastflower.core import errors\n{loop}\nerrors.run_command(main)"
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=repo, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.readline()
        child.stdout.close()
        stderr = child.stderr.read()
        assert child.wait(timeout=60) == 0
    assert stderr == b""


COMMANDS = (
    *("convert", "train", "lrfind", "evaluate", "ensemble", "export", "report"),
    *("campaign", "demo", "doctor", "sample_data", "bench"),
)


@pytest.mark.parametrize("module", COMMANDS)
def test_every_command_documents_its_usage(module, repo):
    """Checks the docstring that `run_command` prints; of the commands that start fast, also the output of --help."""
    source = repo / "fastflower" / module
    text = (source / "__main__.py" if source.is_dir() else source.with_suffix(".py")).read_text()
    assert module in ast.get_docstring(ast.parse(text)).splitlines()[0]
    if module in ("convert", "doctor", "bench"):
        command = [sys.executable, "-m", f"fastflower.{module}", "--help"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == ast.get_docstring(ast.parse(text)) + "\n"


def test_only_one_of_several_ranks_prints_the_help(capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(sys, "argv", ["command", "-h"])
    with pytest.raises(SystemExit) as stop:
        errors.run_command(lambda argv: 5)
    assert stop.value.code == 0 and capsys.readouterr().out == ""
