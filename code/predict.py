"""Predicts the class of every photograph in a folder, or pair in a .npz: `python code/predict.py [<input> <csv>]`.

Needs Python 3.9 or newer, torch, NumPy and Pillow, and the bundle that `python -m fastflower.export` writes; without
a bundle it uses the members and programs of the last `python -m fastflower.evaluate`. A complete table is written
before the first network runs and replaced by better ones during the run.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
import time
from typing import Any

sys.dont_write_bytecode = True
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve each other on a busy machine
sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # `python -I` leaves it out

if sys.version_info < (3, 9):  # noqa: UP036 (the evaluator may have an older one)
    sys.exit(f"predict: this is Python {sys.version.split()[0]}; install 3.9 or newer")
try:
    import numpy as np

    import bundles
    import guard
    import inputs
    import pictures
    import priors
    from bundles import Problem, Unusable
    from messages import log, log_error
    from rows import Speed, predict_rows
    from sample import Sample, Unfollowable, layout_of, match, read_sample, unknown_answers
    from table import Layout, Table, default_layout, replace_atomic
except (ImportError, AttributeError) as missing:  # Pillow before 9.1 has no Image.Transpose
    reason = " ".join(str(missing).split())  # NumPy's message fills a screen
    sys.exit(f"predict: {reason}; install torch, numpy and pillow: pip install -U torch numpy pillow")

WRITE_EVERY = 30.0  # seconds between tables


def main(argv: list[str], *, attempts: int = 3) -> int:
    """Predict, from the start again when the bundle was replaced while it was loaded; returns the exit code."""
    options = parse(argv)
    sample, unfollowed = find_sample(options)
    bundle, hashes, problem = None, {}, None
    notes: list[str] = []
    try:
        bundle, hashes = bundles.read(options.bundle)
        classes = bundles.classes_of(bundle)
    except Problem as error:
        problem, classes = error, bundles.fallback_classes(options.bundle, sample, notes)
        if classes is None:
            raise
        trained = os.path.exists(options.bundle) or bundles.members_beside(options.bundle)
        if options.by_default and not trained:  # then no file that could be taken for a submission
            options.csv = "_priors".join(os.path.splitext(options.csv))
    try:
        source = (
            inputs.open_input(options.folder, bundle["pairs"])
            if bundle
            else inputs.open_without_bundle(options.folder)
        )
    except inputs.UnsuitableInput as error:
        raise problem or Problem(str(error)) from None
    if bundle and any(member["checkpoint"] is not None for member in bundle["members"]):
        log(f"no exported bundle; using the members above {options.bundle}, which export has not checked")
    newer = bundles.outdated_by(options.bundle) if bundle else ""
    if newer:
        log_error(
            f"{options.bundle} is older than the members that evaluate wrote to {newer}, which it may lack; "
            "run python -m fastflower.export to hand those in"
        )
    exit_on_signals()
    names, labels = source.names, source.names
    columns = "two" if options.two_columns else classes.columns
    layout = default_layout(columns, classes.labels, top_k=classes.top_k, separator=classes.separator)
    if sample and names:
        try:
            names, labels, layout = follow(
                sample, names, columns=columns, classes=classes, options=options, notes=notes
            )
        except Unfollowable as difference:
            unfollowed = str(difference)
    for note in dict.fromkeys(notes):
        log_error(note)
    by_em = bool(bundle and bundle["correction"] and bundle["correction"]["target"] == "em")
    table = Table(names, classes.ids, prior=classes.prior, layout=layout, labels=labels, keep_odds=by_em)
    code = 0
    if names or not os.path.exists(options.csv):  # an empty table never replaces a full one
        code = write_table(table, options.csv)
    if unfollowed and names:
        log_error(
            f"{unfollowed}; {table.path} gets the columns {','.join(layout.header)} and a row for each image, "
            "mend or remove the sample"
        )
        code = code or 2
    if source.ignored and names:
        log(
            f"{len(source.ignored)} other entries below {options.folder} get no row, "
            f"{sum(map(pictures.is_hidden, source.ignored))} of them hidden or of the system, "
            f"the first is {os.fsdecode(source.ignored[0])!r}"
        )
    if problem:
        raise Problem(f"{problem}; {only_prior(table)}", problem.code)
    if not names:
        suffixes = b" ".join(pictures.SUFFIXES).decode()
        if not os.path.exists(options.folder):
            raise Problem(f"{options.folder} does not exist; give a folder with {suffixes}")
        raise Problem(f"no photographs below {options.folder}; give a folder with {suffixes}")
    code = run_guarded(options, bundle, hashes=hashes, source=source, table=table) or code
    if code == bundles.REPLACED and attempts > 1:
        return main(argv, attempts=attempts - 1)
    experiment = bundles.experiment_of(bundle)
    if not code and experiment and os.environ.get("FASTFLOWER_NEXT") != "0":
        log(f"next: python -m fastflower report {experiment}")
    return code


def find_sample(options: argparse.Namespace) -> tuple[Sample | None, str]:
    """The organiser's sample, if there is one, and the reason why it cannot be read."""
    try:
        path = options.sample or bundles.nearest("ref/predictions_sample.csv")
        return read_sample(path, required=bool(options.sample)), ""
    except Unfollowable as fault:
        return None, str(fault)


