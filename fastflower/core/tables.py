"""CSV files, written atomically and read with checked columns."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path

from fastflower.core.errors import InputError
from fastflower.core.files import replacing


def write_csv(path: Path, rows: Iterable[dict[str, str]], columns: tuple[str, ...] = ()) -> None:
    """Write a table of text atomically as UTF-8; file names that are not UTF-8 keep their bytes.

    `columns` defaults to those of the first row; when given, `rows` may be a generator and is not held in memory.
    """
    if not columns:
        rows = list(rows)
        columns = tuple(rows[0])
    with (
        replacing(path) as temporary,
        open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """Read the rows of a table of `write_csv`; InputError when the file or one of `columns` is missing."""
    try:
        text = path.read_bytes().decode("utf-8", "surrogateescape")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; run convert first") from None
    reader = csv.DictReader(io.StringIO(text, newline=""))
    missing = [column for column in columns if column not in (reader.fieldnames or [])]
    if missing:
        raise InputError(f"{path}: no column {', '.join(missing)}; move the file away and run convert again")
    return list(reader)


def escaped(name: str) -> str:
    """A name as text for a message, with control characters and undecodable bytes escaped."""
    return repr(name)[1:-1]
