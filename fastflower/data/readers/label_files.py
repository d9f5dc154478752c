"""Label files as people write them, and folders whose names are the labels.

Encoding, delimiter and line ends are detected; a file that cannot be parsed is refused with its line.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from fastflower.core.errors import InputError
from fastflower.core.tables import escaped
from fastflower.data.readers.image_folders import SUFFIXES, FileSource, list_images

ONE_HOT = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}
MAX_LISTED = 10  # names in one message
SPLITS = frozenset(
    {"train", "training", "val", "valid", "validation", "test", "testing"}
)  # names of parts of a set
ClassNames = dict[str, dict[str, str]]  # column -> category_id -> name


@dataclass(slots=True)
class LabelRow:
    """A row of a label file: its location, such as "line 3", its cells, and its problem or ''."""

    where: str
    filename: str = ""
    category_id: str = ""
    problem: str = ""


def csv_rows(
    path: Path, root: Path, *, image_col: str, label_col: str, one_hot: bool = True
) -> tuple[list[LabelRow], ClassNames, list[str]]:
    """Read a label file: its rows in order, the columns of class names, and notices.

    With `one_hot`, columns of 0 and 1 may stand in for that of the labels, one for each class. A column names the
    classes if it is constant within each of them. The encoding is UTF-8, with or without a byte order mark. Failing
    that, GB18030 and UTF-8 with arbitrary bytes in file names are tried, and accepted only if every file then exists
    below `root`. Raises InputError.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"data.csv = {path}: {error.strerror}; give the label file, or data.form=folders"
        ) from None
    if data[:4] in (b"PK\x03\x04", b"\xd0\xcf\x11\xe0"):
        raise InputError(f"{path}: a spreadsheet or an archive, not text; save its table as CSV in UTF-8")
    if b"\0" in data:
        line = data[: data.index(b"\0")].count(b"\n") + 1
        kind = "looks like UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "has a NUL byte"
        raise InputError(f"{path}:{line}: {kind}; save it as UTF-8 text")
    try:
        return _parse(
            data.decode("utf-8-sig"), path, image_col=image_col, label_col=label_col, one_hot=one_hot
        )
    except UnicodeDecodeError as error:
        fault = f"{path}: byte {error.start} is not UTF-8; save it as UTF-8"
    source = FileSource(root)
    for encoding, errors in (("gb18030", "strict"), ("utf-8-sig", "surrogateescape")):
        detected = "GB18030" if errors == "strict" else "UTF-8 with other bytes in file names"
        try:
            text = data.decode(encoding, errors)
            rows, names, notices = _parse(
                text, path, image_col=image_col, label_col=label_col, one_hot=one_hot
            )
            # raises where anything but a file name has bytes that are no text
            json.dumps([[row.category_id for row in rows], names], ensure_ascii=False).encode()
        except UnicodeError:
            continue
        except InputError as error:  # the columns are wrong in any encoding
            raise InputError(f"{error} (it is not UTF-8 and was read as {detected})") from None
        missing = {row.filename for row in rows if not row.problem and not _exists(source, row.filename)}
        if not missing:
            notice = f"{path} is not UTF-8; it was read as {detected}, in which every file exists"
            return rows, names, [*notices, notice]
        # only names that an encoding can change tell whether it is the right one
        telling = [row.filename for row in rows if not row.filename.isascii()] or [r.filename for r in rows]
        if sum(name in missing for name in telling) < len(telling) / 2:
            listed = ", ".join(f"'{escaped(name)}'" for name in sorted(missing)[:MAX_LISTED])
            raise InputError(
                f"{path}: {len(missing)} of {len(rows)} files {'is' if len(missing) == 1 else 'are'} missing: "
                f"{listed}{' ...' * (len(missing) > MAX_LISTED)}; add the files or remove the rows "
                f"(it is not UTF-8 and was read as {detected})"
            )
    raise InputError(f"{fault} (in other encodings, its file names do not exist)")


def _exists(source: FileSource, name: str) -> bool:
    return not source.check(name).problem or bool(source.respelled(name))


def _parse(
    text: str, path: Path, *, image_col: str, label_col: str, one_hot: bool
) -> tuple[list[LabelRow], ClassNames, list[str]]:
    delimiter, header = _header(text, path, image_col=image_col, label_col=label_col)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    records: list[tuple[str, list[str]]] = []
    line, past_header = 1, False
    try:
        for cells in reader:
            where, line = f"line {line}", reader.line_num + 1
            if cells and past_header:
                records.append((where, cells))
            past_header = past_header or bool(cells)
    except csv.Error as error:
        raise InputError(
            f"{path}: line {reader.line_num}: {error}; quotes must be closed and doubled inside"
        ) from None
    if not records:
        raise InputError(f"{path}: has a header and no rows")
    broken = [
        LabelRow(where, problem=f"{where}: {len(cells)} fields, the header has {len(header)}")
        for where, cells in records
        if len(cells) != len(header)
    ]
    records = [(where, cells) for where, cells in records if len(cells) == len(header)]
    _check_unique(path, [name for name in header if name in (image_col, label_col)])
    image = header.index(image_col)
    if label_col not in header:
        rows, columns = _one_hot_rows(records, header, image)
        if not rows or not one_hot:
            raise _no_column(path, header, (label_col,))
        _check_unique(path, columns)
        notice = f"{path}: the labels are its {len(columns)} columns of 0 and 1: {', '.join(columns)}"
        return broken + rows, {}, [notice]
    label = header.index(label_col)
    names: ClassNames = {name: {} for name in header if name not in (image_col, label_col) and name}
    for _, cells in records:
        for name, cell in zip(header, cells, strict=True):
            if name in names and names[name].setdefault(cells[label].strip(), cell) != cell:
                del names[name]  # the column differs within a class, so it holds no class names
    return broken + [LabelRow(where, cells[image], cells[label]) for where, cells in records], names, []


