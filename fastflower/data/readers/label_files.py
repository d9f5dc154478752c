"""Tables of text: label files as people write them, and the project's own CSVs.

Encoding, delimiter and line ends are told from the file; what cannot be told is refused with the line it is in.
"""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path

from fastflower.core.errors import InputError
from fastflower.core.tables import shown

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp")
Names = dict[str, dict[str, str]]  # column -> category_id -> name


@dataclass(slots=True)
class Row:
    """A row of a label file: where it stands, what it says, and what is wrong with it."""

    where: str
    filename: str = ""
    category_id: str = ""
    problem: str = ""


def csv_rows(path: Path, root: Path, *, image_col: str, label_col: str) -> tuple[list[Row], Names, list[str]]:
    """The rows of a label file in its order, each further column that is constant within classes, and notices.

    UTF-8 with or without its mark; else, if then every file name exists below `root`, GB18030 or UTF-8 with file
    names of other bytes.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"data.csv = {path}: {error.strerror}; give the label file, or data.form=folders"
        ) from None
    if b"\0" in data:
        line = data[: data.index(b"\0")].count(b"\n") + 1
        kind = "looks like UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "has a NUL byte"
        raise InputError(f"{path}:{line}: {kind}; save it as UTF-8 text")
    try:
        return *_parse(data.decode("utf-8-sig"), path, image_col=image_col, label_col=label_col), []
    except UnicodeDecodeError as error:
        fault = f"{path}: byte {error.start} is not UTF-8; save it as UTF-8"
    for encoding, errors in (("gb18030", "strict"), ("utf-8-sig", "surrogateescape")):
        try:
            rows, names = _parse(
                data.decode(encoding, errors), path, image_col=image_col, label_col=label_col
            )
            # only names of files may be other than text
            json.dumps([[row.category_id for row in rows], names], ensure_ascii=False).encode()
        except (UnicodeError, InputError):
            continue
        if all((root / row.filename).is_file() for row in rows if not row.problem):
            read = "GB18030" if errors == "strict" else "UTF-8 with file names of other bytes"
            return rows, names, [f"{path} is not UTF-8; it was read as {read}, and so every file exists"]
    raise InputError(f"{fault} (read otherwise, its file names do not exist)")


def _parse(text: str, path: Path, *, image_col: str, label_col: str) -> tuple[list[Row], Names]:
    wanted = (image_col, label_col)
    first = text.lstrip("\r\n").splitlines()[:1]
    if not first:
        raise InputError(f"{path}: empty; its first line must name the columns {', '.join(wanted)}")
    headers = {mark: [name.strip() for name in next(csv.reader(first, delimiter=mark))] for mark in ",;\t"}
    fitting = [mark for mark, header in headers.items() if all(name in header for name in wanted)]
    if not fitting:
        mark = max(headers, key=lambda mark: len(headers[mark]))
        found = ", ".join(shown(name) for name in headers[mark])
        remedy = "name yours by data.image_col and data.label_col"
        if len(headers[mark]) == 1:
            remedy = "separate columns by ',', ';' or a tab"
        raise InputError(
            f"{path}: no column {' or '.join(n for n in wanted if n not in headers[mark])}; it has {found}; {remedy}"
        )
    header = headers[fitting[0]]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=fitting[0], strict=True)
    image, label = header.index(image_col), header.index(label_col)
    rows: list[Row] = []
    names: Names = {name: {} for name in header if name not in wanted and name}
    line, headed = 1, False
    try:
        for cells in reader:
            where, line = f"line {line}", reader.line_num + 1
            if not cells:
                continue
            if not headed:
                headed = True
            elif len(cells) != len(header):
                rows.append(Row(where, problem=f"{where}: {len(cells)} fields, the header has {len(header)}"))
            else:
                rows.append(Row(where, cells[image], cells[label]))
                for name, cell in zip(header, cells, strict=True):
                    if name in names and names[name].setdefault(cells[label].strip(), cell) != cell:
                        del names[name]  # differs within a class, so it names no class
    except csv.Error as error:
        raise InputError(
            f"{path}: line {reader.line_num}: {error}; quotes must be closed and doubled inside"
        ) from None
    if not rows:
        raise InputError(f"{path}: has a header and no rows")
    return rows, names


def folder_rows(root: Path) -> list[Row]:
    """A row for every image below a folder of `root`, whose name is its class."""
    rows = [Row(name, name, name.partition("/")[0]) for name in image_files(root) if "/" in name]
    if not rows:
        raise InputError(f"{root}: no folder with images ({' '.join(SUFFIXES)}) below it")
    return rows


def image_files(root: Path) -> list[str]:
    """Every image file below a folder, at any depth, as a path relative to it, in order."""
    files = sorted(file for file in root.rglob("*") if file.suffix.lower().rstrip() in SUFFIXES)
    return [str(file.relative_to(root)) for file in files]
