"""Parts of the user's own, as docs/add_your_own.md shows them: a training of all at once, its record, refusals."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from fastflower import convert, evaluate
from fastflower.core import own_parts, runs, seeding
from fastflower.core.errors import InputError
from fastflower.data import samplers
from fastflower.data.betons import fold_set
from fastflower.data.transforms import corruptions
from fastflower.data.transforms.augment import augment
from fastflower.model.losses import build_loss
from fastflower.optim.groups import param_groups
from fastflower.optim.optimizers import build_optimizer
from fastflower.recipe import load
from fastflower.recipe.derived import derive
from fastflower.recipe.own import check_own, own_names
from support import forked, toy_project

PAGE = Path(__file__).resolve().parents[2] / "docs" / "add_your_own.md"
WORDS = [
    "loss.name=my_loss:poly1",
    "opt.name=my_optimizer:slow_start",
    "sampler.type=my_sampler:root",
    "aug.extra=[my_transform:fade]",
    "select.metric=0.8*my_metric:top3 + 0.2*clean",
]
BROKEN = """
import numpy as np
import torch

def mean(logits, targets): return (logits * targets).sum()
def constant(logits, targets): return torch.zeros(len(logits))
def one(logits): return logits
def no_optimizer(groups): return groups
def flat(groups): return torch.optim.SGD([p for group in groups for p in group["params"]], lr=0.1)
def few(labels, generator): return np.arange(3)
def far(labels, generator): return np.arange(len(labels)) + 1
def floats(labels, generator): return np.zeros(len(labels))
def smaller(images, keys): return images[..., 1:]
def white(pixels, level, generator): return pixels.astype(float)
NUMBER = 3
"""


@pytest.fixture(autouse=True)
def _modules(tmp_path: Path) -> Iterator[None]:
    """The modules of the page, by the name in their first line, and a broken one."""
    blocks = re.findall(r"```python\n# (my_\w+)\.py\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    modules = {**dict(blocks), "my_broken": BROKEN}
    assert len(modules) == 8
    for name, text in modules.items():
        Path(f"{name}.py").write_text(text)
    yield
    for name in modules:
        sys.modules.pop(name, None)
    sys.path[:] = [entry for entry in sys.path if entry != str(tmp_path)]


@pytest.mark.slow
def test_a_training_of_own_parts_records_them_and_refuses_another_source(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    toy_project.project(tmp_path)
    assert toy_project.fit(*WORDS, *toy_project.ONE) == 0
    versions = json.loads((toy_project.run_of().meta_dir / "versions.json").read_text())
    recorded = versions["own_sources"]
    assert recorded == {
        f"{key} {name}": own_parts.source_digest(key, name)
        for key, name in own_names(load("tiny.yaml", WORDS))
    }
    assert set(recorded) == {
        "loss.name my_loss:poly1",
        "opt.name my_optimizer:slow_start",
        "sampler.type my_sampler:root",
        "aug.extra my_transform:fade",
        "select.metric my_metric:top3",
    }
    assert toy_project.last().training_state["optimizer"]["param_groups"][0]["betas"] == (0.95, 0.999)
    (row,) = toy_project.epochs()
    top3, clean = (row[f"{term}_{row['chosen']}"] for term in ("my_metric:top3", "clean"))
    assert row["score"] == pytest.approx(0.8 * top3 + 0.2 * clean) and clean < top3 < 1
    assert evaluate.main(["tiny", "tta.hflip=false"]) == 0
    assert "0.8*my_metric:top3 + 0.2*clean" in capsys.readouterr().out
    toy_project.run_of().end_path.unlink()  # as if it had been killed
    with Path("my_loss.py").open("a") as file:
        file.write("\n# another one\n")
    with pytest.raises(InputError, match=r"own source of loss.name my_loss:poly1: \w+ -> \w+"):
        toy_project.fit(*WORDS, *toy_project.ONE)


@pytest.mark.slow
def test_a_corruption_of_ones_own_is_converted_and_its_source_is_compared(tmp_path: Path) -> None:
    toy_project.project(tmp_path)
    words = ["tiny.yaml", "robust.kinds=[blur,my_corruption:fog]", "data.home=new"]
    convert.main(words)
    recipe = load("tiny.yaml", words[1:])
    fold = fold_set.open_fold(recipe, 0)
    assert fold.val_corrupt is not None
    assert fold.val_corrupt.origin.combos == (("blur", "low"), ("my_corruption:fog", "low"))
    Path("my_corruption.py").write_text(Path("my_corruption.py").read_text().replace("0.4", "0.5"))
    with pytest.raises(
        InputError, match=r"the source of my_corruption:fog in robust.kinds has changed; run conv"
    ):
        fold_set.open_fold(recipe, 0)


@pytest.mark.dist
@pytest.mark.slow
def test_two_ranks_train_with_own_parts(tmp_path: Path) -> None:
    toy_project.project(tmp_path)
    words = [*WORDS, *toy_project.ONE, "train.world_size=2", "train.batch_per_gpu=5"]
    two = forked.training(*words, "exp.name=two")
    assert two.wait() == [0, 0], two.text()
    rows = runs.read_events(toy_project.run_of("two").events_path, [])
    assert [row["event"] for row in rows] == ["start", "epoch", "end"]


def test_own_parts_do_what_the_page_says() -> None:
    logits, targets = torch.randn(4, 3), torch.eye(3)[[0, 1, 2, 0]]
    loss = build_loss(load(None, ["loss.name=my_loss:poly1", "reg.ls_eps=0"]), [1, 1, 1])
    probability = (logits.softmax(1) * targets).sum(1)
    torch.testing.assert_close(loss(logits, targets), (1 - probability - probability.log()).mean())
    labels, recipe = np.repeat([0, 1], [90, 10]), load(None, ["sampler.type=my_sampler:root"])
    rows = samplers.order(recipe.sampler, labels, seed=1, epoch=0, fold=0)
    assert len(rows) == 100 and 15 < (labels[rows] == 1).sum() < 40  # a quarter
    np.testing.assert_array_equal(rows, samplers.order(recipe.sampler, labels, seed=1, epoch=0, fold=0))
    pixels = np.full((8, 8, 3), 100, np.uint8)
    fog = [
        corruptions.corrupt(pixels, "my_corruption:fog", level=level, key=7).mean()
        for level in ("low", "medium")
    ]
    assert 100 < fog[0] < fog[1]
    images = torch.randint(0, 255, (6, 8, 8, 3), dtype=torch.uint8)
    keys = seeding.hash64_tensor(torch.arange(6))
    still = ["aug.jitter=[0,0,0,0]", "aug.vflip_p=0", "aug.rotation_deg=0"]
    plain, faded = load(None, still), load(None, [*still, "aug.extra=[my_transform:fade]"])
    before, after = (augment(images, keys, aug=r.aug, erase_p=0, fill=[0, 0, 0]) for r in (plain, faded))
    changed = (before != after).flatten(1).any(1)
    assert changed.any() and not changed.all()
    alone = augment(images[2:3], keys[2:3], aug=faded.aug, erase_p=0, fill=[0, 0, 0])
    torch.testing.assert_close(alone[0], after[2])


@pytest.mark.parametrize(
    ("word", "fault"),
    [
        ("loss.name=my_broken:mean", r"gives \(\) for three rows, must give the loss of each, \(3,\)"),
        ("loss.name=my_broken:constant", "gives a loss without a gradient to the logits"),
        ("loss.name=my_broken:one", r"takes \(logits\), and is called with \(logits, targets\)"),
        ("loss.name=my_broken:NUMBER", "my_broken has no function NUMBER"),
        ("opt.name=my_absent:build", "no module my_absent in .* set PYTHONPATH"),
        ("opt.name=my_broken:no_optimizer", "returned list, must return a torch.optim.Optimizer"),
        ("opt.name=my_broken:flat", "must keep the groups that it is given, with all their entries"),
        ("sampler.type=my_broken:few", r"gives int64 \(3,\), must give 5 row numbers \(5,\)"),
        ("sampler.type=my_broken:floats", r"gives float64 \(5,\), must give 5 row numbers"),
        ("sampler.type=my_broken:far", r"gives rows from 1 to 5, must be in 0..4"),
        (
            "aug.extra=[my_broken:smaller]",
            r"gives torch.float32 \(2, 3, 8, 7\) for torch.float32 \(2, 3, 8, 8\)",
        ),
        ("aug.extra=[fade]", "must be module:function"),
        (
            "robust.kinds=[my_broken:white]",
            r"gives float64 \(8, 8, 3\) for uint8 \(8, 8, 3\), must keep both",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused_in_one_line(word: str, fault: str) -> None:
    with pytest.raises(InputError, match=fault) as refused:
        recipe = load(None, [word])
        check_own(recipe)
        build_loss(recipe, [1, 1])
        network = torch.nn.Linear(2, 2)
        groups = [{"params": list(network.parameters()), "lr": 0.1, "name": "all", "part": "head"}]
        build_optimizer(groups, recipe, torch.device("cpu"))
        samplers.order(recipe.sampler, np.array([0, 1, 0, 1, 0]), seed=1, epoch=0, fold=0)
        augment(
            torch.zeros(2, 8, 8, 3, dtype=torch.uint8),
            torch.arange(2),
            aug=recipe.aug,
            erase_p=0,
            fill=[0, 0, 0],
        )
        corruptions.corrupt(np.zeros((8, 8, 3), np.uint8), recipe.robust.kinds[0], level="low", key=1)
    key = word.partition("=")[0]
    assert str(refused.value).startswith(f"{key} = ") and "\n" not in str(refused.value)


def test_lion_starts_at_a_fifth_of_adams_rate() -> None:
    for start in ("true", "false"):
        adam, lion = (
            derive(load(None, [f"opt.name={name}", f"model.pretrained={start}"]), 1).lr
            for name in ("adamw", "lion")
        )
        assert lion == pytest.approx(adam / 5)


@pytest.mark.slow
def test_timms_optimizers_keep_the_groups() -> None:
    """Each lowers a loss, with the group's own learning rate, and its state goes through a checkpoint."""
    from fastflower.model.network import training_network

    for name in ("nadamw", "radamw", "lion", "adan", "adopt", "laprop", "mars", "muon", "adamuon"):
        recipe = load(
            None,
            [f"opt.name={name}", "model.backbone=test_resnet", "model.pretrained=false", "data.img_size=32",
             "tta.scales=[32]", "llrd.enabled=true", "opt.lr=2e-3"],
        )  # fmt: skip
        torch.manual_seed(0)
        network, _, _ = training_network(recipe, 3)
        groups = param_groups(network, 2e-3, recipe)
        want = [(g["name"], g["lr"], g["weight_decay"]) for g in groups]
        optimizer = build_optimizer(groups, recipe, torch.device("cpu"))
        assert [(g["name"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == want, name
        optimizer.param_groups[0]["lr"] = 0.0  # frozen
        first = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
        images, labels = torch.rand(6, 3, 32, 32), torch.tensor([0, 1, 2, 0, 1, 2])
        losses = []
        for _ in range(12):
            loss = torch.nn.functional.cross_entropy(network(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.95 * losses[0], (name, losses)
        assert all(
            torch.equal(a, b) for a, b in zip(first, optimizer.param_groups[0]["params"], strict=True)
        ), name
        again = build_optimizer(param_groups(network, 2e-3, recipe), recipe, torch.device("cpu"))
        again.load_state_dict(optimizer.state_dict())
