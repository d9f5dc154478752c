"""The lr of every step of a schedule, as the algorithm writes it to the optimizer."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from composer.core import Event
from torch import nn

from fastflower.algorithms.learning_rate import LearningRate, stage_factor
from fastflower.optim.schedules import plateau_monitor
from fastflower.recipe import Recipe, derived, load

STEPS = 5


class Net(nn.Module):
    """A backbone and a head under the attribute names of Network."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.head = nn.Linear(2, 2)


def state_at(epoch: int, step: int, network: Net) -> SimpleNamespace:
    timestamp = SimpleNamespace(
        epoch=SimpleNamespace(value=epoch), batch_in_epoch=SimpleNamespace(value=step)
    )
    groups = [
        {"params": list(network.backbone.parameters()), "lr": 0.0, "initial_lr": 0.1, "part": "backbone"},
        {"params": list(network.head.parameters()), "lr": 0.0, "initial_lr": 0.3, "part": "head"},
    ]
    return SimpleNamespace(timestamp=timestamp, optimizers=[torch.optim.SGD(groups)])


def scheduled(*overrides: str, score: float = 0.5) -> tuple[LearningRate, Net, Recipe]:
    recipe = load(None, ["sched.cosine_epochs=10", "sched.warmup_epochs=2", "llrd.enabled=false", *overrides])
    network = Net()
    return (
        LearningRate(
            recipe,
            derived.derive(recipe, 2),
            network=network,
            steps=lambda epoch: STEPS,
            monitored=lambda: score,
        ),
        network,
        recipe,
    )


def lrs(schedule: LearningRate, network: Net, *, epoch: int, step: int) -> list[float]:
    state = state_at(epoch, step, network)
    schedule.apply(Event.BATCH_START, state, None)
    return [group["lr"] for group in state.optimizers[0].param_groups]


def test_first_and_last_steps_are_exact():
    schedule, network, _ = scheduled()
    warmup = 2 * STEPS
    for t in range(warmup):
        assert lrs(schedule, network, epoch=t // STEPS, step=t % STEPS) == pytest.approx(
            [0.1 * (t + 1) / warmup, 0.3 * (t + 1) / warmup]
        )
    for t in range(warmup, 10 * STEPS):
        factor = (1 + math.cos(math.pi * (t - warmup) / (8 * STEPS))) / 2
        assert lrs(schedule, network, epoch=t // STEPS, step=t % STEPS) == pytest.approx(
            [0.1 * factor, 0.3 * factor]
        )


def test_frozen_parts_have_lr_0_and_keep_their_statistics():
    schedule, network, _ = scheduled(
        "llrd.enabled=true", "llrd.multipliers=[1,1]", "llrd.unfreeze_schedule={1: [head], 3: [backbone]}"
    )
    network.train()
    frozen = lrs(schedule, network, epoch=1, step=4)
    assert frozen[0] == 0 and frozen[1] > 0
    assert not network.backbone[1].training and network.training
    network.train()
    thawed = lrs(schedule, network, epoch=2, step=0)
    assert min(thawed) > 0 and network.backbone[1].training
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_plateau_lowers_every_lr_after_its_patience_and_survives_a_state_dict():
    schedule, network, _ = scheduled(
        "sched.name=plateau", "sched.warmup_epochs=0", "sched.patience=1", score=0.5
    )
    assert lrs(schedule, network, epoch=0, step=0) == pytest.approx([0.1, 0.3])
    for epoch in range(1, 4):
        schedule.apply(Event.EPOCH_CHECKPOINT, state_at(epoch, 0, network), None)
    assert lrs(schedule, network, epoch=3, step=0) == pytest.approx([0.05, 0.15])
    restored, second_network, _ = scheduled("sched.name=plateau", "sched.warmup_epochs=0", "sched.patience=1")
    restored.load_state_dict(schedule.state_dict())
    assert lrs(restored, second_network, epoch=3, step=0) == pytest.approx([0.05, 0.15])


def test_without_held_out_images_the_plateau_follows_the_training_loss():
    plateau = ("sched.name=plateau", "sched.patience=0", "data.split=none")
    assert plateau_monitor(load(None, ["sched.monitor=score", *plateau])) == "train_loss"
    losses = iter([1.0, 0.8, 0.6, 0.7])
    schedule, network, _ = scheduled("sched.warmup_epochs=0", *plateau)
    schedule.monitored = lambda: next(losses)
    for epoch, factor in enumerate((1.0, 1.0, 1.0, 0.5), start=1):
        schedule.apply(Event.EPOCH_CHECKPOINT, state_at(epoch, 0, network), None)
        assert lrs(schedule, network, epoch=epoch, step=0) == pytest.approx([0.1 * factor, 0.3 * factor])


@pytest.mark.parametrize(
    "overrides, expected",
    [
        (["train.stage_batch=[64,32]"], 0.5),
        (
            ["train.stage_batch=[64,2]", "opt.lr_min_bound=2e-5"],
            0.2,
        ),  # 2e-4 x 4/256 is raised to the bound: 2e-5 of 1e-4
        (["train.stage_batch=[64,32]", "opt.lr=1e-3"], 1.0),  # explicit: no scaling
        ([], 1.0),
    ],
)
def test_a_stage_with_its_own_batch_follows_the_rule(overrides, expected):
    recipe = load(None, ["data.img_size=[32,64]", *overrides])
    numbers = derived.derive(recipe, 2)
    assert stage_factor(recipe, numbers, 0) == 1.0
    assert stage_factor(recipe, numbers, recipe.sched.cosine_epochs - 1) == pytest.approx(expected)
