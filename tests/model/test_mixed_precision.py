"""Mixed precision on CPUs: torch's autocast, but for depthwise convolutions."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from fastflower.model.mixed_precision import autocast_cpu


@pytest.mark.parametrize("groups, dtype", [(8, torch.float32), (4, torch.bfloat16), (1, torch.bfloat16)])
def test_depthwise_convolutions_are_in_float32_and_others_in_bf16(groups: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, image = nn.Conv2d(8, 8, 5, padding=2, groups=groups), torch.randn(2, 8, 9, 9)
    exact, gradient = layer(image), torch.randn(2, 8, 9, 9)
    exact.backward(gradient)
    reference, layer.weight.grad = layer.weight.grad, None
    with autocast_cpu():
        mixed = layer(image)
        named = F.conv2d(input=image, weight=layer.weight, bias=layer.bias, padding=2, groups=groups)
        half = layer(image.bfloat16())
    assert mixed.dtype == half.dtype == named.dtype == dtype and torch.equal(mixed, named)
    mixed.backward(gradient.to(dtype))
    assert reference is not None and layer.weight.grad is not None
    if dtype == torch.float32:
        assert torch.equal(mixed, exact) and torch.equal(layer.weight.grad, reference)
    torch.testing.assert_close(mixed.float(), exact, rtol=0, atol=0.02)
    torch.testing.assert_close(layer.weight.grad, reference, rtol=0.05, atol=0.1)
    assert not torch.is_autocast_enabled("cpu") and layer(image).dtype == torch.float32


@pytest.mark.parametrize("name", ["test_efficientnet", "test_convnext", "test_resnet", "test_vit"])
def test_a_networks_gradient_points_where_float32s_does(name: str) -> None:
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=7).train()
    images, labels = torch.randn(8, 3, *network.default_cfg["input_size"][1:]), torch.arange(8) % 7

    def gradient(precision: Callable[[], AbstractContextManager[None]]) -> torch.Tensor:
        network.zero_grad()
        with precision():
            logits = network(images)
        F.cross_entropy(logits.float(), labels).backward()
        return torch.cat([parameter.grad.flatten() for parameter in network.parameters()])

    exact, mixed = gradient(nullcontext), gradient(autocast_cpu)
    assert mixed.dtype == torch.float32
    assert F.cosine_similarity(mixed, exact, dim=0) > 0.98  # as with torch's autocast alone
