"""Out-of-fold logits: one file for each member, assembled so that every image occurs exactly once.

`Logits` holds what a member says about its own validation part, a whole out-of-fold set, or a fusion of
several; everything downstream reads only this.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastflower.core import files
from fastflower.core.errors import CorruptionError, InputError
from fastflower.data.labels import differing

BY_IMAGE = ("logits", "single", "class_idx", "index", "fold", "filename")
ARRAYS = (*BY_IMAGE, "corrupt", "combos")


@dataclass(frozen=True)
class Logits:
    """N images, C classes, K corruptions.

    logits (N, C) float32: mean over the views; single (N, C): one view at the trained size;
    corrupt (K, N, C): one view of each corrupted copy; class_idx, index (row of folds.csv), fold (N,) int64;
    filename (N,) str; combos (K, 2) str: kind and level; about: plain description of the member or set.
    """

    logits: np.ndarray
    single: np.ndarray
    corrupt: np.ndarray
    class_idx: np.ndarray
    index: np.ndarray
    fold: np.ndarray
    filename: np.ndarray
    combos: np.ndarray
    about: dict[str, Any]

    def __len__(self) -> int:
        return len(self.class_idx)

    @property
    def name(self) -> str:
        """What messages and tables call it."""
        return str(self.about.get("name", "logits"))

    @property
    def run(self) -> tuple[str, int]:
        """The (backbone, seed) a member belongs to."""
        return str(self.about["backbone"]), int(self.about["seed"])

    def take(self, rows: np.ndarray) -> Logits:
        """The same set, only these rows (N',), in this order."""
        parts = {name: getattr(self, name)[rows] for name in BY_IMAGE}
        return replace(self, corrupt=self.corrupt[:, rows], **parts)


def member_file(folder: Path, about: Mapping[str, Any]) -> Path:
    """Where the logits of the member that `about` describes lie."""
    return folder / f"{about['backbone']}__fold{about['fold']}_seed{about['seed']}.npz"


def save_logits(path: Path, member: Logits) -> None:
    """Write a member's logits atomically."""
    check_finite(member)
    buffer = io.BytesIO()
    np.savez(
        buffer, about=np.array(json.dumps(member.about)), **{name: getattr(member, name) for name in ARRAYS}
    )
    files.write_atomic(path, buffer.getvalue())


def load_logits(path: Path) -> Logits:
    """Read a member's logits; CorruptionError when the file is damaged, InputError when it is missing or foreign."""
    if not path.is_file():
        raise InputError(f"no logits {path}; run python -m fastflower.evaluate first")
    try:
        with np.load(path, allow_pickle=False) as file:
            about = json.loads(str(file["about"]))
            member = Logits(**{name: file[name] for name in ARRAYS}, about=about)
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, KeyError) as error:
        raise CorruptionError(
            f"{path}: not readable ({error}); run python -m fastflower.evaluate again"
        ) from None
    if member.about.get("kind", "logits") != "logits":
        raise InputError(
            f"{path} holds {member.about['kind']}, not logits; run python -m fastflower.evaluate again"
        )
    check_finite(member)
    return member


def check_finite(member: Logits) -> None:
    """The argmax of NaN is a class; so nothing that is not finite passes."""
    bad = ~(np.isfinite(member.logits).all(1) & np.isfinite(member.single).all(1))
    if member.corrupt.size:
        bad |= ~np.isfinite(member.corrupt).all((0, 2))
    if bad.any():
        raise CorruptionError(
            f"{member.name}: {int(bad.sum())} images have logits that are not finite, first {member.filename[bad][0]}; "
            "the member diverged, choose an older checkpoint"
        )


def check_alike(members: list[Logits]) -> None:
    """Refuse members of different class maps, folds or corruptions."""
    first = members[0]
    what = {"class_hash": "class maps", "folds_hash": "folds"}
    for other in members[1:]:
        for key, noun in what.items():
            if first.about.get(key) != other.about.get(key):
                how = (
                    differing(first.about["class_ids"], other.about["class_ids"])
                    if key == "class_hash"
                    else ""
                )
                raise InputError(
                    f"{first.name} and {other.name} have different {noun} ({first.about.get(key)}, "
                    f"{other.about.get(key)}{how and f', {how}'}); evaluate only members of one conversion"
                )
        if first.logits.shape[1] != other.logits.shape[1]:
            raise InputError(
                f"{first.name} has {first.logits.shape[1]} classes, {other.name} has {other.logits.shape[1]}; "
                "evaluate only members of one class map"
            )
        if not np.array_equal(first.combos, other.combos):
            raise InputError(
                f"{first.name} and {other.name} saw different corruptions; run python -m fastflower.evaluate again"
            )


