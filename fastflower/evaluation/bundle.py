"""The bundle: chosen members as programs and weights that code/predict.py runs with torch, NumPy and Pillow alone.

A network is traced with its weights as arguments. So one small program for each backbone and view size serves all
folds and seeds, and each member's weights are stored once. `gates.py` decides whether a bundle may be used.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import shutil
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fastflower
from fastflower import checkpoint, runs
from fastflower.errors import InputError
from fastflower.evaluation.oof import family_weights
from fastflower.evaluation.views import load_network, views_of
from fastflower.recipe import Recipe

FORMAT = 1
TOLERANCE = 1e-4  # of logits in fp32: the predictor's against the trainer's
BATCHES = (1, 2, 5)
CODE = Path(__file__).resolve().parents[2] / "code"


@dataclass
class Member:
    """A checkpoint ready to travel: its file, description, and network with the weights as the bundle stores them."""

    path: Path
    meta: dict[str, Any]
    tensors: dict[str, Tensor]
    network: nn.Module

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the last training stage."""
        return int(self.meta["size"][0]), int(self.meta["size"][1])


def choose(recipe: Recipe, given: list[Path]) -> list[Path]:
    """The members to hand in: those given, else all that the recipe's pattern finds, one for each fold and seed."""
    if given:
        return sorted(dict.fromkeys(given))
    found = runs.find_members(recipe.exp.name, recipe.ensembling.find_pattern)
    if not found:
        folder = runs.MODELS / recipe.exp.name
        pattern = recipe.ensembling.find_pattern
        raise InputError(f"no member in {folder} matches {pattern}; train first or give --members")
    return found


def load_members(paths: list[Path], dtype: str) -> list[Member]:
    """Read checkpoints and round their weights to what the bundle will store.

    Raises InputError for members of different class maps.
    """
    members: list[Member] = []
    for path in paths:
        file = checkpoint.load(path)
        first = members[0] if members else None
        if first and file.meta["class_hash"] != first.meta["class_hash"]:
            raise InputError(
                f"{first.path.name} has class map {first.meta['class_hash']}, {path.name} has "
                f"{file.meta['class_hash']}; a bundle holds members of one class map, choose with --members"
            )
        tensors = {name: stored(tensor, dtype) for name, tensor in file.tensors.items()}
        network = load_network(checkpoint.Checkpoint(tensors, file.meta), path, torch.device("cpu"))
        members.append(Member(path, file.meta, tensors, network))
    return members


def stored(tensor: Tensor, dtype: str) -> Tensor:
    """Matrices and kernels in half precision; vectors (norms, biases, variances) are small and stay as they are."""
    if dtype == "fp32" or not tensor.is_floating_point() or tensor.ndim < 2:
        return tensor
    half = tensor.half()
    return half if bool(torch.isfinite(half).all()) else tensor


def temperature_of(recipe: Recipe, paths: list[Path]) -> tuple[float, str]:
    """T for these members and where it comes from: evaluate's fit, or 1 and why."""
    path = runs.RESULTS / recipe.exp.name / "temperature.json"
    if not recipe.ts.enabled:
        return 1.0, "ts.enabled=false"
    if not path.is_file():
        return 1.0, f"no {path}; python -m fastflower.evaluate fits it"
    fitted = json.loads(path.read_text(encoding="utf-8"))
    known = fitted["members"]
    if len(paths) == 1 and (known.get(paths[0].name) or {}).get("t"):
        return float(known[paths[0].name]["t"]), f"{path}, this member's"
    if not (fitted["fused"] or {}).get("t"):
        return 1.0, f"{path} holds none"
    same = {path.name for path in paths} == set(known)
    return float(fitted["fused"]["t"]), f"{path}, fused" + (
        "" if same else f" from other members ({len(known)})"
    )


