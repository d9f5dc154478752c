"""Parameter groups: complete, disjoint, in the parts of the seed, with real learning rates."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from fastflower.core.errors import InputError
from fastflower.optim.groups import hold_statistics, param_groups, part_names, parts, table
from fastflower.recipe import load, schema


class Whole(nn.Module):
    """A Network's two named parts, without memory."""

    def __init__(self, name: str) -> None:
        super().__init__()
        with torch.device("meta"):
            self.backbone = timm.create_model(name, num_classes=0)
            self.head = nn.Linear(16, 5)


def recipe(*words: str) -> schema.Recipe:
    return load(None, list(words))


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
@pytest.mark.parametrize("words", [(), ("llrd.enabled=false",), ("opt.no_decay_norm_bias=false",)])
def test_every_parameter_is_in_exactly_one_group(name: str, words: tuple[str, ...]) -> None:
    network = Whole(name)
    groups = param_groups(network, 1e-4, recipe(*words))
    ids = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(parameter) for parameter in network.parameters()}
    assert all(group["params"] for group in groups)
    assert list(dict.fromkeys(group["part"] for group in groups)) == part_names(recipe(*words))


def owners(name: str, names: list[str]) -> dict[str, set[str]]:
    """The blocks of each part, by the first words of the parameters' names."""
    found: dict[str, set[str]] = {part: set() for part in names}
    for parameter, part in parts(Whole(name), names).items():
        words = parameter.split(".")[1:]
        depth = 2 if words[0] in ("stages", "blocks", "layers") else 1
        found[part].add(".".join(words[:depth]))
    return found


def test_convnext_is_cut_as_the_seed_says() -> None:
    found = owners("convnextv2_base", FOUR)
    assert found["front"] == {"stem", "stages.0", "stages.1"}
    assert found["middle"] == {"stages.2"}
    assert found["back"] == {"stages.3", "head"}  # timm's own head.norm
    assert found["head"] == {"weight", "bias"}


def test_vit_is_cut_into_runs_of_four_blocks() -> None:
    found = owners("vit_base_patch16_224", FOUR)
    assert found["front"] == {"cls_token", "pos_embed", "patch_embed", *(f"blocks.{i}" for i in range(4))}
    assert found["middle"] == {f"blocks.{i}" for i in range(4, 8)}
    assert found["back"] == {"norm", *(f"blocks.{i}" for i in range(8, 12))}


def test_other_families_are_cut_by_stages() -> None:
    found = owners("resnet18", FOUR)
    assert (found["front"], found["middle"]) == ({"conv1", "bn1", "layer1", "layer2"}, {"layer3"})
    found = owners("tf_efficientnetv2_m", FOUR)
    assert found["middle"] == {"blocks.3", "blocks.4"} and "conv_head" in found["back"]
    assert owners("swin_tiny_patch4_window7_224", FOUR)["back"] == {"layers.3", "norm"}


def test_more_parts_than_stages_cut_between_blocks() -> None:
    names = part_names(recipe("llrd.multipliers=[0.1,0.2,0.3,0.4,0.6,0.8,1.0,1.5]"))
    assert names == [*(f"part{i}" for i in range(1, 8)), "head"]
    assert set(parts(Whole("convnextv2_atto"), names).values()) == set(names)
    with pytest.raises(InputError, match=r"40 parts and a head asked, ConvNeXt has \d+ layers; give fewer"):
        parts(Whole("convnextv2_atto"), [*map(str, range(40)), "head"])


def test_a_backbone_without_layers_is_refused_for_layerwise_lr() -> None:
    network = Whole("resnet18")
    network.backbone = nn.Sequential(nn.Linear(3, 16))
    with pytest.raises(InputError, match=r"llrd.enabled: timm does not say how Sequential is layered"):
        param_groups(network, 1e-4, recipe())
    assert len(param_groups(network, 1e-4, recipe("llrd.enabled=false"))) == 4


def test_lr_is_base_times_multiplier_in_lr_and_initial_lr() -> None:
    groups = param_groups(Whole("convnextv2_atto"), 1e-4, recipe())
    want = {"front": 2.5e-5, "middle": 5e-5, "back": 1e-4, "head": 1.5e-4}
    for group in groups:
        assert group["lr"] == group["initial_lr"] == pytest.approx(want[group["part"]])
    flat = param_groups(Whole("convnextv2_atto"), 1e-4, recipe("llrd.enabled=false"))
    assert {group["lr"] for group in flat} == {1e-4}


def test_norms_biases_and_embeddings_do_not_decay() -> None:
    network = Whole("vit_tiny_patch16_224")
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    groups = param_groups(network, 1e-4, recipe("opt.weight_decay=0.07"))
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            free = parameter.ndim <= 1 or name.rsplit(".")[-1] in ("bias", "pos_embed", "cls_token")
            assert group["weight_decay"] == (0.0 if free else 0.07), name
    everything = param_groups(network, 1e-4, recipe("opt.no_decay_norm_bias=false"))
    assert {group["weight_decay"] for group in everything} == {0.05}


def test_parameters_that_never_train_are_left_out() -> None:
    network = Whole("resnet18")
    network.head.bias.requires_grad_(False)
    groups = param_groups(network, 1e-4, recipe())
    assert "head, no decay" not in [group["name"] for group in groups]


def test_table_accounts_for_every_parameter() -> None:
    network = Whole("convnextv2_atto")
    rows = table(param_groups(network, 1e-4, recipe()))
    counted = sum(int(row[28:42].replace(",", "")) for row in rows[1:])
    assert counted == sum(parameter.numel() for parameter in network.parameters())
    assert rows[1].split() == ["front", "14", "154,480", "2.5e-05", "0.05"]


def test_statistics_of_frozen_parts_hold() -> None:
    network = Whole("test_resnet")
    network.backbone = timm.create_model("test_resnet", num_classes=0)
    part_of = parts(network, FOUR)
    network.train()
    hold_statistics(network, part_of, {"front", "middle"})
    norms = {n: m for n, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert {part_of[f"{n}.weight"] for n, m in norms.items() if m.training} == {"back"}
    before = {name: module.running_mean.clone() for name, module in norms.items()}
    network.backbone(torch.randn(4, 3, 64, 64))
    still = {n for n, m in norms.items() if torch.equal(m.running_mean, before[n])}
    assert still == {n for n in norms if part_of[f"{n}.weight"] in ("front", "middle")}
