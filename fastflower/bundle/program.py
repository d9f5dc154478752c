"""A network as a program: traced for one view size with its weights as arguments, so that members share it.

The predictor needs no class definitions, and each weight is stored once for all views. Programs are compared with
the network they come from before anyone may use them.
"""

from __future__ import annotations

import copy
import io
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import timm.layers
import torch
from timm.layers.grn import GlobalResponseNorm
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from fastflower.core.errors import InputError

TOLERANCE = 1e-4  # of logits in fp32: the predictor's against the trainer's
BATCHES = (1, 2, 5)
CONVOLUTIONS = (nn.Conv2d, timm.layers.Conv2dSame)  # kinds that use their weight as it is


def trace(
    path: Path, network: nn.Module, *, height: int, width: int, tensors: dict[str, Tensor]
) -> dict[str, Any]:
    """A member's network for one view size as a program of (images, *weights).

    Returns its bytes, the names of its weights in order, the BatchNorms that the predictor multiplies into the
    convolution before them, and which weights half precision leaves alone. Weights that only this size has, such
    as resampled position embeddings, are added to `tensors`.
    Raises InputError when the program does not say what the network says.
    """
    what = f"{path.name} at {height}x{width}"
    plain = fixed_size(network, height, width)
    example = torch.rand(2, height, width, 3).permute(0, 3, 1, 2) * 255
    made, norms = without_norms(plain, example)
    weights = {name: t.detach() for name, t in (*made.named_parameters(), *made.named_buffers())}
    computed = {f"{norm['conv']}.{leaf}" for norm in norms for leaf in ("weight", "bias")}
    inputs = []
    for name, value in weights.items():
        same = name in tensors and torch.equal(tensors[name].to(value.dtype), value)
        own = name if same or name in computed or name not in tensors else f"{name}@{height}x{width}"
        if not same and name not in computed:
            tensors[own] = value.clone()
        inputs.append(own)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter(
            "ignore"
        )  # the tracer warns of every Python branch; the result is compared below
        program = torch.jit.trace(
            with_weights(made, list(weights)), (example, *weights.values()), check_trace=False
        )
    check_program(program, what, network=network, height=height, width=width, weights=list(weights.values()))
    buffer = io.BytesIO()
    torch.jit.save(program, buffer)
    data = without_paths(buffer.getvalue())
    keeps = half_keeps(program, inputs, weights=list(weights.values()), images=example[:1])
    return {"data": data, "inputs": inputs, "norms": norms, "half_keeps": keeps}


@torch.no_grad()
def without_norms(network: nn.Module, images: Tensor) -> tuple[nn.Module, list[dict[str, Any]]]:
    """A copy whose BatchNorms are multiplied into the convolutions before them, and which those are.

    On a CPU a BatchNorm costs as much as reading its whole input again. A network that reuses a convolution's
    output elsewhere says something else afterwards, and stays as it is.
    """
    norms: list[dict[str, Any]] = [
        {"conv": conv, "norm": norm, "eps": network.get_submodule(norm).eps}
        for conv, norm in _pairs(network, images)
    ]
    made = copy.deepcopy(network)
    for pair in norms:
        conv: Any = made.get_submodule(pair["conv"])
        norm: Any = made.get_submodule(pair["norm"])
        weight, bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        conv.weight, conv.bias = nn.Parameter(weight), nn.Parameter(bias)
        owner, _, leaf = pair["norm"].rpartition(".")
        setattr(made.get_submodule(owner), leaf, getattr(norm, "act", nn.Identity()))
    if norms and not float((made(images) - network(images)).abs().max()) <= TOLERANCE / 2:
        return network, []
    return made, norms


def _pairs(network: nn.Module, images: Tensor) -> list[tuple[str, str]]:
    """Names of (convolution, BatchNorm) where the second was given the very output of the first."""
    made: dict[int, tuple[str, Tensor]] = {}
    found, handles = [], []

    def after(name: str) -> Any:
        def hook(module: nn.Module, given: Any, output: Tensor) -> None:
            made[id(output)] = name, output

        return hook

    def before(name: str) -> Any:
        def hook(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            if id(given[0]) in made:
                found.append((made[id(given[0])][0], name))

        return hook

    for name, module in network.named_modules():
        if type(module) in CONVOLUTIONS:
            handles.append(module.register_forward_hook(after(name)))
        elif isinstance(module, nn.BatchNorm2d) and module.affine and module.track_running_stats:
            handles.append(module.register_forward_pre_hook(before(name)))
    network(images)
    for handle in handles:
        handle.remove()
    return list(dict.fromkeys(found))  # once, however often the network runs them


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
    for module in modules:
        if type(module) is GlobalResponseNorm:
            module.__class__ = QuickResponseNorm
    return network.eval()


class QuickResponseNorm(GlobalResponseNorm):
    """ConvNeXt V2's response norm in fewer passes over its input.

    On a CPU torch's norm over two axes takes four times as long as the mean of squares. Those of a 32nd stay within
    half precision up to inputs of 8000.
    """

    def forward(self, x: Tensor) -> Tensor:
        height, width = (x.shape[axis] for axis in self.spatial_dim)
        scale = 32 * (height * width) ** 0.5  # not math.sqrt, which would write this size into the program
        norm = (x / 32).square().mean(self.spatial_dim, keepdim=True).sqrt() * scale
        share = norm / (norm.mean(self.channel_dim, keepdim=True) + self.eps)
        return torch.addcmul(self.bias.view(self.wb_shape), x, 1 + self.weight.view(self.wb_shape) * share)


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


def check_program(
    program: Any, what: str, *, network: nn.Module, height: int, width: int, weights: list[Tensor]
) -> None:
    """Refuse a program whose logits leave the network's at any batch size, or that is bound to this device."""
    if 'value="cpu"' in str(program.inlined_graph):
        raise InputError(f"{what}: its program is bound to the CPU; choose another backbone or tta.scales")
    generator = torch.Generator().manual_seed(0)
    for batch in BATCHES:
        images = (torch.rand(batch, height, width, 3, generator=generator) * 255).permute(0, 3, 1, 2)
        with torch.inference_mode(), torch.jit.optimized_execution(False):
            gap = float((program(images, *weights) - network(images)).abs().max())
        if not gap <= TOLERANCE:
            raise InputError(
                f"{what}: traced logits are {gap:.2g} off at batch {batch}, {TOLERANCE:g} is allowed"
            )


def half_keeps(program: Any, names: list[str], *, weights: list[Tensor], images: Tensor) -> list[str] | None:
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
