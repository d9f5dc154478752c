"""Low-rank adapters: what trains, that merging changes no logits, and networks without such layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from torch.nn import functional as F

from fastflower.algorithms.gradients import without_gradient
from fastflower.core import checkpoint
from fastflower.core.errors import InputError
from fastflower.core.records import to_plain
from fastflower.model.classifier import Classifier
from fastflower.model.lora import merged
from fastflower.model.losses import build_loss
from fastflower.model.member import load_member, save_member
from fastflower.model.network import Network, NetworkSpec, build_network, training_network
from fastflower.optim.groups import param_groups
from fastflower.recipe import load, schema
from support.member_metas import member_meta

CLASSES = 5


def recipe(*changes: str, backbone: str = "test_vit") -> schema.Recipe:
    base = [f"model.backbone={backbone}", "model.pretrained=false", "data.img_size=32", "model.lora.rank=4"]
    return load(None, [*base, *changes])


def adapted(settings: schema.Recipe) -> tuple[Network, NetworkSpec]:
    """A network whose adapters have learned something."""
    network, spec, _ = training_network(settings, CLASSES)
    for name, parameter in network.named_parameters():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(parameter, std=0.1)
    return network.eval(), spec


def images() -> torch.Tensor:
    return torch.rand(3, 3, 32, 32) * 255


def test_a_network_with_new_adapters_computes_what_it_did() -> None:
    torch.manual_seed(1)
    plain, _, _ = training_network(recipe("model.lora.rank=0"), CLASSES)
    torch.manual_seed(1)
    network, _, notes = training_network(recipe(), CLASSES)
    network.head.load_state_dict(plain.head.state_dict())
    batch = images()
    with torch.no_grad():  # positions that train are resampled by matrices
        assert torch.equal(network.eval()(batch), plain.eval()(batch))
    assert "adapters of rank 4" in notes[0]


# beit's attention reads the weight of its layer itself
@pytest.mark.parametrize("backbone", ["test_vit", "test_beit"])
def test_merged_adapters_give_the_same_logits(backbone: str, tmp_path: Path) -> None:
    if backbone == "test_beit":
        register_beit()
    network, spec = adapted(recipe(backbone=backbone))
    batch = images()
    want = network(batch)
    plain = merged(network.state_dict())
    rebuilt = build_network(spec)
    assert plain.keys() == rebuilt.state_dict().keys()
    rebuilt.load_state_dict(plain)
    torch.testing.assert_close(rebuilt.eval()(batch), want, atol=1e-5, rtol=1e-5)
    unadapted = {name: tensor for name, tensor in network.state_dict().items() if "lora" not in name}
    rebuilt.load_state_dict(unadapted)
    assert (rebuilt(batch) - want).abs().max().item() > 1e-3  # they did something


def register_beit() -> None:
    from timm.models.beit import Beit

    from fastflower.model.timm_registry import register_with_timm

    def build(**arguments: object) -> Beit:
        return Beit(
            img_size=32, patch_size=16, embed_dim=64, depth=2, num_heads=2, num_classes=0, **arguments
        )

    if not timm.is_model("test_beit"):
        register_with_timm("test_beit", build)


def test_members_are_plain_and_the_last_checkpoint_keeps_the_adapters(tmp_path: Path) -> None:
    network, spec = adapted(recipe())
    meta = member_meta(spec)
    save_member(tmp_path / "best.pth", network.state_dict(), meta)
    checkpoint.save(tmp_path / "last.pth", network.state_dict(), to_plain(meta))
    best, last = (load_member(tmp_path / f"{name}.pth").tensors for name in ("best", "last"))
    assert not [name for name in (*best, *last) if "lora" in name]
    assert all(torch.equal(best[name], last[name]) for name in best)
    assert any("lora_a" in name for name in checkpoint.load(tmp_path / "last.pth").tensors)


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_adapters_and_head_alone_get_gradients_in_the_groups_of_their_layers(checkpointing: str) -> None:
    settings = recipe("llrd.enabled=true", f"model.grad_checkpointing={checkpointing}")
    network, _, _ = training_network(settings, CLASSES)
    model = Classifier(network.train(), build_loss(settings, [3] * CLASSES))
    batch = {"image": images(), "label": torch.tensor([0, 1, 2])}
    model.loss(model(batch), batch).backward()
    assert without_gradient(network) == []
    trained = {name for name, parameter in network.named_parameters() if parameter.grad is not None}
    assert trained and all("lora_" in name or name.startswith("head.") for name in trained)
    name_of = {id(parameter): name for name, parameter in network.named_parameters()}
    groups = {group["name"]: group for group in param_groups(network, 1e-3, settings)}
    assert list(groups) == ["front", "middle", "back", "head", "head, no decay"]
    assert groups["front"]["lr"] == pytest.approx(0.25e-3)
    first = {name_of[id(parameter)] for parameter in groups["front"]["params"]}
    assert all(name.startswith(("backbone.blocks.0.", "backbone.blocks.1.")) for name in first)


def test_targets_choose_layers() -> None:
    network, _, _ = training_network(recipe("model.lora.targets=[qkv]"), CLASSES)
    leaves = {name.split(".")[-2] for name, _ in network.named_parameters() if "lora_a" in name}
    assert leaves == {"qkv"}
    with pytest.raises(InputError, match=r"no linear layers query in its blocks; choose from fc1, fc2, proj"):
        training_network(recipe("model.lora.targets=[query]"), CLASSES)


def test_a_network_without_linear_layers_is_refused() -> None:
    with pytest.raises(InputError, match=r"model.lora.rank = 4: test_resnet has no linear layers of 64") as e:
        training_network(recipe(backbone="test_resnet"), CLASSES)
    assert "\n" not in str(e.value)


def test_an_adapted_layer_is_linear_in_its_weight() -> None:
    network, _ = adapted(recipe())
    layer = network.backbone.blocks[0].attn.qkv
    x = torch.randn(2, layer.in_features)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), atol=1e-5, rtol=1e-5)
