"""The text of a traced network: a function of images and weights that runs on any device and for any batch."""

from __future__ import annotations

import io
import re
import runpy
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastflower.core import runs
from fastflower.core.errors import InputError

CODE = runs.shipped("code")
DEVICE = re.compile(r'torch\.device\("[a-z0-9:]+"\)')  # that a traced program records


def text_and_constants(
    network: nn.Module, weights: dict[str, Tensor], images: Tensor
) -> tuple[str, dict[str, Tensor]]:
    """The text of a network as a function of (images, *weights), and the constants that became arguments, by name.

    Where the network computes positions or masks from the size of its input, they are computed now and become
    constants; those that follow the batch stay in the text and are computed where the images are.
    """
    program = traced(network, weights, images)
    text, table = _printed(program)
    if DEVICE.search(text):
        fix_sizes(program, traced(network, weights, torch.cat([images, images[:1]])))
        text, table = _printed(program)
        first = text[len("def forward(") :].partition(":")[0]
        text = DEVICE.sub(f"ops.prim.device({first})", text)
    arguments = {}
    for name, value in table.items():
        number = "" if value.ndim else f"ops.prim.NumToTensor({value.item()})"
        written = number or f"constant_{name}"
        text = re.sub(rf"\bCONSTANTS\.{name}\b", written, text)
        if not number:
            arguments[written] = value
            text = text.replace(") -> Tensor:", f",\n    {written}: Tensor) -> Tensor:", 1)
    return text, arguments


def traced(network: nn.Module, weights: dict[str, Tensor], images: Tensor) -> Any:
    """A network as torch traces it for these images."""
    with warnings.catch_warnings(), torch.no_grad():
        # the tracer warns of every Python branch; the result is compared with the network
        warnings.simplefilter("ignore")
        return torch.jit.trace(
            with_weights(network, list(weights)), (images, *weights.values()), check_trace=False
        )


def fix_sizes(program: Any, other: Any) -> None:
    """Write the sizes that do not follow the batch into a traced program, and compute what follows from them alone.

    `other` is the same network traced for another batch. Programs traced for several sizes are no longer equal then.
    """
    graph = program.graph
    for node, twin in zip(list(_nodes(graph)), list(_nodes(other.graph)), strict=True):
        if node.kind() != "aten::size" or len(list(node.inputs())) != 2:
            continue
        tensor, axis = node.inputs()
        size, number = tensor.type().sizes(), axis.toIValue()
        if size is not None and size[number] == next(twin.inputs()).type().sizes()[number]:
            with graph.insert_point_guard(node):
                constant = graph.insertConstant(size[number])
            node.output().replaceAllUsesWith(constant)
    torch._C._jit_pass_constant_propagation(graph)
    torch._C._jit_pass_dce(graph)


def _nodes(block: Any) -> Iterator[Any]:
    """The nodes of a traced graph and of the blocks in it, in order."""
    for node in block.nodes():
        yield node
        for inner in node.blocks():
            yield from _nodes(inner)


def _printed(program: Any) -> tuple[str, dict[str, Tensor]]:
    """The text of a traced function and the constants to which it refers."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`torch.jit", category=DeprecationWarning)  # newer torch
        torch.jit.save(program, buffer)
        buffer.seek(0)
        text, table = torch.jit.load(buffer).code_with_constants
    return text.replace("def forward(self,\n", "def forward(", 1), table.const_mapping


def compile_text(text: str, title: str) -> Any:
    """Compile a program as the predictor does; InputError for one that the predictor would refuse."""
    predictor = runpy.run_path(str(CODE / "programs.py"))
    try:
        return predictor["compile_program"](text)
    except predictor["Refused"] as error:
        raise InputError(
            f"{title}: its program {error}, which the predictor does not run; choose another backbone"
        ) from None


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
