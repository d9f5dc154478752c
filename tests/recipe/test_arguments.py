"""The arguments of commands: a recipe's path, or an experiment's name for the recipe that its training recorded."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastflower.core.errors import CorruptionError, InputError
from fastflower.recipe import load, parse_command
from fastflower.recipe.arguments import recorded_recipe
from fastflower.recipe.run_record import write_recipe


@pytest.fixture
def recorded() -> Path:
    """The recorded recipe of an experiment s2 with another learning rate."""
    path = recorded_recipe("s2")
    write_recipe(path, load(None, ["exp.name=s2", "opt.lr=3e-4", "model.backbone=resnet18"]))
    return path


@pytest.mark.parametrize("name", ["s2", "results/results/s2", "./results/results/s2/"])
def test_an_experiments_name_or_folder_means_its_recorded_recipe(recorded: Path, name: str) -> None:
    recipe = parse_command([name, "seed=7"])
    assert (recipe.exp.name, recipe.opt.lr, recipe.model.backbone, recipe.seed) == ("s2", 3e-4, "resnet18", 7)


def test_a_recipe_is_told_from_an_experiment_by_its_ending(recorded: Path) -> None:
    Path("s2.yaml").write_text("opt: {lr: 1.0e-3}\n")
    assert parse_command(["s2.yaml"]).opt.lr == 1e-3
    assert parse_command(["s2"]).opt.lr == 3e-4


def test_a_name_that_is_neither_gets_near_names_of_both_kinds(recorded: Path) -> None:
    Path("recipes").mkdir()
    Path("recipes/tulip3.yaml").write_text("{}\n")
    write_recipe(recorded_recipe("tulip2"), load(None, ["exp.name=tulip2"]))
    with pytest.raises(InputError) as caught:
        parse_command(["tulip4"])
    text, _, near = str(caught.value).partition("did you mean")
    assert "neither a recipe (a file that ends in .yaml) nor an experiment (no results/results/tulip4" in text
    assert "tulip2" in near and "recipes/tulip3.yaml" in near


def test_a_damaged_recorded_recipe_is_refused(recorded: Path) -> None:
    recorded.write_bytes(recorded.read_bytes().replace(b"resnet18", b"resnet34"))
    with pytest.raises(CorruptionError, match="damaged or was edited"):
        parse_command(["s2"])


def test_two_names_are_one_too_many(recorded: Path) -> None:
    with pytest.raises(InputError, match=r"got 2 recipe files \(s2, s3\.yaml\)"):
        parse_command(["s2", "s3.yaml"])
