"""Make the hand-in: `python -m fastflower.export [recipe.yaml] [key=value ...] [--zip FILE] [--members a.pth ...]`."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastflower.bundle import gates, held_out, writer
from fastflower.bundle.members import choose, out_of_fold, shares_of
from fastflower.core import errors, runs
from fastflower.core.errors import InputError
from fastflower.data.readers import sources
from fastflower.recipe import checks, parse_command


def main(argv: list[str]) -> None:
    """Choose members, write the bundle aside, check it, put it in place."""
    parser = argparse.ArgumentParser(prog="python -m fastflower.export", description="Make the hand-in.")
    parser.add_argument("recipe", nargs="*", help="recipe.yaml and key=value words")
    parser.add_argument(
        "--members", nargs="+", type=Path, default=[], help="checkpoints (the recipe's find_pattern)"
    )
    parser.add_argument("--zip", type=Path, help="archive of code/ and the bundle to write as well")
    parser.add_argument("--top", default="", help="folder of the archive that holds both (none)")
    options = parser.parse_intermixed_args(argv)
    recipe = parse_command(options.recipe)
    checks.check_flips(recipe)
    chosen = choose(recipe, options.members)
    held_out.originals(recipe)  # before minutes of work
    members = writer.load_members(chosen.paths, recipe.bundle.dtype)
    shares = shares_of(chosen, [m.meta["backbone"] for m in members], recipe.ensembling.weighting)
    print(f"{len(members)} members, T = {chosen.temperature:.4f} ({chosen.source})")
    for path, share in zip(chosen.paths, shares, strict=True):
        print(f"  {share:.3f}  {path}")
    with writer.aside() as folder:
        arrays = sources.pair_arrays(recipe)
        made = writer.write(
            folder, members, shares=shares, recipe=recipe, temperature=chosen.temperature, arrays=arrays
        )
        known = out_of_fold(recipe, chosen.paths)
        found, lines = gates.check(folder, made, members=members, recipe=recipe, out_of_fold=known)
        gates.table(found)
        for line in lines:
            print(f"  {line}")
        failed = [gate for gate in found if gate.passed is False]
        if failed:
            raise InputError("; ".join(f"{gate.name}: {gate.got}, allowed {gate.allowed}" for gate in failed))
        writer.put_in_place(folder)
    print(f"bundle in {runs.BUNDLE}; run python code/predict.py {'<.npz>' if arrays else '<folder>'} <csv>")
    if options.zip:
        writer.zip_hand_in(options.zip, options.top)
        print(f"hand-in in {options.zip}")


if __name__ == "__main__":
    errors.run(main, own_help=True)
