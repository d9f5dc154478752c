"""The record of an experiment's last export, hand_in.json: the gates that its bundle passed."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from fastflower.core import runs
from fastflower.core.files import digest
from fastflower.core.records import write_record

FILE = "hand_in.json"  # below results/results/<exp>


@dataclass(frozen=True)
class Gate:
    """One line of the table: the measured value, the allowed one, and whether it passed; None: not measurable here."""

    name: str
    got: str
    allowed: str
    passed: bool | None


@dataclass(frozen=True, kw_only=True)
class HandIn:
    """An export: `bundle` is the digest of the bundle.json that it published, `written` its time in seconds."""

    FORMAT: ClassVar[int] = 1
    REMEDY: ClassVar[str] = "run python -m fastflower.export again"

    bundle: str
    written: float
    dtype: str
    gates: list[Gate]
    notes: list[str]


def write_hand_in(exp: str, dtype: str, *, gates: list[Gate], notes: list[str]) -> Path:
    """Write the record of the bundle that was just published, to one of its experiments."""
    path = runs.RESULTS / exp / FILE
    written = round(time.time(), 1)
    write_record(path, HandIn(bundle=bundle_digest(), written=written, dtype=dtype, gates=gates, notes=notes))
    return path


def bundle_digest() -> str:
    """The digest of the published bundle.json; empty without one."""
    path = runs.BUNDLE / "bundle.json"
    return digest(path.read_bytes()) if path.is_file() else ""
