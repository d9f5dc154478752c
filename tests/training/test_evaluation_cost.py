"""The cost of evaluations: the epochs that are scored, the corrupted images that count, the copies to the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastflower.callbacks.scoring import CLEAN, CORRUPTED, Scoring, right_answers
from fastflower.callbacks.selection import Candidate, Selection
from fastflower.core.errors import InputError
from fastflower.core.host_copies import HostCopies
from fastflower.data.loaders import EvalLoader
from fastflower.recipe import checks, load
from fastflower.recipe.derived import derive, is_scored
from fastflower.recipe.schema import Es, Select
from fastflower.training.fold_data import scored_combos
from support import toy_project


def scored(*words: str) -> list[int]:
    recipe = load(None, list(words))
    numbers = derive(recipe, 1)
    return [epoch for epoch in range(1, numbers.epochs + 1) if is_scored(recipe, numbers, epoch)]


def test_an_eighth_of_the_epochs_and_the_last_of_each_size_are_scored() -> None:
    last = [36, 37, 38, 39, 40]
    assert scored() == [5, 10, 15, 20, 25, 30, 35, *last]  # 15 at 224, 25 at 320
    assert scored("data.size_epochs=[12,40]") == [5, 10, 12, 15, 20, 25, 30, 35, *last]
    assert scored("eval.every=16") == [15, 16, 32, 40]
    assert scored("sched.cosine_epochs=400")[68:72] == [345, 350, 351, 352]
    assert scored("sched.cosine_epochs=6") == [1, 2, 3, 4, 5, 6]
    assert scored("sched.name=plateau") == list(range(1, 41))
    with pytest.raises(InputError, match=r"eval\.every = 2: sched\.name=plateau follows"):
        checks.check(load(None, ["sched.name=plateau", "eval.every=2", "model.pretrained=false"]))


def test_each_image_is_scored_in_one_of_its_corruptions() -> None:
    recipe = load(None, ["robust.score=one"])
    rows = scored_combos(recipe, 8, 3)
    assert rows is not None and rows.tolist() == [0, 3, 8 + 1, 8 + 4, 16 + 2, 16 + 5]
    assert scored_combos(recipe, 8, 1) is None and scored_combos(recipe, 2, 3) is None
    auto = load(None, [])
    assert scored_combos(auto, 2000, 5) is None
    many = scored_combos(auto, 4000, 5)
    assert many is not None and np.bincount(many // 4000).tolist() == [400] * 5  # of each corruption as many
    assert len(set(many % 4000)) == 2000 and set(many % 4000 % 10) == set(
        range(5)
    )  # in turn through the images


def test_patience_counts_epochs_between_scores() -> None:
    selection = Selection(Select(), Es(patience=4), 1)
    candidate = {"raw": Candidate(0.5, 0.5, 0.5, val_loss=1.0)}
    left = [selection.update(epoch, 0, candidate).patience_left for epoch in (3, 6)]
    resumed = Selection(Select(), Es(patience=4), 1)
    resumed.load_state_dict(selection.state_dict())
    verdict = resumed.update(9, 0, candidate)
    assert left == [4, 1] and verdict.stop
    assert resumed.stopped == "no gain of 0.001 in 6 epochs up to epoch 9"


def test_rows_that_are_not_finite_are_no_right_answers() -> None:
    logits = torch.tensor([[0.0, 1.0], [torch.nan, 1.0], [1.0, torch.inf], [2.0, 1.0]])
    assert right_answers(logits, torch.ones(4, dtype=torch.int64)).tolist() == [True, False, False, False]


@pytest.mark.slow
def test_epochs_without_scores_train_the_same_and_cost_no_evaluation(tmp_path: Path, monkeypatch) -> None:
    toy_project.project(tmp_path)
    seen: list[int] = []
    batches = EvalLoader._batches

    def counted(self: EvalLoader, size: tuple[int, int]):
        for batch in batches(self, size):
            seen.append(int(batch["valid"].sum()))
            yield batch

    monkeypatch.setattr(EvalLoader, "_batches", counted)
    assert toy_project.fit("exp.name=all") == 0
    whole, seen[:] = sum(seen), []
    assert toy_project.fit("exp.name=some", "eval.every=3", "robust.score=one") == 0
    assert (whole, sum(seen)) == (3 * (20 + 40), 2 * (20 + 20))
    first, skipped, last = toy_project.epochs("some")
    assert skipped["score"] is None and skipped["val_loss"] is None and "clean_raw" not in skipped
    assert (
        skipped["best"] == first["best"]
        and skipped["train_loss"] == toy_project.epochs("all")[1]["train_loss"]
    )
    assert set(last["per_kind"]) == {"blur", "occlusion"} and last["best"]["epoch"] in (1, 3)
    before, after = toy_project.last("all"), toy_project.last("some")
    assert toy_project.different(before.tensors, after.tensors) == []
    assert {"clean_raw", "corrupt_ema"} <= set(after.training_state["parts"]["scoring"]["flat"])


def test_the_host_waits_once_for_an_evaluation(tmp_path: Path, monkeypatch) -> None:
    """Not for each batch; the logits of corrupted images, of which only the right answers count, stay on the device."""
    toy_project.project(tmp_path)
    calls: list[str] = []
    shapes: dict[str, set[int]] = {}
    end, add, wait = Scoring.eval_end, HostCopies.add, HostCopies.wait

    def watched(self: Scoring, state: Any, logger: Any) -> None:
        label = str(state.dataloader_label)
        shapes[label] = {column.ndim for batch in self._collected for column in batch.values()}
        calls.append(label)
        end(self, state, logger)

    monkeypatch.setattr(HostCopies, "add", lambda self, tensor: (calls.append("add"), add(self, tensor))[1])
    monkeypatch.setattr(HostCopies, "wait", lambda self: (calls.append("wait"), wait(self))[1])
    monkeypatch.setattr(Scoring, "eval_end", watched)
    assert toy_project.fit(*toy_project.ONE, "eval.batch=4") == 0
    clean = calls.index(CLEAN)
    columns, batches = 5, 20 // 4  # valid, row, label, raw, ema
    assert calls[clean - columns * batches : clean + 2] == ["add"] * columns * batches + [CLEAN, "wait"]
    assert shapes == {CLEAN: {1, 2}, CORRUPTED: {1}}
