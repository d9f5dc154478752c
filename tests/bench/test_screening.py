"""The screening: its designs, its gains on trainings whose effects are known, and what it trains."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastflower.bench import screening, tiny_project
from fastflower.bench.ablation import Hits
from fastflower.bench.screening import Factor
from fastflower.core.errors import InputError
from fastflower.recipe import Recipe, load


@pytest.mark.parametrize(("factors", "trainings"), [(1, 8), (5, 8), (6, 12), (9, 12)])
def test_every_pair_of_columns_is_balanced(factors: int, trainings: int) -> None:
    plan = screening.design(factors)
    assert plan.shape == (trainings, trainings - 1) and factors <= trainings - 3 and not plan[0].any()
    signs = np.where(plan, 1, -1)
    assert (signs.T @ signs == trainings * np.eye(trainings - 1)).all() and not signs.sum(0).any()


def test_the_effects_that_made_the_hits_come_back() -> None:
    """Of 400 images, one factor gains 40, one that the recipe has loses 20 when it is left out, one does nothing."""
    factors = [
        Factor("-", in_recipe=False, changes=("opt.lr=1", "aug.vflip_p=0")),
        Factor("mixing", in_recipe=True, changes=("reg.mix_prob=0",)),
        Factor("-", in_recipe=False, changes=("reg.erase_p=0",)),
    ]
    hits = []
    for gains, loses, *_ in screening.design(3):
        clean = np.arange(400) < 200 + 40 * gains
        clean[200 - 20 * loses : 200] = False
        hits.append(Hits(clean=clean, single=clean, corrupted=clean / 2))
    head, scores, _, titles, rule, *rows, _, noise = screening.report(hits, factors)
    assert "n = 400: clean 0.5000" in head and scores.startswith("The 8 trainings, clean: 0.500, ")
    assert titles.endswith("| corrupted, points | p |") and titles.count("|") == rule.count("|") == rows[
        0
    ].count("|")
    assert rows[0].startswith("| - | no | `opt.lr=1 aug.vflip_p=0` | +10.0 (") and " | +5.0 (" in rows[0]
    assert rows[1].startswith("| mixing | yes | `reg.mix_prob=0` | +5.0 (")
    assert rows[2].startswith("| - | no | `reg.erase_p=0` | +0.0 (")
    assert "clean +0.0, +0.0, +0.0, +0.0 (standard error 0.0)" in noise


def test_too_many_and_none_are_refused() -> None:
    base = load(None, [])
    for parts, changes, got in (([], [], 0), (["ema", "llrd"], [f"seed={n}" for n in range(8)], 10)):
        with pytest.raises(InputError, match=f"--parts and --changes: got {got} together; give 1 to 9"):
            screening.chosen(base, parts, changes)


def test_the_trainings_change_what_the_design_says(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is asked for once, by a name of its own; the images that erasing loses are found in the table."""
    tiny_project.draw(Path())

    def trained(words: list[str], ledger: Path, seeds: list[int]) -> list[Recipe]:
        return [load(words[0], words[1:])]

    def scored(recipes: list[Recipe], *, corrupted: bool) -> Hits:
        (recipe,) = recipes
        asked.append(recipe)
        right = np.arange(100) < (50 if recipe.reg.erase_p else 70)
        assert not corrupted
        return Hits(clean=right, single=right, corrupted=np.full(100, np.nan))

    asked: list[Recipe] = []
    monkeypatch.setattr(screening, "train", trained)
    monkeypatch.setattr(screening, "hits_over", scored)
    changes = ["--parts", "erasing", "--changes", "opt.lr=0.1 aug.hflip_p=0"]
    assert screening.main([tiny_project.RECIPE_FILE, "data.fold=0", "robust.enabled=false", *changes]) == 0
    out = capsys.readouterr().out
    assert "| random erasing | yes | `reg.erase_p=0` | -20.0 (" in out and "nan" not in out
    names = ["tiny", *(f"tiny-screen{number}" for number in range(1, 8))]
    assert [recipe.exp.name for recipe in asked] == names
    for recipe, (erasing, flip, *_) in zip(asked, screening.design(2), strict=True):
        assert (recipe.reg.erase_p == 0, recipe.aug.hflip_p == 0, recipe.opt.lr == 0.1) == (
            erasing,
            flip,
            flip,
        )
        assert recipe.eval.every == recipe.sched.cosine_epochs and not recipe.es.enabled
