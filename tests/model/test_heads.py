"""Heads beyond linear and margin ones: plain cosines, a small MLP, votes of the nearest training images."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fastflower.core.errors import InputError
from fastflower.model.heads import VOTE_SCALE, CosineHead, NeighboursHead, build_head
from fastflower.model.network import NetworkSpec, training_network
from fastflower.recipe import load
from support.member_metas import member_meta


def spec(head: str, **numbers: float) -> NetworkSpec:
    return member_meta(head=head, num_classes=3, **numbers)


def neighbours(features: torch.Tensor, labels: torch.Tensor, **numbers: float) -> NeighboursHead:
    head = build_head(
        spec("knn", **{"knn_k": 2, "knn_temperature": 0.1, **numbers}, knn_images=len(features)),
        features.shape[1],
    )
    assert isinstance(head, NeighboursHead)
    head.remember(features, labels)
    return head


def test_a_cosine_head_has_no_margin() -> None:
    head = build_head(spec("cosine", head_scale=12.0), 8)
    assert isinstance(head, CosineHead)
    features = torch.randn(4, 8)
    want = 12 * F.cosine_similarity(features[:, None], head.weight[None], dim=2)
    torch.testing.assert_close(head(features), want)


def test_an_mlp_has_one_hidden_layer_of_the_width() -> None:
    head = build_head(spec("mlp", mlp_width=5), 8)
    assert [tuple(parameter.shape) for parameter in head.parameters()] == [(5, 8), (5,), (3, 5), (3,)]
    assert head(torch.randn(4, 8)).shape == (4, 3)


def test_neighbours_vote_by_their_distance_to_the_first_that_does_not() -> None:
    angles = torch.tensor([0.1, 0.3, 0.6, 1.5])
    head = neighbours(torch.stack([angles.cos(), angles.sin()], 1) * 7, torch.tensor([2, 1, 0, 0]))
    logits = head(torch.tensor([[3.0, 0.0]]))  # the features' length does not matter
    cosines = angles.cos()
    weights = ((cosines[:2] - cosines[2]) / 0.1).exp() - 1
    want = VOTE_SCALE * torch.stack([torch.tensor(0.0), weights[1], weights[0]]) / weights.sum()
    torch.testing.assert_close(logits[0], want, atol=1e-5, rtol=1e-5)


def test_a_rounding_error_turns_no_neighbour_around() -> None:
    """The weight of the last neighbour is 0 where it changes."""
    for side in (-1e-6, 1e-6):
        angles = torch.tensor([0.1, 0.3, 0.3 + side])
        head = neighbours(torch.stack([angles.cos(), angles.sin()], 1), torch.tensor([0, 1, 2]))
        torch.testing.assert_close(
            head(torch.tensor([[1.0, 0.0]]))[0], torch.tensor([VOTE_SCALE, 0.0, 0.0]), atol=1e-3, rtol=0
        )


def test_more_neighbours_than_images_are_refused() -> None:
    recipe = load(None, ["model.backbone=test_resnet", "model.head=knn", "model.pretrained=false"])
    with pytest.raises(
        InputError, match=r"model.knn_k = 20: the fold has 12 training images; set it to 11 or"
    ):
        training_network(recipe, 3, images=12)
