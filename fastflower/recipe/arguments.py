"""The arguments of a command: recipes, experiments, and changes as key=value.

An experiment's name means the recipe that its training recorded in meta/. It never ends as a recipe's file does.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from fastflower.core import runs
from fastflower.core.errors import InputError
from fastflower.recipe.load import SUFFIXES, key_of_option, load
from fastflower.recipe.run_record import recipe_text
from fastflower.recipe.schema import Recipe, fields_of


def parse_command(argv: list[str]) -> Recipe:
    """The recipe of a command line: `[recipe.yaml or experiment] [key=value ...]`."""
    names, changes = split_arguments(argv)
    if len(names) > 1:
        raise InputError(
            f"got {len(names)} recipe files ({', '.join(names)}); give one, then changes as key=value"
        )
    return load(locate(names[0]) if names else None, changes)


def parse_several(argv: list[str]) -> list[Recipe]:
    """The recipes of a command line for several experiments: `[recipe or experiment ...] [key=value ...]`.

    Changes apply to all. InputError when two of the recipes are of one experiment.
    """
    names, changes = split_arguments(argv)
    by_experiment: dict[str, tuple[str, Recipe]] = {}
    for name in dict.fromkeys(names):
        recipe = load(locate(name), changes)
        earlier, same = by_experiment.setdefault(recipe.exp.name, (name, recipe))
        if recipe != same:
            raise InputError(
                f"{earlier} and {name} are both of the experiment {recipe.exp.name} and differ; give one of them"
            )
    return [recipe for _, recipe in by_experiment.values()] or [load(None, changes)]


def split_arguments(argv: list[str]) -> tuple[list[str], list[str]]:
    """The names (recipes and experiments) and the changes (key=value) among arguments."""
    options = [argument for argument in argv if argument.startswith("-") and "=" not in argument]
    if options:
        key = key_of_option(options[0])
        example = f"here {key}=..." if key else "such as opt.lr=1e-3"
        raise InputError(
            f"got {options[0]}, which is no option of this command; --help shows what it takes, and settings are "
            f"written key=value, {example}"
        )
    changes = [argument for argument in argv if "=" in argument]
    return [argument for argument in argv if "=" not in argument], changes


def locate(name: str) -> Path:
    """The recipe file that an argument means: a path, or the recorded recipe of an experiment or of its folder.

    Raises InputError with near names when it is neither, CorruptionError for a recorded recipe that was edited. An
    experiment's name never ends as a recipe's file does.
    """
    path = Path(name)
    if path.suffix in SUFFIXES:
        return path
    inside = path.resolve().parent == runs.RESULTS.resolve()
    recorded = recorded_recipe(path.name if inside else name)
    if recorded.is_file():
        recipe_text(recorded)  # checks it
        return recorded
    if path.is_file():  # of another kind, and refused by what reads it
        return path
    known = {exp: exp for exp in recorded_experiments()}
    known |= {file.stem: str(file) for folder in (Path(), Path("recipes")) for file in folder.glob("*.yaml")}
    near = [known[stem] for stem in difflib.get_close_matches(path.name, list(known), n=3)]
    if name in {key for key, _, _ in fields_of(Recipe())}:
        raise InputError(f"got {name} without a value; a change is written {name}=value")
    trained = recorded_experiments()
    hint = f"trained are {', '.join(trained[:5])}{', ...' * (len(trained) > 5)}"
    if near:
        hint = f"did you mean {' or '.join(near)}?"
    elif not trained:
        hint = "train an experiment, or give the path of a recipe"
    raise InputError(
        f"{name} is neither a recipe (a file that ends in .yaml) nor an experiment (no {recorded}); {hint}"
    )


def recorded_recipe(exp: str) -> Path:
    """The file in which the training of an experiment records its recipe."""
    return runs.RESULTS / exp / "meta" / "recipe.yaml"


def recorded_experiments() -> list[str]:
    """The names of the experiments that have a recorded recipe."""
    return sorted(path.parent.parent.name for path in runs.RESULTS.glob("*/meta/recipe.yaml"))
