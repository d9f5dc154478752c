"""A member in the formats of other programs: what timm, safetensors and an ONNX engine make of it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors
import timm
import timm.data
import torch
from torch import nn

from fastflower import export
from fastflower.bundle import interchange
from fastflower.core.errors import InputError
from fastflower.model.member import save_member
from fastflower.model.network import Network, NetworkSpec, build_network
from fastflower.recipe import load
from support.member_metas import member_meta

IDS = ("9", "10", "rose")


def member(backbone: str = "test_vit", head: str = "linear", size: int = 64) -> tuple[Path, Network]:
    """A checkpoint with random weights, whose logits are of the size of a trained network's, and its network."""
    words = [
        f"model.backbone={backbone}",
        f"model.head={head}",
        f"data.img_size={size}",
        "model.pretrained=false",
    ]
    spec = NetworkSpec.from_recipe(load(None, [*words, f"tta.scales=[{size}]"]), len(IDS))
    network = build_network(spec).eval()
    with torch.no_grad():
        network.head.weight *= 50
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
    path = Path(f"results/model/tiny/best_combo__{backbone}__fold0_seed42_epoch3_score0.5000.pth")
    meta = member_meta(spec, class_ids=IDS, class_counts=(1, 1, 1), resize_factor=1.25)
    save_member(path, dict(network.state_dict()), meta)
    return path, network


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit", "test_convnext2", "test_efficientnet"])
def test_timm_loads_the_folder_with_equal_logits(backbone: str, capsys: pytest.CaptureFixture[str]) -> None:
    path, network = member(backbone)
    export.main(["--members", str(path), "--timm", "out/timm"])
    assert "timm.create_model(" in capsys.readouterr().out
    options = {"dynamic_img_size": True} if backbone == "test_vit" else {}
    of_file = timm.create_model(
        backbone, num_classes=3, checkpoint_path="out/timm/model.safetensors", **options
    )
    of_folder = timm.create_model("local-dir:out/timm", pretrained=True)
    data = timm.data.resolve_model_data_config(of_folder)
    assert data["input_size"] == (3, 64, 64) and data["crop_pct"] == pytest.approx(0.8)
    assert json.loads(Path("out/timm/config.json").read_text())["label_names"] == list(IDS)
    images = torch.rand(2, 3, 64, 64)
    mean, std = (torch.tensor(data[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.inference_mode():
        wanted = network(images * 255)
        assert wanted.abs().max() > 0.1
        for classifier in (of_file, of_folder):
            got = classifier.eval()((images - mean) / std)
            torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("backbone", "head", "reason"),
    [
        ("compare_resnet222_concat_w25", "linear", "is not a network of timm; use --safetensors or --onnx"),
        ("test_resnet", "arcface", "its head is arcface, which timm has not"),
        ("deit_tiny_distilled_patch16_224", "linear", "several heads"),
    ],
)
def test_what_timm_has_not_is_refused_with_the_reason(backbone: str, head: str, reason: str) -> None:
    path, _ = member(backbone, head, 32)
    with pytest.raises(InputError, match=reason):
        export.main(["--members", str(path), "--timm", "out"])
    assert not Path("out").exists()


def test_a_folder_with_other_files_is_not_replaced() -> None:
    path, _ = member()
    Path("out").mkdir()
    Path("out/notes.txt").touch()
    with pytest.raises(InputError, match=r"out holds 'notes.txt', which would be deleted"):
        export.main(["--members", str(path), "--timm", "out"])


def test_safetensors_hold_the_tensors_and_the_description() -> None:
    path, network = member("test_resnet", "cosface")
    export.main(["--members", str(path), "--safetensors", "own.safetensors"])
    with safetensors.safe_open("own.safetensors", "pt") as file:
        assert json.loads(file.metadata()["fastflower"])["class_ids"] == list(IDS)
        state = network.state_dict()
        assert set(file.keys()) == set(state)
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in state.items())


@pytest.mark.parametrize(
    ("backbone", "head"),
    [("test_resnet", "arcface"), ("test_vit", "linear"), ("convnextv2_atto", "linear"),
     ("compare_resnet222_adaptive_w25", "linear"), ("ocec_convnext_c8_b3", "linear")],
)  # fmt: skip
def test_onnx_gives_equal_logits_for_any_batch(
    backbone: str, head: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path, network = member(backbone, head, 32)
    export.main(["--members", str(path), "--onnx", "own.onnx"])
    text = capsys.readouterr().out
    assert "own.onnx: opset 17, " in text and "off at batches of 1 and 3" in text
    missing = importlib.util.find_spec("onnxruntime") is None
    assert ("not with onnxruntime, which is not installed" in text) == missing
    _, run = interchange._engine(Path("own.onnx"))
    images = torch.rand(5, 3, 32, 64 if "compare" in backbone else 32)
    with torch.inference_mode():
        wanted = network(images * 255).numpy()
    assert np.abs(wanted).max() > 0.1
    np.testing.assert_allclose(run(images.numpy()), wanted, atol=1e-4, rtol=0)


def test_operators_without_a_counterpart_are_refused_in_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    class Inverse(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.erfinv(images)

    with pytest.raises(InputError, match=r"a.pth: ONNX opset 17 cannot express this network \(.*erfinv"):
        interchange._export(Inverse(), Path("own.onnx"), height=16, width=16, title="a.pth")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("size", [(7, 7), (2, 3), 5, (None, 4), (4, 4)])
def test_pooling_by_slices_is_torchs(size: int | tuple[int | None, int]) -> None:
    maps = torch.rand(2, 3, 8, 10)
    torch.testing.assert_close(interchange._pool(maps, size), nn.functional.adaptive_avg_pool2d(maps, size))


def test_what_no_engine_here_can_run_is_written_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = member("compare_resnet222_concat_cbam_w25", size=32)
    export.main(["--members", str(path), "--onnx", "own.onnx"])
    missing = importlib.util.find_spec("onnxruntime") is None
    assert (interchange.UNCHECKED in capsys.readouterr().out) == missing and Path("own.onnx").exists()


def test_a_file_with_other_logits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = member("test_resnet", size=32)
    export_whole = interchange._export

    def export_bright(network: nn.Module, *arguments: object, **keywords: object) -> None:
        nn.init.constant_(network.network.head.bias, 1.0)
        export_whole(network, *arguments, **keywords)

    monkeypatch.setattr(interchange, "_export", export_bright)
    with pytest.raises(InputError, match=r"own.onnx: logits of .* are 1 off, 0.0001 is allowed"):
        export.main(["--members", str(path), "--onnx", "own.onnx"])
    assert not Path("own.onnx").exists()


def test_several_members_are_refused_with_the_choice() -> None:
    paths = [str(member(name)[0]) for name in ("test_vit", "test_resnet")]
    with pytest.raises(InputError, match=r"2 members match, .* choose it by --members"):
        export.main(["--members", *paths, "--timm", "out"])
    with pytest.raises(InputError, match="--zip is of the hand-in"):
        export.main(["--members", paths[0], "--timm", "out", "--zip", "a.zip"])
