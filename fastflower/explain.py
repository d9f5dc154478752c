"""Explain a key or a recipe: `python -m fastflower.explain [KEY] [recipe.yaml or experiment] [key=value ...]`.

A key, or each of a section: its meaning, the values it takes, its default and, with a recipe, its value and where that
comes from. A recipe alone: each value that a layer gives, with its origin, and the numbers that follow from the recipe;
nothing is started. `--format md` prints the reference of all keys as Markdown. Without arguments, the sections.
"""

from __future__ import annotations

import textwrap

from fastflower.core import console, errors
from fastflower.core.errors import InputError
from fastflower.recipe import arguments, explanation, starting_point
from fastflower.recipe.explanation import Key, Resolved, shown
from fastflower.recipe.schema import Recipe

WIDTH = 80


def main(argv: list[str]) -> None:
    """Print what the arguments ask about."""
    if "--format" in argv:
        if argv != ["--format", "md"]:
            raise InputError(
                f"got {' '.join(argv)}; --format md stands alone and prints all keys as Markdown"
            )
        print(explanation.markdown())
        return
    names, changes = arguments.split_arguments(argv)
    asked = [name for name in names if explanation.is_key(name)]
    recipes = [name for name in names if name not in asked]
    if len(recipes) > 1 or len(asked) > 1:
        raise InputError(
            f"got {', '.join(names)}; explain takes one key or section, and one recipe or experiment"
        )
    found = explanation.find(asked[0]) if asked else []
    resolved = explanation.resolve(recipes[0] if recipes else None, changes) if recipes or changes else None
    if found:
        print("\n".join(line for key in found for line in key_lines(key, resolved)))
    elif resolved:
        print("\n".join(recipe_lines(resolved)))
        console.print_next("doctor", argv)
    else:
        print("\n".join(section_lines()))


def key_lines(key: Key, resolved: Resolved | None) -> list[str]:
    """A key for people, and its value in a recipe."""
    lines = [key.name, *_wrapped("meaning", key.meaning), *_wrapped("allowed", key.allowed)]
    lines += _wrapped("default", shown(key.default))
    if resolved:
        lines += _wrapped("here", f"{shown(resolved.values[key.name])} ({resolved.origins[key.name]})")
        settled = starting_point.settled(resolved.recipe).get(key.name)
        if settled is not None and resolved.values[key.name] == "auto":
            lines += _wrapped("", f"auto is {shown(settled)} here")
    return lines


def recipe_lines(resolved: Resolved) -> list[str]:
    """The values of a recipe that are no defaults, with their origins, and the derived numbers."""
    recipe = resolved.recipe
    numbers, advice = explanation.numbers(recipe, recipe.train.world_size)
    lines = [recipe.exp.name, "", "values (all others are defaults; explain KEY shows one):"]
    for name, value in resolved.given.items():
        text = f"  {name:<24} {shown(value)}"
        origin = f"({resolved.origins[name]})"
        lines += [f"{text}  {origin}"] if len(text) + len(origin) < WIDTH - 1 else [text, f"{'':<27}{origin}"]
    lines += ["", f"numbers on {numbers.world_size} devices (train.world_size):"]
    lines += _wrapped("batch", f"{numbers.batch_global} images in an optimizer step")
    lines += _wrapped("lr", f"{numbers.lr:.3g} ({numbers.lr_note})")
    if starting_point.layerwise(recipe):
        parts = ", ".join(f"{factor * numbers.lr:.3g}" for factor in recipe.llrd.multipliers)
        lines += _wrapped("by part", f"{parts}, from the first layers to the head")
    warmup = starting_point.warmup_epochs(recipe)
    lines += _wrapped("epochs", f"{numbers.epochs}, warm-up {warmup:g}")
    for stage in numbers.stages:
        size = f"{stage.height} x {stage.width}, {stage.batch_per_gpu} images a device"
        lines += _wrapped("stage", f"epochs {stage.first} to {stage.last} at {size}")
    lines += _wrapped("memory", memory(recipe))
    for line in advice:
        lines += _wrapped("note", line)
    return lines


def memory(recipe: Recipe) -> str:
    """The estimated memory of the recipe's training on one GPU, of this machine's where it has any."""
    from fastflower.training import estimate  # imports torch

    try:
        need = estimate.estimate(recipe, total=estimate.card())
    except InputError as error:
        return str(error)
    return f"{need}; {need.advice}" if need.advice else str(need)


def section_lines() -> list[str]:
    """The sections of a recipe and their keys."""
    sections: dict[str, list[str]] = {}
    for key in explanation.schema_keys():
        section, _, name = key.name.partition(".")
        sections.setdefault(section, []).append(name)
    lines = ["explain KEY, explain SECTION, or explain RECIPE; the keys by section:"]
    for section, names in sections.items():
        lines += _wrapped(section, ", ".join(filter(None, names)) or "a key itself")
    return lines


def _wrapped(label: str, text: str) -> list[str]:
    """A label and its text, wrapped to the width of a terminal."""
    return textwrap.wrap(
        text,
        WIDTH - 1,
        initial_indent=f"  {label:<11} ",
        subsequent_indent=" " * 14,
        break_long_words=False,
        break_on_hyphens=False,
    )


if __name__ == "__main__":
    errors.run_command(main)