def follow(
    sample: Sample,
    names: list[bytes],
    *,
    columns: str,
    classes: bundles.Classes,
    options: argparse.Namespace,
    notes: list[str],
) -> tuple[list[bytes], list[bytes], Layout]:
    """Names in the sample's order, the labels to write for them, and the layout; raises Unfollowable.

    The columns are the sample's unless the bundle asks for others. A line for each damaged file is appended to `notes`.
    """
    image, ordered = match(sample, names, options.folder)
    labels = [label.encode("utf-8", "surrogateescape") for label in sample.column(image)]
    layout = default_layout(columns, classes.labels, top_k=classes.top_k, separator=classes.separator)
    if columns in ("sample", "binary"):
        labelings = bundles.labelings(options.bundle, classes.ids, notes)
        # the first is for a sample that tells nothing
        labelings = [classes.labels, *(labeling for labeling in labelings if labeling != classes.labels)]
        of_sample = layout_of(sample, image, labelings, second_class=layout.second_class)
        if columns == "sample" or any(column.kind == "number" for column in of_sample.columns):
            layout = of_sample
            notes += filter(None, [unknown_answers(sample, layout, labelings)])
    return ordered, labels, layout


def run_guarded(
    options: argparse.Namespace, bundle: dict[str, Any], *, hashes: dict[str, str], source: Any, table: Table
) -> int:
    """Predict in a child process, write the final table, and return the exit code."""
    options.half = "none" if options.fp32 else bundle["half"]

    def work(deaths: int, unexplained: int) -> int:
        # a death may be due to memory, a GPU driver, or instructions that the processor only claims to have
        options.threads = max(1, (options.threads or guard.usable_cores()) >> deaths)
        options.device = "cpu" if unexplained else options.device
        options.half = "gpu" if deaths and options.half == "all" else options.half
        try:
            predict(options, bundle, hashes=hashes, source=source, table=table)
        except Problem as problem:
            log_error(str(problem))
            return problem.code
        finally:
            table.update()
        return 0

    try:
        code = guard.run(work, table, log_error)
    finally:  # also when a time limit or a key ends the run
        if bundle["correction"] and bundle["correction"]["target"] == "em":
            correct_by_em(table, np.array(bundle["correction"]["source"]))
        write_code = write_table(table, table.path)
    lost = np.count_nonzero(table.known) - table.summary.get("logits", 0)
    if options.logits and lost:
        log_error(f"{options.logits} lacks {lost} rows that were predicted by a process that died")
    added = source.count_added()
    if added:
        log_error(f"{added} {source.noun} were added during the run; run it again for their rows")
    return code or write_code


def correct_by_em(table: Table, source: np.ndarray) -> None:
    """Correct the predictions for the class distribution that they show together, and log its largest changes."""
    if not table.known.any():
        return
    before = table.best.copy()
    target = priors.estimate(table.odds[table.known], source)
    table.reweight(target / source)
    table.summary = {**table.summary, "class_distribution": [round(float(share), 5) for share in target]}
    changed = sorted(range(len(target)), key=lambda c: -abs(target[c] - source[c]))[:3]
    shifts = ", ".join(f"{table.class_ids[c]} {source[c]:.3f} -> {target[c]:.3f}" for c in changed)
    log(f"class distribution by EM: {shifts}; another class for {np.sum(table.best != before)} rows")


def exit_on_signals() -> None:
    """Turn a time limit's signals into SystemExit, so that the table is written."""
    for name, code in (("SIGTERM", 143), ("SIGHUP", 129)):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda *_, code=code: sys.exit(code))


def write_table(table: Table, path: str) -> int:
    """Write the table to a path; returns 4, with a message, when it had to be written elsewhere."""
    if table.open(path):
        return 0
    log_error(f"{path} cannot be written; the table goes to {table.path}")
    return 4


def only_prior(table: Table) -> str:
    return f"every row of {table.path} holds the most frequent class"


