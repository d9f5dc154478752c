"""A network as a program: traced for one view size with its weights as arguments, so that members share it.

The predictor needs no class definitions, and each weight is stored once for all views. Every program is compared
with its network before it is written.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm.layers
import torch
from timm.layers.grn import GlobalResponseNorm
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from fastflower.bundle.description import FusedNorm
from fastflower.bundle.tracing import compile_text, text_and_constants
from fastflower.core.errors import InputError
from fastflower.model.network import NetworkSpec

TOLERANCE = 1e-4  # largest difference of fp32 logits between predictor and trainer
BATCHES = (1, 2, 5)
CONVOLUTIONS = (nn.Conv2d, timm.layers.Conv2dSame)  # kinds that use their weight unchanged


@dataclass(frozen=True)
class TracedProgram:
    """The text of a program and how to call it; see `description.Program`."""

    text: str
    inputs: list[str]
    norms: list[FusedNorm]
    half_keeps: list[str] | None


def trace(
    path: Path, network: nn.Module, *, height: int, width: int, tensors: dict[str, Tensor]
) -> TracedProgram:
    """Trace a member's network for one view size as a program of (images, *weights).

    Weights that only this size has, such as resampled position embeddings, are added to `tensors`. Raises InputError
    when the program's logits differ from the network's.
    """
    title = f"{path.name} at {height}x{width}"
    fixed = fixed_size(network, height, width)
    example = torch.rand(2, height, width, 3).permute(0, 3, 1, 2) * 255
    fused, norms = fuse_norms(fixed, example)
    weights = {name: t.detach() for name, t in (*fused.named_parameters(), *fused.named_buffers())}
    computed = {f"{norm.conv}.{leaf}" for norm in norms for leaf in ("weight", "bias")}
    inputs = []
    for name, value in weights.items():
        stored = name in tensors and torch.equal(tensors[name].to(value.dtype), value)
        key = name if stored or name in computed or name not in tensors else f"{name}@{height}x{width}"
        if not stored and name not in computed:
            tensors[key] = value.clone()
        inputs.append(key)
    text, constants = text_and_constants(fused, weights, example)
    for name, value in constants.items():
        inputs.append(f"{name}@{height}x{width}")
        tensors[inputs[-1]] = value
    values = [*weights.values(), *constants.values()]
    program = compile_text(text, title)
    check_program(program, title, network=network, height=height, width=width, weights=values)
    return TracedProgram(
        text=text,
        inputs=inputs,
        norms=norms,
        half_keeps=half_keeps(program, inputs, weights=values, images=example[:1]),
    )


@torch.inference_mode()
def try_export(spec: NetworkSpec, network: nn.Module, sizes: Sequence[tuple[int, int]]) -> None:
    """Raise InputError for a network that could not be handed in after its training, at one of the views' sizes.

    Tries networks of equal spec and sizes once in a process. Makes and runs the program of each size on the network's
    device, with pictures that use up no random numbers. Logits may be 1 % off: `trace` compares them exactly.
    """
    key = (spec, *sizes)
    if key in _tried:
        return
    for height, width in sizes:
        title = f"model.backbone = {spec.backbone} at {height}x{width}"
        try:
            fixed = fixed_size(network, height, width)
            weights = {key: t.detach() for key, t in (*fixed.named_parameters(), *fixed.named_buffers())}
            pixels = torch.arange(2 * 3 * height * width, device=next(iter(weights.values())).device)
            images = (pixels * 997 % 256).float().view(2, 3, height, width)
            text, constants = text_and_constants(fixed, weights, images)
            program = compile_text(text, title)
            with torch.jit.optimized_execution(False):
                got = program(images[:1], *weights.values(), *constants.values())
            want = fixed(images[:1])
        except (
            InputError,
            torch.OutOfMemoryError,
        ):  # the latter has its own words at the start of a training
            raise
        except Exception as error:  # the tracer and the networks raise many kinds
            reason = " ".join(str(error).split())[:160]
            raise InputError(
                f"{title}: it cannot be exported for the predictor ({reason}); choose another backbone"
            ) from None
        if got.shape != want.shape or not float((got - want).abs().max()) <= 0.01 * max(
            1.0, float(want.abs().max())
        ):
            raise InputError(
                f"{title}: its program follows the batch or the values of the images that it was traced with; "
                "choose another backbone"
            )
    _tried.add(key)


_tried: set[tuple[Any, ...]] = set()  # networks that try_export has passed


@torch.no_grad()
def fuse_norms(network: nn.Module, images: Tensor) -> tuple[nn.Module, list[FusedNorm]]:
    """A copy whose BatchNorms are multiplied into the convolutions before them, and the list of these.

    On a CPU a BatchNorm costs as much as reading its whole input again. Where the fused network computes something
    else, because it reuses a convolution's output elsewhere, the network itself is returned and an empty list.
    """
    norms = []
    for conv_name, norm_name in _convolutions_before_norms(network, images):
        layer: Any = network.get_submodule(norm_name)
        norms.append(FusedNorm(conv_name, norm_name, layer.eps))
    fused = copy.deepcopy(network)
    for entry in norms:
        conv: Any = fused.get_submodule(entry.conv)
        norm: Any = fused.get_submodule(entry.norm)
        weight, bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        conv.weight, conv.bias = nn.Parameter(weight), nn.Parameter(bias)
        owner, _, leaf = entry.norm.rpartition(".")
        setattr(fused.get_submodule(owner), leaf, getattr(norm, "act", nn.Identity()))
    if norms and not float((fused(images) - network(images)).abs().max()) <= TOLERANCE / 2:
        return network, []
    return fused, norms


def _convolutions_before_norms(network: nn.Module, images: Tensor) -> list[tuple[str, str]]:
    """Names of (convolution, BatchNorm) where the output of the first is the input of the second."""
    outputs: dict[int, tuple[str, Tensor]] = {}  # holding the tensor keeps its id unique
    names, handles = [], []

    def after(name: str) -> Any:
        def hook(module: nn.Module, arguments: Any, output: Tensor) -> None:
            outputs[id(output)] = name, output

        return hook

    def before(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            if id(arguments[0]) in outputs:
                names.append((outputs[id(arguments[0])][0], name))

        return hook

    for name, module in network.named_modules():
        if type(module) in CONVOLUTIONS:
            handles.append(module.register_forward_hook(after(name)))
        elif isinstance(module, nn.BatchNorm2d) and module.affine and module.track_running_stats:
            handles.append(module.register_forward_pre_hook(before(name)))
    network(images)
    for handle in handles:
        handle.remove()
    return list(dict.fromkeys(names))  # once, however often the network runs them


def fixed_size(network: nn.Module, height: int, width: int) -> nn.Module:
    """A copy for one view size, with position embeddings and window masks computed now, and no activations recomputed.

    Inside the program the former would fix the dtype and device of this machine; the tracer cannot follow the latter.
    """
    network = copy.deepcopy(network).eval()
    modules: list[Any] = list(network.modules())  # timm's, whose attributes nn.Module does not declare
    masked = [module for module in modules if getattr(module, "dynamic_mask", False)]
    for module in modules:
        if getattr(module, "grad_checkpointing", False):
            module.grad_checkpointing = False
        embedded = isinstance(getattr(module, "pos_embed", None), Tensor)
        if embedded and getattr(module, "dynamic_img_size", False):
            module.set_input_size(img_size=(height, width))
    for module in masked:
        module.get_attn_mask = _remembered(module)
    if masked:
        with torch.no_grad():
            network(torch.zeros(1, 3, height, width, device=next(network.parameters()).device))
    for module in masked:
        del module.get_attn_mask
        module.dynamic_mask = False
    for module in modules:
        if isinstance(module, GlobalResponseNorm):  # timm's, or the lean one of training
            module.__class__ = QuickResponseNorm
    return network.eval()


class QuickResponseNorm(GlobalResponseNorm):
    """ConvNeXt V2's response norm in fewer passes over its input.

    On a CPU torch's norm over two axes takes four times as long as the mean of squares. The squares are in float32,
    because in half precision an input of 256 has an infinite one.
    """

    def forward(self, x: Tensor) -> Tensor:
        height, width = (x.shape[axis] for axis in self.spatial_dim)
        scale = 32 * (height * width) ** 0.5  # not math.sqrt, which would write this size into the program
        # the division makes a tensor of its own: the tracer would take x itself for its float32 version from here on
        rms = (x / 32).float().square().mean(self.spatial_dim, keepdim=True).sqrt()  # the norm over the scale
        relative = (rms / (rms.mean(self.channel_dim, keepdim=True) + self.eps / scale)).type_as(x)
        return torch.addcmul(self.bias.view(self.wb_shape), x, 1 + self.weight.view(self.wb_shape) * relative)


def _remembered(module: Any) -> Any:
    """A window block's mask function that also stores its result where the block looks for a fixed mask."""
    compute = module.get_attn_mask

    def run(*args: Any, **keywords: Any) -> Tensor | None:
        mask: Tensor | None = compute(*args, **keywords)
        module.attn_mask = mask
        return mask

    return run


