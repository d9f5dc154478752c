"""The project's Trainer: what Composer's own computes, with fewer collectives and waits."""

from __future__ import annotations

import inspect

import composer
import pytest
from composer.utils import dist

from fastflower.training import build
from fastflower.training.trainer import FoldTrainer
from support import toy_project


@pytest.mark.parametrize("name", ["_iter_dataloader", "_accumulate_time_across_ranks"])
def test_composer_still_has_the_methods_that_are_replaced(name: str) -> None:
    own, stock = (inspect.signature(getattr(cls, name)) for cls in (FoldTrainer, composer.Trainer))
    assert list(own.parameters) == list(stock.parameters)


@pytest.mark.slow
def test_a_training_ends_in_the_bits_of_composers_trainer(tmp_path, monkeypatch) -> None:
    toy_project.project(tmp_path)
    calls: dict[str, int] = {}
    for name, cls in (("ours", FoldTrainer), ("stock", composer.Trainer)):
        counted = []
        with monkeypatch.context() as patch:
            patch.setattr(build, "FoldTrainer", cls)
            all_reduce = dist.all_reduce
            patch.setattr(
                dist,
                "all_reduce",
                lambda *a, real=all_reduce, seen=counted, **k: (seen.append(1), real(*a, **k)),
            )
            assert toy_project.fit(f"exp.name={name}", *toy_project.ONE) == 0
        calls[name] = len(counted)
    ours, stock = (toy_project.last(name) for name in calls)
    assert toy_project.different(ours.tensors, stock.tensors) == []
    assert toy_project.different(ours.training_state, stock.training_state) == []
    assert toy_project.different(toy_project.epochs("ours"), toy_project.epochs("stock")) == []
    steps = 4  # 40 images in batches of 10
    assert calls["stock"] - calls["ours"] >= 2 * steps
