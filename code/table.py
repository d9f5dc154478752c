"""The submission: one row for every picture from the first moment on, replaced as a whole and never a part."""

from __future__ import annotations

import contextlib
import csv
import json
import mmap
import os
import stat
import tempfile
import time
from typing import Any, NamedTuple

import numpy as np

COLUMNS = ("filename", "category_id", "confidence")
BINARY = ("filename", "category_id", "probability")
REASON, ABOUT = 160, 1 << 16  # bytes of a row's reason, and of what is said of the run


class Table:
    """Rows of names and predictions; those not yet known, and unreadable pictures, hold the class prior.

    `names` are files, as bytes; `shown` is what the table calls them, byte for byte, by default the same; `path` is
    where the table lies once `open` has found a place. What is known lies in memory that a forked process shares;
    `reading` is when a row's picture began to be read (0: it is not), `alone` marks pictures that may crash it.
    The third column is the confidence in the class that a row has, or with `binary` the second class's probability.
    """

    def __init__(
        self,
        names: list[bytes],
        class_ids: list[str],
        *,
        prior: list[float],
        header: list[str],
        shown: list[bytes] | None = None,
        binary: bool = False,
    ) -> None:
        self.names, self.class_ids, self.header, self.binary = names, class_ids, header, binary
        self.shown = shown or names
        count = len(names)
        self.best, self.confidence = shared(count, "i8"), shared(count, "f8")
        self.best[:], self.confidence[:] = int(np.argmax(prior)), float(np.max(prior))
        self.known, self.alone, self.reading = shared(count, "?"), shared(count, "?"), shared(count, "f8")
        self.failed = shared(count, "?")
        self.reasons, self.said = shared(count, f"S{REASON}"), shared(1, f"S{ABOUT}")
        self.path = ""
        self.written = 0.0

    @property
    def unreadable(self) -> dict[int, str]:
        """Why rows have no prediction."""
        return {int(row): self.reasons[row].decode("utf-8", "replace") for row in np.flatnonzero(self.failed)}

    @property
    def about(self) -> dict[str, Any]:
        """What submission.json says beside the rows."""
        try:
            return dict(json.loads(self.said[0] or b"{}"))
        except ValueError:  # written by a process that was killed over it, or too long
            return {}

    @about.setter
    def about(self, words: dict[str, Any]) -> None:
        self.said[0] = json.dumps(words).encode()

    def done(self) -> int:
        """Rows that need no more work."""
        return int(np.count_nonzero(self.known) + np.count_nonzero(self.failed))

    def waiting(self) -> list[int]:
        """Rows to be predicted, those that may crash the process first."""
        rows = np.flatnonzero(~self.known & ~self.failed)
        return [int(row) for row in rows[np.argsort(~self.alone[rows], kind="stable")]]

    def open(self, wanted: str) -> bool:
        """Write the table to the path wanted, or where that cannot be, in other places; False: elsewhere."""
        name = os.path.basename(wanted)
        # asked for one by one: there may be no temporary folder, and the current one may be gone
        for folder in (None, os.getcwd, tempfile.gettempdir):
            try:
                path = os.path.join(folder(), name) if folder else wanted
                self.path = os.path.realpath(path)  # a link stays a link
                os.makedirs(os.path.dirname(self.path), exist_ok=True)
                self.write()
            except OSError as error:
                fault = error
            else:
                return folder is None
        raise fault

    def fill(self, rows: list[int], fused: np.ndarray) -> None:
        """Predictions of rows from fused logits (N, C) that are already divided by T."""
        for row, logits in zip(rows, fused):
            if not np.isfinite(logits).all():
                self.fail(row, "no network gave finite logits")
                continue
            odds = np.exp(logits - logits.max())
            self.best[row], self.confidence[row] = int(odds.argmax()), float(odds.max() / odds.sum())
            self.known[row] = True

    def fail(self, row: int, reason: str) -> None:
        """The picture cannot be predicted; its row keeps the prior."""
        self.reasons[row] = reason.encode("utf-8", "replace")[:REASON]
        self.failed[row] = True

    def text(self) -> bytes:
        """RFC 4180 with '\\n': names byte for byte, ids as in the training labels, confidence in (0, 1]."""
        fields = [quoted(field.encode("utf-8", "surrogateescape")) for field in self.header]
        lines = [b",".join(fields)]
        width = len(self.header)
        for name, best, confidence in zip(self.shown, self.best, self.confidence):
            if self.binary:  # more digits: what is scored by rank must not be tied by rounding
                number = b"%.9f" % (confidence if best else 1.0 - confidence)
            else:
                number = b"%.6f" % min(max(confidence, 1e-6), 1.0)
            lines.append(b",".join((quoted(name), quoted(self.class_ids[best].encode()), number)[:width]))
        return b"\n".join(lines) + b"\n"

    def sweep(self, process: int) -> None:
        """Remove what a killed process had not put in place."""
        for path in (self.path, beside(self.path)):
            with contextlib.suppress(OSError):
                os.unlink(aside_of(path, process))

    def update(self) -> None:
        """Write what is known; a place that refuses it now may take it later."""
        with contextlib.suppress(OSError):
            self.write()

    def write(self) -> None:
        """Replace the table, then `submission.json` beside it, each in one rename."""
        self.written = time.monotonic()
        replace(self.path, self.text())
        names = [name.decode("utf-8", "surrogateescape") for name in self.names]
        unreadable = {names[row]: reason for row, reason in self.unreadable.items()}
        words = {
            "rows": len(names),
            "predicted": int(self.known.sum()),
            "unreadable": unreadable,
            **self.about,
        }
        replace(beside(self.path), json.dumps(words, indent=1).encode())


