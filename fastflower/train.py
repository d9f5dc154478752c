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
if sys.path and Path(sys.path[0]).resolve() == HERE:  # run by path: its folder would shadow other libraries' names
    sys.path[0] = str(HERE.parent)

import torch  # noqa: E402
from composer.utils import dist  # noqa: E402

from fastflower import build, checkpoint, derived, errors  # noqa: E402
from fastflower.callbacks import record  # noqa: E402
from fastflower.callbacks.progress import Console  # noqa: E402
from fastflower.callbacks.samples import save_samples  # noqa: E402
from fastflower.callbacks.saving import Stop, load_last, parse_interval, restore  # noqa: E402
from fastflower.recipe import Recipe, parse_command  # noqa: E402
from fastflower.runs import Run  # noqa: E402


def main(argv: list[str]) -> int:
    """Train the recipe's folds one after the other, on as many ranks as were launched."""
    recipe = parse_command(argv)
    advice = derived.check(recipe)
    parse_interval(recipe.train.save_every)
    machine = build.prepare(recipe)
    stop = Stop()
    try:
        for fold in build.fold_numbers(recipe):
            with build.claim(recipe, fold) as run, build.console(run) as console:
                train_fold(recipe, run, machine, stop, console, advice)
    finally:
        stop.restore()
        machine.close()
    return 0


def train_fold(
    recipe: Recipe, run: Run, machine: build.Machine, stop: Stop, console: Console, advice: list[str]
) -> None:
    """One run: open the data, go on from the last checkpoint if there is one, fit, summarise."""
    fold = build.open_data(recipe, run.fold)
    same = build.same_run(recipe, fold, machine)
    last = find_last(run, same, console)
    if last is not None and last[1]:
        console.say(last[1])
        return
    build.verify(fold)
    training = build.training(recipe, run, fold, machine, stop, console, same)
    try:
        if last is not None:
            restore(checkpoint.load(last[0]), training.trainer.state, training.network, training.parts)
        announce(recipe, training, machine, advice)
        fit(training)
        finish(training, machine)
    finally:
        training.close()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def find_last(run: Run, same: dict, console: Console) -> tuple[Path, str] | None:
    """The checkpoint to go on from, and a line when there is nothing left to do.

    Raises InputError when it belongs to another recipe or other data.
    """

    def work() -> tuple[Path, str] | None:
        found = load_last(run, console.say)
        if found is None:
            return None
        path, last = found
        changed = record.differences(last.meta["identity"], same)
        if changed:
            raise errors.InputError(
                f"{run.model_dir} holds fold {run.fold}, seed {run.seed} of another recipe or other data "
                f"({'; '.join(changed[:4])}{'; ...' if len(changed) > 4 else ''}); undo the change or choose another exp.name"
            )
        best = last.meta["best"]
        finished = last.meta["finished"] and (
            f"fold {run.fold}, seed {run.seed} of {run.exp} is finished ({last.meta['finished']}): best epoch "
            f"{best['epoch']} with {best['score']:.4f}; nothing to do"
        )
        return path, finished

    return build.on_rank_zero(work)


def announce(recipe: Recipe, training: build.Training, machine: build.Machine, advice: list[str]) -> None:
    """Header on the console, meta/, the picture of samples, the start row."""
    if machine.rank:
        return
    facts, console, run = training.facts, training.console, training.run
    title, *lines = record.header(recipe, facts)
    console.say(title, "bold")
    for line in [*lines, "", *(f"  {line}" for line in facts.groups_table), ""]:
        console.say(line)
    room = record.check_disk(run.model_dir, 8 * 4 * facts.parameters * (2 + recipe.ema.enabled))
    for line in [*facts.notes, *(f"note: {line}" for line in [*record.world_note(recipe, facts), *advice, *room])]:
        console.say(f"  {line}", "yellow" if line.startswith("note") else "")
    record.write_meta(recipe, facts, advice, machine.determinism())
    start = training.trainer.state.timestamp
    epoch, step = start.epoch.value, start.batch_in_epoch.value
    if start.batch.value:
        console.say(f"  going on after epoch {epoch}, step {step} of the next", "bold")
    else:
        picture = run.results_dir / f"samples_{run.stem}.png"
        save_samples(picture, recipe, build.sample_loader(training), len(facts.counts), training.spec.interpolation, build.fill(training.spec))
    console.say()
    training.recorder.write({"event": "start", "from_epoch": epoch, "from_step": step, **facts.derived.as_dict()})


def fit(training: build.Training) -> None:
    """Train to the end. A rank whose own trouble ends the run says so itself; the others only leave."""
    rank = dist.get_global_rank()
    try:
        training.trainer.fit()
    except errors.InputError as error:
        if rank:
            print(f"fastflower: {error}", file=sys.stderr, flush=True)
        raise
    except torch.OutOfMemoryError as error:
        text = str(error).split(". ")[0]
        raise errors.EnvironmentFault(
            f"rank {rank}: {text}; halve train.batch_per_gpu and double train.grad_accum, the global batch stays"
        ) from None
    except RuntimeError as error:
        if dist.get_world_size() == 1 or "onnection" not in str(error):
            raise
        print(f"fastflower: rank {rank} leaves because another rank has ended; its own message says why", file=sys.stderr)
        raise SystemExit(1) from None


def finish(training: build.Training, machine: build.Machine) -> None:
    """The summary, the end row and the record of early stopping."""
    if machine.rank:
        return
    scoring, run = training.scoring, training.run
    best, epochs = scoring.selection.best, training.trainer.state.timestamp.epoch.value
    reason = scoring.selection.stopped or f"all {epochs} epochs"
    seconds = training.trainer.state.timestamp.total_wct.total_seconds()
    row = {
        "event": "end",
        "reason": reason,
        "stopped_early": bool(scoring.selection.stopped),
        "epochs": epochs,
        "best": {"epoch": best.epoch, "score": best.score, "weights": best.weights},
        "idle_epochs": scoring.selection.idle,
        "scores": scoring.best_flat,
        "files": {kind: str(path) for kind, path in training.saving.files().items()},
        "seconds": seconds,
        "saving_seconds": training.saving.seconds,
        "determinism": machine.determinism(),
    }
    training.recorder.write(row)
    record.write_end(run, row)
    for line in ["", *record.summary(run, best, scoring.best_flat, reason, training.saving.files(), seconds)]:
        training.console.say(line, "bold" if line.startswith("done") else "")


if __name__ == "__main__":
    errors.run(main)
