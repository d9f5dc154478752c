"""Trains the folds of a recipe one after another on all launched ranks: resume, fit, summarise."""

from __future__ import annotations

import gc

import torch

from fastflower.callbacks.checkpoints import supersede
from fastflower.callbacks.stop import Stop
from fastflower.core import checkpoint
from fastflower.core.console import Console
from fastflower.core.runs import Run
from fastflower.model.network import fitted
from fastflower.recipe import Recipe, derived
from fastflower.recipe.identity import identity as run_identity
from fastflower.training import build, fold_data, ranks, record, refit, resume, samples


def train(recipe: Recipe, advice: list[str]) -> None:
    """Train the folds of a checked recipe; `advice` are the lines of its check."""
    recipe, lines = fitted(recipe)
    if derived.refits(recipe):
        recipe, why = refit.settled(recipe)
        lines = [*why, *lines]
    advice = [*lines, *advice]
    machine = ranks.prepare(recipe)
    stop = Stop()
    try:
        for fold in derived.fold_numbers(recipe):
            with ranks.lock_run(recipe, fold) as run, ranks.console(run) as console:
                train_fold(recipe, run, machine=machine, stop=stop, console=console, advice=advice)
            gc.collect()  # the fold's networks are in cycles
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        machine.close()  # not after an error: it could wait for a rank that hangs
    finally:
        stop.restore()


def train_fold(
    recipe: Recipe, run: Run, *, machine: ranks.Machine, stop: Stop, console: Console, advice: list[str]
) -> None:
    """One run: open the data, restore the last checkpoint if there is one, fit, summarise."""
    fold = fold_data.open_data(recipe, run.fold)
    identity = run_identity(recipe, derived.derive(recipe, machine.world), fold.data_identity())
    ranks.check_inputs_agree(identity)
    longer = recipe if recipe.train.extend else None
    point = ranks.on_rank_zero(lambda: resume.find_resume_point(run, identity, console.write, longer=longer))
    if point is not None and point.done:
        console.write(point.done)
        return
    fold_data.verify(fold)
    with ranks.network_may_not_fit(recipe, machine):
        training = build.training(
            recipe,
            run,
            fold=fold,
            machine=machine,
            stop=stop,
            console=console,
            identity=identity,
            resuming=point is not None,
        )
    try:
        if point is not None:
            resume.restore(
                checkpoint.load(point.path),
                training.trainer.state,
                network=training.network,
                components=training.components,
            )
        if point is not None and point.extended_from:
            epoch = training.trainer.state.timestamp.epoch.value
            line = resume.extend(recipe, training.components, extended_from=point.extended_from, epoch=epoch)
            advice = [line, *advice]
        if point is not None and point.finished:  # killed between its last step and its summary
            ranks.on_rank_zero(lambda: supersede(run, "last", point.path))
        else:
            with ranks.one_may_fail(machine, training.memory):
                advice = [*advice, *training.memory.run()]
            announce(recipe, training, machine=machine, advice=advice)
            with stop.deferred(), ranks.one_may_fail(machine, training.memory):
                training.trainer.fit()
        finish(training, machine, advice)
    finally:
        training.close()


def announce(recipe: Recipe, training: build.Training, *, machine: ranks.Machine, advice: list[str]) -> None:
    """Write the start of a run: console header, meta/, the pictures of samples, the start row of events.jsonl."""
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
    if start.batch.value:
        advice = [*advice, *record.change_of_precision(facts)]
    for line in [*record.warnings_before_start(recipe, facts), *advice]:
        say(f"  note: {line}", "yellow")
    record.write_meta(recipe, facts, advice=advice, determinism=machine.determinism())
    if start.batch.value:
        say(f"  resuming after epoch {epoch}, step {step} of the next", "bold")
    else:
        samples.save_pictures(training.prepared, training.run)
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
