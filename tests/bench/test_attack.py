"""`bench attack` on a few damages of each file, and its own ability to see a fault."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from fastflower.bench import attack
from fastflower.core.errors import CorruptionError


@pytest.mark.slow
def test_no_damage_of_any_file_that_a_command_reads_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    assert attack.main(["--count", "4", "--seed", "1"]) == 0
    assert ", 0 faults; seed 1" in capsys.readouterr().out


READ_BY_OTHER_NAMES = {  # by the readers that attack runs
    *("JournalRecord", "MemberInfo", "BundleDescription", "Contents", "Manifest", "Record"),
}


def test_every_kind_of_record_is_damaged(repo: Path) -> None:
    """A new record needs a line in attack.targets; the ledgers of bench are for its own restarts."""
    pattern = re.compile(
        r"^class (\w+)[^\n]*\n(?:(?!^class ).*\n)*?    FORMAT: ClassVar\[int\]", re.MULTILINE
    )
    kinds = {
        name
        for path in (repo / "fastflower").rglob("*.py")
        if path.parent.name != "bench"
        for name in pattern.findall(path.read_text(encoding="utf-8"))
    }
    damaged = Path(attack.__file__).read_text(encoding="utf-8")
    assert len(kinds) > 12
    assert not sorted(name for name in kinds - READ_BY_OTHER_NAMES if not re.search(rf"\b{name}\b", damaged))


@pytest.mark.parametrize(
    "kind, seen", [("reads on", "silent"), ("fails", "traceback"), ("dies", "crash"), ("refuses", "refused")]
)
def test_each_kind_of_fault_is_seen(kind: str, seen: str) -> None:
    path = Path("file")
    path.write_bytes(content := bytes(range(1, 101)))

    def read(notes: list[str]) -> Any:
        data = path.read_bytes()
        if data == content or kind == "reads on":
            return data
        if kind == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        raise CorruptionError("file is damaged") if kind == "refuses" else KeyError("a bug")

    outcomes = attack.attack(attack.Target("file", path, read), 3, seed=0)
    assert outcomes == {seen: 3} and path.read_bytes() == content