def write(folder: Path, members: list[Member], recipe: Recipe, temperature: float) -> dict[str, Any]:
    """Write programs, weights, bundle.json and SHA256 into an empty folder; the description in bundle.json."""
    first = members[0].meta
    hflip = recipe.tta.hflip
    crops: list[dict[str, Any]] = []
    programs: list[dict[str, Any]] = []
    files: dict[bytes, str] = {}
    described = []
    shares = weights_of([member.meta["backbone"] for member in members], recipe.ensembling.weighting)
    for number, (member, share) in enumerate(zip(members, shares, strict=True)):
        tensors, views, expected = dict(member.tensors), [], []
        asked = views_of(member.size, recipe.tta.scales, hflip)
        for height, width in dict.fromkeys((view.height, view.width) for view in asked):
            crop = crop_of(member.meta, height, width)
            crops += [] if crop in crops else [crop]
            program = trace(member, height, width, tensors)
            file = files.setdefault(program.pop("data"), f"program_{len(files)}.pt")
            program = {"file": file, **program}
            programs += [] if program in programs else [program]
            views.append({"crop": crops.index(crop), "program": programs.index(program)})
            expected.append(logits_of_test_picture(member.network, height, width))
        torch.save(tensors, folder / f"weights_{number}.pth")
        described.append(
            {
                "name": member.path.stem,
                "weights": f"weights_{number}.pth",
                "weight": float(share),
                "views": views,
                "expected": expected,
            }
        )
    for data, file in files.items():
        (folder / file).write_bytes(data)
    counts = np.sum([member.meta["class_counts"] for member in members], axis=0, dtype=np.float64)
    bundle = {
        "format": FORMAT,
        "fastflower": fastflower.__version__,
        "class_ids": [str(value) for value in first["class_ids"]],
        "class_hash": first["class_hash"],
        "prior": (counts / counts.sum()).tolist(),
        "columns": recipe.bundle.columns,
        "temperature": temperature,
        "hflip": hflip,
        "tolerance": TOLERANCE,
        "crops": crops,
        "programs": programs,
        "members": described,
    }
    (folder / "bundle.json").write_text(json.dumps(bundle, indent=1) + "\n", encoding="ascii")
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in sorted(folder.iterdir())
    ]
    (folder / "SHA256").write_text("".join(lines), encoding="ascii")
    return bundle


def weights_of(backbones: list[str], weighting: str) -> np.ndarray:
    """The say of each member (M,), summing to 1."""
    if weighting == "family":
        return family_weights(backbones)
    return np.full(len(backbones), 1 / len(backbones))


