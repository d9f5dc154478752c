"""Parameter groups: complete, disjoint, split into the documented parts, with real learning rates."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from fastflower.core.errors import InputError
from fastflower.optim.groups import (
    describe_groups,
    freeze_batch_norms,
    param_groups,
    part_by_parameter,
    part_names,
)
from fastflower.recipe import load, schema


class MetaNetwork(nn.Module):
    """A Network's backbone and head on the meta device."""

    def __init__(self, name: str) -> None:
        super().__init__()
        with torch.device("meta"):
            self.backbone = timm.create_model(name, num_classes=0)
            self.head = nn.Linear(16, 5)


def recipe(*overrides: str) -> schema.Recipe:
    return load(None, list(overrides))


FOUR = ["front", "middle", "back", "head"]


@pytest.mark.parametrize(
    "name",
    [
        "convnextv2_base.fcmae_ft_in22k_in1k",
        "vit_base_patch16_224.augreg2_in21k_ft_in1k",
        "tf_efficientnetv2_m.in21k_ft_in1k",
        "swin_base_patch4_window7_224",
        "eva02_base_patch14_448",
        "resnet18",
        "mobilenetv3_small_050",
        "densenet121",
    ],
)
@pytest.mark.parametrize("overrides", [(), ("llrd.enabled=false",), ("opt.no_decay_norm_bias=false",)])
def test_every_parameter_is_in_exactly_one_group(name: str, overrides: tuple[str, ...]) -> None:
    network = MetaNetwork(name)
    groups = param_groups(network, 1e-4, recipe(*overrides))
    ids = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(parameter) for parameter in network.parameters()}
    assert all(group["params"] for group in groups)
    assert list(dict.fromkeys(group["part"] for group in groups)) == part_names(recipe(*overrides))


def blocks_by_part(name: str, names: list[str]) -> dict[str, set[str]]:
    """The blocks of each part, by the first components of the parameters' names."""
    blocks: dict[str, set[str]] = {part: set() for part in names}
    for parameter, part in part_by_parameter(MetaNetwork(name), names).items():
        components = parameter.split(".")[1:]
        depth = 2 if components[0] in ("stages", "blocks", "layers") else 1
        blocks[part].add(".".join(components[:depth]))
    return blocks


def test_convnext_is_split_into_stages_0_and_1_then_2_then_3() -> None:
    blocks = blocks_by_part("convnextv2_base", FOUR)
    assert blocks["front"] == {"stem", "stages.0", "stages.1"}
    assert blocks["middle"] == {"stages.2"}
    assert blocks["back"] == {"stages.3", "head"}  # timm's own head.norm
    assert blocks["head"] == {"weight", "bias"}


def test_vit_is_split_into_four_consecutive_blocks_per_part() -> None:
    blocks = blocks_by_part("vit_base_patch16_224", FOUR)
    assert blocks["front"] == {"cls_token", "pos_embed", "patch_embed", *(f"blocks.{i}" for i in range(4))}
    assert blocks["middle"] == {f"blocks.{i}" for i in range(4, 8)}
    assert blocks["back"] == {"norm", *(f"blocks.{i}" for i in range(8, 12))}


def test_other_families_are_split_by_stages() -> None:
    blocks = blocks_by_part("resnet18", FOUR)
    assert (blocks["front"], blocks["middle"]) == ({"conv1", "bn1", "layer1", "layer2"}, {"layer3"})
    blocks = blocks_by_part("tf_efficientnetv2_m", FOUR)
    assert blocks["middle"] == {"blocks.3", "blocks.4"} and "conv_head" in blocks["back"]
    assert blocks_by_part("swin_tiny_patch4_window7_224", FOUR)["back"] == {"layers.3", "norm"}


def test_more_parts_than_stages_are_split_between_blocks() -> None:
    names = part_names(recipe("llrd.multipliers=[0.1,0.2,0.3,0.4,0.6,0.8,1.0,1.5]"))
    assert names == [*(f"part{i}" for i in range(1, 8)), "head"]
    assert set(part_by_parameter(MetaNetwork("convnextv2_atto"), names).values()) == set(names)
    with pytest.raises(
        InputError, match=r"got 40 factors and one for the head, ConvNeXt has \d+ layers; give fewer"
    ):
        part_by_parameter(MetaNetwork("convnextv2_atto"), [*map(str, range(40)), "head"])


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        (
            "poolformer_s12",
            {"front": {"stem", "stages.0", "stages.1"}, "middle": {"stages.2"}, "back": {"stages.3"}},
        ),
        ("pit_ti_224", {"middle": {"transformers.1"}}),
        ("vgg11", {"front": {"features.0", "features.3", "features.6"}}),
    ],
)
def test_blocks_in_names_serve_where_timm_has_no_layers(name: str, blocks: dict[str, set[str]]) -> None:
    found: dict[str, set[str]] = {part: set() for part in FOUR}
    for parameter, part in part_by_parameter(MetaNetwork(name), FOUR).items():
        components = parameter.split(".")[1:]
        found[part].add(
            ".".join(components[: 2 if len(components) > 2 or components[0] == "features" else 1])
        )
    assert all(found.values())
    for part, expected in blocks.items():
        assert {name for name in found[part] if not name.startswith("stem")} >= expected - {"stem"}, found


