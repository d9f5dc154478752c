"""Stochastic depth: its rate grows with depth, or a line says that it does not."""

from __future__ import annotations

import pytest
from timm.layers import DropPath
from torch import nn

from fastflower.model.backbones import build_backbone
from fastflower.model.network import drop_path_note


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_resnet"])
def test_stochastic_depth_grows_with_depth(name: str) -> None:
    backbone, _ = build_backbone(name, [(32, 32)], drop_path=0.3)
    rates = [module.drop_prob for module in backbone.modules() if isinstance(module, DropPath)]
    assert rates == sorted(rates) and len(set(rates)) > 1 and rates[-1] == pytest.approx(0.3)
    assert drop_path_note(backbone, name) == []


def test_a_rate_of_stochastic_depth_that_does_not_grow_is_said() -> None:
    blocks = nn.Sequential(*(DropPath(0.1) for _ in range(3)))
    assert drop_path_note(blocks, "mixer")[0].startswith(
        "model.drop_path = 0.1 in each of 3 places, as mixer was"
    )
    assert drop_path_note(nn.Sequential(DropPath(0.1)), "one") == []
