"""Optimizers by name: a decoupled weight decay, a resume to the bit, and a refusal of those that exchange weights."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from torch import nn

from fastflower.core import checkpoint
from fastflower.core.errors import InputError
from fastflower.optim.optimizers import build_optimizer
from fastflower.recipe import Recipe, load, schema

CPU = torch.device("cpu")
NAMES = get_args(get_args(get_type_hints(schema.Opt)["name"])[0])
COUPLED = ("adam", "sgd")  # as the key says


def recipe_of(name: str) -> Recipe:
    return load(None, [f"opt.name={name}", "opt.lr=0.01"])


def network_and_groups() -> tuple[nn.Module, list[dict]]:
    torch.manual_seed(1)
    network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(54, 4))
    parts = [[p for p in network.parameters() if (p.ndim > 1) == wide] for wide in (True, False)]
    groups = [
        {"params": part, "lr": 0.01 / (k + 1), "weight_decay": 0.1 * (1 - k), "name": str(k), "part": "head"}
        for k, part in enumerate(parts)
    ]
    return network, groups


@pytest.mark.parametrize("name", [name for name in NAMES if name not in COUPLED])
def test_weight_decay_is_decoupled(name: str) -> None:
    """Without a gradient a step multiplies the weights by 1 - lr * weight_decay, in each group by its own."""
    network, groups = network_and_groups()
    optimizer = build_optimizer(groups, recipe_of(name), CPU)
    for step in range(3):
        before = [p.detach().clone() for p in network.parameters()]
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        for old, new in zip(before, network.parameters(), strict=True):
            factor = (
                1 - 0.01 * 0.1 if new.ndim > 1 and (step or name != "adopt") else 1.0
            )  # its first step starts it
            torch.testing.assert_close(new.detach(), old * factor, rtol=2e-6, atol=0)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_the_fused_step_is_that_of_the_plain_loop(name: str) -> None:
    """Within rounding, for kernels of any memory format and without a gradient; it goes on from a state of the loop."""
    ends = []
    for kind in ("fused", "loop", "resumed"):
        network, groups = network_and_groups()
        network[0].to(memory_format=torch.channels_last)
        optimizer = build_optimizer(groups, recipe_of(name), CPU)
        assert all(group["fused"] for group in optimizer.param_groups)
        generator = torch.Generator().manual_seed(3)
        for step in range(8):
            fused = kind == "fused" or (kind == "resumed" and step >= 4)
            for group in optimizer.param_groups:
                group.update(fused=fused, foreach=not fused)
            for number, parameter in enumerate(network.parameters()):
                gradient = torch.randn(parameter.shape, generator=generator)
                parameter.grad = torch.empty_like(parameter).copy_(gradient) if number != step else None
            optimizer.step()
        ends.append([parameter.detach().clone() for parameter in network.parameters()])
    for fused, loop, resumed in zip(*ends, strict=True):
        torch.testing.assert_close(fused, loop, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(resumed, loop, rtol=1e-5, atol=1e-6)


def test_weights_with_gaps_in_memory_take_no_fused_step() -> None:
    """torch's fused kernel of CPUs reads memory without looking at strides, and would train other numbers."""
    weight = nn.Parameter(torch.ones(4, 8)[:, ::2])
    group = {"params": [weight], "lr": 0.1, "weight_decay": 0.0, "name": "0", "part": "head"}
    optimizer = build_optimizer([group], recipe_of("adamw"), CPU)
    weight.grad = torch.arange(16.0).view(4, 4) - 7.5
    optimizer.step()
    torch.testing.assert_close(weight.detach(), 1 - 0.1 * weight.grad.sign())


@pytest.mark.parametrize("name", NAMES)
def test_a_resume_from_a_file_goes_on_in_the_same_bits(name: str, tmp_path: Path) -> None:
    ends = []
    for resumed in (False, True):
        network, groups = network_and_groups()
        optimizer = build_optimizer(groups, recipe_of(name), CPU)
        generator = torch.Generator().manual_seed(2)
        for step in range(6):
            if resumed and step == 3:
                tensors, state = checkpoint.snapshot(
                    (network.state_dict(), {"optimizer": optimizer.state_dict()})
                )
                checkpoint.save(tmp_path / "last.pth", tensors, {}, **state)
                last = checkpoint.load(tmp_path / "last.pth")
                network, groups = network_and_groups()
                network.load_state_dict(last.tensors)
                optimizer = build_optimizer(groups, recipe_of(name), CPU)
                optimizer.load_state_dict(last.training_state["optimizer"])
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * (6 - step)
            images, labels = torch.rand(8, 3, 5, 5, generator=generator), torch.arange(8) % 4
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images), labels).backward()
            optimizer.step()
        ends.append({name: tensor.clone() for name, tensor in network.state_dict().items()})
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


def test_an_optimizer_that_exchanges_weights_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("my_free.py").write_text(
        "import torch\nclass Free(torch.optim.SGD):\n    def train(self): pass\n    def eval(self): pass\n"
        "def free(groups): return Free(groups, lr=0.1)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(
        InputError, match=r"opt.name = my_free:free: has train\(\) and eval\(\), as schedule-free"
    ):
        build_optimizer(network_and_groups()[1], recipe_of("my_free:free"), CPU)
    sys.modules.pop("my_free", None)