def missing_folds(members: list[Logits], folds: np.ndarray) -> list[int]:
    """The folds of folds.csv (-1: always trained on) that no member of this run validated on."""
    present = {int(member.about["fold"]) for member in members}
    return [fold for fold in sorted(set(folds[folds >= 0].tolist())) if fold not in present]


def assemble(members: list[Logits], folds: np.ndarray) -> Logits:
    """The members of one run, one for each fold, as one set sorted by index; `folds` (rows,) is folds.csv's column.

    Every image of the covered folds must occur exactly once, in the fold it was held out of.
    """
    check_alike(members)
    for member in members:
        _check_held_out(member, folds)
    parts = {name: np.concatenate([getattr(member, name) for member in members]) for name in BY_IMAGE}
    backbone, seed = members[0].run
    covered = sorted(int(member.about["fold"]) for member in members)
    about = {
        "name": f"{backbone} seed {seed}",
        "backbone": backbone,
        "seed": seed,
        "folds": covered,
        "class_hash": members[0].about.get("class_hash"),
        "folds_hash": members[0].about.get("folds_hash"),
        "mb": sum(float(member.about.get("mb", 0)) for member in members),
        "ms": sum(float(member.about.get("ms", 0)) for member in members),
    }
    whole = Logits(
        corrupt=np.concatenate([member.corrupt for member in members], axis=1),
        combos=members[0].combos,
        about=about,
        **parts,
    )
    expected = np.flatnonzero(np.isin(folds, covered))
    values, counts = np.unique(whole.index, return_counts=True)
    if (counts > 1).any():
        twice = whole.filename[whole.index == values[counts > 1][0]][0]
        raise InputError(f"{whole.name}: {twice} occurs {counts.max()} times; give one member for each fold")
    absent = np.setdiff1d(expected, values)
    if len(absent):
        raise InputError(
            f"{whole.name}: {len(absent)} images of folds {covered} are missing, first row {absent[0]} of folds.csv; "
            "run convert, then evaluate again"
        )
    return whole.take(np.argsort(whole.index, kind="stable"))


def _check_held_out(member: Logits, folds: np.ndarray) -> None:
    inside = (member.index >= 0) & (member.index < len(folds))
    stray = ~inside
    stray[inside] = folds[member.index[inside]] != member.about["fold"]
    if stray.any():
        raise InputError(
            f"{member.name}: {int(stray.sum())} images were not held out of fold {member.about['fold']}, "
            f"first {member.filename[stray][0]}; its folds are not those of folds.csv, train it again"
        )


def common(sets: list[Logits]) -> list[Logits]:
    """The same runs over the images that all of them cover, in the same order."""
    check_alike(sets)
    shared = sets[0].index
    for other in sets[1:]:
        shared = np.intersect1d(shared, other.index)
    if not len(shared):
        raise InputError(
            f"{' and '.join(s.name for s in sets)} have no fold in common; train them on the same folds"
        )
    chosen = [s.take(np.flatnonzero(np.isin(s.index, shared))) for s in sets]
    return [s.take(np.argsort(s.index, kind="stable")) for s in chosen]


def fuse(sets: list[Logits], weights: np.ndarray | None = None) -> Logits:
    """The weighted mean of the logits of M runs over the images that all of them cover.

    weights: (M,), or (M, N) where each of the N common images has weights of its own; None: equal.
    """
    aligned = common(sets)
    about = {
        "name": "fused",
        "folds": sorted({int(fold) for fold in aligned[0].fold}),
        "of": [s.name for s in sets],
        "class_hash": sets[0].about.get("class_hash"),
        "folds_hash": sets[0].about.get("folds_hash"),
    }
    return replace(
        aligned[0],
        logits=average([s.logits for s in aligned], weights),
        single=average([s.single for s in aligned], weights),
        corrupt=average([s.corrupt for s in aligned], weights),
        about=about,
    )


def family_weights(backbones: list[str]) -> np.ndarray:
    """Weights that give every backbone the same say, however many runs it has; they sum to 1."""
    families = sorted(set(backbones))
    return np.array([1 / (len(families) * backbones.count(backbone)) for backbone in backbones])


def average(arrays: list[np.ndarray], weights: np.ndarray | None = None) -> np.ndarray:
    """The mean of M float32 arrays (..., N, C) with weights (M,) or (M, N), summed in float64."""
    if weights is None:
        weights = np.full(len(arrays), 1 / len(arrays))
    total = np.zeros(arrays[0].shape, dtype=np.float64)
    for array, weight in zip(arrays, weights, strict=True):
        total += (weight[:, None] if np.ndim(weight) else weight) * array
    return total.astype(np.float32)
