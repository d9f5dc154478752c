"""Sizes: a recipe's are adapted to those that its backbone takes, with a line, and views follow."""

from __future__ import annotations

import pytest
import torch

from fastflower.core.errors import InputError
from fastflower.model import sizes
from fastflower.model.network import build_network, fitted, training_network
from fastflower.recipe import Recipe, load
from fastflower.recipe.derived import image_sizes


def recipe(backbone: str, *words: str) -> Recipe:
    return load(None, [f"model.backbone={backbone}", "model.pretrained=false", *words])


@pytest.mark.parametrize(
    ("backbone", "trained", "views"),
    [
        ("resnet10t", [224, 320], [320, 384]),
        ("eva02_tiny_patch14_224", [224, 322], [322, 378]),
        ("beit_base_patch16_224", [320], [320]),  # built for the size
        ("pit_ti_224", [320], [320]),
        ("efficientformer_l1", [224], [224]),  # 224 whatever it is asked for
    ],
)
def test_the_default_sizes_are_adapted(backbone: str, trained: list[int], views: list[int]) -> None:
    adapted, lines = fitted(recipe(backbone))
    assert [height for height, _ in image_sizes(adapted)] == trained and adapted.tta.scales == views
    assert len(lines) == (trained != [224, 320]) + (views != [320, 384])
    assert all(line.startswith(("data.img_size = ", "tta.scales = ")) and backbone in line for line in lines)
    assert fitted(adapted) == (adapted, [])


def test_stages_that_become_one_keep_the_last_epoch_and_batch() -> None:
    words = ["data.size_epochs=[15,40]", "train.stage_batch=[64,16]"]
    adapted, (line, _) = fitted(recipe("pit_ti_224", *words))
    assert adapted.data.size_epochs == [40] and adapted.train.stage_batch == [16]
    assert line == "data.img_size = [320], the nearest to [224, 320] that pit_ti_224 takes in one training"


def test_no_side_exceeds_what_the_images_were_stored_for() -> None:
    with pytest.raises(
        InputError, match=r"^data.img_size = 96: efficientformer_l1 cannot take images of this size"
    ):
        fitted(recipe("efficientformer_l1", "data.img_size=[64,96]", "tta.scales=[96]"))
    adapted, _ = fitted(recipe("eva02_tiny_patch14_224", "data.img_size=96", "tta.scales=[96]"))
    assert (adapted.data.img_size, adapted.tta.scales) == ([84], [84])


def test_a_member_is_viewed_at_sizes_that_its_own_network_takes() -> None:
    """Members of one experiment may have several backbones and one recipe."""
    _, spec, _ = training_network(recipe("test_vit", "data.img_size=64"), 3)
    assert spec.scales([64, 100]) == [64, 96]
    assert sizes.view_scales("pit_ti_224", (64, 64), [64, 96]) == [64]
    images = torch.rand(1, 3, 96, 96)
    assert build_network(spec)(images).shape == (1, 3)


@pytest.mark.parametrize("backbone", ["efficientvit_m0", "xcit_nano_12_p16_224", "beit_base_patch16_224"])
def test_hints_name_sizes_that_work(backbone: str) -> None:
    """Their patch size is a number, a pair, or unknown."""
    text = sizes.refusal(backbone, (330, 330), [(330, 330)])
    if "takes this size" not in text:
        near = [int(word) for word in text.split(": ")[1].split(" or ")]
        assert near and all(sizes.takes(backbone, (side, side)) for side in near)
