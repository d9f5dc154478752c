"""SAM: a step's gradient is that of the paper's formula in double precision, with all that training puts around it."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastflower.core.errors import InputError
from fastflower.model.losses import Loss
from fastflower.optim.sharpness import Sharpness
from fastflower.recipe import checks, load
from fastflower.training.trainer import FoldTrainer
from support import forked, toy_project

RHO = 0.3
SAM = f"opt.sam_rho={RHO}"


def reference(
    network: nn.Module, criterion: nn.Module, parts: list[dict[str, Tensor]]
) -> tuple[nn.Module, ...]:
    """Copies in double precision with the gradients at w and at w + rho * g / ||g||, of a batch in parts."""
    here = copy.deepcopy(network).double()
    here.zero_grad()
    there = copy.deepcopy(here)
    rows = sum(len(part["label"]) for part in parts)
    for number, module in enumerate((here, there)):
        if number:
            gradients = [p.grad for p in here.parameters() if p.grad is not None]
            norm = math.sqrt(sum(float((g * g).sum()) for g in gradients))
            for own, moved in zip(here.parameters(), there.parameters(), strict=True):
                if own.grad is not None:
                    moved.data += RHO / norm * own.grad
        for part in parts:
            loss = criterion(module(part["image"].double()), part["target"].double())
            (loss * len(part["label"]) / rows).backward()
    return here, there


def close(got: Tensor | None, wanted: Tensor | None, scale: float) -> bool:
    if got is None or wanted is None:
        return got is None and (wanted is None or not wanted.any())
    return bool((got.double() - wanted).abs().max() <= 1e-4 * scale)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["train.grad_accum=2", "train.batch_per_gpu=5", "train.clip_grad=0.05"],
        ["llrd.unfreeze_schedule={1: [head, back]}", "train.clip_grad=null"],
    ],
)
def test_a_steps_gradient_is_the_papers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    toy_project.project(tmp_path)
    passes, seen = FoldTrainer._train_microbatches, []

    def compared(self: Any, microbatches: Any, *rest: Any) -> Any:
        network, criterion = self.state.model.network, self.state.model.criterion
        frozen = [
            p for group in self.state.optimizers[0].param_groups for p in group["params"] if not group["lr"]
        ]
        twin = copy.deepcopy(network)
        for own, copied in zip(network.parameters(), twin.parameters(), strict=True):
            copied.requires_grad_(all(own is not p for p in frozen))
        here, there = reference(twin, criterion, list(microbatches))
        before = [p.detach().clone() for p in network.parameters()]
        out = passes(self, microbatches, *rest)
        assert all(torch.equal(p, old) for p, old in zip(network.parameters(), before, strict=True))
        wanted = [p.grad for p in there.parameters()]
        norm = math.sqrt(sum(float((g * g).sum()) for g in wanted if g is not None))
        factor = min(1.0, clip / norm) if (clip := load("tiny.yaml", words).train.clip_grad) else 1.0
        for (name, own), gradient in zip(network.named_parameters(), wanted, strict=True):
            gradient = None if gradient is None else gradient * factor
            assert close(own.grad, gradient, factor * norm), name
        for (name, own), statistic in zip(network.named_buffers(), here.buffers(), strict=True):
            torch.testing.assert_close(own.double(), statistic.double(), rtol=1e-5, atol=1e-5, msg=name)
        plain = torch.cat([p.grad.flatten() for p in here.parameters() if p.grad is not None])
        own_gradient = torch.cat([g.flatten() for g in wanted if g is not None])
        seen.append(float((plain - own_gradient).norm() / plain.norm()))
        return out

    monkeypatch.setattr(FoldTrainer, "_train_microbatches", compared)
    # its SiLU is smooth; a ReLU near 0 has another sign in single precision, and another gradient
    settled = ["model.backbone=test_efficientnet", "model.drop_rate=0", "model.drop_path=0"]
    assert toy_project.fit(SAM, *settled, *toy_project.ONE, *words) == 0
    assert len(seen) == 4 and min(seen) > 0.01  # the two gradients differ, or nothing was compared


def test_steps_that_are_not_finite_in_either_pass_are_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy_project.project(tmp_path)
    forward, losses = Loss.forward, []

    def faulty(self: Loss, logits: Tensor, targets: Tensor) -> Tensor:
        loss = forward(self, logits, targets)
        losses.append(loss)
        return (
            loss * math.nan if len(losses) in (4, 5) else loss
        )  # the second pass of step 2, the first of step 3

    monkeypatch.setattr(Loss, "forward", faulty)
    assert toy_project.fit(SAM, "model.backbone=test_resnet", *toy_project.ONE) == 0
    run = toy_project.Run(exp="tiny", backbone="test_resnet", fold=0, seed=42)
    last = toy_project.checkpoint.load(run.checkpoints("last")[-1])
    assert len(losses) == 7  # a step whose first pass is not finite has no second one
    assert all(bool(tensor.isfinite().all()) for tensor in last.tensors.values())
    assert last.training_state["parts"]["guard"]["total"] == 2
    assert {float(state["step"]) for state in last.training_state["optimizer"]["state"].values()} == {2.0}
    assert int(last.tensors["backbone.bn1.num_batches_tracked"]) == 4  # of the first passes alone


def test_the_same_images_are_dropped_in_both_passes_and_counted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy_project.project(tmp_path)
    masks: list[Tensor] = []

    def noted(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        if module.training:
            masks.append((output == 0) & (inputs[0] != 0))

    passes = FoldTrainer._train_microbatches

    def hooked(self: Any, *rest: Any) -> Any:
        hook = self.state.model.network.dropout.register_forward_hook(noted)
        out = passes(self, *rest)
        hook.remove()
        return out

    monkeypatch.setattr(FoldTrainer, "_train_microbatches", hooked)
    assert toy_project.fit(SAM, "model.drop_rate=0.5", *toy_project.ONE) == 0
    pairs = list(zip(masks[::2], masks[1::2], strict=True))
    assert len(pairs) == 4 and all(torch.equal(*pair) and pair[0].any() for pair in pairs)
    assert not torch.equal(pairs[0][0], pairs[1][0])
    meter = toy_project.last().training_state["parts"]["recorder"]
    assert meter["sums"]["seen"] == meter["sums"]["images"] == 40


def test_an_infinite_gradient_moves_nothing() -> None:
    network = nn.Linear(2, 1)
    before = network.weight.detach().clone()
    network.weight.grad = torch.tensor([[math.inf, 1.0]])
    with Sharpness(network, 0.1).near_point() as moved:  # type: ignore[arg-type]
        assert not moved and network.weight.grad is not None
    points = []
    for scale in (1.0, 2.0**16):  # of fp16: only the direction counts
        network.weight.grad = scale * torch.tensor([[3.0, 4.0]])
        with Sharpness(network, 0.1).near_point():  # type: ignore[arg-type]
            points.append(network.weight.detach() - before)
    torch.testing.assert_close(points[0], torch.tensor([[0.06, 0.08]]))
    torch.testing.assert_close(points[1], points[0])
    network.weight.grad = torch.zeros(1, 2)
    with Sharpness(network, 0.1).near_point() as moved:  # type: ignore[arg-type]
        assert moved and torch.equal(network.weight, before)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("semi.enabled=true data.labels_per_class=3", "set opt.sam_rho=0, or semi.enabled=false"),
        ("model.head=knn model.freeze=backbone model.pretrained=true llrd.enabled=auto", "set opt.sam_rho=0"),
    ],
)
def test_what_has_no_second_pass_is_refused(tmp_path: Path, words: str, line: str) -> None:
    Path("tiny.yaml").write_text(toy_project.RECIPE.replace("drop_path: 0.1", "drop_path: 0"))
    with pytest.raises(InputError, match=line):
        checks.check(load("tiny.yaml", [SAM, *words.split()]))
    assert any("about twice the time" in note for note in checks.check(load("tiny.yaml", [SAM])))


@pytest.mark.dist
@pytest.mark.slow
def test_two_ranks_take_the_step_of_one(tmp_path: Path) -> None:
    toy_project.project(tmp_path)
    words = [SAM, *toy_project.ONE, "model.drop_rate=0", "model.drop_path=0", "opt.name=sgd", "opt.lr=0.1"]
    two = forked.training(*words, "exp.name=two", "train.batch_per_gpu=4", "train.world_size=2")
    assert two.wait() == [0, 0], two.text()
    assert toy_project.fit(*words, "exp.name=one", "train.batch_per_gpu=8") == 0
    assert toy_project.fit(*words[1:], "exp.name=plain", "train.batch_per_gpu=8") == 0
    one, plain = (toy_project.last(name).tensors for name in ("one", "plain"))
    moved = max(float((plain[name] - tensor).abs().max()) for name, tensor in one.items())
    for name, tensor in toy_project.last("two").tensors.items():
        assert float((tensor - one[name]).abs().max()) < 0.01 * moved, name
