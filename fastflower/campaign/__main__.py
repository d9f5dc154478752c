"""Many trainings: `python -m fastflower.campaign recipe.yaml [recipe.yaml ...] [key=value ...] [-n RANKS] [--ray]`.

  data.fold=all seed=[42,2023] model.backbone=[a,b]               every fold, seed and backbone
  opt.lr=[1e-3,5e-4,2e-4] train.batch_per_gpu=[8,16,32]           a grid: table, heat map, best region
  opt.lr=log:1e-4..1e-2 opt.weight_decay=0..1e-3 --trials 50      a search by Optuna

A list for a key that takes one value is a list of values to train. Finished runs are kept, interrupted ones go on,
a failed one does not stop the others. Writes results/results/<exp>/campaign_<keys>.csv (.png for a grid, .journal
for a search). Exit codes: 0 all done, 1 some failed, 130 interrupted; others as for every command.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from fastflower.campaign import cluster, heatmap, launch, plan, results
from fastflower.campaign.launch import Finished, Result
from fastflower.campaign.search import Search
from fastflower.core import errors, files, runs
from fastflower.core.errors import InputError
from fastflower.core.tables import write_csv
from fastflower.recipe import load


def main(argv: list[str]) -> int:
    options = parse(argv)
    words = plan.read_words(options.words)
    place = place_of(options.recipes, words)
    search = (
        Search(options.recipes, words, trials=options.trials, journal=place.with_suffix(".journal"))
        if options.trials
        else None
    )
    tasks = search.tasks() if search else plan.tasks(options.recipes, words)
    ranks = options.n or default_ranks(load(options.recipes[0], words.plain).train.world_size)
    if options.dry_run:
        for task in tasks:
            print(" ".join(launch.command(task, ranks)))
        return 0
    finished = Finished(ranks)
    if worth_sharing(ranks) if options.ray is None else options.ray:
        ended = cluster.on_ray(tasks, ranks, finished=finished, logs=place.parent / "campaign_logs")
    else:
        ended = launch.one_by_one(tasks, ranks, finished)
    found, whole = collect(ended, search, place)
    tell(found, search, place)
    if not whole:
        print("interrupted; the same command goes on")
        return 130
    return int(any(result.state == "failed" for result in found))


def parse(argv: list[str]) -> argparse.Namespace:
    """Recipes, words and options; InputError for what does not go together."""
    parser = argparse.ArgumentParser(
        prog="python -m fastflower.campaign",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("words", nargs="*", help="recipe files and key=value words")
    parser.add_argument("-n", type=int, help="ranks of each training (the recipe's train.world_size)")
    parser.add_argument("--trials", type=int, help="search: how many proposals in all, earlier ones included")
    parser.add_argument(
        "--ray",
        action=argparse.BooleanOptionalAction,
        help="side by side on Ray (when there are GPUs for two trainings)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the trainings' commands")
    options = parser.parse_intermixed_args(argv)
    options.recipes = [word for word in options.words if "=" not in word]
    options.words = [word for word in options.words if "=" in word]
    for name, value in (("-n", options.n), ("--trials", options.trials)):
        if value is not None and value < 1:
            raise InputError(f"{name} {value}: must be 1 or more")
    if not options.recipes:
        raise InputError("got no recipe file; a campaign trains recipes, such as recipes/digits.yaml")
    if options.dry_run and options.trials:
        raise InputError("--dry-run lists trainings that are known beforehand; a search proposes its own")
    return options


def place_of(recipes: list[str], words: plan.Words) -> Path:
    """Where the campaign's table lies: its name says what varies."""
    keys = [axis.key for axis in words.axes] + [own.key for own in words.ranges]
    varied = [plan.short(key, keys) for key in keys] + ["recipe"] * (len(recipes) > 1)
    name = load(recipes[0], words.plain).exp.name
    return runs.RESULTS / name / ("_".join(["campaign", *varied]) + ".csv")


def default_ranks(wanted: int) -> int:
    """As many as the recipe is written for, or as there are GPUs where there are fewer."""
    return min(wanted, torch.cuda.device_count() or wanted)


def worth_sharing(ranks: int) -> bool:
    """Whether this machine's GPUs hold two trainings and Ray is there to place them."""
    return torch.cuda.device_count() >= 2 * ranks and importlib.util.find_spec("ray") is not None


def collect(ended: Iterator[Result], search: Search | None, place: Path) -> tuple[list[Result], bool]:
    """The results as they come, each written into the table at once; False when a person interrupted."""
    found: list[Result] = []
    try:
        for result in ended:
            found.append(result)
            if search:
                search.tell(result)
            rows = [results.row(one) for one in found]
            texts = [
                {name: "" if value is None else str(value) for name, value in row.items()} for row in rows
            ]
            write_csv(place, texts)
            print(results.line(result), flush=True)
    except KeyboardInterrupt:
        return found, False
    return found, True


def tell(found: list[Result], search: Search | None, place: Path) -> None:
    """The table, the grid and its heat map, the best trial, and last what failed."""
    if not found:
        return
    combined = results.combinations(found)
    print("\n" + results.table(combined))
    grid = None if search else results.grid(combined, validation_images(found))
    if grid:
        chart = heatmap.heat_map(grid, f"{place.parent.name}: mean score")
        files.write_atomic(place.with_suffix(".png"), chart.png())
        print("\n".join(["", *grid.sentences(), f"wrote {place.with_suffix('.png')}"]))
    for line in search.summary() if search else []:
        print(line)
    print(f"wrote {place}")
    failed = [result for result in found if result.state == "failed"]
    for result in failed:
        print(f"failed: {result.task.name}: {result.reason}", file=sys.stderr)
    if failed:
        print(
            f"{len(failed)} of {len(found)} trainings failed; the same command tries them again",
            file=sys.stderr,
        )


def validation_images(found: list[Result]) -> int:
    """Of one training, from what it wrote down at its start; 0 when none has."""
    for result in found:
        path = result.task.run.meta_dir / f"derived_{result.task.run.stem}.json"
        if path.is_file():
            return int(json.loads(path.read_text(encoding="utf-8"))["validation"])
    return 0


if __name__ == "__main__":
    errors.run(main, own_help=True)
