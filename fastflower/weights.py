"""Get the weights that a training starts from: `python -m fastflower.weights [BACKBONE [FILE or FOLDER]] [--ema]`.

Without arguments: the backbones of recipes/, and whether their weights are here. With a backbone (or a recipe): where
timm's weights come from and under which licence; they are downloaded, checked, and put below
results/model/pretrained_model/. HF_ENDPOINT=https://hf-mirror.com downloads from the mirror. Without a network: the
addresses of the file and the path to put it at. With a file: converts a state dict, a checkpoint of timm's train.py or
another program (.pth, .pt, .bin, .pth.tar), .safetensors, or a folder as the Hugging Face hub or a contest entry has it
(model/best_model.pth with config.json); nothing in it is run. A head is left out. Training also finds <backbone>.pth,
.pt, .bin, <backbone>/model.safetensors and <backbone>/pytorch_model.bin there.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fastflower.core import console, errors, files
from fastflower.core.errors import EnvironmentFault, InputError
from fastflower.model.pretrained import check_architecture, locate_weights, published_name, target_path
from fastflower.recipe import arguments, load

if TYPE_CHECKING:
    from fastflower.model.weight_files import Kind

RECIPES = Path("recipes")


def main(argv: list[str]) -> None:
    """List the weights of the recipes, download those of a backbone, or convert a file to them."""
    parser = argparse.ArgumentParser(
        prog="python -m fastflower.weights",
        description=inspect.getdoc(sys.modules[__name__]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "backbone", nargs="?", help="timm name with its tag, or a recipe or experiment that names it"
    )
    parser.add_argument("file", nargs="?", type=Path, help="a file or folder with weights; without: download")
    parser.add_argument("--ema", action="store_true", help="of a checkpoint: the averaged weights")
    parser.add_argument("--raw", action="store_true", help="of a checkpoint: the weights themselves")
    parser.add_argument("--replace", action="store_true", help="replace weights that are already there")
    options = parser.parse_intermixed_args(argv)
    if options.ema and options.raw:
        raise InputError("--ema and --raw exclude each other; give one")
    if options.file is None and (options.ema or options.raw):
        raise InputError("--ema and --raw choose the weights of a file; give one after the backbone")
    if options.backbone is None:
        list_recipes()
        return
    name = options.backbone
    if name.endswith((".yaml", ".yml")) or arguments.recorded_recipe(name).is_file():
        name = load(arguments.locate(name)).model.backbone
    backbone, name = name, published_name(name)
    if options.file is not None and not options.file.exists():
        raise InputError(f"{options.file}: no such file or folder; give a file of weights, or leave it out")
    check_architecture(name)
    present = locate_weights(name)
    if present and not options.replace:
        if options.file is not None:
            raise InputError(f"{present} is already there; --replace replaces it")
        check_present_file(name, present)
    elif options.file is None:
        fetch(name)
    else:
        convert_file(name, options.file, "ema" if options.ema else "raw" if options.raw else None)
    print_next(options.backbone, backbone)


def print_next(given: str, backbone: str) -> None:
    """Print the check of a training from these weights: of the recipe that was given, else of one that names them."""
    if given == backbone:
        users = (path for path in sorted(RECIPES.glob("*.yaml")) if load(path).model.backbone == backbone)
        given = str(next(users, f"model.backbone={backbone}"))
    console.print_next("doctor", [given])


def list_recipes() -> None:
    """Print each backbone of recipes/ that starts from weights, the recipes that use it, and where its file is."""
    users: dict[str, list[str]] = {}
    for path in sorted(RECIPES.glob("*.yaml")):
        recipe = load(path)
        if recipe.model.pretrained:
            users.setdefault(published_name(recipe.model.backbone), []).append(path.name)
    if not users:
        raise InputError(
            f"no recipe in {RECIPES.resolve()} starts from weights; give a backbone: python -m fastflower.weights NAME"
        )
    for name, recipes in users.items():
        present = locate_weights(name)
        print(f"{name}  ({', '.join(recipes)})\n  {f'present   {present}' if present else 'missing'}")
    absent = next((name for name in users if not locate_weights(name)), None)
    if absent:
        console.print_next("weights", [absent])


def check_present_file(name: str, path: Path) -> None:
    """Check the weights that are already there, and say where they come from."""
    # here, as below: torch and timm take seconds, which a refusal does not spend
    from fastflower.model.backbones import check_name, check_weights
    from fastflower.model.weight_files import read_weights

    check_name(name)
    print(check_weights(name, read_weights(path).tensors, path))
    print(f"{name}: present at {path}")


def fetch(name: str) -> None:
    """Download the weights of a backbone, check them and put them in place."""
    from fastflower.model import published

    source, target = published.published(name), target_path(name)
    place = target.with_name(name + Path(source.addresses[0]).suffix)
    print(
        f"{source.name}: {source.parameters / 1e6:.1f} M parameters, about {source.parameters * 4e-6:.0f} MB"
    )
    print(f"  licence  {source.licence or 'not recorded by timm; see the page'}")
    print(f"  page     {source.page}")
    for address in source.addresses:
        print(f"  file     {address}")
    print(f"  goes to  {place}", flush=True)
    folder = target.with_name(f".{target.stem}.download")
    try:
        loaded = published.download(source, folder)
    except EnvironmentFault as error:
        if not any(folder.rglob("*.incomplete")):
            files.remove(folder)  # else an interrupted download goes on from there
        mirror = f", or download from the mirror: HF_ENDPOINT={published.MIRROR}" * (
            len(source.addresses) > 1
        )
        raise EnvironmentFault(f"no download ({error}); put a file from above at {place}{mirror}") from None
    _place(name, loaded, target, as_it_is=loaded.suffix == target.suffix)
    files.remove(folder)


def convert_file(name: str, path: Path, kind: Kind | None) -> None:
    """Convert a file of weights for a backbone and put it in place."""
    from fastflower.model.backbones import check_name

    check_name(name)
    _place(name, path, target_path(name), kind=kind)


def _place(name: str, path: Path, target: Path, *, kind: Kind | None = None, as_it_is: bool = False) -> None:
    """Check a file against the backbone, and put it at `target`: its tensors without a head, or the file itself."""
    import safetensors.torch

    from fastflower.model.backbones import check_weights
    from fastflower.model.weight_files import read_weights

    file = read_weights(path, kind)
    if file.key:
        print(f"taking {file.key} of {file.path}")
    try:
        report = check_weights(name, file.tensors, file.path)
    except InputError as error:
        if file.architecture and file.architecture.partition(".")[0] != name.partition(".")[0]:
            raise InputError(f"{file.path} is of {file.architecture}, not of {name}: {error}") from None
        raise
    if as_it_is:
        files.replace_atomic(path, target)
    else:
        for what, keys in (("of a head", report.dropped), ("that the backbone has not", report.unexpected)):
            if keys:
                first = file.tensors.get(keys[0])
                shape = f" {tuple(first.shape)}" if first is not None else ""
                print(f"left out {len(keys)} tensors {what}: {keys[0]}{shape}{', ...' * (len(keys) > 1)}")
        left_out = {*report.dropped, *report.unexpected}
        kept = {
            key: tensor.clone().contiguous() for key, tensor in file.tensors.items() if key not in left_out
        }
        with files.replacing(target) as temporary:
            # not by save_file, which hides the errors of the disk behind its own
            temporary.write_bytes(safetensors.torch.save(kept))
            check_weights(
                name, safetensors.torch.load_file(temporary), target
            )  # what was written can be read
    print(f"{report.matched} tensors of {name} in {target}")


if __name__ == "__main__":
    errors.run_command(main, parses_help=True)
