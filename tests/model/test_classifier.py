"""The classifier's precision on CPUs."""

from __future__ import annotations

import torch

from fastflower.model.classifier import Classifier, float_images
from fastflower.model.losses import build_loss
from fastflower.model.mixed_precision import autocast_cpu
from fastflower.model.network import training_network
from fastflower.recipe import load


def test_bf16_on_a_cpu_is_torchs_autocast_for_training_and_scoring_with_float32_weights():
    recipe = load(None, ["model.backbone=test_resnet", "model.pretrained=false"])
    torch.manual_seed(0)
    network, _, _ = training_network(recipe, 5)
    images = torch.randint(0, 256, (4, 48, 48, 3), dtype=torch.uint8)
    batch = {"image": images, "label": torch.arange(4)}
    plain = Classifier(network, build_loss(recipe, [8] * 5))
    mixed = Classifier(network, build_loss(recipe, [8] * 5), precision=autocast_cpu)
    mixed.eval()
    with torch.autocast("cpu", torch.bfloat16):
        reference = network(float_images(batch))
    logits = mixed(batch)
    assert logits.dtype == torch.bfloat16 and torch.equal(logits, reference)
    assert plain(batch).dtype == torch.float32
    mixed.shadows["ema"] = network
    scored = mixed.eval_forward(batch)
    for name in ("raw", "ema"):
        assert scored[name].dtype == torch.float32 and torch.equal(scored[name], reference.float())
    loss = mixed.loss(logits, batch)
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in network.parameters())
