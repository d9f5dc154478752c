"""`bench attack`: flips, cuts and zeroes every kind of file that the product writes, and reads each back.

A tiny project is converted, trained, evaluated and exported. Then each file is damaged at random, with fixed seeds, and
its reader is run. The result is the same, or the damage is refused in one line, or a note says what is left out. A
result that differs in silence, a traceback, a crash and a hang are faults, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import importlib
import io
import os
import random
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from fastflower.bench import tiny_project
from fastflower.bundle import hand_in
from fastflower.bundle.hand_in import HandIn
from fastflower.core import runs
from fastflower.core.errors import InputError, one_line
from fastflower.core.records import read_record, write_record

OUTCOMES = ("same", "refused", "note", "silent", "traceback", "crash", "hang")
FAULTS = OUTCOMES[3:]
SECONDS = 20.0  # that a reader may take
MOST_SHOWN = 5  # faults of a file that are printed
CODE = Path(__file__).resolve().parents[2] / "code"


class Target(NamedTuple):
    """A file to damage, and its reader, which returns the content and appends notes to its argument."""

    name: str
    path: Path
    read: Callable[[list[str]], Any]


class Hang(BaseException):
    """A reader that takes more than SECONDS."""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m fastflower.bench attack", description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=600, help="damages of each file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="only files with this text in their names")
    args = parser.parse_args(argv)
    if args.count < 1:
        raise InputError(f"--count {args.count}: must be 1 or more")
    before, faults, total = Path.cwd(), 0, 0
    with tempfile.TemporaryDirectory(prefix="fastflower-attack-") as home:
        try:
            os.chdir(home)
            with contextlib.redirect_stdout(io.StringIO()):
                tiny_project.draw(Path(home))
                tiny_project.finish()
            print(f"| file | {' | '.join(OUTCOMES)} |\n|{' --- |' * (len(OUTCOMES) + 1)}")
            for target in targets():
                if args.only in target.name:
                    outcomes = attack(target, args.count, seed=args.seed)
                    print(
                        f"| {target.name} | {' | '.join(str(outcomes[name]) for name in OUTCOMES)} |",
                        flush=True,
                    )
                    faults += sum(outcomes[name] for name in FAULTS)
                    total += args.count
        finally:
            os.chdir(before)
    print(f"\n{total} damages, {faults} faults; seed {args.seed}")
    return int(faults > 0)


def attack(target: Target, count: int, *, seed: int) -> collections.Counter[str]:
    """Damage a file `count` times, in child processes, since a reader may crash; returns the number of each outcome."""
    content = target.path.read_bytes()
    log = Path(tempfile.mkstemp(prefix="fastflower-attack-")[1])
    try:
        while (done := len(log.read_text(encoding="utf-8").splitlines())) < count:
            sys.stdout.flush()
            child = os.fork()
            if child == 0:
                try:
                    _work(target, content, range(done, count), seed=seed, log=log)
                finally:
                    os._exit(0)
            _, status = os.waitpid(child, 0)
            if os.WIFSIGNALED(status):
                with open(log, "a", encoding="utf-8") as file:
                    file.write(f"crash {signal.Signals(os.WTERMSIG(status)).name}\n")
        lines = log.read_text(encoding="utf-8").splitlines()
    finally:
        log.unlink()
        _replace(target.path, content)
    shown = [f"{number}: {line}" for number, line in enumerate(lines) if line.split(" ")[0] in FAULTS]
    for line in shown[:MOST_SHOWN]:
        print(f"{target.name}, damage {line}", file=sys.stderr)
    return collections.Counter(line.split(" ")[0] for line in lines)


def _work(target: Target, content: bytes, numbers: range, *, seed: int, log: Path) -> None:
    signal.signal(signal.SIGALRM, _hang)
    with (
        open(log, "a", encoding="utf-8") as file,
        open(os.devnull, "w", encoding="utf-8") as null,
        contextlib.redirect_stdout(null),
        contextlib.redirect_stderr(null),
    ):
        _replace(target.path, content)
        notes: list[str] = []
        expected = fingerprint(target.read(notes))
        if notes:  # or every damage would count as noted
            file.writelines(f"traceback the whole file has notes: {one_line(notes[0])}\n" for _ in numbers)
            return
        for number in numbers:
            data = damaged(content, random.Random(f"{seed}/{target.name}/{number}"))
            _replace(target.path, data)
            file.write(outcome(target, expected) + "\n")
            file.flush()


def _hang(*_: object) -> None:
    raise Hang


def outcome(target: Target, expected: str) -> str:
    """The outcome of reading a damaged file, with the reason of a fault behind it, in one line."""
    notes: list[str] = []
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        same = fingerprint(target.read(notes)) == expected
    except (InputError, OSError) as error:
        return "refused" if "\n" not in str(error) else one_line(f"traceback of several lines: {error}")
    except Hang:
        return "hang"
    except Exception as error:
        if type(error).__name__ in ("Problem", "Unusable"):  # of the predictor
            return "refused"
        return one_line(f"traceback {type(error).__name__}: {error}")[:300]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return "note" if notes else "same" if same else "silent"


def damaged(data: bytes, draw: random.Random) -> bytes:
    """Data with one to four bits flipped, or cut, or with zeros in place of a stretch of it."""
    broken, kind, first = bytearray(data), draw.randrange(3), draw.randrange(len(data))
    if kind == 0:
        for place in (first, *(draw.randrange(len(data)) for _ in range(draw.randrange(4)))):
            broken[place] ^= 1 << draw.randrange(8)
    elif kind == 1:
        del broken[first:]
    else:
        length = min(len(data) - first, draw.choice((1, 16, 512, 4096)))
        broken[first : first + length] = bytes(length)
    return bytes(broken)


def _replace(path: Path, data: bytes) -> None:
    """Replace a file by a new one, as the old one may still be mapped."""
    temporary = path.with_name(f".{path.name}.attack")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def fingerprint(value: Any) -> str:
    """A digest of a tree of records, dicts, lists, arrays, tensors and plain values."""
    total = hashlib.sha256()

    def add(item: Any) -> None:
        if dataclasses.is_dataclass(item) and not isinstance(item, type):
            item = {field.name: getattr(item, field.name) for field in dataclasses.fields(item)}
        if isinstance(item, dict):
            for key, inner in item.items():
                add(repr(key))
                add(inner)
        elif isinstance(item, (list, tuple)):
            add(f"{len(item)} items")
            for inner in item:
                add(inner)
        elif hasattr(item, "numpy") or hasattr(item, "tobytes"):
            array = item.numpy() if hasattr(item, "numpy") else item
            total.update(f"{array.shape} {array.dtype}".encode() + array.tobytes())
        else:
            total.update(repr(item).encode("utf-8", "backslashreplace") + b"\0")

    add(value)
    return total.hexdigest()


def _ignoring_notes(read: Callable[[Path], Any], path: Path, notes: list[str]) -> Any:
    """The reader of a Target from one that has no notes."""
    return read(path)


def targets() -> Iterator[Target]:
    """Every kind of file of the project in the current directory that a command reads, and arrays that users give."""
    yield from _given_targets()
    yield from _optional_targets(Path("data"))
    yield from _data_targets(Path("data"))
    yield from _experiment_targets(runs.RESULTS / tiny_project.EXP)
    yield from _predictor_targets(runs.BUNDLE, "bundle")
    yield from _predictor_targets(runs.MODELS / tiny_project.EXP / "programs", "programs")


def _given_targets() -> Iterator[Target]:
    """Images and labels in a .npz; photographs are those of `bench fuzz`, and text has no checksum to break."""
    import numpy as np

    from fastflower.data.readers.arrays import open_npz

    images = np.random.default_rng(0).integers(0, 255, (8, 12, 12), np.uint8)

    def read(path: Path) -> Any:
        stack = open_npz(path, "auto", shape="auto", labelled=True)
        return stack.labels, stack.images

    for save, path in ((np.savez, Path("stored.npz")), (np.savez_compressed, Path("compressed.npz"))):
        save(path, images=images, labels=np.arange(8))
        yield Target(f"given {path.name}", path, partial(_ignoring_notes, read, path))


def _optional_targets(home: Path) -> Iterator[Target]:
    """Records that the tiny project has no use for, with invented contents."""
    from fastflower.data.auxiliary import FILE as AUX_LABELS
    from fastflower.data.auxiliary import AuxColumn, AuxLabels
    from fastflower.evaluation.stacking import FILE as STACKER
    from fastflower.evaluation.stacking import Stacker

    codes = tuple(row % 3 - 1 for row in range(tiny_project.IMAGES))
    trees = [[0.25 * row + column for column in range(6)] for row in range(3)]
    records: dict[Path, Any] = {
        home / AUX_LABELS: AuxLabels("0f3a", (AuxColumn("genus", ("Bellis", "Rosa"), codes),)),
        runs.RESULTS / tiny_project.EXP / STACKER: Stacker(
            method="logistic stacking", runs=["a seed 1", "b seed 1"], class_ids=["7", "8", "9"], present=[0, 1, 2],
            booster="", coefficients=trees, intercepts=[0.0, 0.5, -0.5],
        ),
    }  # fmt: skip
    for path, record in records.items():
        write_record(path, record)
        yield Target(path.name, path, partial(_ignoring_notes, partial(read_record, kind=type(record)), path))


def _data_targets(home: Path) -> Iterator[Target]:
    from fastflower.core.tables import read_sealed
    from fastflower.data import folds
    from fastflower.data.betons import fold_set
    from fastflower.data.betons.beton_file import open_beton
    from fastflower.data.labels import read_class_rows, read_labels
    from fastflower.recipe import load

    recipe = load(tiny_project.RECIPE_FILE)
    saved, labels = folds.read_folds(home / "folds.csv"), read_labels(recipe)

    def beton(path: Path) -> Any:
        opened = open_beton(path)
        opened.verify()
        return opened.manifest, opened.labels, opened.index, [opened.row(row) for row in range(opened.rows)]

    for path in [*sorted((home / "betons").glob("fold0_*.beton")), home / "betons/unlabelled.beton"]:
        yield Target(path.name, path, partial(_ignoring_notes, beton, path))
    path = home / "betons/fold0_val.beton"
    manifest = path.with_name(path.name + ".json")
    yield Target(manifest.name, manifest, lambda _: beton(path))
    memory, files = home / fold_set.CONTENTS, labels.source.files(labels.filenames)
    yield Target(memory.name, memory, lambda _: fold_set.content_hash(memory, files))
    tables: dict[str, Callable[[Path], Any]] = {
        "folds.csv": folds.read_folds,
        "classes.csv": read_class_rows,
        "skipped.csv": lambda path: read_sealed(path, folds.SKIPPED),
        "unlabelled.csv": lambda path: read_sealed(path, fold_set.UNLABELLED_COLUMNS),
        "duplicates.csv": lambda path: folds.read_duplicates(path, saved),
    }
    for name, read in tables.items():
        yield Target(name, home / name, partial(_ignoring_notes, read, home / name))


def _experiment_targets(folder: Path) -> Iterator[Target]:
    from fastflower.core import checkpoint
    from fastflower.evaluation.gradcam_record import GradCams, read_gradcam
    from fastflower.evaluation.logits import load_logits, logits_path
    from fastflower.evaluation.measured import Leak, Priors, ViewTable
    from fastflower.evaluation.records import (
        EnsembleComparison,
        ExperimentScores,
        Temperatures,
    )
    from fastflower.model.member import load_member
    from fastflower.recipe.run_record import (
        Environment,
        RunEnd,
        RunNumbers,
        missing_events,
        numbers_path,
        read_recipe,
    )

    run = tiny_project.run_of()
    member, last = run.checkpoints("best_combo")[-1], run.checkpoints("last")[-1]
    yield Target("best_combo.pth", member, lambda _: load_member(member))
    yield Target("last.pth", last, lambda _: checkpoint.load(last))
    recipe, events = folder / "meta/recipe.yaml", folder / "events.jsonl"
    yield Target("meta/recipe.yaml", recipe, lambda _: read_recipe(recipe)[0])

    def rows(notes: list[str]) -> Any:
        found = runs.read_events(events, notes)
        notes += missing_events(folder, found)
        return found

    yield Target("events.jsonl", events, rows)
    oof = logits_path(folder / "oof", backbone=run.backbone, fold=run.fold, seed=run.seed)
    yield Target("oof/*.npz", oof, lambda _: load_logits(oof))
    kinds: dict[Path, Any] = {
        folder / "meta/versions.json": Environment,
        numbers_path(run): RunNumbers,
        run.end_path: RunEnd,
        folder / "scores.json": ExperimentScores,
        folder / "temperature.json": Temperatures,
        **{folder / kind.FILE: kind for kind in (ViewTable, Priors, Leak)},
        folder / "ensemble.json": EnsembleComparison,
        folder / "gradcam/gradcam.json": GradCams,
        folder / hand_in.FILE: HandIn,
    }
    for path, kind in kinds.items():
        name = path.name.partition(f"_{run.backbone}")[0].removesuffix(".json") + ".json"
        yield Target(name, path, partial(_ignoring_notes, partial(read_record, kind=kind), path))
    search = importlib.import_module("fastflower.campaign.search")
    journal = tiny_project.JOURNAL
    yield Target("campaign_*.journal", journal, lambda _: search.Journal(journal).entries)
    picture = min((folder / "gradcam").glob("*.jpg"))
    yield Target("gradcam/*.jpg", picture, lambda notes: read_gradcam(folder / "gradcam", notes))


def _predictor_targets(folder: Path, noun: str) -> Iterator[Target]:
    """The files that code/predict.py reads, by its own modules."""
    if str(CODE) not in sys.path:
        sys.path.insert(0, str(CODE))
    bundles, networks = importlib.import_module("bundles"), importlib.import_module("networks")
    picture = networks.test_picture(tiny_project.SIDE, tiny_project.SIDE)

    def read(notes: list[str]) -> Any:
        bundle, hashes = bundles.read(str(folder))
        loaded = networks.Networks(str(folder), bundle, hashes=hashes, device="cpu", half="none")
        names = bundles.labelings(str(folder), bundle["class_ids"], notes)
        notes += loaded.notes
        return bundle, names, loaded.fuse(loaded.logits([[picture]]))

    for pattern in ("bundle.json", "SHA256", "classes.csv", "program_0.txt", "weights_0.safetensors"):
        yield Target(f"{noun}/{pattern}", folder / pattern, read)
