"""Backbones: names, sizes, and pretrained weights in every supported file and folder layout."""

from __future__ import annotations

import os
import pickle
import re
import socket
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.data
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from fastflower.core.errors import CorruptionError, InputError
from fastflower.model.backbones import build_backbone, check_name, check_sizes, profile
from fastflower.model.pretrained import find_weights
from fastflower.model.weight_files import read_weights

NAME = "test_convnext2.r160_in1k"
SIZES = [(64, 64)]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("opened a network connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def published() -> dict[str, Tensor]:
    """The tensors of a published classifier, head included."""
    return timm.create_model(NAME, pretrained=False).state_dict()


@pytest.mark.parametrize(
    ("name", "sizes", "features"),
    [
        ("convnextv2_base.fcmae_ft_in22k_in1k", (224, 320, 384, 448), 1024),
        ("vit_base_patch16_224.augreg2_in21k_ft_in1k", (224, 320, 384, 448), 768),
        ("tf_efficientnetv2_m.in21k_ft_in1k", (224, 384), 1280),
        ("swin_base_patch4_window7_224.ms_in22k_ft_in1k", (224, 384), 1024),
        ("swinv2_tiny_window8_256", (256, 320), 768),
        ("vit_base_patch16_clip_224.openai", (224, 320), 768),
        ("eva02_base_patch14_448.mim_in22k_ft_in22k_in1k", (224, 448), 768),
        ("tf_efficientnet_b0.ns_jft_in1k", (28, 224), 1280),
        ("convnext_atto.d2_in1k", (32, 224), 320),
        ("mobilenetv3_small_050", (64,), 1024),
        ("edgenext_xx_small", (64,), 168),
        ("tiny_vit_5m_224", (64, 96), 320),
        ("maxvit_tiny_tf_224.in1k", (224, 448), 512),
        ("beit_base_patch16_224", (320,), 768),
    ],
)
def test_named_backbones_take_their_sizes(name: str, sizes: tuple[int, ...], features: int) -> None:
    assert profile(name, [(size, size) for size in sizes]).features == features


def test_profile_equals_timms() -> None:
    for name in ("convnextv2_atto", "test_vit.r160_in1k", "vit_base_patch16_clip_224.openai"):
        got = profile(name, [(224, 224)])
        want = timm.data.resolve_data_config(
            model=None, args={}, pretrained_cfg=timm.get_pretrained_cfg(name).to_dict()
        )
        assert (got.mean, got.std, got.interpolation) == (want["mean"], want["std"], want["interpolation"])


def test_interpolation_follows_the_backbone() -> None:
    assert profile("vgg11", [(224, 224)]).interpolation == "bilinear"


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"model.backbone = convnextv2_bas: timm .* near: .*convnextv2_base"):
        check_name("convnextv2_bas")
    with pytest.raises(InputError, match=r"has no pretrained tag fcmae_in22k; it has .*fcmae_ft_in22k_in1k"):
        check_name("convnextv2_base.fcmae_in22k")
    with pytest.raises(InputError, match="no such model"):
        check_name("hf-hub:timm/resnet18.a1_in1k")


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("vit_tiny_patch16_224", (330, 330), "data.img_size = 330: .* the nearest that it takes: 320 or 336"),
        (
            "vit_tiny_patch16_224",
            (224, 100),
            r"\[224, 100\].* the nearest that it takes: \[224, 96\] or \[240, 112\]",
        ),
        ("convnextv2_atto", (28, 28), "data.img_size = 28: .* the nearest that it takes: 32"),
        ("edgenext_xx_small", (28, 28), "the nearest that it takes: 32"),
        ("beit_base_patch16_224", (330, 330), "data.img_size = 330: .* that it takes: 320 or 336"),
    ],
)
def test_impossible_sizes_are_refused_with_the_nearest(
    name: str, size: tuple[int, int], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        check_sizes(name, [size])


def test_a_backbone_of_fixed_size_takes_only_the_size_it_was_built_for() -> None:
    check_sizes("beit_base_patch16_224", [(320, 320)])
    with pytest.raises(
        InputError, match=r"tta.scales = 384: beit_base_patch16_224 cannot take images of this size"
    ):
        check_sizes("beit_base_patch16_224", [(384, 384)], key="tta.scales", built_for=[(320, 320)])


def test_vit_interpolates_its_position_embeddings_as_timm_does() -> None:
    backbone, _ = build_backbone("test_vit", [(160, 160), (224, 224)])
    reference = timm.create_model("test_vit", num_classes=0, img_size=224)
    state = backbone.state_dict()
    state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], [14, 14], num_prefix_tokens=1)
    reference.load_state_dict(state)
    images = torch.randn(2, 3, 224, 224)
    torch.testing.assert_close(backbone.eval()(images), reference.eval()(images), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "relative",
    [
        f"{NAME}.safetensors",
        f"{NAME}.pth",
        f"{NAME}.pt",
        f"{NAME}.bin",
        f"{NAME}/model.safetensors",
        f"{NAME}/pytorch_model.bin",
        f"models--timm--{NAME}/snapshots/0123abcd/model.safetensors",
        "test_convnext2.safetensors",
        "test_convnext2/pytorch_model.bin",
    ],
)
def test_pretrained_weights_are_found_in_every_layout(
    tmp_path: Path, published: dict[str, Tensor], relative: str
) -> None:
    path = tmp_path / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(published, path)
    else:
        torch.save(
            {"epoch": 3, "state_dict": {f"module.{key}": value for key, value in published.items()}}, path
        )
    backbone, report = build_backbone(NAME, SIZES, pretrained=tmp_path)
    assert report is not None
    assert (
        report.path == path
        and not report.unexpected
        and set(report.dropped) == {"head.fc.weight", "head.fc.bias"}
    )
    state = backbone.state_dict()
    assert report.matched == len(state) and all(torch.equal(state[key], published[key]) for key in state)
    assert f"{report.matched} tensors loaded, 2 of a head dropped" in str(report)


