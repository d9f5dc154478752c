"""Names and values of users never steer a terminal: not on stdout, not on stderr, not in tables, logs or pages."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from fastflower.core import errors
from fastflower.core.console import CONTROLS, Console
from fastflower.core.workers import Progress
from fastflower.report.__main__ import write_page

HOSTILE = "a\x1b[2J\x07\x9b31m\u202eb\u2028c\rd"
SHOWN = "a\\x1b[2J\\x07\\x9b31m\\u202eb\\u2028c\\rd"
PRINTS = {"console.py", "launch.py", "launcher.py"}  # that write to a stream by themselves


def test_stdout_stderr_and_argparse_show_control_characters_as_escapes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def main(argv: list[str]) -> None:
        print(f"{HOSTILE}\tkept\n花")
        print(HOSTILE.replace("\r", ""), file=sys.stderr)
        raise errors.InputError(HOSTILE)

    with pytest.raises(SystemExit):
        errors.run_command(main)
    said = capsys.readouterr()
    assert said.out == f"{SHOWN}\tkept\n花\n"
    assert said.err.splitlines() == [SHOWN.replace("\\r", ""), f"fastflower: {SHOWN}"]


def test_progress_of_libraries_and_our_own_reaches_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def main(argv: list[str]) -> None:
        print("\r50 %", end="", file=sys.stderr)
        progress = Progress("images", 2)
        progress._live, progress._every = True, 0.0
        progress(2)

    with pytest.raises(SystemExit):
        errors.run_command(main)
    said = capsys.readouterr()
    assert said.err == "\r50 %" and said.out.startswith("\rimages: 2/2")


def test_the_console_of_a_training_and_its_log_show_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    written = Console(Path("log"))
    written.write(HOSTILE)
    written.close()
    assert capsys.readouterr().out == f"{SHOWN}\n" and Path("log").read_text().endswith(f"  {SHOWN}\n")


def test_a_page_shows_escapes() -> None:
    write_page(Path("page.html"), f"<p>{HOSTILE}</p>\n")
    assert Path("page.html").read_bytes().decode() == f"<p>{SHOWN}</p>\n"


def test_the_predictor_escapes_the_same_characters(code: type) -> None:
    inside = {chr(number) for number in range(0x2100) if CONTROLS.match(chr(number))}
    assert inside | {"\t", "\n"} == {
        chr(number) for number in range(0x2100) if code.table.CONTROLS.match(chr(number))
    }


def test_every_command_runs_behind_that_door() -> None:
    package = Path(errors.__file__).parents[1]
    commands = [*package.glob("*.py"), *package.glob("*/__main__.py")]
    ends = {path: path.read_text().partition('\nif __name__ == "__main__":\n')[2] for path in commands}
    ends.pop(package / "__main__.py")  # which runs one of the others
    assert {str(path) for path, end in ends.items() if end and "run_command(" not in end} == set()


def test_no_module_writes_to_a_stream_or_a_table_by_itself() -> None:
    package = Path(errors.__file__).parents[1]
    found = []
    for path in package.rglob("*.py"):
        if path.name in PRINTS or path.parts[-2] in ("bench", "samples", "shipped"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if called in ("sys.stdout.write", "sys.stderr.write", "csv.writer", "csv.DictWriter", "os.write"):
                found.append(f"{path.relative_to(package)}:{node.lineno} {called}")
    assert found == []
