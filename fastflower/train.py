"""composer -n 2 fastflower/train.py [recipe.yaml] [key=value ...]: train one fold, several, or all.

Also `python -m fastflower.train`. The same command resumes a killed or preempted run; a finished run is left as it
is. Writes results/model/<exp>/ (checkpoints, log) and results/results/<exp>/ (meta/, events.jsonl,
tensorboard/). Exit codes: 0 done, 1 diverged, 2 bad input, 3 damaged files, 4 the machine lacks something,
75 stopped by a signal with its state saved.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if (
    sys.path and Path(sys.path[0]).resolve() == HERE
):  # run by path: this folder would shadow other libraries' names
    sys.path[0] = str(HERE.parent)

import torch  # noqa: E402

from fastflower.callbacks.checkpoints import parse_interval, supersede  # noqa: E402
from fastflower.callbacks.stop import Stop  # noqa: E402
from fastflower.callbacks.trackers import check_trackers  # noqa: E402
from fastflower.core import checkpoint, errors  # noqa: E402
from fastflower.core.console import Console  # noqa: E402
from fastflower.core.runs import Run  # noqa: E402
from fastflower.recipe import Recipe, checks, derived, parse_command  # noqa: E402
from fastflower.recipe.identity import identity as run_identity  # noqa: E402
from fastflower.training import build, fold_data, ranks, record, resume  # noqa: E402


@ranks.rank_zero_reports()
def main(argv: list[str]) -> int:
    """Train the recipe's folds one after another on all launched ranks."""
    recipe = parse_command(argv)
    advice = checks.check(recipe)
    parse_interval(recipe.train.save_every)
    check_trackers(recipe)
    machine = ranks.prepare(recipe)
    stop = Stop()
    try:
        for fold in derived.fold_numbers(recipe):
            with ranks.lock_run(recipe, fold) as run, ranks.console(run) as console:
                train_fold(recipe, run, machine=machine, stop=stop, console=console, advice=advice)
        machine.close()  # not after an error: it could wait for a rank that hangs
    finally:
        stop.restore()
    return 0


def train_fold(
    recipe: Recipe, run: Run, *, machine: ranks.Machine, stop: Stop, console: Console, advice: list[str]
) -> None:
    """One run: open the data, restore the last checkpoint if there is one, fit, summarise."""
    fold = fold_data.open_data(recipe, run.fold)
    identity = run_identity(recipe, derived.derive(recipe, machine.world), fold.data_identity())
    ranks.check_inputs_agree(identity)
    point = ranks.on_rank_zero(lambda: resume.find_resume_point(run, identity, console.write))
    if point is not None and point.done:
        console.write(point.done)
        return
    fold_data.verify(fold)
    training = build.training(
        recipe, run, fold=fold, machine=machine, stop=stop, console=console, identity=identity
    )
    try:
        if point is not None:
            resume.restore(
                checkpoint.load(point.path),
                training.trainer.state,
                network=training.network,
                components=training.components,
            )
        if point is not None and point.finished:  # killed between its last step and its summary
            ranks.on_rank_zero(lambda: supersede(run, "last", point.path))
        else:
            announce(recipe, training, machine=machine, advice=advice)
            with stop.deferred():
                ranks.fit(training.trainer)
        finish(training, machine, advice)
    finally:
        training.close()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def announce(recipe: Recipe, training: build.Training, *, machine: ranks.Machine, advice: list[str]) -> None:
    """Write the start of a run: console header, meta/, the picture of samples, the start row of events.jsonl."""
    if machine.rank:
        return
    facts, say, start = training.facts, training.console.write, training.trainer.state.timestamp
    epoch, step = start.epoch.value, start.batch_in_epoch.value
    title, *lines = record.header(recipe, facts)
    say(title, "bold")
    for line in [
        *lines,
        "",
        *(f"  {line}" for line in facts.group_table),
        "",
        *(f"  {line}" for line in facts.numbers.notes),
    ]:
        say(line)
    for line in [*record.warnings_before_start(recipe, facts), *advice]:
        say(f"  note: {line}", "yellow")
    record.write_meta(recipe, facts, advice=advice, determinism=machine.determinism())
    if start.batch.value:
        say(f"  resuming after epoch {epoch}, step {step} of the next", "bold")
    else:
        build.save_sample_picture(recipe, training)
    say()
    row = {"event": "start", "from_epoch": epoch, "from_step": step, **training.scoring.derived.as_dict()}
    training.recorder.write(row)


def finish(training: build.Training, machine: ranks.Machine, advice: list[str]) -> None:
    """Write the end of a run: the end row of events.jsonl, its record in meta/, the summary on the console."""
    if machine.rank:
        return
    end = record.end_of_run(
        training.run,
        training.scoring,
        seconds=training.recorder.meter.total,
        saving_seconds=training.saver.seconds,
        determinism=machine.determinism(),
        identity=training.saver.identity,
    )
    training.recorder.write(record.end_row(end))
    record.write_end(training.facts, advice, end)
    for line in record.summary(end):
        training.console.write(line, "bold" if line.startswith("done") else "")


if __name__ == "__main__":
    errors.run_command(main)
