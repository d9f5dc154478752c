"""CSV files, written atomically and read with checked columns."""

from __future__ import annotations

import csv
import io
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from fastflower.core.console import CONTROLS
from fastflower.core.errors import CorruptionError, EnvironmentFault, InputError, of_machine
from fastflower.core.files import replacing

_CONTROL = re.compile(f"(?!\r){CONTROLS.pattern}")  # not carriage returns, which CSV can quote
CHECK = "check"  # the column of row checksums in tables that decide something
_ESCAPE = re.compile(r"\\(x([01][0-9a-f]|7f|[89][0-9a-f])|u20(2[89a-e]|6[6-9]))")


def write_csv(path: Path, rows: Iterable[dict[str, str]], columns: tuple[str, ...] = ()) -> None:
    """Write a table of text atomically as UTF-8; file names that are not UTF-8 keep their bytes.

    Line ends in a cell are quoted (RFC 4180). Other control characters, which a terminal would obey, are written as
    \\x1b or \\u202e; `read_csv` restores them. `columns` defaults to those of the first row; when given, `rows` may be
    a generator and is not held in memory.
    """
    if not columns:
        rows = list(rows)
        columns = tuple(rows[0])
    with (
        replacing(path) as temporary,
        open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        file.write(_line(columns))
        file.writelines(_line([row.get(column, "") for column in columns]) for row in rows)


def read_csv(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """Read the rows of a table of `write_csv`; InputError when the file or one of `columns` is missing."""
    try:
        text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; run convert first") from None
    except OSError as error:
        raise of_machine(error) from None
    reader = csv.DictReader(io.StringIO(text, newline=""))
    missing = [column for column in columns if column not in (reader.fieldnames or [])]
    if missing:
        raise InputError(f"{path}: no column {', '.join(missing)}; move the file away and run convert again")
    return [
        {column: restored(cell) if isinstance(cell, str) else cell for column, cell in row.items()}
        for row in reader
    ]


def sealed_rows(
    rows: Iterable[dict[str, str]], columns: tuple[str, ...], *, count: int
) -> Iterator[dict[str, str]]:
    """The `count` rows with a column CHECK behind `columns`: a CRC-32 of these cells, the row's number and `count`.

    Other columns follow and are free to edit.
    """
    for number, row in enumerate(rows):
        checked = {column: row[column] for column in columns}
        yield {**checked, CHECK: _check(list(checked.values()), number, count), **row}


def read_sealed(path: Path, columns: tuple[str, ...], *, count: int | None = None) -> list[dict[str, str]]:
    """Read a table of `sealed_rows`; `count`: its number of rows where another file tells it, else one or more.

    Raises InputError when it is missing, CorruptionError when a row was damaged, edited, moved, added or removed.
    """
    remedy = "restore the file, or move it away and run convert again"
    if not path.is_file():
        raise InputError(f"{path}: no such file; run convert first")
    try:
        rows = read_csv(path, (*columns, CHECK))
    except EnvironmentFault:
        raise
    except (InputError, csv.Error) as error:
        cause = str(error).partition(";")[0].removeprefix(f"{path}: ")
        raise CorruptionError(f"{path} is damaged, or of an earlier version ({cause}); {remedy}") from None
    for number, row in enumerate(rows):
        cells = [row[column] or "" for column in columns]
        if row[CHECK] != _check(cells, number, len(rows)) or None in row:
            raise CorruptionError(
                f"{path}: row {number} is damaged or was edited, or rows are missing; {remedy}"
            )
    if not rows if count is None else len(rows) != count:
        wanted = "one or more" if count is None else count
        raise CorruptionError(f"{path} is damaged: it has {len(rows)} rows, not {wanted}; {remedy}")
    return rows


def _check(cells: list[str], number: int, count: int) -> str:
    text = "\0".join((str(number), str(count), *cells))
    return f"{zlib.crc32(text.encode('utf-8', 'surrogateescape')):08x}"


def restored(cell: str) -> str:
    """The text of a cell of `write_csv`, with its control characters."""
    if not _ESCAPE.search(cell):
        return cell
    return re.sub(
        r"\\(\\|x(..)|u(....))",
        lambda match: "\\" if match[1] == "\\" else chr(int(match[2] or match[3], 16)),
        cell,
        flags=re.DOTALL,
    )


def _line(cells: Sequence[object]) -> str:
    # not csv.writer: Python 3.11's leaves a carriage return unquoted, and no reader takes the row for one
    texts = ("" if cell is None else str(cell) for cell in cells)
    return (",".join(map(_quoted, texts)) or '""') + "\n"


def _quoted(cell: str) -> str:
    if _CONTROL.search(cell) or _ESCAPE.search(cell):
        cell = _CONTROL.sub(_code, cell.replace("\\", "\\\\"))
    return '"' + cell.replace('"', '""') + '"' if any(mark in cell for mark in ',"\r\n') else cell


def _code(mark: re.Match[str]) -> str:
    code = ord(mark[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def escaped(name: str) -> str:
    """A name as text for a message, with control characters and undecodable bytes escaped."""
    return repr(name)[1:-1]
