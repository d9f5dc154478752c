"""errors.run: one line and an exit code for what the user can mend, a traceback for what they cannot."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fastflower import errors


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
    program = f"from fastflower import errors\n{loop}\nerrors.run(main)"
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=repo, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.readline()
        child.stdout.close()
        complaint = child.stderr.read()
        assert child.wait(timeout=60) == 0
    assert complaint == b""
