"""Files of another user: the line names the permission as the cause, and not damage."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from fastflower.core.errors import EnvironmentFault
from fastflower.core.records import read_record, write_record
from fastflower.core.tables import read_csv, read_sealed
from fastflower.recipe import load


@dataclass(frozen=True)
class Note:
    FORMAT: ClassVar[int] = 1
    REMEDY: ClassVar[str] = "write it again"
    text: str


READERS: dict[str, Callable[[Path], Any]] = {
    "record": lambda path: read_record(path, Note),
    "table": lambda path: read_csv(path, ("a",)),
    "sealed table": lambda path: read_sealed(path, ("a",)),
    "recipe": lambda path: load(path),
}


@pytest.mark.parametrize("name", READERS)
def test_a_file_of_another_user_is_named_with_its_permission(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path("theirs.yaml")
    write_record(path, Note("x"))

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)  # for root, no file is unreadable
    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(EnvironmentFault) as caught:
        READERS[name](path)
    assert str(caught.value).startswith("theirs.yaml: Permission denied; give yourself permission")
