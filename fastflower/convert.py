"""python -m fastflower.convert [recipe.yaml] [key=value ...] [--ray]: converts labels and images to folds and betons.

Writes classes.csv, class_stats.csv and .png, folds.csv, duplicates.csv and betons/ below data.home. Files that are
up to date are kept: folds.csv is written once, and a second run has nothing to do. With --ray, the nodes of the Ray
cluster at RAY_ADDRESS do the work; each must see this folder and the images under the same paths.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fastflower.core import console, errors
from fastflower.data.labels import check_columns, check_num_classes, describe, label_warnings, read_labels
from fastflower.recipe import Recipe, checks, own, parse_command

if TYPE_CHECKING:
    from fastflower.data.conversion.encode import Machine
    from fastflower.data.conversion.grouping import Embed
    from fastflower.data.conversion.pipeline import Converted

RAY = "--ray"


def main(argv: list[str]) -> int:
    """Convert, and print a summary."""
    cluster = RAY in argv
    argv = [word for word in argv if word != RAY]
    recipe = parse_command(argv)
    checks.check(recipe)
    own.check_own(recipe, ["robust.kinds"])
    table = read_labels(recipe)
    check_columns(recipe, len(table.classes))
    aux = [line for column in table.aux for line in column.describe()]
    for notice in (*table.notices, *check_num_classes(recipe, table), *label_warnings(table), *aux):
        print(f"note: {errors.one_line(notice)}")
    print(describe(table))
    from fastflower.data.conversion.pipeline import convert  # here: SciPy takes half a second, a refusal none

    machines = _cluster() if cluster else None
    print(summary(recipe.data.home, convert(recipe, table, _embedder, cluster=machines)))
    console.print_next("train", argv)
    return 0


def summary(home: str, result: Converted) -> str:
    """The rows of each fold as a table of text, and a line of totals."""
    lines = [f"{'fold':>6} {'train':>8} {'val':>8} {'val_corrupt':>12}"]
    for fold in result.folds.numbers:
        train, val = len(result.folds.train_rows(fold)), len(result.folds.val_rows(fold))
        lines.append(f"{fold:>6} {train:>8} {val:>8} {val * len(result.settings.combos):>12}")
    state = "up to date" if result.up_to_date else "converted"
    lines.append(
        f"{state}: {len(result.table)} images, {len(result.table.classes)} classes, {len(result.folds.numbers)} folds, "
        f"{result.settings.store} at short side {result.settings.stored_side}, "
        f"{result.bytes_on_disk / 1e6:.0f} MB in {home}/betons, {result.seconds:.1f} s"
    )
    return "\n".join(lines)


@contextmanager
def _cluster() -> Iterator[Machine]:
    """Context manager: the nodes of a Ray cluster, with as many tasks at once as they have cores."""
    from fastflower.core import ray_cluster
    from fastflower.data.conversion.encode import Machine

    with ray_cluster.joined(f"leave out {RAY}") as ray:
        count = ray_cluster.cores(ray)
        print(f"on Ray: {count} tasks at once; nodes: {len(ray_cluster.nodes(ray))}", flush=True)
        yield Machine(count, ray_cluster.RayTasks(ray).map_ordered, shards=True)


def _embedder(recipe: Recipe) -> Embed:
    # imported here: torch and timm take seconds, and few conversions need them
    from fastflower.model.embeddings import embedder

    return embedder(recipe)


if __name__ == "__main__":
    errors.run_command(main)
