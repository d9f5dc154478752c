"""Drawn photographs in the folders of a food contest: few with labels, many without, and a hidden truth."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from fastflower import sample_data
from fastflower.core.errors import InputError
from fastflower.core.tables import read_csv
from fastflower.data.samples import food
from fastflower.recipe import checks, load

SMALL = ["food", "rows=12", "unlabelled=13", "held_out=11"]


def files(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).rglob("*.jpg")}


def test_the_recipe_finds_every_folder_and_no_name_tells_a_class(repo: Path) -> None:
    sample_data.main(SMALL)
    for change in ([], ["semi.enabled=false", "exp.name=labels_alone"]):
        checks.check(load(repo / "recipes/food_small.yaml", change))
    data = load(repo / "recipes/food_small.yaml").data
    counts = {folder: len(files(folder)) for folder in (data.root, data.unlabelled, data.val, data.test)}
    assert list(counts.values()) == [12, 13, 11, 11] and Path(data.home) == Path("data/food")
    for folder in (data.root, data.val):
        assert sorted(path.name for path in Path(folder).iterdir()) == sorted(food.CLASSES)
    truth = read_csv(Path("data/food/truth.csv"), ("filename", "category_id"))
    assert sorted(row["category_id"] for row in truth) == sorted(food.CLASSES)
    assert {row["filename"] for row in truth} == set(files(data.test))
    everything = [name for folder in counts for name in files(folder)]
    assert sorted(everything) == [f"{number:06}.jpg" for number in range(1, 48)]
    assert len({image for folder in counts for image in files(folder).values()}) == 47
    in_order = sorted(Path(data.root).rglob("*.jpg"), key=lambda path: path.name)
    classes = [food.CLASSES.index(path.parent.name) for path in in_order]
    assert classes != sorted(classes)
    with Image.open(next(Path(data.test).iterdir())) as image:
        assert image.size == (food.SIDE, food.SIDE)


def test_equal_arguments_plan_equal_photographs_and_another_seed_others() -> None:
    counts = {"training/labeled": 20, "testing": 12}
    first, again, other = (food.planned(Path("a"), counts, seed) for seed in (3, 3, 4))
    assert first == again and {shot.path for shot in first} != {shot.path for shot in other}
    assert len({(shot.species, shot.number) for shot in first}) == 32


def test_what_leaves_a_class_empty_or_would_mix_is_refused_before_drawing() -> None:
    with pytest.raises(InputError, match="rows=10: must be at least 11"):
        sample_data.main(["food", "rows=10"])
    with pytest.raises(InputError, match="held_out=0: must be at least 11"):
        sample_data.main(["food", "held_out=0"])
    assert not Path("data/food").exists()
    Path("data/food").mkdir(parents=True)
    Path("data/food/mine.txt").touch()
    with pytest.raises(InputError, match="not empty; remove it"):
        sample_data.main(["food"])
