"""Stacking as a model: it is fitted, saved, read and applied to images that the predictor reads."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from fastflower import ensemble
from fastflower.core.errors import InputError
from fastflower.core.records import read_record
from fastflower.evaluation import meta_learners, stacking
from fastflower.evaluation.logits import assemble
from fastflower.evaluation.stacking import Stacker
from support import fake_members


def sets_of_two_runs():
    members = [[fake_members.member(fold, seed=seed) for fold in range(3)] for seed in (42, 7)]
    return [assemble(run, fake_members.folds()) for run in members]


@pytest.mark.parametrize("trees", [True, False])
def test_a_saved_stacker_predicts_as_the_fitted_model(monkeypatch, trees):
    if trees and importlib.util.find_spec("lightgbm") is None:
        pytest.skip("no LightGBM")
    if not trees:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    sets = sets_of_two_runs()
    stack, labels = np.stack([run.logits for run in sets]), sets[0].class_idx
    stacker = read_record(stacking.save("exp", stacking.fit(sets)), Stacker)
    method = meta_learners.lightgbm if trees else meta_learners.logistic
    assert stacker.method == ("LightGBM stacking" if trees else "logistic stacking")
    np.testing.assert_allclose(stacker.log_probabilities(stack), method(stack, labels)(stack), atol=1e-6)


def test_runs_are_chosen_by_backbone_or_name():
    sets = sets_of_two_runs()
    first, second = (run.name for run in sets)
    assert [run.name for run in ensemble.chosen_runs(sets, [])] == [first, second]
    assert [run.name for run in ensemble.chosen_runs(sets, [second])] == [second]
    assert len(ensemble.chosen_runs(sets, [sets[0].info.backbone])) == 2
    with pytest.raises(
        InputError, match=r"--runs resnet9: no run, backbone or experiment is called so; choose from"
    ):
        ensemble.chosen_runs(sets, ["resnet9"])
