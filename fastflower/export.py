"""Make the hand-in: `python -m fastflower.export [recipe.yaml] [key=value ...] [--zip FILE] [--members a.pth ...]`."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastflower.bundle import held_out
from fastflower.bundle.members import choose, member_weights, read_out_of_fold
from fastflower.core import errors, runs
from fastflower.core.errors import InputError
from fastflower.data.readers import sources
from fastflower.recipe import checks, parse_command


def main(argv: list[str]) -> None:
    """Choose members, write the bundle to a temporary folder, check it, publish it."""
    parser = argparse.ArgumentParser(prog="python -m fastflower.export", description="Make the hand-in.")
    parser.add_argument("recipe", nargs="*", help="recipe.yaml and key=value changes")
    parser.add_argument(
        "--members", nargs="+", type=Path, default=[], help="checkpoints (those that find_pattern matches)"
    )
    parser.add_argument("--zip", type=Path, help="also write an archive of code/ and the bundle")
    parser.add_argument("--top", default="", help="folder inside the archive for both (none)")
    options = parser.parse_intermixed_args(argv)
    recipe = parse_command(options.recipe)
    checks.check_flips(recipe)
    chosen = choose(recipe, options.members)
    held_out.open_originals(recipe)  # fails early, before minutes of work
    # here: torch and timm take seconds, which a refusal does not spend
    from fastflower.bundle import gates, writer

    members = writer.load_members(chosen.paths, recipe.bundle.dtype)
    weights = member_weights(chosen, [m.meta.backbone for m in members], recipe.ensembling.weighting)
    print(f"{len(members)} members, T = {chosen.temperature:.4f} ({chosen.source})")
    for path, weight in zip(chosen.paths, weights, strict=True):
        print(f"  {weight:.3f}  {path}")
    with writer.temporary_bundle() as folder:
        arrays = sources.pair_arrays(recipe)
        bundle = writer.write_bundle(
            folder, members, weights=weights, recipe=recipe, temperature=chosen.temperature, arrays=arrays
        )
        out_of_fold = read_out_of_fold(recipe, chosen.paths)
        results, notes = gates.check(folder, bundle, members=members, recipe=recipe, out_of_fold=out_of_fold)
        gates.print_table(results)
        for note in notes:
            print(f"  {note}")
        failed = [gate for gate in results if gate.passed is False]
        if failed:
            raise InputError("; ".join(f"{gate.name}: {gate.got}, allowed {gate.allowed}" for gate in failed))
        writer.publish(folder)
    print(f"bundle in {runs.BUNDLE}; run python code/predict.py {'<.npz>' if arrays else '<folder>'} <csv>")
    if options.zip:
        writer.zip_hand_in(options.zip, options.top)
        print(f"hand-in in {options.zip}")


if __name__ == "__main__":
    errors.run_command(main, parses_help=True)
