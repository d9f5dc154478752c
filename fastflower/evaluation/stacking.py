"""Stacking as a model to keep: fitted on all out-of-fold logits, saved as text, and applied to predicted images.

The members' logits come from the predictor, so that images are read and cut as in a hand-in. The hand-in itself cannot
hold a stacker: it runs torch alone.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from scipy.special import softmax

from fastflower.core import files, runs
from fastflower.core.errors import EnvironmentFault, InputError
from fastflower.core.records import read_record, write_record
from fastflower.core.tables import write_csv
from fastflower.evaluation import meta_learners
from fastflower.evaluation.logits import RunLogits, reduce_views

FILE = "stacking.json"  # below results/results/<exp>/


@dataclass(frozen=True, kw_only=True)
class Stacker:
    """stacking.json: a meta-learner on the log-probabilities of these runs.

    present: the class_idx that it was trained on. booster: LightGBM's text of the trees, or empty; else coefficients
    (C, M * C) and intercepts (C,) of the logistic regression, of one row for two classes.
    """

    FORMAT: ClassVar[int] = 1
    REMEDY: ClassVar[str] = "run python -m fastflower.ensemble with --save again"

    method: str
    runs: list[str]
    class_ids: list[str]
    present: list[int]
    booster: str
    coefficients: list[list[float]]
    intercepts: list[float]

    def log_probabilities(self, stack: np.ndarray) -> np.ndarray:
        """Logits (M, N, C) of the runs, in their order -> log-probabilities (N, C)."""
        inputs = meta_learners.features(stack)
        if self.booster:
            from lightgbm import Booster

            values = np.asarray(Booster(model_str=self.booster).predict(inputs))
            probabilities = np.stack([1 - values, values], 1) if values.ndim == 1 else values
        else:
            scores = inputs @ np.array(self.coefficients).T + np.array(self.intercepts)
            both = np.concatenate([np.zeros_like(scores), scores], 1) if scores.shape[1] == 1 else scores
            probabilities = softmax(both, axis=1)
        log_p = np.full((stack.shape[1], len(self.class_ids)), np.log(1e-12))
        log_p[:, self.present] = np.log(np.maximum(probabilities, 1e-12))
        return log_p


def fit(sets: Sequence[RunLogits]) -> Stacker:
    """The stacker of these runs, fitted on all their images: LightGBM where it is installed, else logistic."""
    stack, labels = np.stack([run.logits for run in sets]), sets[0].class_idx
    trees = importlib.util.find_spec("lightgbm") is not None
    model = (meta_learners.fit_lightgbm if trees else meta_learners.fit_logistic)(stack, labels)
    return Stacker(
        method="LightGBM stacking" if trees else "logistic stacking",
        runs=[run.name for run in sets],
        class_ids=list(sets[0].info.class_ids),
        present=[int(label) for label in model.classes_],
        booster=model.booster_.model_to_string() if trees else "",
        coefficients=[] if trees else model.coef_.tolist(),
        intercepts=[] if trees else model.intercept_.tolist(),
    )


def save(exp: str, stacker: Stacker) -> Path:
    """Write an experiment's stacker; returns its path."""
    path = runs.RESULTS / exp / FILE
    write_record(path, stacker)
    return path


def predict(exp: str, source: Path, table: Path) -> int:
    """Write the stacker's table of a folder of photographs or a .npz of pairs; returns the number of rows.

    The predictor runs the programs that evaluate wrote for all members. Raises InputError when the stacker's runs are
    not among them, or the predictor's message when it fails.
    """
    path, programs = runs.RESULTS / exp / FILE, runs.MODELS / exp / "programs"
    if not path.is_file():
        raise InputError(f"no {path}; run python -m fastflower.ensemble with --save first")
    stacker = read_record(path, Stacker)
    if not (programs / "bundle.json").is_file():
        raise InputError(f"no programs in {programs}; run python -m fastflower.evaluate, which writes them")
    description = json.loads((programs / "bundle.json").read_text(encoding="utf-8"))
    with files.scratch_folder("stacking") as folder:
        logits, rows = _run_predictor(source, programs, folder)
    stack = _by_run(stacker, description, logits)
    log_p = stacker.log_probabilities(stack)
    write_csv(table, _rows(rows, stacker, softmax(log_p, axis=1)), tuple(rows[0]))
    return len(rows)


def _run_predictor(source: Path, programs: Path, folder: Path) -> tuple[np.ndarray, list[dict[str, str]]]:
    """The logits (N, members, views, C) and the rows of the table that the predictor writes."""
    arguments = [str(source), str(folder / "table.csv"), "--bundle", str(programs)]
    done = subprocess.run(
        [
            sys.executable,
            str(runs.shipped("code") / "predict.py"),
            *arguments,
            "--logits",
            str(folder / "logits.npz"),
        ],
        capture_output=True,
        text=True,
    )
    if done.returncode or not (folder / "logits.npz").is_file():
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise InputError(f"the predictor failed on {source}: {lines[-1] if lines else 'without a message'}")
    with open(folder / "table.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return np.load(folder / "logits.npz")["logits"], rows


def _by_run(stacker: Stacker, description: dict[str, Any], logits: np.ndarray) -> np.ndarray:
    """The predictor's logits as those of the stacker's runs (M, N, C): the mean over each run's members."""
    members: dict[str, list[int]] = {}
    for position, member in enumerate(description["members"]):
        name = runs.parse_member(Path(f"{member['name']}.pth"))
        if name is not None:
            members.setdefault(f"{name.backbone} seed {name.seed}", []).append(position)
    missing = [run for run in stacker.runs if run not in members]
    if missing:
        raise InputError(
            f"the stacker needs {missing[0]}, which evaluate has not exported; run evaluate again"
        )
    if stacker.class_ids != description["class_ids"]:
        raise EnvironmentFault("the stacker was fitted for other classes; run ensemble with --save again")
    reduced = [
        reduce_views(list(np.moveaxis(logits[:, m], 1, 0)), description["reduce"])
        for m in range(logits.shape[1])
    ]
    return np.stack([np.mean([reduced[m] for m in members[run]], axis=0) for run in stacker.runs])


def _rows(rows: list[dict[str, str]], stacker: Stacker, probabilities: np.ndarray) -> list[dict[str, str]]:
    """The predictor's rows with the stacker's class and confidence, or probability of the second class."""
    result = []
    for row, p in zip(rows, probabilities, strict=True):
        changed = {"category_id": stacker.class_ids[int(p.argmax())], "confidence": f"{p.max():.6f}"}
        changed["probability"] = f"{p[1]:.6f}"
        result.append({name: changed.get(name, cell) for name, cell in row.items()})
    return result
