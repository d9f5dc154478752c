"""The submission: complete from the start, with a row for every image, and always replaced atomically."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import re
import stat
import tempfile
import time
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
ABANDONED_AFTER = 1.0  # seconds without a write after which a temporary file whose writer is gone is deleted
REASON_BYTES, SUMMARY_BYTES = 160, 1 << 16  # longest reason of an unreadable row; longest summary of the run


class Column(NamedTuple):
    """A column to write: its kind, and the texts or the class that belong to it.

    Kinds: `image` (the label), `class` (one of `texts`, by class), `number` (the confidence, or the probability of the
    second class), `odds` (the probability of class `position`), `top` (the `position` likeliest classes, from `texts`,
    with `separator` between them), `copy` (`texts`, by row).
    """

    kind: Literal["image", "class", "number", "odds", "top", "copy"]
    texts: tuple[str, ...] = ()
    position: int = 0
    separator: str = " "


class Layout(NamedTuple):
    """The layout of the table: header, columns, delimiter, and whether `number` is of the second class."""

    header: list[str]
    columns: list[Column]
    delimiter: str = ","
    second_class: bool = False


def default_layout(
    columns: str, labels: Sequence[str] = (), *, top_k: int = 5, separator: str = " "
) -> Layout:
    """The layout for these fields of bundle.json; without a sample to follow, `sample` means three columns."""
    if columns == "odds":
        odds = [Column("odds", position=position) for position in range(len(labels))]
        return Layout(["filename", *labels], [Column("image"), *odds])
    if columns == "top":
        top = Column("top", tuple(labels), min(top_k, len(labels)), separator)
        return Layout(["filename", "category_id"], [Column("image"), top])
    third = "probability" if columns == "binary" else "confidence"
    width = 2 if columns == "two" else 3
    kinds = [Column("image"), Column("class", tuple(labels)), Column("number")]
    return Layout(["filename", "category_id", third][:width], kinds[:width], second_class=columns == "binary")


class Table:
    """Rows of names and predictions; rows without a prediction hold the most frequent class and its frequency.

    `names` are the images' names as bytes; `labels` are the names to write, byte for byte, by default the same. `path`
    is the file that `open` could write. `keep_odds` keeps all probabilities of each row. Predictions lie in memory that
    a forked process shares: `reading_since` is the time at which reading of a row's picture began (0: it is not being
    read), `suspect` marks pictures that may crash the process.
    """

    def __init__(
        self,
        names: list[bytes],
        class_ids: list[str],
        *,
        prior: list[float],
        layout: Layout | None = None,
        labels: list[bytes] | None = None,
        keep_odds: bool = False,
    ) -> None:
        self.names, self.class_ids, self.layout = names, class_ids, layout or default_layout("three")
        self.labels = labels or names
        count = len(names)
        self.best, self.confidence = shared_array(count, "i8"), shared_array(count, "f8")
        self.best[:], self.confidence[:] = int(np.argmax(prior)), float(np.max(prior))
        needed = keep_odds or any(column.kind in ("odds", "top") for column in self.layout.columns)
        self.odds = shared_array(count * len(class_ids) * needed, "f8").reshape(-1, len(class_ids))
        self.odds[:] = prior
        self.known, self.failed, self.suspect = (shared_array(count, "?") for _ in range(3))
        self.reading_since = shared_array(count, "f8")
        self.reasons = shared_array(count, f"S{REASON_BYTES}")
        self._summary = shared_array(1, f"S{SUMMARY_BYTES}")
        self.path = ""
        self.written = 0.0

    @property
    def unreadable(self) -> dict[int, str]:
        """The reasons of rows that cannot be predicted, by row."""
        return {int(row): self.reasons[row].decode("utf-8", "replace") for row in np.flatnonzero(self.failed)}

    @property
    def partial(self) -> dict[int, str]:
        """The notes on rows that are predicted from a part of their picture, by row."""
        rows = np.flatnonzero(self.known & (self.reasons != b""))
        return {int(row): self.reasons[row].decode("utf-8", "replace") for row in rows}

    @property
    def summary(self) -> dict[str, Any]:
        """The fields that submission.json has beside the counts of rows."""
        try:
            return dict(json.loads(self._summary[0] or b"{}"))
        except ValueError:  # cut: too long, or the process that wrote it was killed
            return {}

    @summary.setter
    def summary(self, fields: dict[str, Any]) -> None:
        self._summary[0] = json.dumps(fields).encode()

    def done(self) -> int:
        """The number of rows that need no more work."""
        return int(np.count_nonzero(self.known) + np.count_nonzero(self.failed))

    def waiting(self) -> list[int]:
        """Rows to predict, suspect ones first."""
        rows = np.flatnonzero(~self.known & ~self.failed)
        return [int(row) for row in rows[np.argsort(~self.suspect[rows], kind="stable")]]

    def open(self, requested: str) -> bool:
        """Write the table to the requested path, else to the current or the temporary folder; False: not as requested.

        Raises the last OSError when none of them can be written.
        """
        name = os.path.basename(requested)
        # each folder is looked up only when needed: there may be no temporary one, and the current one may be gone
        for folder in (None, os.getcwd, tempfile.gettempdir):
            try:
                path = os.path.join(folder(), name) if folder else requested
                self.path = os.path.realpath(path)  # a link stays a link
                os.makedirs(os.path.dirname(self.path), exist_ok=True)
                self.write()
            except OSError as error:
                fault = error
            else:
                return folder is None
        raise fault

    def fill(self, rows: list[int], fused: np.ndarray) -> None:
        """Set the predictions of rows from fused logits (N, C), already divided by T."""
        for row, logits in zip(rows, fused):
            if not np.isfinite(logits).all():
                self.fail(row, "no network gave finite logits")
                continue
            odds = np.exp(logits - logits.max())
            self.best[row], self.confidence[row] = int(odds.argmax()), float(odds.max() / odds.sum())
            if len(self.odds):
                self.odds[row] = odds / odds.sum()
            self.known[row] = True

    def reweight(self, ratio: np.ndarray) -> None:
        """Multiply the predicted rows' probabilities by a ratio (C,), and choose their classes anew."""
        rows = np.flatnonzero(self.known)
        odds = self.odds[rows] * ratio
        self.odds[rows] = odds / odds.sum(1, keepdims=True)
        self.best[rows], self.confidence[rows] = self.odds[rows].argmax(1), self.odds[rows].max(1)

    def fail(self, row: int, reason: str) -> None:
        """Mark a row as impossible to predict; it keeps the most frequent class."""
        self.note(row, reason)
        self.failed[row] = True

    def note(self, row: int, text: str) -> None:
        """Keep a note on a row."""
        self.reasons[row] = text.encode("utf-8", "replace")[:REASON_BYTES]

    def text(self) -> bytes:
        """RFC 4180 with '\\n': names byte for byte, ids as in the training labels, confidence in (0, 1].

        Control characters in ids and headers, which could steer a terminal, are written as escapes.
        """
        delimiter = self.layout.delimiter.encode()
        columns = [self._cells(column) for column in self.layout.columns]
        lines = [[encoded(field) for field in self.layout.header], *zip(*columns)]
        return b"".join(
            delimiter.join([quoted(field, delimiter) for field in fields]) + b"\n" for fields in lines
        )

    def _cells(self, column: Column) -> list[bytes]:
        """The cells of a column, one for each row."""
        if column.kind == "image":
            return self.labels
        if column.kind == "odds":
            return [b"%.9f" % share for share in self.odds[:, column.position]]
        if column.kind == "number" and self.layout.second_class:
            # more digits: rounding must not tie rows that are scored by rank
            second = np.where(self.best == 1, self.confidence, 1.0 - self.confidence)
            return [b"%.9f" % share for share in second]
        if column.kind == "number":
            return [b"%.6f" % share for share in np.clip(self.confidence, 1e-6, 1.0)]
        texts = [encoded(text) for text in column.texts or self.class_ids]
        if column.kind == "top":
            order = np.argsort(-self.odds, axis=1, kind="stable")[:, : column.position]
            return [column.separator.encode().join([texts[best] for best in row]) for row in order]
        return texts if column.kind == "copy" else [texts[best] for best in self.best]

    def remove_temporary(self, process: int) -> None:
        """Delete the temporary files of a killed process."""
        for path in (self.path, summary_path(self.path)):
            with contextlib.suppress(OSError):
                os.unlink(temporary_path(path, process))

    def update(self) -> None:
        """Write the table; ignores an OSError, as a later attempt may succeed."""
        with contextlib.suppress(OSError):
            self.write()

    def write(self) -> None:
        """Replace the table, then `submission.json` beside it, each atomically."""
        self.written = time.monotonic()
        replace_atomic(self.path, self.text())
        names = [name.decode("utf-8", "surrogateescape") for name in self.names]
        unreadable, partial = (
            {names[row]: reason for row, reason in reasons.items()}
            for reasons in (self.unreadable, self.partial)
        )
        fields = {
            "rows": len(names),
            "predicted": int(self.known.sum()),
            "unreadable": unreadable,
            "partial": partial,
            **self.summary,
        }
        replace_atomic(summary_path(self.path), json.dumps(fields, indent=1).encode())


