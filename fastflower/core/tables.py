"""CSV files, written atomically and read with checked columns."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path

from fastflower.core.errors import InputError
from fastflower.core.files import replacing


def write_csv(path: Path, rows: Iterable[dict[str, str]], columns: tuple[str, ...] = ()) -> None:
    """A table of text as UTF-8, atomically; file names that are not UTF-8 keep their bytes.

    Without `columns` they are those of the first row; with them, rows may come one by one and are not kept.
    """
    if not columns:
        rows = list(rows)
        columns = tuple(rows[0])
    with (
        replacing(path) as aside,
        open(aside, "w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """The rows of a table that `write_csv` made; InputError when it is missing or lacks a column."""
    try:
        text = path.read_bytes().decode("utf-8", "surrogateescape")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; run convert first") from None
    reader = csv.DictReader(io.StringIO(text, newline=""))
    lacking = [column for column in columns if column not in (reader.fieldnames or [])]
    if lacking:
        raise InputError(f"{path}: no column {', '.join(lacking)}; move the file away and run convert again")
    return list(reader)


def shown(name: str) -> str:
    """A name for a message: control characters and stray bytes escaped, everything else as it is."""
    return repr(name)[1:-1]
