"""Show where two recipes differ: `python -m fastflower.diff <recipe.yaml or experiment> <another> [key=value ...]`.

Changes apply to both. Prints a line for each key whose value differs.
"""

from __future__ import annotations

from fastflower.core import console, errors
from fastflower.core.errors import InputError
from fastflower.recipe import arguments, explanation
from fastflower.recipe.explanation import shown


def main(argv: list[str]) -> None:
    """Print the keys that differ."""
    names, changes = arguments.split_arguments(argv)
    if len(names) != 2:
        raise InputError(f"got {len(names)} recipes ({', '.join(names) or 'none'}); diff takes two")
    first, second = (explanation.resolve(name, changes).recipe for name in names)
    rows = explanation.differences(first, second)
    if not rows:
        print("no key differs")
        return
    for name, old, new in rows:
        line = f"{name}: {shown(old)} -> {shown(new)}"
        print(line if len(line) < 80 else f"{name}:\n  {shown(old)}\n  -> {shown(new)}")
    print(f"{len(rows)} keys differ")
    console.print_next("explain", [rows[0][0]])


if __name__ == "__main__":
    errors.run_command(main)
