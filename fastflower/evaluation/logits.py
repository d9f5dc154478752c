"""Out-of-fold logits: one file for each member, assembled into sets in which every image occurs exactly once."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

import numpy as np
from scipy.special import softmax

from fastflower.core import checkpoint, files
from fastflower.core.errors import CorruptionError, InputError
from fastflower.core.records import from_plain, to_plain
from fastflower.data.labels import class_differences
from fastflower.evaluation.records import REMEDY

PER_IMAGE = ("logits", "single", "class_idx", "index", "fold", "filename")
ARRAYS = (*PER_IMAGE, "corrupt", "combos")


@dataclass(frozen=True, kw_only=True)
class LogitsInfo:
    """Description of a set of logits; the hashes are those of classes.csv and folds.csv."""

    name: str
    class_ids: list[str]
    class_hash: str
    folds_hash: str


@dataclass(frozen=True, kw_only=True)
class TrainedInfo(LogitsInfo):
    """Description of a member or of a run; mb: of weights in half precision, ms: all views of one image."""

    backbone: str
    seed: int
    mb: float
    ms: float

    @property
    def run(self) -> tuple[str, int]:
        """The run it belongs to."""
        return self.backbone, self.seed


@dataclass(frozen=True, kw_only=True)
class MemberInfo(TrainedInfo):
    """A member and the way it was evaluated: the description inside its .npz of logits.

    seal: checksum of the checkpoint, None without one; stored: clean top-1 that training measured; size: (height,
    width) at the end of training; views: (height, width, mirrored) of each.
    """

    FORMAT: ClassVar[int] = 3

    kind: str = "logits"
    checkpoint: str
    seal: int | None
    fold: int
    epoch: int
    weights: str
    head: str
    stored: float | None
    size: tuple[int, int]
    views: list[tuple[int, int, bool]]


@dataclass(frozen=True, kw_only=True)
class RunInfo(TrainedInfo):
    """A run, the members of one (backbone, seed); mb and ms are the sums over its members."""

    folds: list[int]


@dataclass(frozen=True, kw_only=True)
class FusedInfo(LogitsInfo):
    """The weighted mean of runs, by their names."""

    folds: list[int]
    runs: list[str]


Info = TypeVar("Info", bound=LogitsInfo, covariant=True)
T = TypeVar("T", bound=LogitsInfo)


@dataclass(frozen=True)
class Logits(Generic[Info]):
    """The logits of a member on its validation images, of a run over its folds, or of several runs fused.

    N images, C classes, K corruptions. logits (N, C) float32: mean over the views; single (N, C): one view at the
    trained size; corrupt (K, N, C): one view of each corrupted copy; class_idx, index (row of folds.csv), fold (N,)
    int64; filename (N,) str; combos (K, 2) str: kind and level.
    """

    logits: np.ndarray
    single: np.ndarray
    corrupt: np.ndarray
    class_idx: np.ndarray
    index: np.ndarray
    fold: np.ndarray
    filename: np.ndarray
    combos: np.ndarray
    info: Info

    def __len__(self) -> int:
        return len(self.class_idx)

    @property
    def name(self) -> str:
        """Its name in messages and tables."""
        return self.info.name

    @property
    def run(self: Logits[TrainedInfo]) -> tuple[str, int]:
        """The (backbone, seed) of a member or a run."""
        return self.info.run

    def take(self, rows: np.ndarray) -> Logits[Info]:
        """The images of these rows (N',), in this order."""
        arrays = {name: getattr(self, name)[rows] for name in PER_IMAGE}
        return replace(self, corrupt=self.corrupt[:, rows], **arrays)


MemberLogits = Logits[MemberInfo]
RunLogits = Logits[RunInfo]


def logits_path(folder: Path, *, backbone: str, fold: int, seed: int) -> Path:
    """The file of a member's logits."""
    return folder / f"{backbone}__fold{fold}_seed{seed}.npz"


def save_logits(folder: Path, member: MemberLogits) -> Path:
    """Write a member's logits atomically, with a checksum of the whole file; returns the file."""
    check_finite(member)
    info = member.info
    path = logits_path(folder, backbone=info.backbone, fold=info.fold, seed=info.seed)
    description = json.dumps({"format": info.FORMAT, **to_plain(info)})
    with files.replacing(path) as temporary:
        with open(temporary, "wb") as file:
            np.savez(file, info=np.array(description), **{name: getattr(member, name) for name in ARRAYS})
        checkpoint.add_seal(temporary)
    return path


def load_logits(path: Path) -> MemberLogits:
    """Read a member's logits.

    Raises InputError when the file is missing, of another version or holds no logits, CorruptionError when it is
    damaged or holds NaN or infinity.
    """
    if not path.is_file():
        raise InputError(f"no logits {path}; run python -m fastflower.evaluate first")
    sealed = checkpoint.check_seal(path, REMEDY)
    try:
        with np.load(path, allow_pickle=False) as file:
            content = json.loads(str(file["info"]))
            arrays = {name: file[name] for name in ARRAYS}
        version = content.pop("format")
        info = from_plain(MemberInfo, content) if version == MemberInfo.FORMAT else None
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptionError(f"{path}: not readable ({error}); {REMEDY}") from None
    if info is None:
        raise InputError(f"{path} has format {version}, this version reads {MemberInfo.FORMAT}; {REMEDY}")
    if not sealed:
        raise CorruptionError(f"{path}: cut short or damaged (its checksum is missing); {REMEDY}")
    if info.kind != "logits":
        raise InputError(f"{path} holds {info.kind}, not logits; {REMEDY}")
    member = Logits(**arrays, info=info)
    check_finite(member)
    return member


def check_finite(data: Logits[LogitsInfo]) -> None:
    """Raise CorruptionError for NaN and infinity: their argmax is a class, so later steps would not notice."""
    bad = ~(np.isfinite(data.logits).all(1) & np.isfinite(data.single).all(1))
    if data.corrupt.size:
        bad |= ~np.isfinite(data.corrupt).all((0, 2))
    if bad.any():
        raise CorruptionError(
            f"{data.name}: {int(bad.sum())} images have logits that are not finite, first {data.filename[bad][0]}; "
            "the member diverged, choose an older checkpoint"
        )


def check_compatible(sets: Sequence[Logits[LogitsInfo]]) -> None:
    """Raise InputError for sets of different class maps, folds or corruptions."""
    first = sets[0]
    for other in sets[1:]:
        a, b = first.info, other.info
        difference = class_differences(a.class_ids, b.class_ids)
        for noun, ours, theirs, detail in (
            ("class maps", a.class_hash, b.class_hash, difference and f", {difference}"),
            ("folds", a.folds_hash, b.folds_hash, ""),
        ):
            if ours != theirs:
                raise InputError(
                    f"{first.name} and {other.name} have different {noun} ({ours}, {theirs}{detail}); "
                    "evaluate only members of one conversion"
                )
        if first.logits.shape[1] != other.logits.shape[1]:
            raise InputError(
                f"{first.name} has {first.logits.shape[1]} classes, {other.name} has {other.logits.shape[1]}; "
                "evaluate only members of one class map"
            )
        if not np.array_equal(first.combos, other.combos):
            raise InputError(f"{first.name} and {other.name} saw different corruptions; {REMEDY}")


def missing_folds(members: Sequence[MemberLogits], folds: np.ndarray) -> list[int]:
    """The folds of folds.csv's column (-1: always trained on) that no member of this run validated on."""
    present = {member.info.fold for member in members}
    return [fold for fold in sorted(set(folds[folds >= 0].tolist())) if fold not in present]


def assemble(members: Sequence[MemberLogits], folds: np.ndarray) -> RunLogits:
    """The members of one run, one for each fold, as one set sorted by index; `folds` (rows,) is folds.csv's column.

    Raises InputError unless every image of the covered folds occurs exactly once, in the fold it was held out of.
    """
    check_compatible(members)
    for member in members:
        _check_held_out(member, folds)
    first = members[0].info
    covered = sorted(member.info.fold for member in members)
    info = RunInfo(
        name=f"{first.backbone} seed {first.seed}",
        backbone=first.backbone,
        seed=first.seed,
        folds=covered,
        class_ids=first.class_ids,
        class_hash=first.class_hash,
        folds_hash=first.folds_hash,
        mb=sum(member.info.mb for member in members),
        ms=sum(member.info.ms for member in members),
    )
    run = Logits(
        corrupt=np.concatenate([member.corrupt for member in members], axis=1),
        combos=members[0].combos,
        info=info,
        **{name: np.concatenate([getattr(member, name) for member in members]) for name in PER_IMAGE},
    )
    values, counts = np.unique(run.index, return_counts=True)
    if (counts > 1).any():
        repeated = run.filename[run.index == values[counts > 1][0]][0]
        raise InputError(f"{run.name}: {repeated} occurs {counts.max()} times; give one member for each fold")
    absent = np.setdiff1d(np.flatnonzero(np.isin(folds, covered)), values)
    if len(absent):
        raise InputError(
            f"{run.name}: {len(absent)} images of folds {covered} are missing, first row {absent[0]} of folds.csv; "
            "run convert, then evaluate again"
        )
    return run.take(np.argsort(run.index, kind="stable"))


def of_experiment(run: RunLogits, exp: str) -> RunLogits:
    """The run with its experiment's name before its own, `s2/resnet18 seed 42`, to stand beside runs of others."""
    return replace(run, info=replace(run.info, name=f"{exp}/{run.name}"))


def _check_held_out(member: MemberLogits, folds: np.ndarray) -> None:
    inside = (member.index >= 0) & (member.index < len(folds))
    stray = ~inside
    stray[inside] = folds[member.index[inside]] != member.info.fold
    if stray.any():
        raise InputError(
            f"{member.name}: {int(stray.sum())} images were not held out of fold {member.info.fold}, "
            f"first {member.filename[stray][0]}; its folds are not those of folds.csv, train it again"
        )


def align(sets: Sequence[Logits[T]]) -> list[Logits[T]]:
    """The sets cut down to the images that all of them cover, in the order of folds.csv."""
    check_compatible(sets)
    shared = sets[0].index
    for other in sets[1:]:
        shared = np.intersect1d(shared, other.index)
    if not len(shared):
        raise InputError(
            f"{' and '.join(data.name for data in sets)} have no fold in common; train them on the same folds"
        )
    reduced = [data.take(np.flatnonzero(np.isin(data.index, shared))) for data in sets]
    return [data.take(np.argsort(data.index, kind="stable")) for data in reduced]


def fuse(
    sets: Sequence[RunLogits], weights: np.ndarray | None = None, *, space: str = "logits"
) -> Logits[FusedInfo]:
    """The weighted mean of the logits, or probabilities, of M runs over the images that all of them cover.

    weights: (M,), or (M, N) with separate weights for each of the N common images; None: equal.
    """
    aligned = align(sets)
    first = aligned[0]
    info = FusedInfo(
        name="fused",
        folds=sorted({int(fold) for fold in first.fold}),
        runs=[run.name for run in sets],
        class_ids=first.info.class_ids,
        class_hash=first.info.class_hash,
        folds_hash=first.info.folds_hash,
    )
    return Logits(
        logits=combine([run.logits for run in aligned], weights, space),
        single=combine([run.single for run in aligned], weights, space),
        corrupt=combine([run.corrupt for run in aligned], weights, space),
        class_idx=first.class_idx,
        index=first.index,
        fold=first.fold,
        filename=first.filename,
        combos=first.combos,
        info=info,
    )


def reduce_views(views: Sequence[np.ndarray], how: str) -> np.ndarray:
    """The logits of V views (N, C) as one prediction: their mean, or for `vote` the log of their shares of votes.

    The mean votes too, with its probabilities, which breaks ties and leaves no class without any. Float32 (N, C).
    """
    # twin of Networks.fuse in code/networks.py
    mean = average(list(views))
    if how == "mean":
        return mean
    classes = np.arange(mean.shape[1])
    votes = np.sum([logits.argmax(1)[:, None] == classes for logits in views], axis=0)
    shares: np.ndarray = np.log((votes + softmax(mean.astype(np.float64), axis=1)) / (len(views) + 1))
    return shares.astype(np.float32)


def combine(arrays: list[np.ndarray], weights: np.ndarray | None, space: str) -> np.ndarray:
    """The weighted mean of M arrays of logits (..., N, C), or the log of that of their probabilities."""
    if space == "logits":
        return average(arrays, weights)
    mean = average([softmax(array.astype(np.float64), axis=-1) for array in arrays], weights)
    log: np.ndarray = np.log(np.maximum(mean, 1e-30))
    return log.astype(np.float32)


def family_weights(backbones: list[str]) -> np.ndarray:
    """Weights (M,) of M runs, summing to 1, that are equal in sum for every backbone."""
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
