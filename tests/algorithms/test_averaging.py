"""Averages of weights against the written-out formulas."""

from __future__ import annotations

import copy

import pytest
import torch
from composer.core import Event
from torch import nn

from fastflower.algorithms.averaging import Ema, Swa, pull, ramped, recalibrate, shadow_of


class Net(nn.Module):
    """Floats, a BatchNorm and an index table, as Swin's relative positions are."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("table", torch.arange(1000))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear(x))


class Clock:
    """As much of Composer's State as the averages look at."""

    def __init__(self, epoch: int) -> None:
        self.timestamp = self
        self.epoch = self
        self.value = epoch


def moved(network: nn.Module) -> None:
    for parameter in network.parameters():
        parameter.data.add_(torch.randn_like(parameter))


def test_ramp_is_the_formula_until_the_decay():
    assert [ramped(0.9999, t, warmup=True) for t in (0, 1, 10, 1000)] == [
        1 / 10,
        2 / 11,
        11 / 20,
        1001 / 1010,
    ]
    assert ramped(0.9999, 10**6, warmup=True) == 0.9999
    assert ramped(0.9999, 0, warmup=False) == 0.9999


def test_ema_follows_the_formula_for_every_float_and_copies_the_rest():
    network = Net()
    ema = Ema(network, 0.9, warmup=True, skipped=lambda: False)
    expected = {name: tensor.double().clone() for name, tensor in network.state_dict().items()}
    for t in range(30):
        moved(network)
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


def test_the_shadow_is_apart_and_untrained():
    network = Net()
    shadow = shadow_of(network)
    assert not any(p.requires_grad for p in shadow.parameters())
    assert not shadow.training and network.training
    before = copy.deepcopy(shadow.state_dict())
    moved(network)
    assert all(torch.equal(before[name], tensor) for name, tensor in shadow.state_dict().items())


def test_ema_state_goes_through_a_state_dict():
    network = Net()
    one = Ema(network, 0.9, warmup=True, skipped=lambda: False)
    moved(network)
    one.apply(Event.BATCH_END, None, None)
    other = Ema(Net(), 0.9, warmup=True, skipped=lambda: False)
    other.load_state_dict(one.state_dict())
    assert other.updates == 1
    assert all(
        torch.equal(a, b)
        for a, b in zip(one.shadow.state_dict().values(), other.shadow.state_dict().values(), strict=True)
    )
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({"updates": 1, "shadow": {}})


def test_swa_is_the_plain_mean_of_the_last_epochs():
    network, shadows = Net(), {}
    swa = Swa(network, 3, shadows=shadows, batches=lambda state: [torch.randn(16, 3)])
    seen = []
    for epoch in range(1, 6):
        moved(network)
        if swa.match(Event.EPOCH_END, Clock(epoch)):
            seen.append(network.linear.weight.detach().clone())
            swa.apply(Event.EPOCH_END, Clock(epoch), None)
        assert ("swa" in shadows) == (epoch >= 3)
    assert len(seen) == 3
    torch.testing.assert_close(shadows["swa"].linear.weight, torch.stack(seen).mean(0))


def test_swa_does_not_average_the_same_epoch_twice():
    """A run that is resumed between its last step and its evaluation meets the end of the epoch again."""
    swa = Swa(Net(), 1, shadows={}, batches=lambda state: [torch.randn(16, 3)])
    swa.apply(Event.EPOCH_END, Clock(1), None)
    again = Swa(Net(), 1, shadows={}, batches=lambda state: [])
    again.load_state_dict(swa.state_dict())
    assert not again.match(Event.EPOCH_END, Clock(1))
    assert again.match(Event.EPOCH_END, Clock(2))
    assert "swa" in again.shadows


def test_swa_leaves_everything_as_it_was_when_the_run_is_asked_to_end():
    """Asked while the statistics are re-estimated: what is saved meets the end of the epoch again."""
    network, seen = Net(), []
    batches = [torch.randn(16, 3) for _ in range(5)]
    swa = Swa(
        network,
        1,
        shadows={},
        batches=lambda state: (seen.append(1) or batch for batch in batches),
        asked=lambda state: len(seen) > 2,
    )
    before = copy.deepcopy(swa.state_dict())
    moved(network)
    swa.apply(Event.EPOCH_END, Clock(1), None)
    assert len(seen) == 3 and "swa" not in swa.shadows
    assert (swa.averaged, swa.last_epoch) == (0, 0) and swa.match(Event.EPOCH_END, Clock(1))
    assert all(
        torch.equal(before["shadow"][name], tensor) for name, tensor in swa.shadow.state_dict().items()
    )
    whole = Swa(network, 1, shadows={}, batches=lambda state: batches)
    for average in (again := Swa(network, 1, shadows={}, batches=lambda state: batches), whole):
        average.shadow.load_state_dict(before["shadow"])
    again.load_state_dict(swa.state_dict())
    for average in (again, whole):
        average.apply(Event.EPOCH_END, Clock(1), None)
    assert all(torch.equal(again.shadow.state_dict()[n], t) for n, t in whole.shadow.state_dict().items())


def test_recalibrated_statistics_are_those_of_the_batches():
    network = Net().eval()
    batches = [torch.randn(32, 3) * 5 + 2 for _ in range(4)]
    recalibrate(network, batches)
    outputs = [network.linear(batch) for batch in batches]
    torch.testing.assert_close(network.norm.running_mean, torch.stack([o.mean(0) for o in outputs]).mean(0))
    torch.testing.assert_close(network.norm.running_var, torch.stack([o.var(0) for o in outputs]).mean(0))
    assert network.norm.momentum == 0.1 and not network.norm.training


def test_pull_by_one_copies():
    network, shadow = Net(), shadow_of(Net())
    pull(shadow, network, 1.0)
    ours, theirs = shadow.state_dict(), network.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
