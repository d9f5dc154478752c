"""Rotated and shifted views, votes, and the mean of probabilities: trainer and predictor agree on each."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import softmax
from torch.nn import functional as F

from fastflower.bundle import writer
from fastflower.core import runs
from fastflower.core.errors import InputError
from fastflower.evaluation.logits import combine, reduce_views
from fastflower.evaluation.moves import Move, moved, moves_of
from fastflower.model.member import save_member
from fastflower.model.network import NetworkSpec, build_network
from fastflower.recipe import checks, load
from support.member_metas import member_meta
from support.predictor_runs import photograph

WORDS = ["model.backbone=test_resnet", "model.pretrained=false", "data.img_size=32", "data.size_epochs=auto"]
MOVES = ["tta.scales=[32]", "tta.hflip=false", "tta.rotations=[-10,10]", "tta.shift=0.0625"]
RECIPE = load(None, [*WORDS, *MOVES])
SPEC = replace(NetworkSpec.from_recipe(RECIPE, 3))


def random_network(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return build_network(SPEC).eval()


def test_the_views_of_a_recipe():
    shifts = [Move(across=0.0625), Move(across=-0.0625), Move(down=0.0625), Move(down=-0.0625)]
    assert moves_of(RECIPE.tta) == [Move(), Move(degrees=-10), Move(degrees=10), *shifts]
    assert moves_of(load(None, []).tta) == [Move()]


@torch.no_grad()
def test_a_moved_network_sees_the_moved_image():
    network, images = random_network(0), 255 * torch.rand(2, 3, 32, 32)
    assert moved(network, Move(), (32, 32)) is network
    shifted = moved(network, Move(across=0.0625, down=-0.125), (32, 32))  # 2 pixels to the right, 4 up
    by_hand = F.pad(images, (2, 0, 0, 4), "reflect")[:, :, 4:, :32]
    inner = images.clone()
    inner[:, :, : 32 - 4, 2:] = images[:, :, 4:, : 32 - 2]
    seen: list[torch.Tensor] = []
    hook = network.backbone.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    shifted(images)
    network(by_hand)
    hook.remove()
    torch.testing.assert_close(seen[0][:, :, :28, 2:], seen[1][:, :, :28, 2:], atol=1e-4, rtol=0)
    turned = moved(network, Move(degrees=90), (32, 32))
    torch.testing.assert_close(turned(images), network(images.rot90(1, (2, 3))), atol=1e-4, rtol=1e-4)
    pair = torch.cat([images, images.flip(3)], 3)
    both: list[torch.Tensor] = []
    hook = network.backbone.register_forward_pre_hook(lambda _, arguments: both.append(arguments[0]))
    moved(network, Move(degrees=90), (32, 32), images=2)(pair)
    hook.remove()
    halves = torch.cat([images.rot90(1, (2, 3)), images.flip(3).rot90(1, (2, 3))], 3)
    torch.testing.assert_close(both[0], (halves - network.mean) / network.std, atol=1e-3, rtol=0)
    assert "across" not in " ".join(name for name, _ in network.named_buffers())


def test_votes_count_views_and_the_mean_breaks_ties():
    views = [
        np.array([[3.0, 0, 0], [1, 0, 0]]),
        np.array([[0, 1.0, 0], [0, 5, 0]]),
        np.array([[0, 1.0, 0], [0, 0, 1]]),
    ]
    mean = np.mean(views, axis=0)
    assert mean[0].argmax() == 0 and reduce_views(views, "vote")[0].argmax() == 1  # two of three
    assert reduce_views(views, "vote")[1].argmax() == 1  # one each: that of the mean
    assert softmax(reduce_views(views, "vote"), axis=1).sum(1) == pytest.approx(1)
    np.testing.assert_allclose(reduce_views(views, "mean"), mean, atol=1e-6)


def test_a_mean_of_probabilities_is_not_one_of_logits():
    sure, unsure = np.array([[8.0, 0]]), np.array([[0, 1.0]])
    got = softmax(combine([sure, unsure], np.array([0.25, 0.75]), "probabilities"), axis=1)
    np.testing.assert_allclose(got, 0.25 * softmax(sure, axis=1) + 0.75 * softmax(unsure, axis=1), atol=1e-6)
    assert combine([sure, unsure], np.array([0.25, 0.75]), "logits").argmax() == 0 != got.argmax()
    with pytest.raises(InputError, match=r"bundle.members = greedy chooses by the mean of logits"):
        checks.check(load(None, ["ensembling.average=probabilities", "bundle.members=greedy"]))


@pytest.mark.parametrize("how", ["mean", "vote"])
@pytest.mark.parametrize("space", ["logits", "probabilities"])
def test_the_predictor_gives_the_trainers_logits_of_every_view_and_their_combination(code, how, space):
    recipe = load(
        None, [*WORDS, *MOVES, f"tta.reduce={how}", f"ensembling.average={space}", "bundle.dtype=fp32"]
    )
    paths = []
    for seed in (0, 1):
        meta = member_meta(SPEC, resize_factor=1.0, stored_side=32, seed=seed)
        path = runs.Run(exp="exp", backbone="test_resnet", fold=0, seed=seed).checkpoint_path(
            "best_combo", 1, 0.5
        )
        save_member(path, dict(random_network(seed).state_dict()), meta)
        paths.append(path)
    members, weights = writer.load_members(paths, "fp32"), np.array([0.3, 0.7])
    os.mkdir("bundle")
    writer.write_bundle(runs.Path("bundle"), members, weights=weights, recipe=recipe, temperature=2.0)
    description, hashes = code.bundles.read("bundle")
    networks = code.networks.Networks("bundle", description, hashes=hashes, device="cpu")
    photograph(3, (40, 50)).save("picture.png")
    crops, _ = code.pictures.prepare(b"picture.png", description["crops"])
    got = networks.logits([crops])
    assert got.shape == (1, 2, 7, 3)
    image = torch.from_numpy(crops[0]).permute(2, 0, 1)[None].float()
    with torch.inference_mode():
        expected = [[version(image).numpy() for version in member.versions] for member in members]
    assert np.abs(got[0] - np.concatenate([np.stack(views, 1) for views in expected])).max() <= 1e-4
    assert np.ptp(got[0, 0], axis=0).max() > 1e-3  # the views differ
    reduced = [reduce_views(views, how) for views in expected]
    np.testing.assert_allclose(networks.fuse(got), combine(reduced, weights, space) / 2.0, atol=1e-3)