def check_program(
    program: Any, title: str, *, network: nn.Module, height: int, width: int, weights: list[Tensor]
) -> None:
    """Raise InputError for a program whose logits differ from the network's."""
    generator = torch.Generator().manual_seed(0)
    for batch in BATCHES:
        images = (torch.rand(batch, height, width, 3, generator=generator) * 255).permute(0, 3, 1, 2)
        with torch.inference_mode(), torch.jit.optimized_execution(False):
            want = network(images)
            try:
                gap = float((program(images, *weights) - want).abs().max())
            except RuntimeError as error:  # written for the batch that it was traced with
                reason = str(error).strip().splitlines()[-1]
                raise InputError(f"{title}: its program fails at batch {batch} ({reason})") from None
        allowed = TOLERANCE * max(1.0, float(want.abs().max()))
        if not gap <= allowed:
            raise InputError(
                f"{title}: traced logits are {gap:.2g} off at batch {batch}, {allowed:g} is allowed"
            )


def half_keeps(program: Any, names: list[str], *, weights: list[Tensor], images: Tensor) -> list[str] | None:
    """The weights that stay in fp32 when a program runs in half precision; None where it must not.

    Cosine heads compute in fp32 and need fp32 weights; a dtype that the tracer recorded rules out half precision.
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


def logits_of_test_picture(network: nn.Module, height: int, width: int) -> list[float]:
    """Logits (C,) of the test picture, by which the predictor checks a new machine.

    Rounded to four decimals, more than the check needs, so that equal members give equal bundles.
    """
    # twin of test_picture in code/networks.py
    y, x, c = np.ogrid[:height, :width, :3]
    waves = 127.5 + 90 * np.sin(x * 6.0 / width + 2.0 * c) * np.cos(y * (4.0 + c) / height)
    image = torch.from_numpy((waves + 35 * (x > y)).astype(np.uint8)[None])
    with torch.inference_mode():
        return [round(value, 4) for value in network(image.permute(0, 3, 1, 2).float())[0].tolist()]