def _one_hot_rows(
    records: list[tuple[str, list[str]]], header: list[str], image: int
) -> tuple[list[LabelRow], list[str]]:
    """Rows whose label is the name of the only column that is 1, and those columns; empty if the table is not such."""
    columns = [
        column
        for column in range(len(header))
        if column != image
        and header[column]  # a column without a name holds the numbers of the rows
        and all(cells[column].strip().lower() in ONE_HOT for _, cells in records)
    ]
    if len(columns) < 2:
        return [], []
    rows = []
    for where, cells in records:
        ones = [header[column] for column in columns if ONE_HOT[cells[column].strip().lower()]]
        listed = ", ".join(map(escaped, ones)) or "none"
        fault = f"{where}: {len(ones)} columns are 1 ({listed}); an image has one label"
        rows.append(LabelRow(where, cells[image], "".join(ones[:1]), "" if len(ones) == 1 else fault))
    if 2 * sum(not row.problem for row in rows) < len(rows):
        return [], []
    return rows, [escaped(header[column]) for column in columns]


def _header(text: str, path: Path, *, image_col: str, label_col: str) -> tuple[str, list[str]]:
    """The delimiter with which the first line has the two columns, or at least image_col, and all its column names."""
    required = (image_col, label_col)
    first = text.lstrip("\r\n").splitlines()[:1]
    if not first:
        raise InputError(f"{path}: empty; its first line must name the columns {', '.join(required)}")
    headers = {mark: [name.strip() for name in next(csv.reader(first, delimiter=mark))] for mark in ",;\t"}
    for wanted in (required, (image_col,)):
        for delimiter, header in headers.items():
            if all(name in header for name in wanted):
                return delimiter, header
    raise _no_column(path, max(headers.values(), key=len), required)


def _check_unique(path: Path, names: list[str]) -> None:
    """Raise InputError if two of the columns that are read have one name, as one of them would be ignored."""
    for name, count in Counter(names).items():
        if count > 1:
            raise InputError(
                f"{path}: {count} columns are called {escaped(name)}; leave the one that counts, or rename the others"
            )


def _no_column(path: Path, header: list[str], required: tuple[str, ...]) -> InputError:
    missing = " or ".join(name for name in required if name not in header)
    remedy = "name yours by data.image_col and data.label_col"
    if len(header) == 1:
        remedy = "separate columns by ',', ';' or a tab"
    elif any(Path(name).suffix.lower() in SUFFIXES for name in header):
        remedy = f"its first line must name the columns, such as {','.join(required)}"
    columns = ", ".join(escaped(name) for name in header)
    return InputError(f"{path}: no column {missing}; it has {columns}; {remedy}")


def folder_rows(root: Path) -> tuple[list[LabelRow], list[str]]:
    """A row for every image in a folder below `root`, whose topmost folder is the class, and notices."""
    listing = list_images(root)
    rows = [LabelRow(name, name, name.partition("/")[0]) for name in listing.images if "/" in name]
    if not rows:
        others = Counter(path.suffix.lower() for path in root.rglob("*") if path.is_file() and path.suffix)
        found = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(3))
        where = f"; it has {found} files" if found else ", it is empty"
        raise InputError(f"{root}: no folder with images ({' '.join(SUFFIXES)}) below it{where}")
    _check_no_splits(root, listing.images)
    loose = [name for name in listing.images if "/" not in name]
    notices = listing.notices(root)
    if loose:
        notices.append(
            f"{len(loose)} images directly in {root} lie in no class folder and were left out, "
            f"such as {escaped(loose[0])}"
        )
    return rows, notices


def _check_no_splits(root: Path, images: list[str]) -> None:
    """Raise InputError for a folder of folders such as train/ and val/, whose class folders lie one level deeper."""
    paths = [name.split("/") for name in images if "/" in name]
    splits = sorted({path[0] for path in paths})
    if all(name.lower() in SPLITS for name in splits) and all(len(path) > 2 for path in paths):
        train = next((name for name in splits if name.lower().startswith("train")), splits[0])
        others = [name for name in splits if name.lower().startswith("val")]
        remedy = f"data.root={root / train}" + (f" data.val={root / others[0]}" if others else "")
        raise InputError(
            f"data.root = {root}: its folders {', '.join(map(escaped, splits))} hold folders of classes, and would be "
            f"the classes themselves; give {remedy}"
        )