def shared_array(count: int, dtype: str) -> np.ndarray:
    """Zeros (count,) in memory that a forked process shares."""
    kind = np.dtype(dtype)
    return np.frombuffer(mmap.mmap(-1, max(1, count) * kind.itemsize), kind, count)


def replace_atomic(path: str, data: bytes) -> None:
    """Write a temporary file beside `path` and rename it, so that readers see the old content or the new."""
    if os.path.exists(path) and not stat.S_ISREG(os.stat(path).st_mode):
        raise FileExistsError(f"{path} is not a regular file")
    temporary = temporary_path(path, os.getpid())
    remove_abandoned(path)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # another user may score it
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def summary_path(path: str) -> str:
    """The path of a table's summary: `a.json` for `a.csv`, `a.json.json` for `a.json`."""
    summary = os.path.splitext(path)[0] + ".json"
    return path + ".json" if summary.lower() == path.lower() else summary


def remove_abandoned(path: str) -> None:
    """Delete the temporary files of killed writers of `path`.

    A writer in another container cannot be asked; its file is younger than ABANDONED_AFTER.
    """
    if os.name != "posix":  # elsewhere os.kill would end the process
        return
    folder, name = os.path.split(os.path.abspath(path))
    for entry in os.listdir(folder):
        process = entry[len(name) + 1 : -len(".tmp")]
        temporary = os.path.join(folder, entry)
        if entry != f"{name}.{process}.tmp" or not process.isdecimal():
            continue
        with contextlib.suppress(OSError, OverflowError):
            if not is_running(int(process)) and time.time() - os.stat(temporary).st_mtime > ABANDONED_AFTER:
                os.unlink(temporary)


def is_running(process: int) -> bool:
    """True if a process exists, also one of another user."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def temporary_path(path: str, process: int) -> str:
    return f"{path}.{process}.tmp"


def quoted(field: bytes, delimiter: bytes) -> bytes:
    """A field in quotation marks where it needs them."""
    special = any(mark in field for mark in (delimiter, b'"', b"\n", b"\r"))
    return b'"' + field.replace(b'"', b'""') + b'"' if special else field


def encoded(text: str) -> bytes:
    """A text for a cell: bytes that are no UTF-8 as they were, control characters as escapes."""
    return visible(text).encode("utf-8", "surrogateescape")


def visible(text: str) -> str:
    """A text whose control characters, also those that reverse the direction of text, are written as escapes."""
    return CONTROLS.sub(lambda mark: mark[0].encode("unicode_escape").decode(), text)
