"""Checks that need a GPU: mixed precision and its scaler, norms across GPUs, the fused optimizer, the predictor."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fastflower.bench.predict import write_random_bundle
from fastflower.core.records import read_record
from fastflower.model.network import synchronise_norms, training_network
from fastflower.optim.groups import param_groups
from fastflower.optim.optimizers import build_optimizer
from fastflower.recipe import load
from fastflower.recipe.run_record import RunNumbers, numbers_path
from support import toy_project

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


@pytest.mark.parametrize("precision, half", [("amp_bf16", torch.bfloat16), ("amp_fp16", torch.float16)])
def test_mixed_precision_trains_as_single_does_and_keeps_float32_weights(
    precision, half, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """fp16 is used where the GPU has no bf16; its scaler is saved, and a finished run is recognised."""
    toy_project.project(tmp_path)
    seen: set[torch.dtype] = set()
    forward = nn.Linear.forward

    def watched(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        out = forward(self, x)
        seen.add(out.dtype)
        return out

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: precision == "amp_bf16")
    monkeypatch.setattr(nn.Linear, "forward", watched)
    assert toy_project.fit("exp.name=half") == 0
    assert half in seen
    assert toy_project.fit("exp.name=single", "train.amp=false") == 0
    for exp, name in (("half", precision), ("single", "fp32")):
        run = toy_project.run_of(exp)
        numbers = read_record(numbers_path(run), RunNumbers)
        assert numbers.precision == name and numbers.device == torch.cuda.get_device_name()
    found = toy_project.last("half")
    assert {t.dtype for t in found.tensors.values() if t.is_floating_point()} == {torch.float32}
    assert all(bool(tensor.isfinite().all()) for tensor in found.tensors.values())
    assert bool(found.training_state["scaler"]) == (precision == "amp_fp16")
    if precision == "amp_fp16":
        assert (
            math.isfinite(found.training_state["scaler"]["scale"])
            and found.training_state["scaler"]["scale"] >= 1
        )
    for one, other in zip(toy_project.epochs("half"), toy_project.epochs("single"), strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=0.05)
    assert toy_project.fit("exp.name=half") == 0


def test_batch_norms_are_synchronised_and_score_alike():
    recipe = load(None, ["model.backbone=test_resnet", "model.pretrained=false", "data.img_size=[32,64]"])
    network = training_network(recipe, 5)[0].to(CUDA)
    images = torch.rand(4, 3, 64, 64, device=CUDA) * 255
    plain = network.eval()(images)
    converted, count = synchronise_norms(network, recipe, device=CUDA, world_size=2)
    assert count and count == sum(isinstance(module, nn.SyncBatchNorm) for module in converted.modules())
    torch.testing.assert_close(converted.to(CUDA).eval()(images), plain)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_the_fused_step_is_the_cpus(name: str):
    recipe = load(
        None, [f"opt.name={name}", "model.backbone=test_vit", "model.pretrained=false", "data.img_size=32"]
    )
    network = training_network(recipe, 5)[0]
    weights = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    ends = {}
    for device in (torch.device("cpu"), CUDA):
        network.to(device).load_state_dict(weights)
        made = build_optimizer(param_groups(network, 1e-3, recipe), recipe, device)
        assert made.defaults["fused"] == (device == CUDA)
        noise = torch.Generator().manual_seed(0)
        for _ in range(5):
            for parameter in network.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=noise).to(device)
            made.step()
        ends[device.type] = {
            key: tensor.detach().cpu().clone() for key, tensor in network.state_dict().items()
        }
    for key, tensor in ends["cpu"].items():
        torch.testing.assert_close(ends["cuda"][key], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backbone", ["resnet10t", "convnextv2_atto", "vit_tiny_patch16_224"])
def test_the_predictor_says_on_a_gpu_what_it_says_on_the_cpu(backbone: str, tmp_path: Path, code: type):
    """In fp16 approximately; a batch that does not fit is split, and the GPU stays in use."""
    place = tmp_path / "write_random_bundle"
    place.mkdir()
    write_random_bundle(place, backbone, scales=[64, 96])
    folder = str(place / "bundle")
    description, hashes = code.bundles.read(folder)
    rng = np.random.default_rng(0)
    shapes = [(crop["height"], crop["width"], 3) for crop in description["crops"]]
    pictures = [[rng.integers(0, 256, shape, dtype=np.uint8) for shape in shapes] for _ in range(8)]
    want = code.networks.Networks(folder, description, hashes=hashes, device="cpu").logits(pictures)
    largest = max(1.0, float(np.abs(want).max()))
    for half, dtype, share in (("none", torch.float32, 1e-3), ("gpu", torch.float16, 0.02)):
        networks = code.networks.Networks(folder, description, hashes=hashes, device="cuda", half=half)
        assert networks.dtype == dtype and networks.notes == []
        assert np.abs(networks.logits(pictures) - want).max() <= share * largest
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**27) / total)
    try:
        got = networks.logits(pictures * 256)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert networks.device.type == "cuda" and networks.notes == []
    assert np.abs(got - np.concatenate([want] * 256)).max() <= 0.02 * largest
