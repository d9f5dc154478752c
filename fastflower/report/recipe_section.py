"""The recipe of an experiment as its page shows it: keys that are no defaults, and the numbers derived from it."""

from __future__ import annotations

from fastflower.recipe import Recipe, fields_of
from fastflower.recipe.run_record import RunNumbers


def changed_keys(recipe: Recipe) -> list[dict[str, str]]:
    """The keys whose values differ from the defaults, with both values and the key's description."""
    defaults = {dotted: value for dotted, value, _ in fields_of(Recipe())}
    return [
        {
            "key": dotted,
            "value": str(value),
            "default": str(defaults[dotted]),
            "doc": str(spec.metadata["doc"]),
        }
        for dotted, value, spec in fields_of(recipe)
        if value != defaults[dotted]
    ]


def derived_numbers(numbers: RunNumbers | None) -> list[tuple[str, str]]:
    """Derived numbers as (name, text), one line for each stage and for each parameter group."""
    rows: list[tuple[str, str]] = []
    if numbers is None:
        return rows
    for name, value in vars(numbers).items():
        if name == "stages":
            for number, (stage, steps) in enumerate(zip(numbers.stages, numbers.steps, strict=True), 1):
                size = f"{stage.height} × {stage.width}"
                text = f"epochs {stage.first} to {stage.last}, {size}, batch {stage.batch_per_gpu} per device"
                rows.append((f"stage {number}", f"{text}, {steps} steps per epoch"))
        elif name == "groups":
            for group in numbers.groups:
                text = f"lr {group.lr:.3g}, weight decay {group.weight_decay:g}, {group.tensors} tensors"
                rows.append((f"group {group.name}", text))
        elif name == "notes":
            rows += [("note", note) for note in value]
        elif isinstance(value, (int, float, str)):
            style = ".6g" if isinstance(value, float) else "," if type(value) is int else ""
            rows.append((name.replace("_", " "), format(value, style)))
    return rows
