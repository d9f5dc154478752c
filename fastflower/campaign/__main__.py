"""Many trainings: `python -m fastflower.campaign recipe.yaml [recipe.yaml ...] [key=value ...] [-n RANKS] [--ray]`.

  data.fold=all seed=[42,2023] model.backbone=[a,b]               every fold, seed and backbone
  opt.lr=[1e-3,5e-4,2e-4] train.batch_per_gpu=[8,16,32]           a grid: table, heat map, best region
  opt.lr=log:1e-4..1e-2 opt.weight_decay=0..1e-3 --trials 50      a search by Optuna
  data.fold=all data.unlabelled=more semi.rounds=2                students of students, on unlabelled images

A list for a key that takes one value is a list of values to train. Finished runs are kept, interrupted runs resume,
a failed run does not stop the others. Writes results/results/<exp>/campaign_<keys>.csv (.png for a grid, .journal
for a search). Exit codes: 0 all done, 1 some failed, 130 interrupted; others as for every command.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from fastflower.campaign import cluster, launch, plan, results, rounds
from fastflower.campaign.launch import Finished, Result
from fastflower.campaign.search import Search
from fastflower.core import console, errors, files, runs
from fastflower.core.errors import InputError
from fastflower.core.launcher import gpu_count
from fastflower.core.records import read_record
from fastflower.core.tables import write_csv
from fastflower.recipe import Recipe, arguments, load
from fastflower.recipe.derived import unscored_kind, validates
from fastflower.recipe.run_record import RunNumbers, numbers_path


def main(argv: list[str]) -> int:
    options = parse(argv)
    overrides = plan.parse_overrides(options.overrides)
    table = table_path(options.recipes, overrides)
    ranks = options.n or default_ranks(load(options.recipes[0], overrides.fixed).train.world_size)
    planned = []
    if load(options.recipes[0], overrides.fixed).semi.rounds:
        if options.trials:
            raise InputError(
                "got --trials with semi.rounds; a search trains no rounds of students; give one of them"
            )
        planned = rounds.plan_rounds(options.recipes, overrides)
    if options.dry_run:
        for task in [task for each in planned for task in each.tasks] or plan.tasks(
            options.recipes, overrides
        ):
            print(" ".join(launch.training_command(task, ranks)))
        return 0
    busy = f"{table}: another campaign (process {{pid}}) writes it; wait for it, or set another exp.name"
    with files.locked(table.with_name(f".{table.stem}.lock"), busy):
        return run(options, overrides, table=table, ranks=ranks, planned=planned)


def run(
    options: argparse.Namespace,
    overrides: plan.Overrides,
    *,
    table: Path,
    ranks: int,
    planned: Sequence[rounds.Round] = (),
) -> int:
    """Train what is not finished, of all rounds that are planned, and write the table; returns the exit code."""
    search = None
    if options.trials:
        journal = table.with_suffix(".journal")
        search = Search(options.recipes, overrides, trials=options.trials, journal=journal)
    finished = Finished(ranks)
    parallel = can_run_parallel(ranks) if options.ray is None else options.ray
    order: dict[plan.Task, int] = {}  # of the plan, in which trainings side by side do not end

    def numbered(tasks: Iterable[plan.Task]) -> Iterator[plan.Task]:
        for task in tasks:
            order[task] = len(order)
            yield task

    def train(tasks: Iterable[plan.Task]) -> Iterator[Result]:
        if parallel:
            logs = table.parent / "campaign_logs"
            return cluster.run_on_ray(numbered(tasks), ranks, finished=finished, logs=logs)
        return launch.run_sequentially(numbered(tasks), ranks, finished)

    if planned:
        stream = rounds.run(planned, train)
    else:
        stream = train(search.tasks() if search else plan.tasks(options.recipes, overrides))
    collected, completed = collect(stream, search, order=order, table=table)
    print_summary(collected, search, table)
    if not completed:
        print("interrupted; run the same command again to continue")
        return 130
    failed = any(result.state == "failed" for result in collected)
    if planned and not failed:
        print_gains(rounds.gains(planned), table.with_name(rounds.FILE))
    names = list(dict.fromkeys(result.task.run.exp for result in collected))
    if collected and not failed:
        print_next(load(options.recipes[0], overrides.fixed), names, in_rounds=bool(planned))
    return int(failed)


def parse(argv: list[str]) -> argparse.Namespace:
    """Recipes, overrides and options; InputError for invalid values and combinations."""
    parser = argparse.ArgumentParser(
        prog="python -m fastflower.campaign",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("arguments", nargs="*", help="recipe files or experiments, and key=value overrides")
    parser.add_argument(
        "-n", type=int, help="ranks of each training (default: the recipe's train.world_size)"
    )
    parser.add_argument(
        "--trials", type=int, help="search: total number of proposals, including earlier ones"
    )
    parser.add_argument(
        "--ray",
        action=argparse.BooleanOptionalAction,
        help="run trainings in parallel on Ray (default: when the GPUs fit two trainings)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands of the trainings and exit")
    options = parser.parse_intermixed_args(argv)
    options.recipes = [
        str(arguments.locate(argument)) for argument in options.arguments if "=" not in argument
    ]
    options.overrides = [argument for argument in options.arguments if "=" in argument]
    for name, value in (("-n", options.n), ("--trials", options.trials)):
        if value is not None and value < 1:
            raise InputError(f"{name} {value}: must be 1 or more")
    if not options.recipes:
        raise InputError(
            "got no recipe or experiment; a campaign trains recipes, such as recipes/digits.yaml"
        )
    if options.dry_run and options.trials:
        raise InputError(
            "--dry-run cannot list a search, which proposes its trainings as it runs; give --dry-run or --trials"
        )
    return options


def table_path(recipes: list[str], overrides: plan.Overrides) -> Path:
    """Path of the campaign's table, named after the keys that vary."""
    keys = [axis.key for axis in overrides.axes] + [interval.key for interval in overrides.ranges]
    varied = [plan.short_key(key, keys) for key in keys] + ["recipe"] * (len(recipes) > 1)
    name = load(recipes[0], overrides.fixed).exp.name
    return runs.RESULTS / name / ("_".join(["campaign", *varied]) + ".csv")


