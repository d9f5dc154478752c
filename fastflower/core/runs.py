"""The paths of a run's files, the names of checkpoints, and the event log.

All paths are relative to the current directory: commands run from the repository root.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastflower.core.files import finite
from fastflower.core.own_parts import is_own

MODELS = Path("results/model")
RESULTS = Path("results/results")
BUNDLE = MODELS / "bundle"
PRETRAINED = MODELS / "pretrained_model"
SUBMISSION = RESULTS / "submission.csv"
COMPARISON = RESULTS / "compare.html"
FIGURES = RESULTS / "figures"  # of compare.md
COMBINATION = RESULTS / "ensemble.json"  # of the runs of several experiments
METRIC_KINDS = (  # of checkpoints: the best by a metric, by a weighted sum, by a metric of the user's own
    *(
        "best_clean",
        "best_combo",
        "best_f1",
        "best_macro_f1",
        "best_macro_recall",
        "best_log_loss",
        "best_auc",
    ),
    *("best_kappa", "best_corrupted", "best_weighted", "best_own"),
)
TRAINED_KINDS = (*METRIC_KINDS, "ema_best", "swa", "last", "refit")
UNSCORED_KINDS = ("last", "refit")  # members only for a pattern that begins with them
SOUP_CANDIDATES = (  # in the order tried
    *("best_combo", "ema_best", "best_clean"),
    *(kind for kind in METRIC_KINDS if kind not in ("best_combo", "best_clean")),
    "swa",
)
KINDS = (*TRAINED_KINDS, "soup")

_EVENT = re.compile(rb'(?P<text>\{.*), "checksum": "(?P<checksum>[0-9a-f]{8})"\}', re.DOTALL)
_MEMBER = re.compile(
    r"(?P<kind>\w+?)__(?P<backbone>.+)__fold(?P<fold>\d+)_seed(?P<seed>\d+)"
    r"_epoch(?P<epoch>\d+)_score(?P<score>-?\d+\.\d+)\.pth"
)


@dataclass(frozen=True)
class Run:
    """One training: a backbone of an experiment on one fold with one seed."""

    exp: str
    backbone: str
    fold: int
    seed: int

    @property
    def stem(self) -> str:
        """The part of file names that identifies this run in the experiment's folders."""
        return f"{self.backbone}__fold{self.fold}_seed{self.seed}"

    @property
    def model_dir(self) -> Path:
        return MODELS / self.exp

    @property
    def results_dir(self) -> Path:
        return RESULTS / self.exp

    @property
    def meta_dir(self) -> Path:
        return self.results_dir / "meta"

    @property
    def events_path(self) -> Path:
        return self.results_dir / "events.jsonl"

    @property
    def end_path(self) -> Path:
        """The file that is written at the end of training, early or not."""
        return self.meta_dir / f"early_stop_{self.stem}.json"

    @property
    def lock_path(self) -> Path:
        """The file whose lock the process holds that trains this run."""
        return self.model_dir / f".{self.stem}.lock"

    def checkpoint_path(self, kind: str, epoch: int, score: float) -> Path:
        """The path of a checkpoint; epochs count from 1."""
        name = f"{kind}__{self.stem}_epoch{epoch}_score{score:.4f}.pth"
        return self.model_dir / name

    def checkpoints(self, kind: str) -> list[Path]:
        """The checkpoints of this run and kind, oldest epoch first."""
        prefix = f"{kind}__{self.stem}_epoch"
        checkpoints = [
            (name.epoch, path)
            for path in self.model_dir.glob("*.pth")
            if (name := parse_member(path)) and path.name.startswith(prefix)
        ]
        return [path for _, path in sorted(checkpoints)]


@dataclass(frozen=True)
class MemberName:
    """The fields of a checkpoint's file name."""

    kind: str
    backbone: str
    fold: int
    seed: int
    epoch: int
    score: float


def parse_member(path: Path) -> MemberName | None:
    """The fields of a checkpoint's file name, or None for any other file."""
    match = _MEMBER.fullmatch(path.name)
    if match is None or match["kind"] not in KINDS:
        return None
    return MemberName(
        kind=match["kind"],
        backbone=match["backbone"],
        fold=int(match["fold"]),
        seed=int(match["seed"]),
        epoch=int(match["epoch"]),
        score=float(match["score"]),
    )


def best_kind(metric: str) -> str:
    """The kind of checkpoint that a metric chooses: best_<its name>, best_weighted or best_own."""
    kind = f"best_{metric}"
    if kind in METRIC_KINDS:
        return kind
    return "best_own" if is_own(metric) else "best_weighted"


def member_pattern(pattern: str, metric: str) -> str:
    """The glob of an experiment's members: `auto` is the best by the metric."""
    return f"{best_kind(metric)}__*.pth" if pattern == "auto" else Path(pattern).name


def find_members(exp: str, pattern: str, *, metric: str) -> list[Path]:
    """One checkpoint for each (backbone, fold, seed) of an experiment that matches the pattern.

    Of several kinds the best by the metric comes first, then those of SOUP_CANDIDATES, then soups; `last` is for
    resuming, and counts only when the pattern begins with it. Of several epochs the newest is taken. A leading
    `results/model/` in the pattern is allowed and ignored.
    """
    pattern = member_pattern(pattern, metric)
    preferred = list(dict.fromkeys((best_kind(metric), *SOUP_CANDIDATES, "soup")))
    preferred += [kind for kind in UNSCORED_KINDS if pattern.startswith(kind)]
    found: dict[tuple[str, int, int], tuple[tuple[int, int], Path]] = {}
    for path in sorted((MODELS / exp).glob(pattern)):
        name = parse_member(path)
        if name is None or name.kind not in preferred:
            continue
        key, rank = (name.backbone, name.fold, name.seed), (-preferred.index(name.kind), name.epoch)
        if key not in found or rank > found[key][0]:
            found[key] = (rank, path)
    return [path for _, (_, path) in sorted(found.items())]


def shipped(name: str) -> Path:
    """The folder `code` or `recipes` that comes with the package: in the repository, or where setup.py put it."""
    package = Path(__file__).resolve().parents[1]
    in_repository = package.parent / name
    return in_repository if (package.parent / "pyproject.toml").is_file() else package / "shipped" / name


def append_event(path: Path, row: dict[str, Any]) -> None:
    """Append one line to events.jsonl in a single write, so that runs of an experiment can share the file.

    Its last field is a CRC-32 of the others.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(finite(row), ensure_ascii=False, allow_nan=False).encode()
    line = text[:-1] + b', "checksum": "%08x"}\n' % zlib.crc32(text)
    with open(path, "a+b", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            line = line if file.read(1) == b"\n" else b"\n" + line  # behind a line that a kill cut
        file.write(line)
        os.fsync(file.fileno())


def read_events(path: Path, notices: list[str]) -> list[dict[str, Any]]:
    """The rows of events.jsonl; of an epoch that a resumed run repeated, only the last row.

    Lines that are damaged, or were cut by a kill, are left out, and counted in a line that is appended to `notices`.
    """
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    damaged = 0
    for line in filter(None, lines):
        match = _EVENT.fullmatch(line)
        if match is None or zlib.crc32(match["text"] + b"}") != int(match["checksum"], 16):
            damaged += 1
            continue
        row = json.loads(match["text"] + b"}")
        identity = (row.get("fold"), row.get("seed"), row.get("backbone"), row.get("event"), row.get("epoch"))
        rows.pop(identity, None)
        rows[identity] = row
    if damaged:
        notices.append(
            f"{path}: {damaged} of its rows are damaged, cut by a kill, or of an earlier version; they are left out"
        )
    return list(rows.values())