@pytest.mark.parametrize("name", ["fastvit_t8", "mambaout_femto", "efficientvim_m1"])
def test_closing_layers_are_no_part(name: str) -> None:
    network = MetaNetwork(name)
    sizes = dict.fromkeys(FOUR, 0)
    for parameter, part in part_by_parameter(network, FOUR).items():
        sizes[part] += network.get_parameter(parameter).numel()
    assert min(sizes[part] for part in FOUR[:3]) > 0.02 * sum(sizes.values())


def test_a_decay_gives_each_layer_its_own_rate() -> None:
    network = MetaNetwork("vit_tiny_patch16_224")
    groups = param_groups(network, 1.0, recipe("llrd.decay=0.75"))
    rate = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    assert len(rate) == len(list(network.parameters()))
    assert rate[id(network.head.weight)] == 1.0
    for block in range(12):
        norm = network.get_parameter(f"backbone.blocks.{block}.norm1.weight")
        assert rate[id(norm)] == pytest.approx(0.75 ** (12 - block))
    assert rate[id(network.backbone.patch_embed.proj.weight)] == rate[id(network.backbone.pos_embed)]
    assert list(dict.fromkeys(group["part"] for group in groups)) == FOUR  # what unfreeze_schedule names
    assert [g["name"] for g in groups][:3] == ["front, layer 1", "front, layer 1, no decay", "front, layer 2"]


def test_a_backbone_without_layers_is_refused_for_layerwise_lr() -> None:
    network = MetaNetwork("resnet18")
    network.backbone = nn.Sequential(nn.Linear(3, 16))
    with pytest.raises(
        InputError, match=r"got 3 factors and one for the head, Sequential has 1 layers; give fewer"
    ):
        param_groups(network, 1e-4, recipe())
    assert len(param_groups(network, 1e-4, recipe("llrd.enabled=false"))) == 4


def test_lr_and_initial_lr_are_base_times_multiplier() -> None:
    groups = param_groups(MetaNetwork("convnextv2_atto"), 1e-4, recipe())
    want = {"front": 2.5e-5, "middle": 5e-5, "back": 1e-4, "head": 1.5e-4}
    for group in groups:
        assert group["lr"] == group["initial_lr"] == pytest.approx(want[group["part"]])
    flat = param_groups(MetaNetwork("convnextv2_atto"), 1e-4, recipe("llrd.enabled=false"))
    assert {group["lr"] for group in flat} == {1e-4}


def test_norms_biases_and_embeddings_do_not_decay() -> None:
    network = MetaNetwork("vit_tiny_patch16_224")
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    groups = param_groups(network, 1e-4, recipe("opt.weight_decay=0.07"))
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            free = parameter.ndim <= 1 or name.rsplit(".")[-1] in ("bias", "pos_embed", "cls_token")
            assert group["weight_decay"] == (0.0 if free else 0.07), name
    without_exemptions = param_groups(network, 1e-4, recipe("opt.no_decay_norm_bias=false"))
    assert {group["weight_decay"] for group in without_exemptions} == {0.05}


def test_parameters_that_never_train_are_left_out() -> None:
    network = MetaNetwork("resnet18")
    network.head.bias.requires_grad_(False)
    groups = param_groups(network, 1e-4, recipe())
    assert "head, no decay" not in [group["name"] for group in groups]


def test_description_counts_every_parameter() -> None:
    network = MetaNetwork("convnextv2_atto")
    rows = describe_groups(param_groups(network, 1e-4, recipe()))
    counted = sum(int(row[28:42].replace(",", "")) for row in rows[1:])
    assert counted == sum(parameter.numel() for parameter in network.parameters())
    assert rows[1].split() == ["front", "14", "154,480", "2.5e-05", "0.05"]


def test_statistics_of_frozen_parts_do_not_change() -> None:
    network = MetaNetwork("test_resnet")
    network.backbone = timm.create_model("test_resnet", num_classes=0)
    part_of = part_by_parameter(network, FOUR)
    network.train()
    freeze_batch_norms(network, part_of, {"front", "middle"})
    norms = {n: m for n, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert {part_of[f"{n}.weight"] for n, m in norms.items() if m.training} == {"back"}
    before = {name: module.running_mean.clone() for name, module in norms.items()}
    network.backbone(torch.randn(4, 3, 64, 64))
    unchanged = {n for n, m in norms.items() if torch.equal(m.running_mean, before[n])}
    assert unchanged == {n for n in norms if part_of[f"{n}.weight"] in ("front", "middle")}
