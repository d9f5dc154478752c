"""Name the class of every photograph in a folder, or pair in a .npz: `python code/predict.py [<folder or .npz> <csv>]`.

Needs Python 3.9 or newer, torch, NumPy and Pillow, and the bundle that `python -m fastflower.export` writes; without
one it takes the members as `python -m fastflower.evaluate` left them.
A complete table lies at its place before the first network has run; better ones replace it on the way.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

sys.dont_write_bytecode = True
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve each other on a busy machine
sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # `python -I` leaves it out

if sys.version_info < (3, 9):  # noqa: UP036 (whoever runs it may have an older one)
    sys.exit(f"predict: this is Python {sys.version.split()[0]}; 3.9 or newer is needed")
try:
    import numpy as np

    import bundles
    import guard
    import inputs
    import pictures
    from bundles import Problem
    from table import Table, columns, ordered, read_sample, replace
except (ImportError, AttributeError) as missing:  # Pillow before 9.1 has no Image.Transpose
    reason = " ".join(str(missing).split())  # NumPy's fills a screen
    sys.exit(f"predict: {reason}; needed are torch, numpy and pillow: pip install -U torch numpy pillow")

WRITE_EVERY = 30.0  # seconds between tables
TOGETHER = 8  # pictures that a CPU thread takes at once, at most
PIXELS = 300_000  # of the largest views of those that it takes
SHOWN = 40  # unreadable pictures named: a pipe that is read only at the end must not fill and halt all


def main(argv: list[str]) -> int:
    options = parse(argv)
    sample = read_sample(bundles.nearest("ref/predictions_sample.csv"))
    fault, hashes = None, {}
    try:
        bundle, hashes = bundles.read(options.bundle)
    except Problem as problem:
        fault, bundle = problem, bundles.substitute(options.bundle, sample)
        if not bundle:
            raise
    try:
        given = inputs.guess(options.folder) if fault else inputs.find(options.folder, bundle.get("pairs"))
        names = given.names
    except inputs.Unfit as unfit:
        raise fault or Problem(str(unfit)) from None
    if any("checkpoint" in member for member in bundle.get("members", ())):
        say(f"no bundle; taking the members above {options.bundle}, which passed no gate of export")
    options.half = "none" if options.fp32 else bundle.get("half", "gpu")
    header = columns("two" if options.two_columns else bundle["columns"], sample)
    for name, number in (("SIGTERM", 143), ("SIGHUP", 129)):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda *_, number=number: sys.exit(number))
    files, shown = ordered(names, sample)
    table = Table(
        files,
        bundle["class_ids"],
        prior=bundle["prior"],
        header=header,
        shown=shown,
        binary=bundle["columns"] == "binary",
    )
    code = 0
    if names or not os.path.exists(options.csv):  # never an empty table over a good one
        code = put(table, options.csv)
    if given.others and names:
        say(
            f"{len(given.others)} others below {options.folder} get no row, first {os.fsdecode(given.others[0])!r}"
        )
    if fault:
        raise Problem(f"{fault}; every row of {table.path} is the class prior", fault.code)
    if not names:
        kinds = b" ".join(pictures.SUFFIXES).decode()
        raise Problem(f"no photographs below {options.folder}; give a folder with {kinds}")

    def work(deaths: int, unexplained: int) -> int:
        # memory may be what killed it, a GPU's driver, or instructions that the processor only claims to have
        options.threads = max(1, (options.threads or guard.usable_cores()) >> deaths)
        options.device = "cpu" if unexplained else options.device
        options.half = "gpu" if deaths and options.half == "all" else options.half
        try:
            predict(options, bundle, hashes=hashes, given=given, table=table)
        except Problem as problem:
            say(str(problem), sys.stderr)
            return problem.code
        finally:
            table.update()
        return 0

    try:
        code = guard.run(work, table, lambda text: say(text, sys.stderr)) or code
    finally:  # also what is known when a time limit or a key ends the run
        moved = put(table, table.path)
    lost = np.count_nonzero(table.known) - table.about.get("logits", 0)
    if options.logits and lost:
        say(f"{options.logits} lacks {lost} rows that a process which died had predicted", sys.stderr)
    if late := given.late():
        say(f"{late} {given.noun} came while it ran; run it again for their rows", sys.stderr)
    return code or moved


def put(table: Table, place: str) -> int:
    """Write the table there; 4 and a line when it had to go elsewhere."""
    if table.open(place):
        return 0
    say(f"{place} cannot be written; the table goes to {table.path}", sys.stderr)
    return 4


def predict(
    options: argparse.Namespace, bundle: dict[str, Any], *, hashes: dict[str, str], given: Any, table: Table
) -> None:
    """Fill the rows of the table, which is written after the first picture, every half minute and at the end."""
    start = time.monotonic()
    threads = options.threads
    try:
        given.load()
    except inputs.Unfit as error:
        raise Problem(f"{error}; every row of {table.path} is the class prior", 3) from None
    try:
        import torch  # here, because it takes seconds and the first table need not wait

        import networks

        torch.set_num_threads(threads)
        members = networks.Networks(
            options.bundle, bundle, hashes=hashes, device=options.device, half=options.half
        )
    except (ImportError, OSError) as error:  # a library of torch that is missing or does not fit into memory
        raise Problem(
            f"torch cannot be loaded ({error}); every row of {table.path} is the class prior", 4
        ) from None
    except networks.Unusable as error:
        table.about = {"notes": [str(error)]}
        raise Problem(f"{error}; every row of {table.path} is the class prior", 3) from None
    about = {"torch": torch.__version__, "threads": threads}
    about.update(members=[member["name"] for member in members.members], notes=members.notes)
    count, where = len(members.members), members.where()
    say(f"{len(table.names)} {given.noun}, {count} members on {where}, T = {bundle['temperature']:.3f}")
    loaded = time.monotonic()
    kept: dict[int, np.ndarray] = {}
    told = 0
    before, warm = table.done(), 0.0
    done = before
    for rows, logits in predicted(members, given, table=table, threads=threads, batch=options.batch or 64):
        if rows:
            table.fill(rows, members.fuse(logits))
            kept.update(zip(rows, logits) if options.logits else ())
        for note in members.notes[told:]:
            say(note, sys.stderr)
        told, first, done = len(members.notes), done == before, table.done()
        spent = time.monotonic() - loaded
        warm = spent if first else warm
        own = done - before
        pace = spent / own if first else (spent - warm) / (own - 1)  # the first picture pays for warming up
        pace = max(pace, 1e-6)  # the clock of Windows stands still for 16 ms
        about.update(
            device=members.where(),
            first_row_s=loaded - start + warm,
            seconds=loaded - start + spent,
            ms_per_image=1000 * pace,
        )
        table.about = about
        if first or time.monotonic() - table.written > WRITE_EVERY:
            table.update()
            left = pace * (len(table.names) - done)
            say(f"{done} of {len(table.names)}, {1 / pace:.1f} {given.noun}/s, {left:.0f} s left")
    if options.logits and kept:
        missing, buffer = np.full_like(next(iter(kept.values())), np.nan), io.BytesIO()
        np.savez(buffer, logits=np.stack([kept.get(row, missing) for row in range(len(table.names))]))
        replace(options.logits, buffer.getvalue())
        table.about = {**about, "logits": len(kept)}
    say(f"{done} rows in {table.path}, {1 / pace:.1f} {given.noun}/s, {len(table.unreadable)} unreadable")


def predicted(
    members: Any, given: Any, *, table: Table, threads: int, batch: int
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Rows and their logits in order; pictures that cannot be read are left out and marked in the table.

    For a GPU the threads decode two batches ahead of it. On a CPU each thread takes a few pictures from file to
    logits: together they pay once for laying out the weights, and threads that do not wait for each other are the
    faster ones.
    """
    import torch

    crops, parent, alone = members.bundle["crops"], os.getppid(), threading.Lock()
    on_cpu = members.device.type == "cpu"

    def work(rows: list[int]) -> list[tuple[int, Any]]:
        """Rows that could be read, with their logits on a CPU, else with their views."""
        found = []
        for row in rows:
            table.reading[row] = time.monotonic()
            try:
                found.append((row, views(table.names[row])))
            except Exception as error:  # whatever a hostile file makes Pillow raise costs one row
                refuse(row, error)
            finally:
                table.reading[row] = 0
        if not found or not on_cpu:
            return found
        try:
            return list(zip([row for row, _ in found], members.logits([views for _, views in found])))
        except Exception as error:
            for row, _ in found:
                refuse(row, error)
            return []

    def views(name: bytes) -> list[np.ndarray]:
        try:
            return given.views(name, crops)
        except (MemoryError, OSError):  # all threads at once may want more memory or handles than there are
            with alone:
                return given.views(name, crops)

    def refuse(row: int, error: Exception) -> None:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        table.fail(row, reason)
        if np.count_nonzero(table.failed) <= SHOWN:
            say(f"{os.fsdecode(table.names[row])!r}: {reason}; its row is the class prior", sys.stderr)

    def gather(some: list[list[tuple[int, Any]]]) -> tuple[list[int], np.ndarray]:
        found = [pair for part in some for pair in part]
        rows, results = [row for row, _ in found], [result for _, result in found]
        return rows, members.logits(results) if rows and not on_cpu else np.array(results)

    rows = table.waiting()
    few = max(1, np.count_nonzero(table.alone[rows]))
    for row in rows[:few]:  # the first row soon, and with all cores
        yield gather([work([row])])
    together = 1
    if on_cpu:  # the same whatever the number of threads, so that the last digits are too
        fitting = PIXELS // max(crop["height"] * crop["width"] for crop in crops)
        together = max(1, min(TOGETHER, fitting, len(rows) // 16))
    parts = [rows[start : start + together] for start in range(few, len(rows), together)]
    size = threads if on_cpu else batch
    waiting, coming = iter(parts), deque()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            while True:
                for part in itertools.islice(waiting, 3 * size - len(coming)):
                    coming.append(pool.submit(work, part))
                if not coming or os.getppid() != parent:  # nobody is left to read the table to
                    return
                yield gather([coming.popleft().result() for _ in range(min(size, len(coming)))])
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def parse(argv: list[str]) -> argparse.Namespace:
    about = "Name the class of every photograph in a folder, or of every pair in a .npz."
    parser = argparse.ArgumentParser(prog="predict.py", description=about, allow_abbrev=False)
    parser.add_argument(
        "folder", nargs="?", help="photographs, also in subfolders, or pairs in a .npz (test_dataset)"
    )
    parser.add_argument(
        "csv", nargs="?", help="the table to write, or its folder (results/results/submission.csv)"
    )
    parser.add_argument("--bundle", help="exported members (results/model/bundle, else those evaluated last)")
    parser.add_argument("--two-columns", action="store_true", help="leave out the confidence")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (auto)")
    parser.add_argument("--fp32", action="store_true", help="no half precision, whatever the bundle says")
    parser.add_argument("--batch", type=natural, help="photographs at a time on a GPU (64)")
    parser.add_argument(
        "--threads", type=natural, help="threads that decode, and that compute on a CPU (all cores)"
    )
    parser.add_argument(
        "--logits", metavar="NPZ", help="also write logits (photographs, members, views, classes)"
    )
    options = parser.parse_args(argv)
    options.folder = options.folder or bundles.nearest("test_dataset", "test_dataset.npz")
    options.csv = options.csv or os.path.join(bundles.ROOT, "results", "results", "")
    if options.csv.endswith(("/", os.sep)) or os.path.isdir(options.csv):
        options.csv = os.path.join(options.csv, "submission.csv")
    options.bundle = options.bundle or bundles.default()
    return options


def natural(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be 1 or more")
    return number


def say(text: str, stream: Any = None) -> None:
    """One line for people; nobody listening is no reason to stop."""
    with contextlib.suppress(OSError, ValueError):
        print(f"predict: {text}", file=stream or sys.stdout, flush=True)


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has it not
            stream.reconfigure(errors="backslashreplace")
    try:
        code = main(sys.argv[1:])
    except Problem as problem:
        say(str(problem), sys.stderr)
        code = problem.code
    except OSError as error:
        say(str(error), sys.stderr)
        code = 4
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)
