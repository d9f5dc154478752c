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
    parser.add_argument(
        "--zip", type=Path, help="also write an archive of code/, the bundle, recipes, logs and scores"
    )
    parser.add_argument("--top", default="", help="folder inside the archive for both (none)")
    parser.add_argument(
        "--timm", type=Path, metavar="DIR", help="write one member as timm loads it; no hand-in"
    )
    parser.add_argument(
        "--safetensors", type=Path, metavar="FILE", help="write one member's tensors; no hand-in"
    )
    parser.add_argument("--onnx", type=Path, metavar="FILE", help="write one member as ONNX; no hand-in")
    options = parser.parse_intermixed_args(argv)
    recipe = parse_command(options.recipe)
    checks.check_flips(recipe)
    chosen = choose(recipe, options.members)
    if options.timm or options.safetensors or options.onnx:
        write_network(chosen.paths, options)
        return
    held_out.open_originals(recipe)  # fails early, before minutes of work
    # here: torch and timm take seconds, which a refusal does not spend
    from fastflower.bundle import archive, gates, hand_in, writer

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
        if failed and runs.BUNDLE.exists():
            print(f"{runs.BUNDLE} still holds the bundle of an earlier export")
        if failed:
            raise InputError("; ".join(f"{gate.name}: {gate.got}, allowed {gate.allowed}" for gate in failed))
        writer.publish(folder)
    hand_in.write_hand_in(recipe.exp.name, recipe.bundle.dtype, gates=results, notes=notes)
    print(f"bundle in {runs.BUNDLE}; run python code/predict.py {'<.npz>' if arrays else '<folder>'} <csv>")
    if options.zip:
        described = [(member.path, member.meta) for member in members]
        records, omitted = archive.training_records(recipe, described)
        archive.zip_hand_in(options.zip, options.top, records)
        print(
            f"hand-in in {options.zip}, with {archive.FOLDER}/{archive.README} and {len(records) - 1} records"
        )
        if omitted:
            print(
                f"  without {', '.join(omitted[:3])}{' ...' if len(omitted) > 3 else ''}: bundle.max_mb has no room"
            )


def write_network(paths: list[Path], options: argparse.Namespace) -> None:
    """Write one member in the formats of other programs; InputError when several were chosen."""
    if options.zip:
        raise InputError("--zip is of the hand-in; give it without --timm, --safetensors and --onnx")
    if len(paths) > 1:
        raise InputError(
            f"{len(paths)} members match, and another program gets one network; choose it by --members {paths[0]}, or "
            "average them by ensembling.soup=folds of evaluate"
        )
    # here: torch and timm take seconds, which a refusal does not spend
    from fastflower.bundle import interchange

    member = interchange.read_member(paths[0])
    print(
        f"{paths[0]}: {member.meta.backbone}, {len(member.meta.class_ids)} classes, size {member.meta.size}"
    )
    if options.timm:
        print(interchange.write_timm(member, options.timm))
    if options.safetensors:
        print(interchange.write_safetensors(member, options.safetensors))
    if options.onnx:
        print("\n".join(interchange.write_onnx(member, options.onnx)))


if __name__ == "__main__":
    errors.run_command(main, parses_help=True)