def shared(count: int, dtype: str) -> np.ndarray:
    """Zeros (count,) in memory that a forked process shares."""
    kind = np.dtype(dtype)
    return np.frombuffer(mmap.mmap(-1, max(1, count) * kind.itemsize), kind, count)


def replace(path: str, data: bytes) -> None:
    """Write a file aside, on the same disk, and rename it: readers see the old one or the new."""
    if os.path.exists(path) and not stat.S_ISREG(os.stat(path).st_mode):
        raise FileExistsError(f"{path} is not a regular file")
    aside = aside_of(path, os.getpid())
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(aside, 0o644)  # whoever scores it may be another user
        os.replace(aside, path)
    finally:
        if os.path.exists(aside):
            os.unlink(aside)


def beside(path: str) -> str:
    """Where the words about a table lie: `a.json` of `a.csv`, never the table itself."""
    found = os.path.splitext(path)[0] + ".json"
    return path + ".json" if found.lower() == path.lower() else found


def aside_of(path: str, process: int) -> str:
    return f"{path}.{process}.tmp"


def quoted(field: bytes) -> bytes:
    special = any(mark in field for mark in (b",", b'"', b"\n", b"\r"))
    return b'"' + field.replace(b'"', b'""') + b'"' if special else field


class Sample(NamedTuple):
    """The organiser's sample: its header, its file names, and the classes that it gives them."""

    header: list[str]
    names: list[bytes]
    ids: list[str]


def read_sample(path: str) -> Sample | None:
    """None when there is no sample that says anything."""
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            rows = [row for row in csv.reader(file) if row]
    except (OSError, csv.Error):
        return None
    if not rows or len(rows[0]) not in (2, 3):
        return None
    header = [field.strip() for field in rows[0]]
    names = [row[0].encode("utf-8", "surrogateescape") for row in rows[1:]]
    return Sample(header, names, [row[1] for row in rows[1:] if len(row) > 1])


def columns(kind: str, sample: Sample | None) -> list[str]:
    """The header: `two`, `three`, `binary`, or `sample` for the organiser's, else three."""
    if sample and (kind == "sample" or (kind == "binary" and len(sample.header) == 3)):
        return sample.header
    return list({"two": COLUMNS[:2], "binary": BINARY}.get(kind, COLUMNS))


def ordered(names: list[bytes], sample: Sample | None) -> tuple[list[bytes], list[bytes]]:
    """Files in the table's order, and what it calls them.

    Both are the organiser's when the sample lists exactly these files, with their endings or without (ids), or
    numbers the rows of a .npz from 0 or 1.
    """
    if sample is None or len(sample.names) != len(names):
        return names, names
    if sorted(sample.names) == names:
        return sample.names, sample.names
    files = {os.path.splitext(name)[0]: name for name in names}
    if sorted(sample.names) == sorted(files):
        return [files[shown] for shown in sample.names], sample.names
    numbered = all(name.rpartition(b"/")[2].isdigit() for name in names)  # no photograph is: it has a suffix
    if numbered and all(shown.isdigit() and len(shown) < 19 for shown in sample.names):
        places = [int(shown) for shown in sample.names]
        for first in (0, 1):
            if sorted(places) == list(range(first, first + len(names))):
                return [names[place - first] for place in places], sample.names
    return names, names
