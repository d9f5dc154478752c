"""A network as a program: traced for one view size with its weights as arguments, so that members share it.

The predictor needs no class definitions, and each weight is stored once for all views. Every program is compared
with its network before it is written.
"""

from __future__ import annotations

import copy
import io
import re
import runpy
import warnings
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
from fastflower.core.errors import InputError

TOLERANCE = 1e-4  # largest difference of fp32 logits between predictor and trainer
BATCHES = (1, 2, 5)
CODE = Path(__file__).resolve().parents[2] / "code"
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
    with warnings.catch_warnings(), torch.no_grad():
        # the tracer warns of every Python branch; the result is compared below
        warnings.simplefilter("ignore")
        program = torch.jit.trace(
            with_weights(fused, list(weights)), (example, *weights.values()), check_trace=False
        )
    text, constants = text_and_constants(program)
    if 'torch.device("cpu")' in text:
        raise InputError(f"{title}: its program is bound to the CPU; choose another backbone or tta.scales")
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


def text_and_constants(program: Any) -> tuple[str, dict[str, Tensor]]:
    """The text of a traced function, and the constant tensors that became arguments of it, by name.

    Single numbers are written into the text.
    """
    buffer = io.BytesIO()
    torch.jit.save(program, buffer)
    buffer.seek(0)
    text, table = torch.jit.load(buffer).code_with_constants
    text = text.replace("def forward(self,\n", "def forward(", 1)
    arguments = {}
    for name, value in table.const_mapping.items():
        number = "" if value.ndim else f"ops.prim.NumToTensor({value.item()})"
        written = number or f"constant_{name}"
        text = re.sub(rf"\bCONSTANTS\.{name}\b", written, text)
        if not number:
            arguments[written] = value
            text = text.replace(") -> Tensor:", f",\n    {written}: Tensor) -> Tensor:", 1)
    return text, arguments


def compile_text(text: str, title: str) -> Any:
    """Compile a program as the predictor does; InputError for one that the predictor would refuse."""
    predictor = runpy.run_path(str(CODE / "programs.py"))
    try:
        return predictor["compile_program"](text)
    except predictor["Refused"] as error:
        raise InputError(
            f"{title}: its program {error}, which the predictor does not run; choose another backbone"
        ) from None


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
    """A copy for one view size, with position embeddings and window masks computed now.

    Inside the program these steps would fix the dtype and device of this machine.
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

    On a CPU torch's norm over two axes takes four times as long as the mean of squares. Dividing by 32 first keeps
    the squares within half precision for inputs up to 8000.
    """

    def forward(self, x: Tensor) -> Tensor:
        height, width = (x.shape[axis] for axis in self.spatial_dim)
        scale = 32 * (height * width) ** 0.5  # not math.sqrt, which would write this size into the program
        norm = (x / 32).square().mean(self.spatial_dim, keepdim=True).sqrt() * scale
        relative = norm / (norm.mean(self.channel_dim, keepdim=True) + self.eps)
        return torch.addcmul(self.bias.view(self.wb_shape), x, 1 + self.weight.view(self.wb_shape) * relative)


def _remembered(module: Any) -> Any:
    """A window block's mask function that also stores its result where the block looks for a fixed mask."""
    compute = module.get_attn_mask

    def run(*args: Any, **keywords: Any) -> Tensor | None:
        mask: Tensor | None = compute(*args, **keywords)
        module.attn_mask = mask
        return mask

    return run


def with_weights(network: nn.Module, names: list[str]) -> Any:
    """The network as a function (images, *weights); torch's functional_call cannot be traced."""
    slots = []
    for name in names:
        owner, _, leaf = name.rpartition(".")
        module = network.get_submodule(owner)
        slots.append((module._parameters if leaf in module._parameters else module._buffers, leaf))

    def run(images: Tensor, *weights: Tensor) -> Tensor:
        for (tensors, leaf), value in zip(slots, weights, strict=True):
            tensors[leaf] = value  # type: ignore[assignment]
        return network(images)

    return run


def check_program(
    program: Any, title: str, *, network: nn.Module, height: int, width: int, weights: list[Tensor]
) -> None:
    """Raise InputError for a program whose logits differ from the network's."""
    generator = torch.Generator().manual_seed(0)
    for batch in BATCHES:
        images = (torch.rand(batch, height, width, 3, generator=generator) * 255).permute(0, 3, 1, 2)
        with torch.inference_mode(), torch.jit.optimized_execution(False):
            gap = float((program(images, *weights) - network(images)).abs().max())
        if not gap <= TOLERANCE:
            raise InputError(
                f"{title}: traced logits are {gap:.2g} off at batch {batch}, {TOLERANCE:g} is allowed"
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
