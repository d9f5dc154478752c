"""The final content of a project's files without what depends on the run: times, durations, starts, file states.

Two projects on which the same commands ended have equal contents, whatever was killed in between.
"""

from __future__ import annotations

import csv
import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from fastflower.bench.attack import fingerprint

TIMES = {  # keys of records, events and training states that hold a time, a duration or a speed
    *("time", "written", "seconds", "total_seconds", "eval_seconds", "saving_seconds", "minutes"),
    *("images_per_s", "wait_share", "wait", "total_wct", "iteration_wct", "epoch_wct", "batch_wct"),
    *("first_row_s", "ms_per_image", "ms", "pruned_ms", "datetime_start", "datetime_complete"),
}
# keys that describe a process or a resume
OF_THE_START = {"command", "from_epoch", "from_step", "worker_id"}
DROPPED = TIMES | OF_THE_START | {"checksum"}
# a folder for each start of a training
STARTS = re.compile(r"meta/[^/]+/\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d(/|$)")
UNCOMPARED = (
    "*.log",  # for people; its lines begin with the time
    "SHA256",  # of files that are compared themselves
)
UNCOUNTED = (
    "*contents.json",  # hashes by inode and time of change, for files that are old enough; else all are read
    "*.previous.pth",  # the state before the last: a training that was told to stop has saved once more
)
BY_ORDER = (  # of the training that came last, which is chance where they run side by side
    *("results/model/*/last.pth", "results/results/*/meta/recipe.yaml"),
)
LEFTOVER = re.compile(r"(\.tmp|\.lock|\.old|\.new|\.rename|\.incomplete|\.download)(/|$)")
CLOCKS = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d(:\d\d)?|\d+(\.\d+)? ?(ms|s|min|images/s)\b|\d+:\d\d(:\d\d)?")


def contents(folder: Path, *, but: tuple[str, ...] = ()) -> dict[str, str]:
    """A digest of each file's content, by its path in the folder; empty folders count as files.

    Files that match a pattern of `but` need only be there.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if STARTS.search(name) or any(map(path.match, UNCOUNTED)) or (path.is_dir() and any(path.iterdir())):
            continue
        if path.is_dir() or any(path.match(pattern) for pattern in but):
            found[name] = "folder" if path.is_dir() else "file"
        else:
            found[name] = fingerprint(_value(path, name))
    return found


def leftovers(folder: Path) -> list[str]:
    """Temporary files and locks in a folder."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    return sorted(name for name in names if LEFTOVER.search(name))


def differences(first: dict[str, str], second: dict[str, str]) -> list[str]:
    """The names of files that only one of two contents has, or that differ."""
    return sorted(name for name in {*first, *second} if first.get(name) != second.get(name))


def _value(path: Path, name: str) -> Any:
    if any(Path(name).match(pattern) for pattern in UNCOMPARED):
        return ""
    if path.suffix == ".pth" and name.startswith("results/model/"):
        from fastflower.core import checkpoint

        kept = checkpoint.load(path)
        return without_times([kept.tensors, kept.meta, kept.training_state])
    return value_of(name, path.read_bytes())


def value_of(name: str, data: bytes) -> Any:
    """The comparable value of a file's bytes, by its name's ending."""
    ending = Path(name).suffix
    if ending == ".json":
        return without_times(json.loads(data))
    if ending == ".journal":  # trainings that run side by side end in any order
        return sorted(map(repr, without_times(json.loads(data))["entries"]))
    if ending == ".npz":
        return _arrays(data)
    if ending == ".jsonl":
        return _events(data)
    if ending == ".csv":
        text = data.decode("utf-8", "surrogateescape")
        rows = csv.DictReader(io.StringIO(text))
        # a campaign's table tells trainings that were done from those that an earlier command had finished
        return [without_times({**row, "state": ""}) for row in rows] if ",state," in text else data
    if ending in (".html", ".md"):
        return CLOCKS.sub("", data.decode())
    if ending == ".zip":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = [entry for entry in archive.namelist() if not STARTS.search(entry)]
            return {entry: _entry(entry, archive.read(entry)) for entry in entries}
    return data


def _entry(name: str, data: bytes) -> Any:
    return "" if any(Path(name).match(pattern) for pattern in UNCOMPARED) else value_of(name, data)


def _arrays(data: bytes) -> Any:
    """The arrays of a .npz; one without dimensions is JSON."""
    with np.load(io.BytesIO(data)) as arrays:
        return {
            name: without_times(json.loads(str(array))) if array.shape == () else array
            for name, array in arrays.items()
        }


def _events(data: bytes) -> list[Any]:
    """The rows of epochs and ends by run, of repeated ones the last; a resume adds a row of its start."""
    rows: dict[tuple[str, str, int | None], Any] = {}
    for line in data.splitlines():
        row = json.loads(line)
        if row["event"] in ("epoch", "end"):
            run = str([row.get(field) for field in ("fold", "seed", "backbone")])
            key = run, row["event"], row.get("epoch")
            rows.pop(key, None)
            rows[key] = without_times(row)
    return [rows[key] for key in sorted(rows, key=lambda key: key[0])]


def without_times(value: Any) -> Any:
    """A tree without the keys in DROPPED, and without the measured value of the gate of latency."""
    if isinstance(value, dict):
        latency = value.get("name") == "latency" and "allowed" in value
        return {
            name: without_times(item)
            for name, item in value.items()
            if name not in DROPPED and not (latency and name == "got")
        }
    return [without_times(item) for item in value] if isinstance(value, (list, tuple)) else value
