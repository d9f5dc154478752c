"""Mixed precision on CPUs: torch's autocast, but for depthwise convolutions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import timm
import torch
from timm.layers import Conv2dSame
from torch import nn
from torch.nn import functional as F

from fastflower.model.mixed_precision import autocast_cpu, keep_depthwise_in_float32


@pytest.mark.parametrize("kind", [nn.Conv2d, Conv2dSame])
@pytest.mark.parametrize("groups, dtype", [(8, torch.float32), (4, torch.bfloat16), (1, torch.bfloat16)])
def test_depthwise_convolutions_are_in_float32_and_others_in_bf16(
    groups: int, dtype: torch.dtype, kind: type[nn.Conv2d]
) -> None:
    torch.manual_seed(0)
    layer, image = kind(8, 8, 5, stride=2, padding=2, groups=groups), torch.randn(2, 8, 9, 9)
    exact = layer(image)
    gradient = torch.randn_like(exact)
    exact.backward(gradient)
    reference, layer.weight.grad = layer.weight.grad, None
    keep_depthwise_in_float32(layer)
    keep_depthwise_in_float32(layer)  # a second time changes nothing
    layer = copy.deepcopy(layer)  # as averages of weights are made
    with autocast_cpu():
        mixed, half = layer(image), layer(image.bfloat16())
    assert mixed.dtype == half.dtype == dtype
    mixed.backward(gradient.to(dtype))
    assert reference is not None and layer.weight.grad is not None
    if dtype == torch.float32:
        assert torch.equal(mixed, exact) and torch.equal(layer.weight.grad, reference)
    torch.testing.assert_close(mixed.float(), exact, rtol=0, atol=0.02)
    torch.testing.assert_close(layer.weight.grad, reference, rtol=0.05, atol=0.1)
    assert isinstance(layer, kind) and torch.equal(layer(image), exact)


def gradient(network: nn.Module, precision: Callable[[], AbstractContextManager[None]]) -> torch.Tensor:
    """The gradient (P,) of a network's loss on drawn images."""
    torch.manual_seed(1)
    images, labels = torch.randn(8, 3, 96, 96), torch.arange(8) % 7
    network.zero_grad()
    with precision():
        logits = network(images)
    F.cross_entropy(logits.float(), labels).backward()
    return torch.cat(
        [parameter.grad.flatten() for parameter in network.parameters() if parameter.grad is not None]
    )


@pytest.mark.parametrize(
    "name, depthwise, likeness",
    [
        ("test_efficientnet", True, 0.999),
        ("test_convnext", True, 0.999),
        ("test_resnet", False, 0.97),
        ("resnet10t", False, 0.97),
    ],
)
def test_a_networks_gradient_points_where_float32s_does(name: str, depthwise: bool, likeness: float) -> None:
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=7).train()
    exact, torchs = gradient(network, nullcontext), gradient(network, autocast_cpu)
    keep_depthwise_in_float32(network)
    mixed = gradient(network, autocast_cpu)
    assert mixed.dtype == torch.float32 and torch.equal(mixed, torchs) is not depthwise
    assert likeness < F.cosine_similarity(mixed, exact, dim=0) < 1 - 1e-7


@pytest.mark.parametrize("name", ["test_efficientnet", "test_convnext"])
def test_checkpointed_layers_are_computed_again_in_the_same_precision(name: str) -> None:
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=7).eval()  # without dropout; BatchNorm keeps its statistics
    keep_depthwise_in_float32(network)
    whole = gradient(network, autocast_cpu)
    network.set_grad_checkpointing()
    assert torch.equal(gradient(network, autocast_cpu), whole)
