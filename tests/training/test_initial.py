"""Trainings that start from another experiment's member or from a weight file, and those that would leak."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import timm
import torch

from fastflower.core import runs
from fastflower.core.errors import InputError
from fastflower.data.betons.fold_set import open_fold
from fastflower.model.member import load_member
from fastflower.model.network import training_network
from fastflower.recipe import load
from fastflower.training import initial
from support import toy_project


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with one trained experiment, `tiny`."""
    home, here = toy_project.project(tmp_path_factory.mktemp("trained")), Path.cwd()
    os.chdir(home)
    try:
        assert toy_project.fit(*toy_project.ONE) == 0
    finally:
        os.chdir(here)
    return home


@pytest.fixture(autouse=True)
def there(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)


def member() -> Path:
    return runs.find_members("tiny", "auto", metric="combo")[0]


def started(*changes: str, fold: int = 0) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The tensors of a network that starts as the changes say, and the lines about it."""
    recipe = load("tiny.yaml", ["exp.name=next", *toy_project.ONE, *changes])
    opened = open_fold(recipe, fold)
    torch.manual_seed(7)
    network, spec, _ = training_network(recipe, len(opened.classes))
    lines = initial.load_initial(network, spec, recipe=recipe, fold=opened)
    return network.state_dict(), lines


def refused(*changes: str, fold: int = 0) -> str:
    with pytest.raises(InputError) as caught:
        started(*changes, fold=fold)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.slow
def test_a_training_starts_from_the_member_of_its_fold(capsys):
    assert toy_project.fit(*toy_project.ONE, "exp.name=next", "model.init=tiny", "opt.lr=1e-12") == 0
    assert "head kept, as the classes are equal" in capsys.readouterr().out
    theirs, ours = load_member(member()).tensors, toy_project.last("next").tensors
    assert all(torch.allclose(theirs[name], ours[name], atol=1e-9) for name in theirs)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_weight_file_fills_the_backbone_and_leaves_the_head(suffix):
    weights = timm.create_model(toy_project.BACKBONE).state_dict()
    path = Path(f"own{suffix}")
    if suffix == ".pth":
        torch.save(weights, path)
    else:
        from safetensors.torch import save_file

        save_file(weights, path)
    tensors, lines = started(f"model.init={path}")
    assert "new head" in lines[0]
    assert torch.equal(tensors["backbone.cls_token"], weights["cls_token"])


def test_a_member_of_another_fold_leaks():
    assert refused("model.init=tiny", fold=1).startswith(
        f"model.init = {member()}: leak: it was trained on 20 of the 20"
    )
    assert "leak" in refused(f"model.init={member()}", fold=2)


def test_other_folds_leak_as_far_as_their_images_validate_here():
    recipe = load("tiny.yaml", [])
    meta, fold = load_member(member()).meta, open_fold(recipe, 0)
    elsewhere = dataclasses.replace(meta, exp="gone", folds_hash="other")
    assert "which are not here" in initial._check_leak(elsewhere, fold, member())[0]
    moved = dataclasses.replace(fold.folds, fold=(fold.folds.fold + 1) % 3)
    inside = dataclasses.replace(fold, folds=moved)  # the same images in other folds
    with pytest.raises(InputError, match="leak: it was trained on 20 of the 20 images that validate fold 0"):
        initial._check_leak(meta, inside, member())
    strange = dataclasses.replace(moved, sha256=[f"new {sha}" for sha in moved.sha256])
    assert initial._check_leak(meta, dataclasses.replace(fold, folds=strange), member()) == []


def test_another_network_or_none_is_refused():
    assert "holds test_vit, not model.backbone = test_vit2" in refused(
        f"model.init={member()}", "model.backbone=test_vit2", "model.drop_path=0"
    )
    assert "it has test_vit" in refused("model.init=tiny", "model.backbone=test_resnet")
    assert refused("model.init=nothing").endswith("nor a file; give one of them or none")
    torch.save(timm.create_model("test_resnet").state_dict(), "resnet.pth")
    assert "lacks" in refused("model.init=resnet.pth")


def test_other_classes_get_a_new_head(monkeypatch):
    read = initial._read

    def renamed(path: Path):
        meta, tensors = read(path)
        return dataclasses.replace(meta, class_ids=("a", "b", "c", "d")), tensors

    monkeypatch.setattr(initial, "_read", renamed)
    tensors, lines = started("model.init=tiny")
    assert "new head (4 classes there, 4 others here)" in lines[0]
    assert not torch.equal(tensors["head.weight"], load_member(member()).tensors["head.weight"])


def test_an_experiment_does_not_start_from_itself():
    with pytest.raises(InputError, match="cannot start from itself"):
        toy_project.fit("model.init=tiny")