def crop_of(meta: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    """How a picture is cut for one view of a member."""
    return {
        "height": height,
        "width": width,
        "factor": float(meta["resize_factor"]),
        "interpolation": meta["interpolation"],
        "stored_side": meta["stored_side"],
    }


def trace(member: Member, height: int, width: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """A member's network for one view size as a program of (images, *weights).

    Returns its bytes, the names of its weights in order, and which of them half precision leaves alone.
    Weights that only this size has, such as resampled position embeddings, are added to `tensors`.
    Raises InputError when the program does not say what the network says.
    """
    network = fixed_size(member.network, height, width)
    weights = {name: t.detach() for name, t in (*network.named_parameters(), *network.named_buffers())}
    inputs = []
    for name, value in weights.items():
        if name in tensors and torch.equal(tensors[name].to(value.dtype), value):
            inputs.append(name)
            continue
        own = name if name not in tensors else f"{name}@{height}x{width}"
        tensors[own] = value.clone()
        inputs.append(own)
    example = torch.rand(2, height, width, 3).permute(0, 3, 1, 2) * 255
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter(
            "ignore"
        )  # the tracer warns of every Python branch; the result is compared below
        program = torch.jit.trace(
            with_weights(network, list(weights)), (example, *weights.values()), check_trace=False
        )
    check_program(program, member, height, width, list(weights.values()))
    buffer = io.BytesIO()
    torch.jit.save(program, buffer)
    data = without_paths(buffer.getvalue())
    keeps = half_keeps(program, inputs, list(weights.values()), example[:1])
    return {"data": data, "inputs": inputs, "half_keeps": keeps}


def fixed_size(network: nn.Module, height: int, width: int) -> nn.Module:
    """A copy prepared for one size: what depends on size alone (position embeddings, window masks) is computed now.

    Left inside the program, those steps would hold the dtype and device of this machine.
    """
    network = copy.deepcopy(network)
    modules: list[Any] = list(network.modules())  # timm's, whose attributes nn.Module does not declare
    masked = [module for module in modules if getattr(module, "dynamic_mask", False)]
    for module in modules:
        embedded = isinstance(getattr(module, "pos_embed", None), Tensor)
        if embedded and getattr(module, "dynamic_img_size", False):
            module.set_input_size(img_size=(height, width))
    for module in masked:
        module.get_attn_mask = _remembered(module)
    if masked:
        with torch.no_grad():
            network(torch.zeros(1, 3, height, width))
    for module in masked:
        del module.get_attn_mask
        module.dynamic_mask = False
    return network.eval()


def _remembered(module: Any) -> Any:
    """A window block's mask function that also leaves its result where the block looks for a fixed mask."""
    compute = module.get_attn_mask

    def run(*args: Any, **words: Any) -> Tensor | None:
        mask: Tensor | None = compute(*args, **words)
        module.attn_mask = mask
        return mask

    return run


def with_weights(network: nn.Module, names: list[str]) -> Any:
    """The network as a function (images, *weights): torch's functional_call refuses to be traced."""
    places = []
    for name in names:
        owner, _, leaf = name.rpartition(".")
        module = network.get_submodule(owner)
        places.append((module._parameters if leaf in module._parameters else module._buffers, leaf))

    def run(images: Tensor, *weights: Tensor) -> Tensor:
        for (table, leaf), value in zip(places, weights, strict=True):
            table[leaf] = value  # type: ignore[assignment]
        return network(images)

    return run


def check_program(program: Any, member: Member, height: int, width: int, weights: list[Tensor]) -> None:
    """Refuse a program whose logits leave the network's at any batch size, or that is bound to this device."""
    what = f"{member.path.name} at {height}x{width}"
    if 'value="cpu"' in str(program.inlined_graph):
        raise InputError(f"{what}: its program is bound to the CPU; choose another backbone or tta.scales")
    generator = torch.Generator().manual_seed(0)
    for batch in BATCHES:
        images = (torch.rand(batch, height, width, 3, generator=generator) * 255).permute(0, 3, 1, 2)
        with torch.inference_mode(), torch.jit.optimized_execution(False):
            gap = float((program(images, *weights) - member.network(images)).abs().max())
        if not gap <= TOLERANCE:
            raise InputError(
                f"{what}: traced logits are {gap:.2g} off at batch {batch}, {TOLERANCE:g} is allowed"
            )


def half_keeps(program: Any, names: list[str], weights: list[Tensor], images: Tensor) -> list[str] | None:
    """The weights that stay in fp32 when the rest of a program is run in half precision; None: it must not be.

    Cosine heads compute in fp32 and need their own so; a dtype that the tracer wrote down spoils the whole program.
    """
    heads = [name for name in names if name.startswith("head.")]
    with torch.inference_mode(), torch.jit.optimized_execution(False):
        full = program(images, *weights)
        for kept in ([], heads):
            halves = [
                value.half() if value.is_floating_point() and name not in kept else value
                for name, value in zip(names, weights, strict=True)
            ]
            try:
                gap = (program(images.half(), *halves).float() - full).abs().max()
            except RuntimeError:
                continue
            if gap <= 0.02 * max(1.0, float(full.abs().max())):
                return kept
    return None


def without_paths(data: bytes) -> bytes:
    """The same program without debug records, which name this machine's folders, and without the id made from them."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(result, "w") as target:
        for name in source.namelist():
            if not name.endswith((".debug_pkl", "serialization_id")):
                target.writestr(zipfile.ZipInfo(name), source.read(name))
    return result.getvalue()


def logits_of_test_picture(network: nn.Module, height: int, width: int) -> list[float]:
    """What the network says (C) of the picture with which the predictor tests itself on a new machine.

    Four decimals: the test asks for fewer, and the same members should give the same file.
    """
    y, x, c = np.ogrid[:height, :width, :3]
    waves = 127.5 + 90 * np.sin(x * 6.0 / width + 2.0 * c) * np.cos(y * (4.0 + c) / height)
    image = torch.from_numpy((waves + 35 * (x > y)).astype(np.uint8)[None])
    with torch.inference_mode():
        return [round(value, 4) for value in network(image.permute(0, 3, 1, 2).float())[0].tolist()]


@contextmanager
def aside() -> Iterator[Path]:
    """A new folder beside the bundle's place, removed unless `put_in_place` took it."""
    folder = runs.aside_of(runs.BUNDLE)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def put_in_place(folder: Path) -> None:
    """Rename a finished bundle to results/model/bundle; the old one is kept until then."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    old = runs.BUNDLE.with_name(f".{runs.BUNDLE.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if runs.BUNDLE.exists():
        os.rename(runs.BUNDLE, old)
    os.rename(folder, runs.BUNDLE)
    runs.fsync_folder(runs.BUNDLE.parent)
    shutil.rmtree(old, ignore_errors=True)


def zip_hand_in(path: Path) -> None:
    """The archive to hand in: code/ and the bundle in their places; the same bundle gives the same bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for file in [*sorted(CODE.glob("*.py")), *sorted(runs.BUNDLE.iterdir())]:
            name = f"code/{file.name}" if file.parent == CODE else runs.BUNDLE.joinpath(file.name).as_posix()
            entry = zipfile.ZipInfo(name)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, file.read_bytes())
    runs.write_atomic(path, buffer.getvalue())
