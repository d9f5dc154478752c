"""The network from pixels to logits, its description in a checkpoint, and its adapter to Composer."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import timm
import torch
from composer.models import ComposerModel
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from fastflower.algorithms.gradients import without_gradient
from fastflower.core.errors import InputError
from fastflower.core.records import to_plain
from fastflower.model.classifier import Classifier
from fastflower.model.losses import build_loss
from fastflower.model.member import parse_meta
from fastflower.model.network import (
    NetworkSpec,
    build_network,
    fitted,
    synchronise_norms,
    training_network,
    use_channels_last,
)
from fastflower.recipe import load, schema
from support.member_metas import member_meta

CLASSES = 7


def recipe(*overrides: str, backbone: str = "test_convnext2") -> schema.Recipe:
    base = [
        f"model.backbone={backbone}",
        "model.pretrained=false",
        "data.img_size=[32,64]",
        "tta.scales=[64,96]",
    ]
    return load(None, [*base, *overrides])


def pixel_batch(rows: int = 4) -> torch.Tensor:
    return torch.randint(0, 256, (rows, 64, 64, 3), dtype=torch.uint8)


@pytest.mark.parametrize("head", ["linear", "arcface", "cosine", "mlp", "knn"])
@pytest.mark.parametrize("backbone", ["test_convnext2", "test_vit.r160_in1k", "test_efficientnet"])
def test_a_checkpoints_description_builds_the_same_network(head: str, backbone: str) -> None:
    trained, spec, _ = training_network(recipe(f"model.head={head}", backbone=backbone), CLASSES, images=25)
    meta = parse_meta(json.loads(json.dumps(to_plain(member_meta(spec)))), Path("member.pth"))
    assert NetworkSpec(**{name: getattr(meta, name) for name in vars(spec)}) == spec
    rebuilt = build_network(meta)
    rebuilt.load_state_dict(trained.state_dict())
    images = pixel_batch().permute(0, 3, 1, 2).float()
    got, want = rebuilt.eval()(images), trained.eval()(images)
    assert got.shape == (4, CLASSES)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)  # the layout in memory may differ


@pytest.mark.parametrize("head", ["linear", "arcface"])
@pytest.mark.parametrize("backbone", ["test_convnext2", "test_vit", "test_efficientnet", "test_resnet"])
def test_every_parameter_gets_a_gradient_in_the_first_step(head: str, backbone: str) -> None:
    """On two ranks DDP would wait for the missing gradient."""
    settings = recipe(f"model.head={head}", "model.drop_path=0", backbone=backbone)
    network, _, _ = training_network(settings, CLASSES)
    model = Classifier(network.train(), build_loss(settings, [3] * CLASSES))
    batch = {"image": pixel_batch(), "label": torch.tensor([0, 1, 2, 3])}
    model.loss(model(batch), batch).backward()
    assert without_gradient(network) == []


def test_state_dict_holds_backbone_and_head_only() -> None:
    network, _, _ = training_network(recipe(), CLASSES)
    backbone = timm.create_model("test_convnext2", num_classes=0)
    backbone_keys = {f"backbone.{key}" for key in backbone.state_dict()}
    assert set(network.state_dict()) == backbone_keys | {"head.weight", "head.bias"}


def test_description_has_the_keys_of_a_member() -> None:
    spec = NetworkSpec.from_recipe(recipe("model.head=cosface", "data.img_size=[[32,64],[64,128]]"), CLASSES)
    assert to_plain(spec) == {
        "backbone": "test_convnext2",
        "head": "cosface",
        "head_scale": 30.0,
        "margin": 0.3,
        "num_classes": 7,
        "size": [64, 128],
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bicubic",
        "mlp_width": 0,
        "knn_k": 0,
        "knn_temperature": 0.0,
        "knn_images": 0,
    }
    described = to_plain(member_meta(spec))
    with pytest.raises(InputError, match=r"member\.pth: its description lacks backbone, margin; use"):
        parse_meta(
            {k: v for k, v in described.items() if k not in ("backbone", "margin")}, Path("member.pth")
        )
    with pytest.raises(
        InputError, match=r"member\.pth: in its description epoch is .*, must be a whole number; use"
    ):
        parse_meta({**described, "epoch": "3"}, Path("member.pth"))


def test_the_network_normalises_its_input() -> None:
    network, spec, _ = training_network(recipe("data.mean=[0.5,0.4,0.3]", "data.std=[0.2,0.3,0.4]"), CLASSES)
    assert spec.mean == (0.5, 0.4, 0.3)
    images = pixel_batch().permute(0, 3, 1, 2).float()
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])
    normalised = (images / 255 - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
    network.eval()
    want = network.head(network.backbone(normalised))
    torch.testing.assert_close(network(images), want, atol=1e-5, rtol=1e-5)


def test_normalisation_that_contradicts_pretrained_weights_is_refused(tmp_path: Path) -> None:
    save_file(timm.create_model("test_convnext2").state_dict(), tmp_path / "test_convnext2.safetensors")
    overrides = ["model.pretrained=true"]
    with pytest.raises(
        InputError, match=r"data.mean = \[0.4, 0.5, 0.5\]: the pretrained weights .* need \[0.5"
    ):
        training_network(recipe(*overrides, "data.mean=[0.4,0.5,0.5]"), CLASSES, tmp_path)
    with pytest.raises(InputError, match=r"data.std = \[0.1, 0.1, 0.1\]"):
        training_network(recipe(*overrides, "data.std=[0.1,0.1,0.1]"), CLASSES, tmp_path)
    _, _, lines = training_network(recipe(*overrides, "data.mean=[0.5,0.5,0.5]"), CLASSES, tmp_path)
    assert str(tmp_path) in lines[0]


def test_pretrained_weights_replace_random_ones_except_in_the_head(tmp_path: Path) -> None:
    published = timm.create_model("test_convnext2").state_dict()
    save_file(published, tmp_path / "test_convnext2.safetensors")
    network, _, _ = training_network(recipe("model.pretrained=true"), CLASSES, tmp_path)
    for key, tensor in network.backbone.state_dict().items():
        assert torch.equal(tensor, published[key]), key
    assert network.head.weight.shape == (CLASSES, published["head.fc.weight"].shape[1])
    _, _, lines = training_network(recipe(), CLASSES, tmp_path)
    assert lines == ["test_convnext2: random initial weights (model.pretrained=false)"]


def test_pretrained_weights_are_read_from_the_default_folder() -> None:
    with pytest.raises(InputError) as caught:
        training_network(recipe("model.pretrained=true"), CLASSES)
    assert str(caught.value) == (
        "no pretrained weights of test_convnext2 in results/model/pretrained_model; get them by "
        "python -m fastflower.weights test_convnext2, or set model.pretrained=false"
    )


def test_views_that_the_backbone_cannot_take_are_adapted_before_training() -> None:
    adapted, lines = fitted(recipe("tta.scales=[64,100]", backbone="test_vit"))
    assert adapted.tta.scales == [64, 96]
    assert lines == ["tta.scales = [64, 96], the nearest to [64, 100] that test_vit takes"]
    oblong = recipe("tta.scales=[100]", "data.img_size=[[32,64]]", backbone="test_vit")
    assert fitted(oblong) == (oblong, [])  # which has one view, of its own size


def test_tensors_of_five_axes_keep_their_layout() -> None:
    network = nn.Module()
    network.kernel, network.table = (
        nn.Parameter(torch.rand(4, 3, 2, 2)),
        nn.Parameter(torch.rand(2, 3, 1, 2, 2)),
    )
    use_channels_last(network)
    assert network.kernel.is_contiguous(memory_format=torch.channels_last) and network.table.is_contiguous()


def test_recipe_keys_reach_the_network() -> None:
    overrides = [
        "model.drop_rate=0.3",
        "model.drop_path=0.1",
        "model.grad_checkpointing=true",
        "train.channels_last=true",
    ]
    network, _, _ = training_network(recipe(*overrides, "model.head=arcface", "model.head_scale=12"), CLASSES)
    assert network.dropout.p == 0.3 and network.head.scale == 12
    assert any(type(module).__name__ == "DropPath" for module in network.modules())
    assert network.backbone.stem[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert all(stage.grad_checkpointing for stage in network.backbone.stages)
    rows, _, _ = training_network(recipe("train.channels_last=false"), CLASSES)
    assert rows.backbone.stem[0].weight.is_contiguous()


def test_equal_seeds_give_equal_initial_weights() -> None:
    initial = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        initial.append(training_network(recipe(), CLASSES)[0].state_dict())
    assert all(torch.equal(initial[0][key], initial[1][key]) for key in initial[0])
    assert not torch.equal(initial[0]["head.weight"], initial[2]["head.weight"])


def test_norms_are_synchronised_for_cnns_on_several_gpus_only() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    cnn, _, _ = training_network(recipe(backbone="test_resnet"), CLASSES)
    names = list(cnn.state_dict())
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in cnn.modules())
    assert (
        synchronise_norms(cnn, recipe(), device=cpu, world_size=2)[1]
        == synchronise_norms(cnn, recipe(), device=cuda, world_size=1)[1]
        == 0
    )
    assert synchronise_norms(cnn, recipe("train.sync_bn=false"), device=cuda, world_size=2)[1] == 0
    converted, count = synchronise_norms(cnn, recipe(), device=cuda, world_size=2)
    assert count == norms == sum(isinstance(module, nn.SyncBatchNorm) for module in converted.modules())
    assert list(converted.state_dict()) == names
    plain, _, _ = training_network(recipe(), CLASSES)
    assert synchronise_norms(plain, recipe(), device=cuda, world_size=2) == (plain, 0)


@pytest.fixture
def classifier() -> Classifier:
    network, _, _ = training_network(recipe(), CLASSES)
    return Classifier(network.eval(), build_loss(recipe(), [3] * CLASSES))


def test_classifier_takes_decoded_and_augmented_images_alike(classifier: Classifier) -> None:
    images = pixel_batch()
    want = classifier.network(images.permute(0, 3, 1, 2).float())
    assert torch.equal(classifier({"image": images}), want)
    assert torch.equal(classifier({"image": images.permute(0, 3, 1, 2).float()}), want)
    assert isinstance(classifier, ComposerModel)


def test_classifier_learns_from_the_soft_target_where_there_is_one(classifier: Classifier) -> None:
    logits, label = torch.randn(4, CLASSES), torch.tensor([0, 1, 2, 3])
    hard = classifier.loss(logits, {"label": label})
    torch.testing.assert_close(hard, F.cross_entropy(logits, label, label_smoothing=0.05))
    target = F.one_hot(label, CLASSES).float().roll(1, 0)
    soft = classifier.loss(logits, {"label": label, "target": target})
    torch.testing.assert_close(soft, F.cross_entropy(logits, target, label_smoothing=0.05))


def test_shadows_are_scored_but_are_not_in_the_module_tree(classifier: Classifier) -> None:
    shadow, _, _ = training_network(recipe(), CLASSES)
    names, parameters = list(classifier.state_dict()), len(list(classifier.parameters()))
    classifier.shadows["ema"] = shadow.eval()
    assert list(classifier.state_dict()) == names and len(list(classifier.parameters())) == parameters
    classifier.train()
    assert not shadow.training
    classifier.eval()
    images = pixel_batch()
    with torch.autocast("cpu", torch.bfloat16):
        logits = classifier.eval_forward({"image": images})
    assert set(logits) == {"raw", "ema"} and {value.dtype for value in logits.values()} == {torch.float32}
    exact = classifier.eval_forward({"image": images})
    assert torch.equal(exact["ema"], shadow(images.permute(0, 3, 1, 2).float()))
    assert not torch.equal(exact["ema"], exact["raw"])
    assert classifier.get_metrics(is_train=True) == classifier.get_metrics(is_train=False) == {}


def test_kernels_are_stored_as_torch_stores_them():
    """1 x 1 kernels too, whose gradients have these strides: DDP warns of any others."""
    network = nn.Sequential(nn.Conv2d(8, 6, 1, bias=False), nn.Conv2d(6, 4, 3))
    expected = copy.deepcopy(network).to(memory_format=torch.channels_last)
    use_channels_last(network)
    assert [p.stride() for p in network.parameters()] == [p.stride() for p in expected.parameters()]
    network(torch.rand(2, 8, 5, 5).to(memory_format=torch.channels_last)).sum().backward()
    assert all(p.grad is not None and p.grad.stride() == p.stride() for p in network.parameters())
