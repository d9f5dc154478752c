"""Clipping against its formula; non-finite steps are skipped, counted, and stop the run after the limit."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from composer.core import Event, Precision
from torch import nn

from fastflower.algorithms import gradients
from fastflower.algorithms.gradients import GradientGuard, clip, without_gradient
from fastflower.core.errors import Diverged, InputError


def state_of(
    network: nn.Module, precision: Precision = Precision.FP32, scale: float = 1.0
) -> SimpleNamespace:
    scaler = SimpleNamespace(is_enabled=lambda: precision == Precision.AMP_FP16, get_scale=lambda: scale)
    timestamp = SimpleNamespace(batch=SimpleNamespace(value=7), epoch=SimpleNamespace(value=1))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    return SimpleNamespace(scaler=scaler, precision=precision, timestamp=timestamp, optimizers=[optimizer])


def with_gradients(value: float = 2.0) -> nn.Module:
    network = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    for parameter in network.parameters():
        parameter.grad = torch.full_like(parameter, value)
    return network


def test_clip_scales_the_global_norm_and_returns_the_norm_before():
    network = with_gradients(2.0)
    expected = math.sqrt(sum(4.0 * p.numel() for p in network.parameters()))
    assert clip(network.parameters(), 1.0) == pytest.approx(expected)
    after = math.sqrt(sum(float((p.grad**2).sum()) for p in network.parameters()))
    assert after == pytest.approx(1.0, rel=1e-4)


def test_small_gradients_and_no_limit_change_nothing():
    for limit in (1e6, None):
        network = with_gradients(2.0)
        clip(network.parameters(), limit)
        assert all(bool((p.grad == 2.0).all()) for p in network.parameters())


def test_a_step_that_is_not_finite_changes_nothing():
    network = with_gradients()
    guard, state = GradientGuard(network, 1.0, limit=3), state_of(network)
    guard.apply(Event.BATCH_START, state, None)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network(torch.full((4, 3), math.nan))  # poisons the running statistics
    network[0].weight.grad[0, 0] = math.inf
    guard.apply(Event.AFTER_TRAIN_BATCH, state, None)
    state.optimizers[0].step()
    assert guard.skipped and guard.total == 1
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            assert torch.equal(tensor, before[name]), name


def test_frozen_parts_do_not_count_in_the_norm_and_gather_no_moments():
    network = with_gradients(2.0)
    groups = [
        {"params": list(network[0].parameters()), "lr": 0.0},
        {"params": list(network[1].parameters()), "lr": 0.1},
    ]
    state = state_of(network)
    state.optimizers = [torch.optim.AdamW(groups)]
    guard = GradientGuard(network, 1.0, limit=3)
    network[0].weight.grad[0, 0] = 1e6
    guard.apply(Event.AFTER_BACKWARD, state, None)
    guard.apply(Event.AFTER_TRAIN_BATCH, state, None)
    assert guard.norm == pytest.approx(math.sqrt(4.0 * sum(p.numel() for p in network[1].parameters())))
    state.optimizers[0].step()
    assert set(state.optimizers[0].state) == set(network[1].parameters())


@pytest.mark.parametrize("microbatches", [1, 3])
@pytest.mark.parametrize("frozen, skipped", [(True, False), (False, True)])
def test_the_scaler_sees_no_overflow_of_a_frozen_part(microbatches: int, frozen: bool, skipped: bool):
    """torch's own scaler and the guard agree on whether a step is skipped."""
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    lr = 0.0 if frozen else 0.1
    groups = [
        {"params": list(network[0].parameters()), "lr": lr},
        {"params": list(network[1].parameters()), "lr": 0.1},
    ]
    optimizer, scaler = torch.optim.AdamW(groups), torch.amp.GradScaler("cpu", init_scale=2.0)
    state = state_of(network, Precision.AMP_FP16, scale=2.0)
    state.optimizers = [optimizer]
    guard = GradientGuard(network, 1.0, limit=3)
    before = network[1].weight.clone()
    scaler.scale(torch.zeros(1))  # as the loss; creates the scale
    for _ in range(microbatches):
        network(torch.ones(2, 3)).sum().backward()
        network[0].weight.grad[0, 0] = math.inf
        guard.apply(Event.AFTER_BACKWARD, state, None)
    scaler.unscale_(optimizer)
    guard.apply(Event.AFTER_TRAIN_BATCH, state, None)
    scaler.step(optimizer)
    assert guard.skipped == skipped == torch.equal(network[1].weight, before)


