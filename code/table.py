"""The submission: complete from the start, with a row for every image, and always replaced atomically."""

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
REASON_BYTES, SUMMARY_BYTES = 160, 1 << 16  # longest reason of an unreadable row; longest summary of the run


class Table:
    """Rows of names and predictions; rows without a prediction hold the most frequent class and its frequency.

    `names` are the images' names as bytes; `labels` are the names to write, byte for byte, by default the same. `path`
    is the file that `open` could write. Predictions lie in memory that a forked process shares: `reading_since` is
    the time at which reading of a row's picture began (0: it is not being read), `suspect` marks pictures that may
    crash the process. The third column is the confidence in the row's class, or with `binary` the probability of the
    second class.
    """

    def __init__(
        self,
        names: list[bytes],
        class_ids: list[str],
        *,
        prior: list[float],
        header: list[str],
        labels: list[bytes] | None = None,
        binary: bool = False,
    ) -> None:
        self.names, self.class_ids, self.header, self.binary = names, class_ids, header, binary
        self.labels = labels or names
        count = len(names)
        self.best, self.confidence = shared_array(count, "i8"), shared_array(count, "f8")
        self.best[:], self.confidence[:] = int(np.argmax(prior)), float(np.max(prior))
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
            self.known[row] = True

    def fail(self, row: int, reason: str) -> None:
        """Mark a row as impossible to predict; it keeps the most frequent class."""
        self.reasons[row] = reason.encode("utf-8", "replace")[:REASON_BYTES]
        self.failed[row] = True

    def text(self) -> bytes:
        """RFC 4180 with '\\n': names byte for byte, ids as in the training labels, confidence in (0, 1]."""
        fields = [quoted(field.encode("utf-8", "surrogateescape")) for field in self.header]
        lines = [b",".join(fields)]
        width = len(self.header)
        for label, best, confidence in zip(self.labels, self.best, self.confidence):
            if self.binary:  # more digits: rounding must not tie rows that are scored by rank
                number = b"%.9f" % (confidence if best else 1.0 - confidence)
            else:
                number = b"%.6f" % min(max(confidence, 1e-6), 1.0)
            lines.append(b",".join((quoted(label), quoted(self.class_ids[best].encode()), number)[:width]))
        return b"\n".join(lines) + b"\n"

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
        unreadable = {names[row]: reason for row, reason in self.unreadable.items()}
        fields = {
            "rows": len(names),
            "predicted": int(self.known.sum()),
            "unreadable": unreadable,
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


def temporary_path(path: str, process: int) -> str:
    return f"{path}.{process}.tmp"


def quoted(field: bytes) -> bytes:
    special = any(mark in field for mark in (b",", b'"', b"\n", b"\r"))
    return b'"' + field.replace(b'"', b'""') + b'"' if special else field


class Sample(NamedTuple):
    """The organiser's sample submission: its header, file names and category ids."""

    header: list[str]
    names: list[bytes]
    ids: list[str]


def read_sample(path: str) -> Sample | None:
    """Read the sample; None when it is missing, unreadable, or has other than two or three columns."""
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


def column_names(kind: str, sample: Sample | None) -> list[str]:
    """The header: `two`, `three`, `binary`, or `sample` for the organiser's, else three."""
    if sample and (kind == "sample" or (kind == "binary" and len(sample.header) == 3)):
        return sample.header
    return list({"two": COLUMNS[:2], "binary": BINARY}.get(kind, COLUMNS))


def in_sample_order(names: list[bytes], sample: Sample | None) -> tuple[list[bytes], list[bytes]]:
    """The names in the table's order, and the labels to write for them.

    Both follow the sample when it lists exactly these files, with or without their suffixes, or numbers the rows of a
    .npz from 0 or 1.
    """
    if sample is None or len(sample.names) != len(names):
        return names, names
    if sorted(sample.names) == names:
        return sample.names, sample.names
    files = {os.path.splitext(name)[0]: name for name in names}
    if sorted(sample.names) == sorted(files):
        return [files[label] for label in sample.names], sample.names
    numbered = all(name.rpartition(b"/")[2].isdigit() for name in names)  # photographs have a suffix
    if numbered and all(label.isdigit() and len(label) < 19 for label in sample.names):
        rows = [int(label) for label in sample.names]
        for first in (0, 1):
            if sorted(rows) == list(range(first, first + len(names))):
                return [names[row - first] for row in rows], sample.names
    return names, names
