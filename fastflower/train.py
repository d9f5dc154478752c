"""composer -n 2 fastflower/train.py [recipe.yaml] [key=value ...]: train one fold, several, or all.

Also `python -m fastflower.train`. The same command goes on where a killed or preempted run stopped; a finished
run says so. Writes results/model/<exp>/ (checkpoints, log) and results/results/<exp>/ (meta/, events.jsonl,
tensorboard/). Exit codes: 0 done, 1 diverged, 2 bad input, 3 damaged files, 4 the machine lacks something,
75 stopped by a signal with its state saved.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if (
    sys.path and Path(sys.path[0]).resolve() == HERE
):  # run by path: its folder would shadow other libraries' names
    sys.path[0] = str(HERE.parent)

import torch  # noqa: E402

from fastflower.callbacks.checkpoints import adopt, parse_interval  # noqa: E402
from fastflower.callbacks.stop import Stop  # noqa: E402
from fastflower.callbacks.trackers import check_trackers  # noqa: E402
from fastflower.core import checkpoint, errors  # noqa: E402
from fastflower.core.console import Console  # noqa: E402
from fastflower.core.runs import Run  # noqa: E402
from fastflower.recipe import Recipe, checks, derived, parse_command  # noqa: E402  # noqa: E402
from fastflower.recipe.identity import identity  # noqa: E402
from fastflower.training import build, fold_data, ranks, record, resume  # noqa: E402  # noqa: E402
from fastflower.training.resume import restore  # noqa: E402


@ranks.rank_zero_speaks()
def main(argv: list[str]) -> int:
    """Train the recipe's folds one after the other, on as many ranks as were launched."""
    recipe = parse_command(argv)
    advice = checks.check(recipe)
    parse_interval(recipe.train.save_every)
    check_trackers(recipe)
    machine = ranks.prepare(recipe)
    stop = Stop()
    try:
        for fold in derived.fold_numbers(recipe):
            with ranks.claim(recipe, fold) as run, ranks.console(run) as console:
                train_fold(recipe, run, machine=machine, stop=stop, console=console, advice=advice)
        machine.close()  # not after an error: it may wait for a rank that is stuck
    finally:
        stop.restore()
    return 0


def train_fold(
    recipe: Recipe, run: Run, *, machine: ranks.Machine, stop: Stop, console: Console, advice: list[str]
) -> None:
    """One run: open the data, go on from the last checkpoint if there is one, fit, summarise."""
    fold = fold_data.open_data(recipe, run.fold)
    more = fold.unlabelled.manifest if fold.unlabelled else None
    same = identity(
        recipe, derived.derive(recipe, machine.world), manifest=fold.train.manifest, unlabelled=more
    )
    ranks.check_alike(same)
    last = ranks.on_rank_zero(lambda: resume.find_last(run, same, console.say))
    if last is not None and last.done:
        console.say(last.done)
        return
    fold_data.verify(fold)
    training = build.training(recipe, run, fold=fold, machine=machine, stop=stop, console=console, same=same)
    try:
        if last is not None:
            restore(
                checkpoint.load(last.path),
                training.trainer.state,
                network=training.network,
                parts=training.parts,
            )
        if last is not None and last.finished:  # cut between its last step and its summary
            ranks.on_rank_zero(lambda: adopt(run, "last", last.path))
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
    """Header on the console, meta/, the picture of samples, the start row."""
    if machine.rank:
        return
    facts, say, start = training.facts, training.console.say, training.trainer.state.timestamp
    epoch, step = start.epoch.value, start.batch_in_epoch.value
    title, *lines = record.header(recipe, facts)
    say(title, "bold")
    for line in [
        *lines,
        "",
        *(f"  {line}" for line in facts.groups_table),
        "",
        *(f"  {line}" for line in facts.notes),
    ]:
        say(line)
    for line in record.notes(recipe, facts, advice):
        say(f"  note: {line}", "yellow")
    record.write_meta(recipe, facts, advice=advice, determinism=machine.determinism())
    if start.batch.value:
        say(f"  going on after epoch {epoch}, step {step} of the next", "bold")
    else:
        build.picture(recipe, training)
    say()
    row = {"event": "start", "from_epoch": epoch, "from_step": step, **facts.derived.as_dict()}
    training.recorder.write(row)


def finish(training: build.Training, machine: ranks.Machine, advice: list[str]) -> None:
    """The summary, the end row and the record of how the run ended."""
    if machine.rank:
        return
    row = record.end(
        training.run,
        training.scoring,
        seconds=training.recorder.meter.total,
        saving_seconds=training.saving.seconds,
    )
    row["determinism"] = machine.determinism()
    training.recorder.write(row)
    record.write_end(training.facts, advice, row=row, same=training.saving.identity)
    for line in record.summary(row):
        training.console.say(line, "bold" if line.startswith("done") else "")


if __name__ == "__main__":
    errors.run(main)
