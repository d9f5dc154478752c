"""Make the hand-in: `python -m fastflower.export [recipe.yaml or experiment ...] [key=value ...] [--zip FILE]`.

Chooses trained members, writes them with their programs and weights to a new folder, and puts that in the place of
results/model/bundle/ when all checks have passed: size, equal pixels and predictions, time for an image, and a run of
code/predict.py in an empty environment without network. A failed check is named and leaves the earlier bundle in place.
Members of several experiments become one bundle, whose settings are those of the first.
"""

from __future__ import annotations

import argparse
import inspect
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fastflower.bundle import held_out
from fastflower.bundle.members import check_shared_settings, choose, member_weights, read_out_of_fold
from fastflower.core import console, errors, files, runs
from fastflower.core.errors import InputError
from fastflower.data.readers import sources
from fastflower.recipe import Recipe, checks, parse_several

if TYPE_CHECKING:
    from fastflower.model.member import MemberMeta


def main(argv: list[str]) -> None:
    """Choose members, write the bundle to a temporary folder, check it, publish it."""
    options = parse(argv)
    recipes = parse_several(options.recipe)
    recipe, others = recipes[0], recipes[1:]
    for each in recipes:
        checks.check_flips(each)
        checks.check_views(each)
    if others and options.members:
        raise InputError(
            f"--members names the members of all experiments; give one recipe or experiment, got {len(recipes)}"
        )
    if options.timm or options.safetensors or options.onnx:
        # a member that is named needs no recipe: its checkpoint describes the network
        named = sorted(dict.fromkeys(options.members))
        write_network(named or choose(recipe, [], others=others).paths, options)
        return
    chosen = choose(recipe, options.members, others=others)
    # here: torch and timm take seconds, which a refusal does not spend
    from fastflower.bundle import gates, hand_in, writer
    from fastflower.evaluation import priors
    from fastflower.evaluation.views import kept_views

    recipes = [kept_views(each) for each in recipes]
    check_shared_settings(recipes)  # of several, each may have left out other views
    recipe = recipes[0]
    files.check_writable(runs.MODELS, *(runs.RESULTS / each.exp.name for each in recipes))
    held_out.open_originals(recipe)  # fails early, before minutes of work
    members = writer.load_members(chosen.paths, recipe.bundle.dtype)
    scales = {each.exp.name: each.tta.scales for each in recipes}
    for member in members:
        member.scales = scales.get(member.path.parent.name)
    weights = member_weights(chosen, [m.meta.backbone for m in members], recipe.ensembling.weighting)
    print(f"{len(members)} members, T = {chosen.temperature:.4f} ({chosen.source})")
    for path, weight in zip(chosen.paths, weights, strict=True):
        print(f"  {weight:.3f}  {path}")
    correction = priors.correction(recipe, list(members[0].meta.class_ids))
    if correction:
        print(f"bundle.prior = {recipe.bundle.prior}: {correction.effect}")
    with writer.temporary_bundle() as folder:
        arrays = sources.pair_arrays(recipe)
        bundle = writer.write_bundle(
            folder, members, weights=weights, recipe=recipe, temperature=chosen.temperature, arrays=arrays
        )
        out_of_fold = read_out_of_fold(list(scales), chosen.paths)
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
    for exp in scales:
        hand_in.write_hand_in(exp, recipe.bundle.dtype, gates=results, notes=notes)
    print(f"bundle in {runs.BUNDLE}")
    if options.zip:
        write_archive(recipe, [(member.path, member.meta) for member in members], options=options)
    source = "<pairs.npz>" if arrays else shlex.quote(recipe.data.test)
    console.print_next_line(f"python code/predict.py {source} {runs.SUBMISSION}")


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m fastflower.export",
        description=inspect.getdoc(sys.modules[__name__]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "recipe", nargs="*", help="recipe.yaml or experiment, one or several, and key=value changes"
    )
    parser.add_argument(
        "--members",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="hand in these checkpoints; without it, the best of each fold and seed",
    )
    parser.add_argument(
        "--zip",
        type=Path,
        metavar="FILE",
        help="also pack predictor, bundle and training records for the organiser",
    )
    parser.add_argument(
        "--top", default="", metavar="FOLDER", help="folder inside the archive that holds it all"
    )
    network = parser.add_argument_group("one trained network for other programs, without a hand-in")
    network.add_argument("--timm", type=Path, metavar="FOLDER", help="as timm loads it")
    network.add_argument("--safetensors", type=Path, metavar="FILE", help="its tensors alone")
    network.add_argument("--onnx", type=Path, metavar="FILE", help="as ONNX")
    return parser.parse_intermixed_args(argv)


def write_archive(
    recipe: Recipe, members: list[tuple[Path, MemberMeta]], *, options: argparse.Namespace
) -> None:
    """Write the archive of the published bundle and say what is in it."""
    from fastflower.bundle import archive

    records, omitted = archive.training_records(recipe, members)
    archive.zip_hand_in(options.zip, options.top, records)
    print(f"hand-in in {options.zip}, with {archive.FOLDER}/{archive.README} and {len(records) - 1} records")
    if omitted:
        first = f"{', '.join(omitted[:3])}{' ...' if len(omitted) > 3 else ''}"
        print(f"  without {first}: bundle.max_mb has no room")


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
