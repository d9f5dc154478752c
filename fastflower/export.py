"""Make the hand-in: `python -m fastflower.export [recipe.yaml] [key=value ...] [--zip FILE] [--members a.pth ...]`."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastflower import errors, runs
from fastflower.errors import InputError
from fastflower.evaluation import bundle, gates
from fastflower.recipe import parse_command


def main(argv: list[str]) -> None:
    """Choose members, write the bundle aside, check it, put it in place."""
    parser = argparse.ArgumentParser(prog="python -m fastflower.export", description="Make the hand-in.")
    parser.add_argument("recipe", nargs="*", help="recipe.yaml and key=value words")
    parser.add_argument(
        "--members", nargs="+", type=Path, default=[], help="checkpoints (the recipe's find_pattern)"
    )
    parser.add_argument("--zip", type=Path, help="archive of code/ and the bundle to write as well")
    options = parser.parse_intermixed_args(argv)
    recipe = parse_command(options.recipe)
    paths = bundle.choose(recipe, options.members)
    members = bundle.load_members(paths, recipe.bundle.dtype)
    temperature, source = bundle.temperature_of(recipe, paths)
    print(f"{len(members)} members, T = {temperature:.4f} ({source})")
    for path in paths:
        print(f"  {path}")
    with bundle.aside() as folder:
        made = bundle.write(folder, members, recipe, temperature)
        found, lines = gates.check(folder, made, members, recipe)
        gates.table(found)
        for line in lines:
            print(f"  fp16 {line}")
        failed = [gate for gate in found if not gate.passed]
        if failed:
            raise InputError("; ".join(f"{gate.name}: {gate.got}, allowed {gate.allowed}" for gate in failed))
        bundle.put_in_place(folder)
    print(f"bundle in {runs.BUNDLE}; run python code/predict.py <folder> <csv>")
    if options.zip:
        bundle.zip_hand_in(options.zip)
        print(f"hand-in in {options.zip}")


if __name__ == "__main__":
    errors.run(main)
