"""The start of a teacher: one that began with other weights would hand them to a student that must not have them."""

from __future__ import annotations

from fastflower.core.errors import InputError
from fastflower.recipe import Recipe, load
from fastflower.recipe.arguments import recorded_recipe
from fastflower.recipe.run_record import recipe_text
from fastflower.recipe.starting_point import from_scratch, origin


def check_start(recipe: Recipe, key: str, name: str) -> None:
    """Refuse a teacher that did not train from scratch itself, with checks.from_scratch (InputError)."""
    path = recorded_recipe(name)
    if not recipe.checks.from_scratch or not path.is_file():
        return
    recipe_text(path)  # checks that it is as its training wrote it
    teacher = load(path)
    taught = [*teacher.distill.teacher, *([teacher.semi.soft_teacher] if teacher.semi.soft_teacher else [])]
    if teacher.checks.from_scratch or (from_scratch(teacher) and not taught):
        return
    start = f"was taught by {', '.join(taught)}" if from_scratch(teacher) else f"trained {origin(teacher)}"
    raise InputError(
        f"{key} = {name}: it {start}, and this recipe trains from scratch (checks.from_scratch=true), as its contest "
        "demands; choose a teacher that was trained with checks.from_scratch=true, or set it to false"
    )
