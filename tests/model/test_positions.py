"""Position embeddings resampled by matrices: timm's values and gradients, without its interpolation on the way back."""

from __future__ import annotations

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from fastflower.model import positions
from fastflower.model.network import training_network
from fastflower.model.positions import resample_positions
from fastflower.recipe import load
from fastflower.training import estimate

SIZES = [((14, 14), (20, 20)), ((14, 14), (10, 7)), ((7, 9), (3, 30)), ((2, 3), (3, 1))]
WORDS = ["model.pretrained=false", "data.img_size=[32,48]", "tta.scales=[48]", "data.num_classes=3"]


@pytest.mark.parametrize(("old", "new"), SIZES)
@pytest.mark.parametrize("prefix", [0, 2])
def test_values_and_gradients_are_timms(old, new, prefix: int) -> None:
    embedding = torch.randn(1, prefix + old[0] * old[1], 8, requires_grad=True)
    theirs = resample_abs_pos_embed(embedding, list(new), list(old), prefix)
    ours = resample_positions(embedding, new, old, num_prefix_tokens=prefix)
    grad = torch.randn_like(theirs)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    (wanted,), (got,) = (torch.autograd.grad(out, embedding, grad) for out in (theirs, ours))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


def test_the_size_of_the_embedding_is_left_alone_and_evaluation_is_timms() -> None:
    embedding = torch.randn(1, 1 + 16, 8, requires_grad=True)
    assert resample_positions(embedding, (4, 4)) is embedding
    with torch.no_grad():
        ours, theirs = resample_positions(embedding, (6, 5)), resample_abs_pos_embed(embedding, [6, 5])
    assert torch.equal(ours, theirs)


def test_half_precision_does_not_round_positions() -> None:
    embedding = torch.randn(1, 16, 8, requires_grad=True)
    plain = resample_positions(embedding, (6, 5), num_prefix_tokens=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(resample_positions(embedding, (6, 5), num_prefix_tokens=0), plain)


def backward_steps(output: Tensor) -> set[str]:
    """The names of all operations of a backward pass."""
    seen, waiting = set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [before for before, _ in node.next_functions]
    return {node.name() for node in seen}


@pytest.mark.parametrize("name", ["test_vit", "deit_tiny_distilled_patch16_224", "eva02_tiny_patch14_224"])
def test_a_transformer_trains_at_several_sizes_without_interpolation(name: str) -> None:
    """Its backward pass on GPUs adds up in any order, and torch has no deterministic one."""
    side = 28 if "patch14" in name else 32
    words = [*WORDS, f"model.backbone={name}", f"data.img_size=[{side},{2 * side}]", f"tta.scales=[{side}]"]
    network = training_network(load(None, words), 3)[0].train()
    for size in (side, 2 * side):
        network.zero_grad()
        output = network(torch.rand(1, 3, size, size) * 255)
        assert not [step for step in backward_steps(output) if "Upsample" in step]
        output.sum().backward()
        assert network.backbone.pos_embed.grad.abs().sum() > 0


def test_an_estimate_of_memory_leaves_nothing_without_content() -> None:
    positions._matrix.cache_clear()
    need = estimate.estimate(load(None, ["model.backbone=test_vit", *WORDS]))
    assert need.allocated > 0 and positions._matrix.cache_info().currsize == 0
