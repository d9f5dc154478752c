"""errors.run: one line and an exit code for what the user can mend, a traceback for what they cannot."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from fastflower.core import errors


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
        errors.run(main)
    assert stop.value.code == code
    assert capsys.readouterr().err == f"fastflower: {raised}\n"


def test_only_the_first_rank_speaks(capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")

    def main(argv: list[str]) -> None:
        raise errors.InputError("once")

    with pytest.raises(SystemExit) as stop:
        errors.run(main)
    assert stop.value.code == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (5, 5)])
def test_main_gets_the_words_and_gives_the_code(returned, code, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["command", "a=1"])
    got: list[str] = []

    def main(argv: list[str]) -> int | None:
        got.extend(argv)
        return returned

    with pytest.raises(SystemExit) as stop:
        errors.run(main)
    assert stop.value.code == code
    assert got == ["a=1"]


def test_interrupt_is_130():
    def main(argv: list[str]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        errors.run(main)
    assert stop.value.code == 130


def test_a_bug_keeps_its_traceback():
    def main(argv: list[str]) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        errors.run(main)


def test_a_closed_pipe_is_not_a_failure(repo: Path):
    loop = "def main(argv):\n  for _ in range(100000): print('x' * 80)"
    program = f"from fastflower.core import errors\n{loop}\nerrors.run(main)"
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=repo, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.readline()
        child.stdout.close()
        complaint = child.stderr.read()
        assert child.wait(timeout=60) == 0
    assert complaint == b""


COMMANDS = (
    *("convert", "train", "lrfind", "evaluate", "ensemble", "export", "report"),
    *("campaign", "demo", "doctor", "sample_data", "bench"),
)


@pytest.mark.parametrize("module", COMMANDS)
def test_every_command_says_how_it_is_used(module, repo):
    """Each by the text that `run` shows, and those that start at once by asking them."""
    source = repo / "fastflower" / module
    text = (source / "__main__.py" if source.is_dir() else source.with_suffix(".py")).read_text()
    assert module in ast.get_docstring(ast.parse(text)).splitlines()[0]
    if module in ("convert", "doctor", "bench"):
        command = [sys.executable, "-m", f"fastflower.{module}", "--help"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == ast.get_docstring(ast.parse(text)) + "\n"


def test_help_is_said_once_by_several_ranks(capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(sys, "argv", ["command", "-h"])
    with pytest.raises(SystemExit) as stop:
        errors.run(lambda argv: 5)
    assert stop.value.code == 0 and capsys.readouterr().out == ""
