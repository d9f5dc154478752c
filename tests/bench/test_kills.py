"""`bench kills` on a few kills of a conversion, and its own ability to see each fault."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastflower.bench import final_content, forked, kills
from fastflower.bench.kills import Kills, Victim
from fastflower.core.errors import InputError
from fastflower.core.files import temporary_path, write_atomic


@pytest.fixture(autouse=True)
def _no_reaper() -> Iterator[None]:
    """Let process 1 adopt the orphans of later tests again, which `Kills` changes for its whole process."""
    yield
    ctypes.CDLL(None).prctl(kills.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


@pytest.mark.slow
def test_a_killed_conversion_repeated_ends_as_if_nothing_had_happened(
    capsys: pytest.CaptureFixture[str],
) -> None:
    import matplotlib.pyplot  # noqa: F401  # here, and not in each fork

    from fastflower.data.conversion import pipeline  # noqa: F401

    victim = Victim("convert", "convert", ("tiny.yaml", "data.workers=2", "robust.enabled=false"))
    counts = Kills(Path.cwd(), seed=1, warm=False).attack(victim, moments=1, changes=1)
    assert {name: counts[name] for name in kills.FAULTS} == dict.fromkeys(kills.FAULTS, 0), (
        capsys.readouterr().err
    )
    assert counts["killed"] + counts["ended first"] == 2 and counts["changes"] > 20


def appends(_: list[str]) -> None:
    for _ in range(2):
        with open("log.csv", "a") as file:
            file.write("row\n")


def leaves_a_file(_: list[str]) -> None:
    temporary = temporary_path(Path("a.csv"))
    temporary.write_text("a")
    Path("b.csv").write_text("b")
    temporary.unlink()


def keeps_a_lock(_: list[str]) -> None:
    if Path("lock").exists():
        raise InputError("locked")
    Path("lock").write_text("")
    Path("b.csv").write_text("b")
    Path("lock").unlink()


def outlives(_: list[str]) -> None:
    write_atomic(Path("a.csv"), "a")
    subprocess.run([sys.executable, "-c", "import time; time.sleep(2)"], check=False)
    write_atomic(Path("a.csv"), "a")


@pytest.mark.parametrize(
    ("command", "fault"), [(appends, "differs"), (leaves_a_file, "left over"), (keeps_a_lock, "fails")]
)
def test_each_kind_of_fault_is_seen(command: object, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        sys.modules, "fastflower.faulty", types.SimpleNamespace(main=command, __file__="faulty.py")
    )
    counts = Kills(Path.cwd(), seed=0, warm=False).attack(
        Victim("faulty", "faulty", ()), moments=0, changes=4
    )
    assert counts[fault] > 0 and counts["killed"] == 4
    assert {name for name in kills.FAULTS if counts[name]} == {fault}


def test_a_process_that_outlives_a_killed_command_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        sys.modules, "fastflower.faulty", types.SimpleNamespace(main=outlives, __file__="faulty.py")
    )
    bench = Kills(Path.cwd(), seed=0, warm=False)
    victim = Victim("faulty", "faulty", ())
    bench._lay_out(victim)
    assert bench._run(victim, kills.Kill(seconds=0.8)).code == -9
    assert forked.end_children(bench.own_children, 0.1) == 1


def test_a_kill_between_the_opening_and_the_writing_of_the_count_is_a_kill(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def opens_the_count(_: list[str]) -> None:
        Path("../changes").write_text("")
        time.sleep(10)

    module = types.SimpleNamespace(main=opens_the_count, __file__="faulty.py")
    monkeypatch.setitem(sys.modules, "fastflower.faulty", module)
    bench = Kills(Path.cwd(), seed=0, warm=False)
    victim = Victim("faulty", "faulty", ())
    bench._lay_out(victim)
    ended = bench._run(victim, kills.Kill(seconds=0.5))
    assert (bench.home / "changes").exists() and (ended.code, ended.changes) == (-9, 0)


def test_contents_leave_out_times_and_nothing_else() -> None:
    Path("results/results/a").mkdir(parents=True)

    def content(seconds: float, score: float) -> dict[str, str]:
        text = f'{{"event": "epoch", "epoch": 1, "seconds": {seconds}, "score": {score}}}\n'
        Path("results/results/a/events.jsonl").write_text(text)
        Path("page.html").write_text(f"<p>{score} after {seconds} s</p>")
        return final_content.contents(Path.cwd())

    assert content(1.0, 0.5) == content(2.0, 0.5)
    assert final_content.differences(content(1.0, 0.5), content(1.0, 0.6)) == [
        "page.html",
        "results/results/a/events.jsonl",
    ]


def test_what_python_and_torch_leave_in_the_temporary_folder_is_no_leftover(tmp_path: Path) -> None:
    for name, filled, ignored in (
        ("tmpab_12x", False, True),
        ("tmpab_12y", True, False),
        ("ranks", False, False),
    ):
        (tmp_path / name).mkdir()
        if filled:
            (tmp_path / name / "part").write_bytes(b"")
        assert kills._of_a_library(tmp_path / name) == ignored
    for name, content, ignored in (
        ("e6_otzw6", b"blat", True),
        ("e6_otzw6", b"a table", False),
        ("soup", b"", False),
    ):
        (tmp_path / name).write_bytes(content)
        assert kills._of_a_library(tmp_path / name) == ignored


def test_unknown_commands_are_refused() -> None:
    with pytest.raises(
        InputError, match=r"--only trian: no such command; choose from sample_data, convert, "
    ):
        kills.main(["--only", "trian"])
    assert os.environ.get("TMPDIR") != str(Path.cwd() / "tmp")
