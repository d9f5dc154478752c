"""The weights command: lists, downloads from a hub, names what to fetch without a network, converts files of others."""

from __future__ import annotations

import argparse
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor

from fastflower import train, weights
from fastflower.core import console
from fastflower.core.errors import EnvironmentFault, InputError
from fastflower.model import published
from fastflower.model.backbones import build_backbone

NAME = "test_resnet.r160_in1k"
TARGET = Path(f"results/model/pretrained_model/{NAME}.safetensors")


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """The tensors of a classifier of 1000 classes."""
    return timm.create_model(NAME).state_dict()


class Hub(BaseHTTPRequestHandler):
    """A hub with one repository; `files` are its files by path."""

    files: dict[str, bytes] = {}  # noqa: RUF012

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.wfile.write(self.answer())

    def answer(self) -> bytes:
        data = self.files.get(self.path, b"")
        self.send_response(200 if data else 404)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", '"0123456789abcdef"')
        self.send_header("X-Repo-Commit", "0" * 40)
        if not data:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        return data

    def log_message(self, *_: Any) -> None:
        """Keep the test's output quiet."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a running hub, which HF_ENDPOINT names."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", address)
    yield address
    server.shutdown()
    server.server_close()
    thread.join()


def loaded(name: str = NAME) -> dict[str, Tensor]:
    """The tensors of a backbone as training finds them."""
    backbone, report = build_backbone(name, [(64, 64)], pretrained=TARGET.parent)
    assert report is not None and not report.missing
    return backbone.state_dict()


def check_loaded(state: dict[str, Tensor], factor: float = 1.0) -> None:
    for key, tensor in loaded().items():
        assert torch.equal(tensor, state[key] * factor if tensor.is_floating_point() else state[key])


def test_without_arguments_the_recipes_weights_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match=r"no recipe in .* starts from weights; give a backbone"):
        weights.main([])
    Path("recipes").mkdir()
    Path("recipes/a.yaml").write_text("model: {backbone: resnet18.a1_in1k}")
    Path("recipes/b.yaml").write_text("base: a.yaml\nseed: 1")
    Path("recipes/c.yaml").write_text("model: {backbone: vit_tiny_patch16_224}")
    Path("recipes/d.yaml").write_text("model: {backbone: resnet50, pretrained: false}")
    there = Path("results/model/pretrained_model/resnet18.pth")
    there.parent.mkdir(parents=True)
    there.touch()
    weights.main([])
    assert capsys.readouterr().out.splitlines() == [
        "resnet18.a1_in1k  (a.yaml, b.yaml)",
        f"  present   {there}",
        "vit_tiny_patch16_224  (c.yaml)",
        "  missing",
        f"next: {console.spelled('weights', ['vit_tiny_patch16_224'])}",
    ]


def test_weights_are_downloaded_checked_and_put_in_place(
    hub: str, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = safetensors.torch.save(state)
    monkeypatch.setattr(Hub, "files", {f"/timm/{NAME}/resolve/main/model.safetensors": data})
    weights.main([NAME])
    text = capsys.readouterr().out
    assert f"page     {hub}/timm/{NAME}\n" in text and "licence  apache-2.0\n" in text
    assert f"file     {hub}/timm/{NAME}/resolve/main/model.safetensors\n" in text
    assert TARGET.read_bytes() == data and sorted(TARGET.parent.iterdir()) == [TARGET]
    check_loaded(state)
    monkeypatch.setattr(Hub, "files", {})
    weights.main([NAME])  # what is there is checked, and nothing is asked of the hub
    assert f"{NAME}: present at {TARGET}" in capsys.readouterr().out
    TARGET.unlink()
    with pytest.raises(EnvironmentFault, match=f"{hub} answers 404"):
        weights.main([NAME])
    assert not list(TARGET.parent.iterdir())


def test_a_download_of_something_else_is_not_put_in_place(
    hub: str, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = {key: tensor for key, tensor in state.items() if not key.startswith("layer1")}
    files = {f"/timm/{NAME}/resolve/main/model.safetensors": safetensors.torch.save(other)}
    monkeypatch.setattr(Hub, "files", files)
    with pytest.raises(InputError, match=r"lacks \d+ of the backbone's"):
        weights.main([NAME])
    assert not TARGET.exists()


def test_without_a_network_the_address_and_the_path_are_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(EnvironmentFault) as refusal:
        weights.main([NAME])
    text = capsys.readouterr().out
    for address in ("http://127.0.0.1:9", published.MIRROR):
        assert f"file     {address}/timm/{NAME}/resolve/main/model.safetensors\n" in text
    assert "Connection refused" in str(refusal.value) and f"put a file from above at {TARGET}" in str(
        refusal.value
    )
    assert f"HF_ENDPOINT={published.MIRROR}" in str(refusal.value) and len(str(refusal.value)) < 250
    assert not list(TARGET.parent.iterdir())


def test_networks_without_published_weights_are_refused() -> None:
    with pytest.raises(InputError, match="timm names no published weights for it; give a file of your own"):
        weights.main(["compare_resnet222_concat"])


def timm_checkpoint(state: dict[str, Tensor]) -> dict[str, Any]:
    """A checkpoint as timm's train.py writes it: Namespace of options, raw and averaged weights, a NumPy score."""
    return {
        "epoch": 3,
        "arch": "test_resnet",
        "state_dict": {f"module.{key}": tensor for key, tensor in state.items()},
        "state_dict_ema": {key: tensor * 2 if tensor.is_floating_point() else tensor for key, tensor in state.items()},
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
        "args": argparse.Namespace(model="test_resnet", data_dir=Path("train"), lr=0.1),
        "metric": torch.tensor(0.5).double().numpy()[()],
    }  # fmt: skip


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_a_checkpoint_of_timms_training_asks_which_weights(
    zipped: bool, state: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = timm_checkpoint(state)
    if not zipped:
        del checkpoint["args"].data_dir, checkpoint["metric"]
    torch.save(checkpoint, "model_best.pth.tar", _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        InputError, match=r"holds state_dict .* and state_dict_ema .*; choose by --raw or --ema"
    ):
        weights.main([NAME, "model_best.pth.tar"])
    assert not TARGET.exists()
    weights.main([NAME, "model_best.pth.tar", "--ema"])
    text = capsys.readouterr().out
    assert "taking state_dict_ema of model_best.pth.tar" in text
    assert "left out 2 tensors of a head: fc.weight (1000, " in text
    check_loaded(state, 2.0)
    with pytest.raises(InputError, match=f"{TARGET} is already there; --replace replaces it"):
        weights.main([NAME, "model_best.pth.tar", "--raw"])
    weights.main([NAME, "model_best.pth.tar", "--raw", "--replace"])
    check_loaded(state)


def test_weights_for_another_network_name_it(state: dict[str, Tensor]) -> None:
    torch.save({"arch": "test_resnet", "state_dict": state}, "resnet.pth")
    with pytest.raises(InputError, match=r"resnet.pth is of test_resnet, not of test_vit: .*lacks"):
        weights.main(["test_vit", "resnet.pth"])
    with pytest.raises(InputError, match=r"has no ema weights, only state_dict; leave out --ema"):
        weights.main([NAME, "resnet.pth", "--ema"])


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.", "module._orig_mod.", "timm_model."])
def test_prefixes_and_heads_of_other_classes_are_removed(prefix: str, state: dict[str, Tensor]) -> None:
    tensors = {prefix + key: tensor for key, tensor in state.items()}
    tensors[f"{prefix}fc.weight"], tensors[f"{prefix}fc.bias"] = torch.zeros(17, 64), torch.zeros(17)
    torch.save({"model": tensors, "epoch": 1}, "own.pt")
    weights.main([NAME, "own.pt"])
    check_loaded(state)


def test_a_hugging_face_folder_and_a_member_are_read(state: dict[str, Tensor]) -> None:
    folder = Path("downloads/resnet")
    folder.mkdir(parents=True)
    with pytest.raises(InputError, match=r"no weights in it; give a folder with model.safetensors or"):
        weights.main([NAME, str(folder)])
    (folder / "config.json").write_text(json.dumps({"architecture": "test_resnet"}))
    torch.save(state, folder / "pytorch_model.bin")
    weights.main([NAME, str(folder)])
    check_loaded(state)
    with pytest.raises(InputError, match="is of test_resnet, not of test_vit"):
        weights.main(["test_vit", str(folder)])
    backbone = {f"backbone.{key}": tensor for key, tensor in state.items() if not key.startswith("fc.")}
    torch.save(
        {"fastflower": 1, "meta": "{}", "tensors": {**backbone, "head.weight": torch.zeros(3, 64)}}, "m.pth"
    )
    weights.main([NAME, "m.pth", "--replace"])
    check_loaded(state)


def test_training_is_refused_before_anything_heavy_without_its_weights(toy: Path) -> None:
    with pytest.raises(InputError) as refusal:
        train.main(["tiny.yaml", "model.pretrained=true"])
    text = str(refusal.value)
    assert text.startswith(
        "no pretrained weights of test_vit in results/model/pretrained_model; get them by "
    )
    assert "python -m fastflower.weights test_vit" in text and len(text) < 200


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    from support.toy_project import project

    return project(tmp_path)


def test_the_model_folder_of_another_contest_entry_is_read(state: dict[str, Tensor], capsys) -> None:
    """As FloraAI has it: raw and averaged weights in best_model.pth, beside latest_checkpoint.pth and config.json."""
    folder = Path("entry/model")
    folder.mkdir(parents=True)
    averaged = {name: tensor * 2 if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    about = {
        "epoch": 7,
        "val_acc": 98.18,
        "optimizer_state_dict": {"state": {}, "param_groups": [{"lr": 5e-5}]},
        "args": argparse.Namespace(model_type="test_resnet"),
    }
    torch.save({**about, "model_state_dict": state}, folder / "latest_checkpoint.pth")
    torch.save(
        {**about, "model_state_dict": state, "ema_model_state_dict": averaged}, folder / "best_model.pth"
    )
    config = {"model_type": "test_resnet", "num_classes": 100, "class_to_idx": {"164": 0, "1734": 1}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        InputError, match=r"model_state_dict .* and ema_model_state_dict .*choose by --raw or --ema"
    ):
        weights.main([NAME, str(folder)])
    weights.main([NAME, str(folder), "--ema"])
    assert "taking ema_model_state_dict of entry/model/best_model.pth" in capsys.readouterr().out
    check_loaded(state, 2.0)
    with pytest.raises(InputError, match=r"best_model\.pth is of test_resnet, not of"):
        weights.main(["test_vit", str(folder), "--ema"])
    torch.save(state, folder / "best_model_v2.pth")
    with pytest.raises(InputError, match=r"has best_model.pth, best_model_v2.pth; give one of these files"):
        weights.main([NAME, str(folder), "--replace"])
