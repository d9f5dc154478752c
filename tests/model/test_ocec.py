"""Networks for crops of eyes: their structure, their names, and that the predictor runs each of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from fastflower.bundle import program
from fastflower.core.errors import InputError
from fastflower.model.backbones import build_backbone, profile
from fastflower.model.network import training_network
from fastflower.model.ocec import PooledHead, TokenHead
from fastflower.optim.groups import param_groups
from fastflower.recipe import load

SIZE = (32, 64)
HEADS = ("avg", "avgmax_mlp", "transformer", "mlp_mixer")


@pytest.mark.parametrize(
    ("name", "map_size", "features", "head"),
    [
        ("ocec_baseline_c64_b8", (2, 4), 512, PooledHead),
        ("ocec_inverted_se_c8_b4", (8, 16), 16, PooledHead),
        ("ocec_convnext_c8_b5", (2, 4), 32, TokenHead),
    ],
)
def test_a_variant_halves_the_map_and_doubles_the_channels_at_each_second_block(
    name: str, map_size: tuple[int, int], features: int, head: type
) -> None:
    backbone, _ = build_backbone(name, [SIZE])
    maps = backbone.stages(backbone.stem(torch.rand(2, 3, *SIZE)))
    assert maps.shape == (2, features, *map_size) and isinstance(backbone.pool, head)
    assert profile(name, [SIZE]).features == features
    assert profile(name, [SIZE]).mean == (0.5,) * 3


def test_the_recipes_network_is_the_published_one(repo: Path) -> None:
    recipe = load(repo / "recipes/eyes.yaml")
    assert (recipe.model.backbone, recipe.model.drop_rate) == ("ocec_baseline_c64_b8", 0.3)
    network, spec, _ = training_network(recipe, 2)
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 1 + 2 * 8 and spec.size == SIZE
    assert sum(p.numel() for p in network.parameters()) == 548_226
    assert (network.eval()(torch.rand(3, 3, *SIZE) * 255)).shape == (3, 2)


@pytest.mark.parametrize("variant", ["baseline", "inverted_se", "convnext"])
@pytest.mark.parametrize("head", HEADS)
def test_the_predictor_runs_every_variant_and_head(variant: str, head: str) -> None:
    name = f"ocec_{variant}_c8_b3_{head}"
    recipe = load(None, [f"model.backbone={name}", "model.pretrained=false", "data.img_size=[[32,64]]"])
    network, _, _ = training_network(recipe, 2)
    network(torch.rand(4, 3, *SIZE) * 255)  # statistics unlike those of a new network
    tensors = dict(network.eval().state_dict())
    traced = program.trace(Path(name), network, height=32, width=64, tensors=tensors)
    assert traced.half_keeps is not None and "CONSTANTS" not in traced.text


def test_activations_can_be_recomputed_and_blocks_dropped() -> None:
    torch.manual_seed(0)
    plain, _ = build_backbone("ocec_convnext_c8_b4", [SIZE])
    torch.manual_seed(0)
    saving, _ = build_backbone("ocec_convnext_c8_b4", [SIZE], grad_checkpointing=True)
    images = torch.rand(2, 3, *SIZE)
    gradients = []
    for backbone in (plain, saving):
        backbone.train()(images).square().sum().backward()
        gradients.append([p.grad for p in backbone.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    dropping, _ = build_backbone("ocec_baseline_c8_b4", [SIZE], drop_path=0.3)
    assert dropping.stages[1][1].drop_path.drop_prob == pytest.approx(0.3)
    assert isinstance(dropping.stages[1][0].drop_path, nn.Identity)  # no residual there


def test_layer_wise_learning_rates_find_the_stages() -> None:
    recipe = load(
        None,
        [
            "model.backbone=ocec_baseline_c8_b8",
            "model.pretrained=false",
            "data.img_size=[[32,64]]",
            "llrd.enabled=true",
        ],
    )
    network, _, _ = training_network(recipe, 2)
    parts = {group["part"] for group in param_groups(network, 1.0, recipe)}
    assert parts == {"front", "middle", "back", "head"}


@pytest.mark.parametrize(
    "name", ["ocec_tiny_c64_b8", "ocec_baseline_c2_b8", "ocec_baseline_c64", "ocec_baseline_c64_b8_max"]
)
def test_other_names_are_refused_with_the_form_of_a_name(name: str) -> None:
    with pytest.raises(
        InputError, match=rf"model.backbone = {name}: write ocec_<baseline, .* as in ocec_baseline"
    ):
        build_backbone(name, [SIZE])