def predict(
    options: argparse.Namespace, bundle: dict[str, Any], *, hashes: dict[str, str], source: Any, table: Table
) -> None:
    """Fill the table, and write it after the first picture, every half minute and at the end."""
    start = time.monotonic()
    try:
        source.load()
    except inputs.UnsuitableInput as error:
        raise Problem(f"{error}; {only_prior(table)}", 3) from None
    ensemble = load_networks(options, bundle, hashes=hashes, table=table)
    log(
        f"{len(table.names)} {source.noun}, {len(ensemble.members)} members on "
        f"{ensemble.device_and_precision()}, T = {bundle['temperature']:.3f}"
    )
    speed = Speed(start, table.done())
    kept: dict[int, np.ndarray] = {}
    logged = 0
    for rows, logits in predict_rows(
        ensemble, source, table=table, threads=options.threads, batch=options.batch or 64
    ):
        if rows:
            table.fill(rows, ensemble.fuse(logits))
            kept.update(zip(rows, logits) if options.logits else ())
        for note in ensemble.notes[logged:]:
            log_error(note)
        logged = len(ensemble.notes)
        first, settled = speed.update(table.done())
        table.summary = {**summary_of(ensemble, options.threads), **speed.summary()}
        late = time.monotonic() - table.written > WRITE_EVERY
        if first or late:
            table.update()
        if settled or late:
            seconds = speed.seconds_per_row * (len(table.names) - speed.done)
            log(
                f"{speed.done} of {len(table.names)}, {1 / speed.seconds_per_row:.1f} {source.noun}/s, "
                f"{seconds:.0f} s left"
            )
    if options.logits and kept:
        missing, buffer = np.full_like(next(iter(kept.values())), np.nan), io.BytesIO()
        np.savez(buffer, logits=np.stack([kept.get(row, missing) for row in range(len(table.names))]))
        replace_atomic(options.logits, buffer.getvalue())
        table.summary = {**table.summary, "logits": len(kept)}
    log(
        f"{speed.done} rows in {table.path}, {1 / speed.seconds_per_row:.1f} {source.noun}/s, "
        f"{len(table.unreadable)} unreadable"
    )


def load_networks(
    options: argparse.Namespace, bundle: dict[str, Any], *, hashes: dict[str, str], table: Table
) -> Any:
    """Import torch and load the members; raises Problem when that is impossible."""
    try:
        import torch  # takes seconds, for which the first table need not wait

        import networks

        torch.set_num_threads(options.threads)
        ensemble = networks.Networks(
            options.bundle, bundle, hashes=hashes, device=options.device, half=options.half
        )
        if ensemble.notes:
            check_current(options.bundle, hashes)
        return ensemble
    except (ImportError, OSError) as error:  # a library of torch that is missing or does not fit into memory
        raise Problem(f"torch cannot be loaded ({error}); {only_prior(table)}", 4) from None
    except Unusable as error:
        check_current(options.bundle, hashes)
        table.summary = {"notes": [str(error)]}
        raise Problem(f"{error}; {only_prior(table)}", 3) from None


def check_current(folder: str, hashes: dict[str, str]) -> None:
    """Raise Problem when the bundle that does not load is no longer the one that was read."""
    if bundles.is_replaced(folder, hashes):
        raise Problem(f"{folder} was replaced while it was loaded; repeat the command", bundles.REPLACED)


def summary_of(ensemble: Any, threads: int) -> dict[str, Any]:
    """The fields of submission.json about the software, the members and the device."""
    import torch

    return {
        "torch": torch.__version__,
        "threads": threads,
        "members": [member["name"] for member in ensemble.members],
        "notes": ensemble.notes,
        "device": ensemble.device_and_precision(),
    }


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="predict.py",
        description="Name the class of every photograph in a folder, or of every pair in a .npz.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "folder", nargs="?", help="photographs, also in subfolders, or pairs in a .npz (test_dataset)"
    )
    parser.add_argument(
        "csv", nargs="?", help="the table to write, or its folder (results/results/submission.csv)"
    )
    parser.add_argument("--bundle", help="exported members (results/model/bundle, else those evaluated last)")
    parser.add_argument(
        "--sample", metavar="CSV", help="organiser's table to follow (ref/predictions_sample.csv)"
    )
    parser.add_argument("--two-columns", action="store_true", help="leave out the confidence")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (auto)")
    parser.add_argument("--fp32", action="store_true", help="no half precision, whatever the bundle allows")
    parser.add_argument("--batch", type=positive, help="photographs at a time on a GPU (64)")
    parser.add_argument(
        "--threads", type=positive, help="threads that decode, and compute on a CPU (all cores)"
    )
    parser.add_argument(
        "--logits", metavar="NPZ", help="also write logits (photographs, members, views, classes)"
    )
    options = parser.parse_args(argv)
    options.folder = options.folder or bundles.nearest("test_dataset", "test_dataset.npz")
    options.csv = options.csv or os.path.join(bundles.ROOT, "results", "results", "")
    if options.csv.endswith(("/", os.sep)) or os.path.isdir(options.csv):
        options.csv = os.path.join(options.csv, "submission.csv")
    options.by_default = not options.bundle
    options.bundle = options.bundle or bundles.default_folder()
    return options


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be 1 or more")
    return number


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's streams lack it
            stream.reconfigure(errors="backslashreplace")
    try:
        code = main(sys.argv[1:])
    except Problem as problem:
        log_error(str(problem))
        code = problem.code
    except OSError as error:
        log_error(str(error))
        code = 4
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)
