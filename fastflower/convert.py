"""python -m fastflower.convert [recipe.yaml] [key=value ...]: labels and photographs become folds and betons.

Writes classes.csv, class_stats.csv and .png, folds.csv, duplicates.csv and betons/ below data.home. What is there
already and still fits is kept: folds.csv is made once, and a second run has nothing to do.
"""

from __future__ import annotations

from fastflower.core import errors
from fastflower.data.conversion.pipeline import Converted, Embed, convert
from fastflower.data.labels import check_columns, check_num_classes, describe, read_labels, remarks
from fastflower.recipe import Recipe, checks, parse_command


def main(argv: list[str]) -> int:
    """Convert and print a closing table."""
    recipe = parse_command(argv)
    checks.check(recipe)
    table = read_labels(recipe)
    check_columns(recipe, len(table.classes))
    for notice in (*table.notices, *check_num_classes(recipe, table), *remarks(table)):
        print(f"note: {notice}")
    print(describe(table))
    print(closing(recipe.data.home, convert(recipe, table, _embedder)))
    return 0


def closing(home: str, made: Converted) -> str:
    """What there is now, as a table of text."""
    lines = [f"{'fold':>6} {'train':>8} {'val':>8} {'val_corrupt':>12}"]
    for fold in made.folds.numbers:
        train, val = len(made.folds.train_rows(fold)), len(made.folds.val_rows(fold))
        lines.append(f"{fold:>6} {train:>8} {val:>8} {val * len(made.settings['combos']):>12}")
    state = "up to date" if made.up_to_date else "converted"
    lines.append(
        f"{state}: {len(made.table)} images, {len(made.table.classes)} classes, {len(made.folds.numbers)} folds, "
        f"{made.settings['store']} at short side {made.settings['stored_side']}, "
        f"{made.bytes_on_disk / 1e6:.0f} MB in {home}/betons, {made.seconds:.1f} s"
    )
    return "\n".join(lines)


def _embedder(recipe: Recipe) -> Embed:
    # torch and timm take seconds, and few conversions need them
    from fastflower.model.embeddings import embedder

    return embedder(recipe)


if __name__ == "__main__":
    errors.run(main)