def default_ranks(world_size: int) -> int:
    """The recipe's world size, limited to the number of GPUs; not limited without GPUs."""
    return min(world_size, gpu_count() or world_size)


def can_run_parallel(ranks: int) -> bool:
    """True when this machine has GPUs for two trainings and Ray is installed."""
    return gpu_count() >= 2 * ranks and importlib.util.find_spec("ray") is not None


def collect(
    stream: Iterator[Result], search: Search | None, *, order: dict[plan.Task, int], table: Path
) -> tuple[list[Result], bool]:
    """Results in the order of their tasks, and False after Ctrl-C; the table is rewritten after each result."""
    collected: list[Result] = []
    try:
        for result in stream:
            collected.append(result)
            collected.sort(key=lambda item: order[item.task])
            if search:
                search.record(result)
            rows = [results.row(item) for item in collected]
            texts = [
                {name: "" if value is None else str(value) for name, value in row.items()} for row in rows
            ]
            write_csv(table, texts)
            print(results.line(result), flush=True)
    except KeyboardInterrupt:
        return collected, False
    return collected, True


def print_summary(collected: list[Result], search: Search | None, table: Path) -> None:
    """Print the table, the grid with its heat map, the best trial, and the failures last."""
    if not collected:
        return
    combined = results.combinations(collected)
    print("\n" + results.summary_table(combined))
    grid = None if search else results.grid(combined, validation_images(collected))
    if grid:
        from fastflower.campaign import heatmap  # here: it imports matplotlib

        chart = heatmap.heat_map(grid, f"{table.parent.name}: mean score")
        files.write_atomic(table.with_suffix(".png"), chart.png())
        print("\n".join(["", *grid.summary(), f"wrote {table.with_suffix('.png')}"]))
    for line in search.summary() if search else []:
        print(line)
    print(f"wrote {table}")
    failed = [result for result in collected if result.state == "failed"]
    for result in failed:
        print(f"failed: {result.task.name}: {result.reason}", file=sys.stderr)
    if failed:
        print(
            f"{len(failed)} of {len(collected)} trainings failed; run the same command again to retry them",
            file=sys.stderr,
        )


def print_gains(rows: list[dict[str, str]], path: Path) -> None:
    """Print the gain of each round, and write it."""
    write_csv(path, rows)
    print("\n" + console.aligned([list(rows[0]), *(list(row.values()) for row in rows)]))
    print(f"wrote {path}; no validation image's label has reached a member that scores it")


def print_next(recipe: Recipe, experiments: list[str], *, in_rounds: bool) -> None:
    """Print the next command: rounds are evaluated already, and without held-out images nothing is scored."""
    if in_rounds:
        console.print_next("report", experiments)
    elif validates(recipe):
        console.print_next("evaluate", experiments)
    else:
        pattern = f"ensembling.find_pattern={unscored_kind(recipe)}__*.pth"
        console.print_next("export", [*experiments, pattern])


def validation_images(collected: list[Result]) -> int:
    """Number of validation images of one training, from its derived numbers; 0 when none has written them."""
    for result in collected:
        path = numbers_path(result.task.run)
        if path.is_file():
            return read_record(path, RunNumbers).validation
    return 0


if __name__ == "__main__":
    errors.run_command(main, parses_help=True)
