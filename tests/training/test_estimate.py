"""The estimate of GPU memory: against peaks of torch's CUDA allocator, and against saved tensors counted on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastflower import doctor, explain
from fastflower.model.losses import build_loss
from fastflower.model.network import training_network
from fastflower.optim.groups import param_groups
from fastflower.optim.optimizers import build_optimizer
from fastflower.recipe import Recipe, load
from fastflower.training import estimate
from fastflower.training.estimate import GIB, OUTSIDE

MIB = 2**20


def recipe_of(backbone: str, size: int, *words: str) -> Recipe:
    sizes = (f"data.img_size={size}", f"tta.scales=[{size}]")
    return load(None, [f"model.backbone={backbone}", "model.pretrained=false", *sizes, *words])


@pytest.mark.parametrize(
    "backbone, size, words, peak",
    [  # MiB at 64 images a GPU of two, AdamW, EMA, mixed precision: max_memory_allocated of such a step
        ("convnextv2_base", 224, (), 11710),
        pytest.param("convnextv2_base", 320, (), 21843, marks=pytest.mark.slow),
        pytest.param(
            "convnextv2_base", 320, ("model.grad_checkpointing=true",), 7230, marks=pytest.mark.slow
        ),
        ("vit_base_patch16_224", 224, (), 6134),
        ("vit_base_patch16_224", 448, (), 18778),
        ("resnet50", 224, (), 3324),
        pytest.param("swin_tiny_patch4_window7_224", 224, (), 5008, marks=pytest.mark.slow),
    ],
)
def test_an_estimate_is_the_allocators_peak(
    backbone: str, size: int, words: tuple[str, ...], peak: int
) -> None:
    need = estimate.estimate(recipe_of(backbone, size, *words))
    assert need.allocated / MIB == pytest.approx(peak, rel=0.08)


@pytest.mark.parametrize("backbone", ["test_vit", "test_resnet", "test_convnext"])
def test_activations_are_those_that_a_real_pass_saves(backbone: str) -> None:
    """Between two microbatches the estimates differ by the bytes that autograd keeps for the images between them."""
    words = ("train.amp=false", "train.stage_batch=null", "eval.batch=1")
    few, many = (
        estimate.estimate(recipe_of(backbone, 96, f"train.batch_per_gpu={rows}", *words)).allocated
        for rows in (32, 96)
    )
    recipe = recipe_of(backbone, 96)
    network = training_network(recipe, 100)[0].train()
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    parameters = {tensor.untyped_storage().data_ptr() for tensor in network.parameters()}
    images = torch.rand(16, 3, 96, 96).to(memory_format=torch.channels_last)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = build_loss(recipe, [1] * 100)(network(images), torch.full((16, 100), 0.01))
    assert loss.requires_grad
    kept = sum(size for pointer, size in saved.items() if pointer not in parameters) / 16
    batch = (
        3 * 96 * 96 * (2 * 4 + 2 + 4)
    )  # the step's images, their copy, two of uint8, and those of the microbatch
    assert (many - few) / 64 == pytest.approx(kept + batch, rel=0.15)


def test_the_microbatch_is_halved_until_it_fits_the_card() -> None:
    recipe = recipe_of("test_resnet", 96)
    whole = estimate.estimate(recipe)
    assert whole.fits and whole.advice == "" and whole.microbatch == 64
    assert str(whole).endswith("GB a GPU at 96 with a microbatch of 64 images")
    total = int((OUTSIDE + 0.75 * whole.allocated) / (1 - estimate.MARGIN))
    half = estimate.estimate(recipe, total=total)
    assert half.fits and half.microbatch == 32 and half.whole == whole.allocated
    assert f"of {total / GIB:.1f} GB a GPU" in str(half) and "a microbatch of 32 images (64 need" in str(half)
    assert half.advice == "training halves the microbatch by itself"
    none = estimate.estimate(recipe, total=OUTSIDE)
    assert not none.fits and none.microbatch == 1 and "grad_checkpointing=true" in none.advice


@pytest.mark.parametrize(
    "words",
    [
        ("semi.enabled=true", "data.labels_per_class=4", "train.batch_per_gpu=8"),
        ("model.head=arcface", "swa.enabled=true", "opt.name=sgd"),
        ("data.form=pairs", "train.channels_last=false", "train.grad_accum=2"),
    ],
)
def test_what_a_recipe_adds_needs_more(words: tuple[str, ...]) -> None:
    plain = [word for word in words if word.startswith("train.batch")]
    less = estimate.estimate(recipe_of("test_resnet", 64, *plain)).allocated
    assert estimate.estimate(recipe_of("test_resnet", 64, *words)).allocated > less


def test_a_frozen_backbone_is_held_once_and_has_no_gradients() -> None:
    """Averages share it, ranks exchange nothing of it, and with fixed views steps take its features alone."""
    frozen = ("model.freeze=backbone", "train.world_size=2")
    network = training_network(recipe_of("test_resnet", 64), 100)[0]
    weights = sum(parameter.numel() * 4 for parameter in network.parameters())

    def needed(*words: str) -> int:
        return estimate.estimate(recipe_of("test_resnet", 64, "eval.batch=1", *words)).allocated

    without = needed(*frozen, "model.frozen_views=0", "ema.enabled=false")
    assert (
        needed(*frozen, "model.frozen_views=0", "swa.enabled=true") - without < 0.5 * weights
    )  # of the head
    assert needed("train.world_size=2", "swa.enabled=true") > without + 5 * weights
    assert needed(*frozen, "model.frozen_views=4") < 0.5 * without
    assert needed(*frozen, "model.head=knn") < 0.5 * without


def test_explain_and_doctor_say_it_and_ask_for_no_weights(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["model.backbone=test_resnet.r160_in1k", "data.img_size=64", "tta.scales=[64]"]
    Path("mine.yaml").write_text("sched: {cosine_epochs: 16}\n")
    explain.main(["mine.yaml", *words])
    assert "with a microbatch of 64 images" in " ".join(capsys.readouterr().out.split())
    recipe = load(None, words)
    assert doctor.gpu_memory(recipe).ok is None
    monkeypatch.setattr(estimate, "card", lambda: 24 * GIB)
    assert doctor.gpu_memory(recipe).ok and "of 24.0 GB a GPU at 64" in doctor.gpu_memory(recipe).text
    monkeypatch.setattr(estimate, "card", lambda: GIB)
    lacking = doctor.gpu_memory(recipe)
    assert lacking.ok is False and "does not fit; set model.grad_checkpointing=true" in str(lacking)


def test_a_network_that_asks_for_values_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("asks.py").write_text(
        "from torch import nn\n"
        "class Asks(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.layer = nn.Conv2d(3, 8, 3)\n"
        "    def forward(self, x):\n"
        "        x = self.layer(x).mean((2, 3))\n"
        "        return x * 2 if not x.is_meta and x.sum() > 0 else x\n"
        "def build(): return Asks()\n"
    )
    monkeypatch.syspath_prepend(".")
    assert "cannot be estimated" in explain.memory(recipe_of("asks:build", 32))


@pytest.mark.parametrize("name, moments", [("adamw", 2), ("sgd", 1), ("adam", 2), ("lion", 1), ("adan", 4)])
def test_the_state_of_any_optimizer_is_counted(name: str, moments: int) -> None:
    recipe = recipe_of("test_vit", 32, f"opt.name={name}")
    network = training_network(recipe, 5)[0]
    optimizer = build_optimizer(param_groups(network, 1e-3, recipe), recipe, torch.device("cpu"))
    size = sum(parameter.nbytes for parameter in network.parameters())
    assert estimate.missing_state(optimizer) == moments * size
    assert not optimizer.state and all(p.grad is None for p in network.parameters())
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    kept = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    assert sum(v.nbytes for v in kept) == pytest.approx(moments * size, rel=0.01)
    assert estimate.missing_state(optimizer) == 0


def test_an_optimizer_with_attributes_of_its_own_is_counted() -> None:
    class Halved(torch.optim.SGD):
        def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
            super().__init__(parameters, lr=0.1, momentum=0.9)
            self.factor = 0.5

        def step(self, closure: None = None) -> None:
            self.param_groups[0]["lr"] *= self.factor
            super().step(closure)

    weight = torch.nn.Parameter(torch.ones(8, 8))
    optimizer = Halved([weight])
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0)  # wraps the step of this one
    assert estimate.missing_state(optimizer) == weight.nbytes
    assert bool((weight == 1).all()) and not optimizer.state
