"""Own networks: a worked example through training, description and program, and refusals in one line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastflower.bundle import program
from fastflower.core import runs
from fastflower.core.errors import InputError
from fastflower.model import own_network
from fastflower.model.network import build_network, fitted, training_network
from fastflower.optim.groups import param_groups
from fastflower.recipe import Recipe, load

EXAMPLE = """
from torch import nn


class Tiny(nn.Module):
    mean = (0.4, 0.5, 0.6)
    interpolation = "bicubic"

    def __init__(self, width=8):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.body = nn.Sequential(*(nn.Conv2d(width, width, 3, 2, 1) for _ in range(3)))

    def forward(self, images):
        return self.body(self.stem(images)).mean((2, 3))


def build():
    return Tiny()


def words(): return "no network"
def raises(): return 1 / 0
def needs(depth): return Tiny(depth)
def maps(): return nn.Conv2d(3, 4, 3)
NUMBER = 3
"""


@pytest.fixture(autouse=True)
def _module(tmp_path: Path) -> Iterator[None]:
    Path("my_network.py").write_text(EXAMPLE)
    Path("my_broken.py").write_text("import no_such_library\n")
    yield
    for name in ("my_network", "my_broken"):
        sys.modules.pop(name, None)
    sys.path[:] = [entry for entry in sys.path if entry != str(tmp_path)]


def recipe(function: str, *words: str) -> Recipe:
    sizes = ["data.img_size=[32,48]", "tta.scales=[48]", "model.pretrained=false"]
    return load(None, [f"model.backbone={function}", *sizes, *words])


def test_an_own_network_trains_and_is_handed_in() -> None:
    settings, lines = fitted(recipe("my_network:build", "llrd.enabled=true"))
    network, spec, _ = training_network(settings, 4)
    assert lines == [] and (spec.mean, spec.std) == ((0.4, 0.5, 0.6), (0.5, 0.5, 0.5))
    assert (spec.backbone, spec.interpolation) == ("my_network:build", "bicubic")
    parts = [group["part"] for group in param_groups(network, 1e-3, settings)]
    assert list(dict.fromkeys(parts)) == ["front", "middle", "back", "head"]
    network(torch.rand(2, 3, 32, 32)).sum().backward()
    program.try_export(spec, network, [(48, 48)])
    rebuilt = build_network(spec).eval()
    rebuilt.load_state_dict(network.state_dict())
    traced = program.trace(Path("a.pth"), rebuilt, height=48, width=48, tensors=dict(rebuilt.state_dict()))
    assert traced.norms and traced.half_keeps == []
    run = runs.Run(exp="own", backbone=spec.backbone, fold=0, seed=1)
    name = runs.parse_member(run.checkpoint_path("best_combo", 3, 0.5))
    assert name is not None and name.backbone == "my_network:build"


@pytest.mark.parametrize(
    ("function", "fault"),
    [
        ("my_network:words", "returned str, must return an nn.Module"),
        ("my_network:raises", "raised ZeroDivisionError: division by zero"),
        ("my_network:needs", r"takes \(depth\), and is called without arguments"),
        ("my_network:NUMBER", "my_network has no function NUMBER"),
        ("my_network:absent", "my_network has no function absent"),
        ("my_absent:build", "no module my_absent in .* set PYTHONPATH"),
        ("my_broken:build", "importing my_broken raised ModuleNotFoundError: No module named"),
        ("my_network:maps", r"gives \(2, 4, 46, 46\) for two images; a backbone gives one vector"),
    ],
)
def test_faults_are_told_in_one_line(function: str, fault: str) -> None:
    with pytest.raises(InputError, match=fault) as refused:
        fitted(recipe(function))
    assert "\n" not in str(refused.value)


def test_keys_that_an_own_network_cannot_follow_are_refused() -> None:
    for words, fault in (
        (["model.drop_path=0.1"], "model.drop_path = 0.1: my_network:build is an own network"),
        (["model.grad_checkpointing=true"], "my_network:build cannot recompute activations"),
    ):
        with pytest.raises(InputError, match=fault):
            training_network(recipe("my_network:build", *words), 3)
    settings = load(None, ["model.backbone=my_network:build", "data.img_size=32", "tta.scales=[32]"])
    with pytest.raises(
        InputError, match=r"model.pretrained = true: my_network:build is an own network without"
    ):
        training_network(settings, 3)


def test_preprocessing_must_be_three_numbers() -> None:
    network = torch.nn.Identity()
    network.mean = (120, 130, 140)
    with pytest.raises(
        InputError, match=r"attribute mean is \(120, 130, 140\), must be three numbers in 0..1"
    ):
        own_network.preprocessing(network)
