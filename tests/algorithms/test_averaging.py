"""EMA and SWA of the weights against the formulas."""

from __future__ import annotations

import copy

import pytest
import torch
from composer.core import Event
from torch import nn

from fastflower.algorithms.averaging import (
    Ema,
    Swa,
    ema_decay,
    interpolate,
    reestimate_batch_norms,
    shadow_copy,
)


class Net(nn.Module):
    """A network with floats, a BatchNorm and an integer index table, like Swin's relative positions."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("table", torch.arange(1000))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear(x))


class Clock:
    """The attributes of Composer's State that the averages read."""

    def __init__(self, epoch: int) -> None:
        self.timestamp = self
        self.epoch = self
        self.value = epoch


def perturb(network: nn.Module) -> None:
    for parameter in network.parameters():
        parameter.data.add_(torch.randn_like(parameter))


def test_ramp_is_the_formula_until_the_decay():
    assert [ema_decay(0.9999, t, warmup=True) for t in (0, 1, 10, 1000)] == [
        1 / 10,
        2 / 11,
        11 / 20,
        1001 / 1010,
    ]
    assert ema_decay(0.9999, 10**6, warmup=True) == 0.9999
    assert ema_decay(0.9999, 0, warmup=False) == 0.9999


def test_ema_follows_the_formula_for_every_float_and_copies_the_rest():
    network = Net()
    ema = Ema(network, 0.9, warmup=True, skipped=lambda: False)
    expected = {name: tensor.double().clone() for name, tensor in network.state_dict().items()}
    for t in range(30):
        perturb(network)
        network(torch.randn(8, 3))
        ema.apply(Event.BATCH_END, None, None)
        decay = min(0.9, (1 + t) / (10 + t))
        for name, tensor in network.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * tensor.double()
    for name, tensor in ema.shadow.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(tensor, network.state_dict()[name])
    assert torch.equal(ema.shadow.table, torch.arange(1000))


def test_the_ramp_forgets_the_initial_weights():
    network = Net()
    ema = Ema(network, 0.9999, warmup=True, skipped=lambda: False)
    with torch.no_grad():
        network.linear.weight.fill_(1.0)
        ema.shadow.linear.weight.fill_(0.0)
    for _ in range(3000):
        ema.apply(Event.BATCH_END, None, None)
    assert ema.shadow.linear.weight.min() > 0.99


def test_a_skipped_step_is_not_averaged():
    network, skipped = Net(), [True]
    ema = Ema(network, 0.9, warmup=False, skipped=lambda: skipped[0])
    assert not ema.match(Event.BATCH_END, None)
    skipped[0] = False
    assert ema.match(Event.BATCH_END, None)
    assert not ema.match(Event.EPOCH_END, None)


def test_the_shadow_is_an_untrained_copy():
    network = Net()
    shadow = shadow_copy(network)
    assert not any(p.requires_grad for p in shadow.parameters())
    assert not shadow.training and network.training
    before = copy.deepcopy(shadow.state_dict())
    perturb(network)
    assert all(torch.equal(before[name], tensor) for name, tensor in shadow.state_dict().items())


def test_ema_state_survives_a_state_dict():
    network = Net()
    saved = Ema(network, 0.9, warmup=True, skipped=lambda: False)
    perturb(network)
    saved.apply(Event.BATCH_END, None, None)
    restored = Ema(Net(), 0.9, warmup=True, skipped=lambda: False)
    restored.load_state_dict(saved.state_dict())
    assert restored.updates == 1
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            saved.shadow.state_dict().values(), restored.shadow.state_dict().values(), strict=True
        )
    )
    with pytest.raises(RuntimeError, match="Missing key"):
        restored.load_state_dict({"updates": 1, "shadow": {}})


def test_swa_is_the_mean_of_the_last_epochs():
    network, shadows = Net(), {}
    swa = Swa(network, 3, shadows=shadows, batches=lambda state: [torch.randn(16, 3)])
    weights = []
    for epoch in range(1, 6):
        perturb(network)
        if swa.match(Event.EPOCH_END, Clock(epoch)):
            weights.append(network.linear.weight.detach().clone())
            swa.apply(Event.EPOCH_END, Clock(epoch), None)
        assert ("swa" in shadows) == (epoch >= 3)
    assert len(weights) == 3
    torch.testing.assert_close(shadows["swa"].linear.weight, torch.stack(weights).mean(0))


def test_swa_does_not_average_the_same_epoch_twice():
    """A run resumed between its last step and its evaluation meets the end of the epoch again."""
    swa = Swa(Net(), 1, shadows={}, batches=lambda state: [torch.randn(16, 3)])
    swa.apply(Event.EPOCH_END, Clock(1), None)
    resumed = Swa(Net(), 1, shadows={}, batches=lambda state: [])
    resumed.load_state_dict(swa.state_dict())
    assert not resumed.match(Event.EPOCH_END, Clock(1))
    assert resumed.match(Event.EPOCH_END, Clock(2))
    assert "swa" in resumed.shadows


def test_swa_changes_nothing_while_the_run_is_stopping():
    """Stopped while statistics are re-estimated: the resumed run meets the end of the epoch again."""
    network, seen = Net(), []
    batches = [torch.randn(16, 3) for _ in range(5)]
    swa = Swa(
        network,
        1,
        shadows={},
        batches=lambda state: (seen.append(1) or batch for batch in batches),
        stopping=lambda state: len(seen) > 2,
    )
    before = copy.deepcopy(swa.state_dict())
    perturb(network)
    swa.apply(Event.EPOCH_END, Clock(1), None)
    assert len(seen) == 3 and "swa" not in swa.shadows
    assert (swa.averaged, swa.last_epoch) == (0, 0) and swa.match(Event.EPOCH_END, Clock(1))
    assert all(
        torch.equal(before["shadow"][name], tensor) for name, tensor in swa.shadow.state_dict().items()
    )
    uninterrupted = Swa(network, 1, shadows={}, batches=lambda state: batches)
    resumed = Swa(network, 1, shadows={}, batches=lambda state: batches)
    for average in (resumed, uninterrupted):
        average.shadow.load_state_dict(before["shadow"])
    resumed.load_state_dict(swa.state_dict())
    for average in (resumed, uninterrupted):
        average.apply(Event.EPOCH_END, Clock(1), None)
    want = uninterrupted.shadow.state_dict()
    assert all(torch.equal(resumed.shadow.state_dict()[n], t) for n, t in want.items())


def test_reestimated_statistics_are_those_of_the_batches():
    network = Net().eval()
    batches = [torch.randn(32, 3) * 5 + 2 for _ in range(4)]
    reestimate_batch_norms(network, batches)
    outputs = [network.linear(batch) for batch in batches]
    torch.testing.assert_close(network.norm.running_mean, torch.stack([o.mean(0) for o in outputs]).mean(0))
    torch.testing.assert_close(network.norm.running_var, torch.stack([o.var(0) for o in outputs]).mean(0))
    assert network.norm.momentum == 0.1 and not network.norm.training


def test_interpolation_with_weight_one_copies():
    network, shadow = Net(), shadow_copy(Net())
    interpolate(shadow, network, 1.0)
    got, want = shadow.state_dict(), network.state_dict()
    assert all(torch.equal(got[name], want[name]) for name in want)