def test_the_file_with_the_tag_is_preferred(tmp_path: Path) -> None:
    for name in ("resnet18.pth", "resnet18.a1_in1k.bin", "resnet18.a1_in1k.pth"):
        (tmp_path / name).touch()
    assert find_weights("resnet18.a1_in1k", tmp_path).name == "resnet18.a1_in1k.pth"


def test_position_embeddings_of_another_size_are_resampled(tmp_path: Path) -> None:
    small = timm.create_model("test_vit", img_size=96)
    save_file(small.state_dict(), tmp_path / "test_vit.safetensors")
    backbone, _ = build_backbone("test_vit", [(160, 160)], pretrained=tmp_path)
    want = resample_abs_pos_embed(small.pos_embed.detach(), [10, 10], num_prefix_tokens=1)
    torch.testing.assert_close(backbone.pos_embed.detach(), want)


def test_names_of_the_original_authors_are_converted(tmp_path: Path) -> None:
    """torchvision's DenseNet as published before 2018: only timm's builder knows the conversion."""
    with torch.device("meta"):
        shapes = timm.create_model("densenet121").state_dict()
    old = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", key): torch.full(value.shape, 0.5)
        for key, value in shapes.items()
        if not key.endswith("num_batches_tracked")
    }
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    torch.save(old, tmp_path / "densenet121.pth")
    backbone, report = build_backbone("densenet121", SIZES, pretrained=tmp_path)
    assert report is not None and report.matched == len(old) - 2 and not report.unexpected
    assert all((parameter == 0.5).all() for parameter in backbone.parameters())


def test_missing_weights_name_the_command_and_never_start_at_random(tmp_path: Path) -> None:
    with pytest.raises(InputError) as refusal:
        build_backbone(NAME, SIZES, pretrained=tmp_path)
    assert str(refusal.value) == (
        f"no pretrained weights of {NAME} in {tmp_path}; get them by python -m fastflower.weights {NAME}, or set "
        "model.pretrained=false"
    )


