"""Schedules against published numbers and torch's plateau; optimizers against one step by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from fastflower.core.errors import InputError
from fastflower.optim.optimizers import build_optimizer
from fastflower.optim.schedules import Plateau, frozen_parts, lr_factor
from fastflower.recipe import load, schema


def curve(*overrides: str) -> schema.Recipe:
    return load(None, list(overrides))


def cosine_with_warmup(i: int, horizon: int, *, warmup: int, base: float, eta_min: float = 0.0) -> float:
    """The formula of a per-step CosineAnnealingWithWarmupLR."""
    if i < warmup:
        return base * (i + 1) / warmup
    return eta_min + (base - eta_min) * (1 + math.cos(math.pi * (i - warmup) / (horizon - warmup))) / 2


@pytest.mark.parametrize(
    ("horizon", "epoch", "lr"),
    [
        (40, 0, 2e-5),
        (40, 1, 4e-5),
        (40, 4, 1e-4),
        (40, 5, 1e-4),
        (40, 14, 8.4553e-5),
        (40, 15, 8.1174e-5),
        (40, 22, 5.2243e-5),
        (40, 39, 2.0129e-7),
        (40, 40, 0.0),
        (40, 45, 0.0),
        (48, 15, 8.7239e-5),
        (48, 39, 1.0425e-5),
        (48, 40, 8.3001e-6),
        (48, 47, 1.3339e-7),
    ],
)
def test_one_step_per_epoch_gives_the_published_numbers(horizon: int, epoch: int, lr: float) -> None:
    recipe = curve(f"sched.cosine_epochs={horizon}")
    assert 1e-4 * lr_factor(epoch, 0, steps_per_epoch=1, recipe=recipe) == pytest.approx(
        lr, rel=1e-4, abs=1e-12
    )


def test_every_step_follows_the_formula_counted_in_steps() -> None:
    recipe, steps = curve("sched.cosine_epochs=8", "sched.warmup_epochs=2"), 7
    got = [lr_factor(t // steps, t % steps, steps_per_epoch=steps, recipe=recipe) for t in range(8 * steps)]
    assert got == pytest.approx(
        [cosine_with_warmup(t, 8 * steps, warmup=2 * steps, base=1.0) for t in range(8 * steps)], rel=1e-12
    )
    assert got[0] == 1 / 14 and got[13] == 1.0 and 0 < got[-1] < 2e-3


def test_the_digits_recipe_warms_up_for_one_epoch_of_steps(repo: Path) -> None:
    """T_max in steps, warm-up T_max // epochs, eta_min proportional to the lr."""
    recipe = load(repo / "recipes/digits.yaml", ["sched.eta_min=0.01", "sched.cosine_epochs=10"])
    steps, base = 525, float(recipe.opt.lr)
    horizon = 10 * steps
    got = [
        base * lr_factor(t // steps, t % steps, steps_per_epoch=steps, recipe=recipe) for t in range(horizon)
    ]
    expected = [
        cosine_with_warmup(t, horizon, warmup=horizon // 10, base=base, eta_min=0.01 * base)
        for t in range(horizon)
    ]
    assert got == pytest.approx(expected, rel=1e-12)


def test_the_lr_ends_at_eta_min_and_stays_there() -> None:
    recipe = curve("sched.eta_min=0.01")
    assert lr_factor(40, 0, steps_per_epoch=100, recipe=recipe) == pytest.approx(0.01)
    assert lr_factor(45, 50, steps_per_epoch=100, recipe=recipe) == pytest.approx(0.01)
    assert lr_factor(5, 0, steps_per_epoch=100, recipe=recipe) == 1.0


def test_cosine_stays_continuous_when_a_stage_has_more_steps() -> None:
    recipe = curve()
    before, after = (
        lr_factor(14, 99, steps_per_epoch=100, recipe=recipe),
        lr_factor(15, 0, steps_per_epoch=200, recipe=recipe),
    )
    usual = lr_factor(14, 98, steps_per_epoch=100, recipe=recipe) - before
    assert before - after == pytest.approx(usual, rel=0.01)
    assert (
        lr_factor(20, 0, steps_per_epoch=200, recipe=recipe, batch_factor=0.5)
        == lr_factor(20, 0, steps_per_epoch=100, recipe=recipe) / 2
    )


def test_without_warmup_the_first_step_has_the_full_lr() -> None:
    assert lr_factor(0, 0, steps_per_epoch=10, recipe=curve("sched.warmup_epochs=0")) == 1.0


def test_plateau_warms_up_then_follows_its_factor_and_none_is_constant() -> None:
    recipe = curve("sched.name=plateau")
    got = [1e-4 * lr_factor(e, 0, steps_per_epoch=1, recipe=recipe, plateau_factor=0.5) for e in range(7)]
    assert got == pytest.approx([2e-5, 4e-5, 6e-5, 8e-5, 1e-4, 5e-5, 5e-5])
    none = curve("sched.name=none")
    assert {lr_factor(e, s, steps_per_epoch=9, recipe=none) for e in (0, 3, 50) for s in (0, 8)} == {1.0}


def test_a_warmup_by_epochs_rises_once_an_epoch() -> None:
    recipe = curve("sched.name=plateau", "sched.warmup_epochs=5", "sched.warmup_unit=epoch")
    got = [lr_factor(e, s, steps_per_epoch=3, recipe=recipe) for e in range(7) for s in range(3)]
    assert got == pytest.approx([f for f in (0.2, 0.4, 0.6, 0.8, 1, 1, 1) for _ in range(3)])


def test_cyclic_equals_torchs() -> None:
    recipe = curve("sched.name=cyclic", "sched.eta_min=0.01", "sched.cycle_steps=20")
    reference = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    torchs = torch.optim.lr_scheduler.CyclicLR(reference, base_lr=1e-5, max_lr=1e-3, step_size_up=20)
    for step in range(90):
        lr = 1e-3 * lr_factor(step // 7, step % 7, steps_per_epoch=7, recipe=recipe)
        assert lr == pytest.approx(reference.param_groups[0]["lr"], rel=1e-9)
        reference.step()
        torchs.step()


@pytest.mark.parametrize("monitor", ["score", "val_loss"])
@pytest.mark.parametrize("patience", [0, 1, 2, 3])
def test_plateau_equals_torchs(patience: int, monitor: str) -> None:
    generator = torch.Generator().manual_seed(patience)
    walk = (0.5 + 0.01 * torch.randn(60, generator=generator).cumsum(0)).tolist()
    scores = [0.0, 0.0, 0.5, 0.4, 0.41, 0.42, 0.38, float("nan"), *walk, *([0.7] * 6), 0.70001, 0.701]
    parameter = torch.nn.Parameter(torch.zeros(1))
    reference = torch.optim.SGD([parameter], lr=1.0)
    torchs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        reference, {"score": "max", "val_loss": "min"}[monitor], factor=0.9, patience=patience
    )
    plateau = Plateau(0.9, patience, monitor)
    for position, score in enumerate(scores):
        torchs.step(score)
        plateau.step(score)
        assert plateau.factor == pytest.approx(reference.param_groups[0]["lr"], rel=1e-12), position
    assert plateau.factor < 1


def test_lowering_the_lr_in_the_second_bad_epoch_is_a_patience_of_one() -> None:
    losses, published = [0.5, 0.4, 0.41, 0.42, 0.38], [1e-4, 1e-4, 1e-4, 1e-4, 5e-5]  # the lr of each epoch
    for patience, falls in ((1, True), (2, False)):  # with patience 2 torch never lowers it here
        plateau, lrs = Plateau(0.5, patience, "val_loss"), []
        for loss in losses:
            lrs.append(1e-4 * plateau.factor)
            plateau.step(loss)
        assert (lrs == published) == falls and min(lrs) == (5e-5 if falls else 1e-4)


def test_plateau_state_continues_and_a_restart_keeps_the_factor() -> None:
    first, second = Plateau(0.5, 1), Plateau(0.5, 1)
    for score in (0.5, 0.4):
        first.step(score)
    second.load_state_dict(first.state_dict())
    first.step(0.4)
    second.step(0.4)
    assert first.factor == second.factor == 0.5
    second.restart()
    second.step(0.1)
    second.step(0.1)
    assert second.factor == 0.5 and second.state_dict()["best"] == 0.1


def test_parts_unfreeze_by_epoch() -> None:
    recipe = curve("llrd.unfreeze_schedule={1: [head], 3: [back], 6: [middle, front]}")
    assert frozen_parts(0, recipe) == frozen_parts(1, recipe) == {"front", "middle", "back"}
    assert frozen_parts(2, recipe) == frozen_parts(4, recipe) == {"front", "middle"}
    assert frozen_parts(5, recipe) == set()
    assert frozen_parts(0, curve()) == set()
    assert frozen_parts(39, curve("llrd.unfreeze_schedule={1: [head]}")) == {"front", "middle", "back"}


def test_impossible_unfreezing_is_refused() -> None:
    with pytest.raises(InputError, match="no part neck; the parts are front, middle, back, head"):
        frozen_parts(0, curve("llrd.unfreeze_schedule={1: [head], 3: [neck]}"))
    with pytest.raises(InputError, match="nothing trains in epoch 1"):
        frozen_parts(0, curve("llrd.unfreeze_schedule={2: [head]}"))


def group(lr: float, decay: float) -> dict[str, object]:
    return {"params": [torch.nn.Parameter(torch.ones(3))], "lr": lr, "initial_lr": lr, "weight_decay": decay}


def test_adamw_decays_by_lr_times_decay() -> None:
    groups = [group(0.1, 0.05), group(0.2, 0.05), group(0.0, 0.05)]
    optimizer = build_optimizer(groups, curve(), torch.device("cpu"))
    assert isinstance(optimizer, torch.optim.AdamW)
    for g in groups:
        g["params"][0].grad = torch.zeros(3)  # type: ignore[index]
    optimizer.step()
    got = [g["params"][0][0].item() for g in optimizer.param_groups]
    assert got == pytest.approx([1 - 0.1 * 0.05, 1 - 0.2 * 0.05, 1.0], abs=1e-7)


def test_adam_adds_the_decay_to_the_gradient() -> None:
    optimizer = build_optimizer([group(0.1, 0.05)], curve("opt.name=adam"), torch.device("cpu"))
    (weight,) = optimizer.param_groups[0]["params"]
    weight.grad = torch.zeros(3)
    optimizer.step()
    assert type(optimizer) is torch.optim.Adam
    assert weight[0].item() == pytest.approx(1 - 0.1, abs=1e-5)  # a step of lr along the decay's sign


def test_sgd_takes_the_recipes_momentum() -> None:
    recipe = curve("opt.name=sgd", "opt.momentum=0.8")
    optimizer = build_optimizer([group(0.1, 0.0)], recipe, torch.device("cpu"))
    assert (
        isinstance(optimizer, torch.optim.SGD)
        and optimizer.defaults["momentum"] == 0.8
        and optimizer.defaults["nesterov"]
    )
    plain = build_optimizer([group(0.1, 0.0)], curve("opt.name=sgd", "opt.momentum=0"), torch.device("cpu"))
    assert not plain.defaults["nesterov"]


def test_a_part_with_lr_zero_does_not_move_while_its_moments_fill() -> None:
    frozen = group(0.0, 0.05)
    optimizer = build_optimizer([frozen], curve(), torch.device("cpu"))
    frozen["params"][0].grad = torch.ones(3)  # type: ignore[index]
    optimizer.step()
    assert torch.equal(frozen["params"][0].detach(), torch.ones(3))  # type: ignore[index]