def test_parameters_without_a_gradient_are_named_after_the_first_step_and_refused_on_two_ranks(monkeypatch):
    network, warnings = with_gradients(), []
    network[1].bias.grad = None
    network.register_parameter("fixed", nn.Parameter(torch.zeros(2), requires_grad=False))
    assert without_gradient(network) == ["1.bias"]
    guard = GradientGuard(network, 1.0, limit=3, warn=warnings.append)
    for _ in range(2):
        guard.apply(Event.AFTER_BACKWARD, state_of(network), None)
    (line,) = warnings
    assert line.startswith(
        "WARNING 1 parameters get no gradient, first 1.bias: the loss does not depend on them"
    )
    monkeypatch.setattr(gradients.dist, "get_world_size", lambda: 2)
    with pytest.raises(
        InputError, match=r"1 parameters get no gradient, first 1.bias, and ranks cannot average"
    ):
        GradientGuard(network, 1.0, limit=3).apply(Event.AFTER_BACKWARD, state_of(network), None)
    monkeypatch.setattr(gradients.dist, "get_global_rank", lambda: 1)
    with pytest.raises(SystemExit) as caught:
        GradientGuard(network, 1.0, limit=3).apply(Event.AFTER_BACKWARD, state_of(network), None)
    assert caught.value.code == InputError.exit_code


def test_a_finite_step_resets_the_count_of_steps_in_a_row():
    network = with_gradients()
    guard, state = GradientGuard(network, 1.0, limit=2), state_of(network)
    network[0].weight.grad[0, 0] = math.nan
    guard.apply(Event.AFTER_TRAIN_BATCH, state, None)
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    guard.apply(Event.AFTER_TRAIN_BATCH, state, None)
    assert (guard.skipped, guard.in_a_row, guard.total) == (False, 0, 1)


def test_the_run_stops_after_the_limit_and_proposes_a_lower_lr():
    network = with_gradients()
    guard, state = GradientGuard(network, 1.0, limit=2), state_of(network)
    network[0].weight.grad[0, 0] = math.nan
    guard.apply(Event.AFTER_TRAIN_BATCH, state, None)
    network[0].weight.grad = torch.full((3, 3), math.nan)
    with pytest.raises(
        Diverged, match=r"2 steps in a row, up to step 8 \(epoch 2, lr 0.001\); lower opt.lr_ref"
    ) as stopped:
        guard.apply(Event.AFTER_TRAIN_BATCH, state, None)
    remedies = ("opt.large_batch_factor", "aug.strength", "opt.weight_decay", "sched.warmup_epochs")
    assert all(key in str(stopped.value) for key in remedies) and Diverged.exit_code == 1


def test_the_fp16_scaler_may_overflow_while_it_finds_its_scale():
    network = with_gradients()
    guard = GradientGuard(network, 1.0, limit=1)
    network[0].weight.grad[0, 0] = math.inf
    guard.apply(Event.AFTER_TRAIN_BATCH, state_of(network, Precision.AMP_FP16, scale=1024.0), None)
    assert guard.skipped and guard.total == 0
    network[0].weight.grad = torch.full((3, 3), math.inf)
    with pytest.raises(Diverged):
        guard.apply(Event.AFTER_TRAIN_BATCH, state_of(network, Precision.AMP_FP16, scale=1.0), None)


def test_counters_survive_a_state_dict():
    guard = GradientGuard(with_gradients(), None, limit=5)
    guard.load_state_dict({"total": 4, "in_a_row": 2})
    assert guard.state_dict() == {"total": 4, "in_a_row": 2}
