"""The files of published weights below results/model/pretrained_model/: where they belong and which one is taken.

Imports no torch: commands look for weights before the imports that take seconds.
"""

from __future__ import annotations

import difflib
import importlib.util
import re
from importlib.metadata import version
from pathlib import Path

from fastflower.core import runs
from fastflower.core.errors import InputError
from fastflower.recipe import Recipe, derived

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")
# networks that compare pairs by a trunk of timm; compare_resnet222_* and 333 are this project's own
WITH_TRUNK = re.compile(r"compare_(?P<trunk>(?!resnet(?:222|333)_)\w+)_(?P<fusion>[a-z]+)")
OWN_NETWORKS = ("compare_", "ocec_")
REGISTERED = re.compile(r"^@register_model\ndef (\w+)\(", re.MULTILINE)  # in timm's sources


def published_name(backbone: str) -> str:
    """The timm name whose published weights a backbone takes: its own, or that of the trunk that compares pairs."""
    match = WITH_TRUNK.fullmatch(backbone)
    return match["trunk"] if match else backbone


def target_path(name: str, folder: Path = runs.PRETRAINED) -> Path:
    """The path at which `fastflower.weights` puts a backbone's weights."""
    return folder / f"{name}.safetensors"


def locate_weights(name: str, folder: Path = runs.PRETRAINED) -> Path | None:
    """The file with a backbone's published weights, or None.

    With its tag before without; a file `<name>.safetensors`, .pth, .pt or .bin before a folder `<name>/` as the hub
    has it, before a copy of the hub's cache.
    """
    name = published_name(name)
    for stem in dict.fromkeys((name, name.partition(".")[0])):
        snapshots = folder / f"models--timm--{stem}" / "snapshots"
        paths = [folder / (stem + suffix) for suffix in SUFFIXES]
        paths += [folder / stem / file for file in FOLDER_FILES]
        paths += [path for file in FOLDER_FILES for path in sorted(snapshots.glob(f"*/{file}"))]
        for path in paths:
            if path.is_file():
                return path
    return None


def find_weights(name: str, folder: Path = runs.PRETRAINED) -> Path:
    """The file with a backbone's published weights; InputError names the command that gets them."""
    name = published_name(name)
    path = locate_weights(name, folder)
    if path is None:
        raise InputError(
            f"no pretrained weights of {name} in {folder}; get them by python -m fastflower.weights {name}, "
            "or set model.pretrained=false"
        )
    return path


def check_architecture(backbone: str) -> None:
    """Refuse a name that timm does not have, before timm is imported: by the functions in its sources.

    Names of this project's own networks pass, and everything where timm has no sources.
    """
    name = published_name(backbone).partition(".")[0]
    if ":" in name or name.startswith(OWN_NETWORKS) or (spec := importlib.util.find_spec("timm")) is None:
        return
    folder = Path(spec.origin or "").parent / "models"
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py")))
    known = REGISTERED.findall(text)
    if name in known or re.search(rf"['\"]{re.escape(name)}['\"]", text) or not known:  # quoted: an old name
        return
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"near: {', '.join(near)}" if near else "see timm.list_models(), or give module:function"
    raise InputError(f"model.backbone = {backbone}: timm {version('timm')} has no such model; {hint}")


def check_present(recipe: Recipe) -> None:
    """Refuse a recipe whose training begins with weights that are missing; a run that has ended needs none."""
    name = recipe.model.backbone
    if recipe.model.init or not recipe.model.pretrained or ":" in name or locate_weights(name):
        return
    waiting = [
        fold
        for fold in derived.fold_numbers(recipe)
        if not runs.Run(exp=recipe.exp.name, backbone=name, fold=fold, seed=recipe.seed).end_path.is_file()
    ]
    if waiting:
        find_weights(name)