def test_weights_of_another_network_are_refused(tmp_path: Path, published: dict[str, Tensor]) -> None:
    lacking = {key: value for key, value in published.items() if not key.startswith("stages.1.blocks.0.")}
    torch.save(lacking, tmp_path / f"{NAME}.pth")
    with pytest.raises(InputError, match=r"lacks \d+ of the backbone's \d+ tensors \(stages.1.blocks.0"):
        build_backbone(NAME, SIZES, pretrained=tmp_path)
    torch.save({**published, "stem.0.weight": torch.zeros(7, 3, 4, 4)}, tmp_path / f"{NAME}.pth")
    with pytest.raises(
        InputError, match=r"1 tensors have another shape \(stem.0.weight: \(7, 3, 4, 4\), the backbone"
    ):
        build_backbone(NAME, SIZES, pretrained=tmp_path)


def test_unexpected_tensors_are_reported(tmp_path: Path, published: dict[str, Tensor]) -> None:
    torch.save({**published, "decoder.weight": torch.zeros(3)}, tmp_path / f"{NAME}.pth")
    _, report = build_backbone(NAME, SIZES, pretrained=tmp_path)
    assert report is not None and report.unexpected == ("decoder.weight",)
    assert "1 unexpected (decoder.weight)" in str(report)


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch hostile-code-ran",)


def test_damaged_and_hostile_files_are_refused(tmp_path: Path, published: dict[str, Tensor]) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(pickle.dumps({"model": Hostile()}, protocol=2))
    with pytest.raises(InputError, match="nothing in it was run"):
        read_weights(path)
    torch.save({"model": Hostile()}, path)
    with pytest.raises(InputError, match="nothing in it was run"):
        read_weights(path)
    assert not Path("hostile-code-ran").exists()
    torch.save(published, path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CorruptionError, match="cut short or damaged"):
        read_weights(path)
    save_file(published, tmp_path / "weights.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "weights.safetensors").read_bytes()[:5000])
    with pytest.raises(CorruptionError, match="cut short or damaged"):
        read_weights(tmp_path / "cut.safetensors")
    torch.save([1, 2], path)
    with pytest.raises(InputError, match="holds no dictionary of tensors"):
        read_weights(path)
    torch.save(torch.nn.Linear(2, 2), path)  # its class is not looked up
    with pytest.raises(InputError, match="holds no dictionary of tensors"):
        read_weights(path)
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    with pytest.raises(InputError, match="a program of TorchScript, which is not run"):
        read_weights(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"\n<!DOCTYPE html><html>sign in</html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "a pointer of Git LFS"),
    ],
)
def test_what_is_saved_in_the_place_of_weights_is_named(
    tmp_path: Path, data: bytes, what: str, suffix: str
) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(data)
    with pytest.raises(InputError, match=f"{what}, not weights; download the file itself"):
        read_weights(path)


class Imported:
    """An object of another library; reading a file must neither find its class nor run its methods."""

    def __init__(self) -> None:
        self.value = 3

    def __setstate__(self, state: Any) -> None:
        Path("imported-code-ran").touch()


def test_other_objects_in_a_file_are_not_rebuilt(tmp_path: Path, published: dict[str, Tensor]) -> None:
    torch.save({"model": published, "settings": [Imported()], Path("key"): Imported()}, tmp_path / "w.pth")
    assert set(read_weights(tmp_path / "w.pth").tensors) == set(published)
    assert not Path("imported-code-ran").exists()


def test_stochastic_depth_reaches_timm_or_is_refused() -> None:
    backbone, _ = build_backbone(NAME, SIZES, drop_path=0.2)
    rates = [m.drop_prob for m in backbone.modules() if type(m).__name__ == "DropPath"]
    assert max(rates) == pytest.approx(0.2)
    with pytest.raises(InputError, match=r"model.drop_path = 0.2: densenet121 has no stochastic depth"):
        build_backbone("densenet121", SIZES, drop_path=0.2)


def test_recomputed_activations_give_the_same_gradients() -> None:
    plain, _ = build_backbone("test_vit", SIZES)
    saving, _ = build_backbone("test_vit", SIZES, grad_checkpointing=True)
    saving.load_state_dict(plain.state_dict())
    assert saving.grad_checkpointing and not plain.grad_checkpointing
    images = torch.randn(2, 3, 64, 64)
    for backbone in (plain, saving):
        backbone.train()(images).square().sum().backward()
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    with pytest.raises(InputError, match=r"model.grad_checkpointing: inception_v3 cannot recompute"):
        build_backbone("inception_v3", [(160, 160)], grad_checkpointing=True)
