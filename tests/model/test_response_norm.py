"""The lean response norm against timm's: values, gradients, names, memory that the backward pass keeps."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from timm.layers.grn import GlobalResponseNorm
from torch import Tensor

from fastflower.model.backbones import build_backbone
from fastflower.model.network import training_network
from fastflower.model.response_norm import LeanResponseNorm, use_lean_response_norms
from fastflower.recipe import load

HALVES = (torch.bfloat16, torch.float16)


def layers(*, channels_last: bool) -> tuple[GlobalResponseNorm, LeanResponseNorm]:
    """timm's layer with drawn parameters, and the lean one with the same."""
    timms = GlobalResponseNorm(16, channels_last=channels_last)
    with torch.no_grad():
        timms.weight.normal_()
        timms.bias.normal_()
    lean = torch.nn.Sequential(copy.deepcopy(timms))
    use_lean_response_norms(lean)
    return timms, lean[0]


def images(*, channels_last: bool) -> Tensor:
    """A hidden map in float64 in which a channel is all zeros."""
    x = torch.randn(4, 7, 5, 16, dtype=torch.float64)
    x[..., 3] = 0
    return x if channels_last else x.permute(0, 3, 1, 2).contiguous()


def outcome(
    layer: GlobalResponseNorm, x: Tensor, grad: Tensor, half: torch.dtype | None = None
) -> list[Tensor]:
    """The output and the gradients of x, weight and bias; with `half`, under autocast."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    autocast = torch.autocast("cpu", dtype=half) if half else contextlib.nullcontext()
    with autocast:
        y = layer(x)
    (y.to(grad.dtype) * grad).sum().backward()
    assert x.grad is not None and layer.weight.grad is not None and layer.bias.grad is not None
    return [y.detach(), x.grad, layer.weight.grad.clone(), layer.bias.grad.clone()]


@pytest.mark.parametrize("channels_last", [True, False])
def test_values_and_gradients_are_timms_in_float64(channels_last: bool) -> None:
    timms, lean = layers(channels_last=channels_last)
    x = images(channels_last=channels_last)
    grad = torch.randn_like(x)
    for wanted, got in zip(outcome(timms.double(), x, grad), outcome(lean.double(), x, grad), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("channels_last", [True, False])
def test_half_precision_is_as_near_to_float32_as_timms(half: torch.dtype, channels_last: bool) -> None:
    """Compared as the next layer sees it: timm's output is float32, which autocast rounds for the product behind it."""
    timms, lean = layers(channels_last=channels_last)
    x = images(channels_last=channels_last).to(half)
    grad = torch.randn(x.shape).to(half).float()
    reference = outcome(timms, x.float(), grad)
    theirs, ours = outcome(timms, x, grad, half), outcome(lean, x, grad, half)
    theirs[0] = theirs[0].to(half)
    for wanted, timm, got in zip(reference, theirs, ours, strict=True):
        assert (got.float() - wanted).norm() <= 1.05 * (timm.float() - wanted).norm() + 1e-6 * wanted.norm()
    assert ours[0].dtype == half


def test_the_input_alone_is_kept() -> None:
    """Under bfloat16 autocast the lean layer keeps the map once in two bytes; timm's does more, most on GPUs."""
    kept: dict[str, int] = {}
    for name, layer in zip(("timm", "lean"), layers(channels_last=True), strict=True):
        sizes: dict[int, int] = {}

        def keep(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = torch.randn(4, 32, 32, 16, dtype=torch.bfloat16, requires_grad=True)
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
            torch.autocast("cpu", torch.bfloat16),
        ):
            layer(x)
        kept[name] = sum(sizes.values())
    assert kept["lean"] < 2.1 * 4 * 32 * 32 * 16 and kept["timm"] > 1.9 * kept["lean"]


def test_a_training_network_has_lean_norms_under_timms_names() -> None:
    words = [
        "model.backbone=convnextv2_atto",
        "model.pretrained=false",
        "data.img_size=32",
        "tta.scales=[32]",
    ]
    network, _, _ = training_network(load(None, words), 3)
    kinds = {type(module) for module in network.modules() if isinstance(module, GlobalResponseNorm)}
    assert kinds == {LeanResponseNorm}
    plain, _ = build_backbone("convnextv2_atto", [(32, 32)])
    assert list(network.backbone.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(network.backbone.state_dict())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(network.backbone.eval()(x), plain.eval()(x))


def test_recomputed_activations_and_copies_keep_the_lean_norm() -> None:
    """Gradient checkpointing and the averages' deep copies work with it."""
    plain, _ = build_backbone("convnextv2_atto", [(32, 32)])
    saving, _ = build_backbone("convnextv2_atto", [(32, 32)], grad_checkpointing=True)
    saving.load_state_dict(plain.state_dict())
    for backbone in (plain, saving):
        use_lean_response_norms(backbone)
        assert any(isinstance(module, LeanResponseNorm) for module in copy.deepcopy(backbone).modules())
    x = torch.randn(2, 3, 32, 32)
    for backbone in (plain, saving):
        backbone.train()(x).square().sum().backward()
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
