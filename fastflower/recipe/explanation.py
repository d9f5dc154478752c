"""The meaning of recipe keys, the origin of a recipe's values, and the difference of two recipes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastflower.core.errors import InputError
from fastflower.recipe import arguments, checks
from fastflower.recipe.derived import Derived, derive
from fastflower.recipe.load import Layer, allowed, merge, nearest, read_layers
from fastflower.recipe.schema import Recipe, fields_of

SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


@dataclass(frozen=True)
class Key:
    """A key of the schema; `allowed` and `meaning` are text for people."""

    name: str
    allowed: str
    default: Any
    meaning: str


@dataclass(frozen=True)
class Resolved:
    """A recipe and the origin of each of its values: default, a file, the experiment, or the command line."""

    recipe: Recipe
    origins: dict[str, str]

    @property
    def values(self) -> dict[str, Any]:
        """The value of each key."""
        return {name: value for name, value, _ in fields_of(self.recipe)}

    @property
    def given(self) -> dict[str, Any]:
        """The values that are not defaults by origin: name -> value."""
        return {name: value for name, value, _ in fields_of(self.recipe) if self.origins[name] != "default"}


def schema_keys() -> list[Key]:
    """Every key of the schema, in its order."""
    return [
        Key(name, allowed=_allowed(spec), default=default, meaning=spec.metadata["doc"])
        for name, default, spec in fields_of(Recipe())
    ]


def find(name: str) -> list[Key]:
    """The key of this name, or the keys of this section; InputError with the nearest key when there is none."""
    found = [key for key in schema_keys() if key.name == name or key.name.startswith(f"{name}.")]
    if found:
        return found
    near = nearest(name, [key.name for key in schema_keys()])
    raise InputError(
        f"no key or section {name}"
        + (f"; did you mean {near}?" if near else "; fastflower explain lists them")
    )


def is_key(name: str) -> bool:
    """True if an argument names a key or a section and no recipe."""
    sections = {key.name.partition(".")[0] for key in schema_keys()}
    return name in sections or (name.partition(".")[0] in sections and not name.endswith((".yaml", ".yml")))


def resolve(name: str | None, changes: list[str]) -> Resolved:
    """The recipe of a file or experiment with changes, and where each value comes from."""
    path = arguments.locate(name) if name else None
    layers = read_layers(path, changes)
    recipe = merge(layers, path)
    origins = {}
    for dotted, _, _ in fields_of(recipe):
        last = next((layer for layer in reversed(layers) if layer.names(dotted)), None)
        origins[dotted] = _origin(last, name, path)
    if origins["exp.name"] == "default":
        origins["exp.name"] = "the file's name" if path else "default"
    return Resolved(recipe, origins)


def differences(first: Recipe, second: Recipe) -> list[tuple[str, Any, Any]]:
    """(key, value in the first, value in the second) of each key that differs."""
    values = {name: value for name, value, _ in fields_of(second)}
    return [(name, value, values[name]) for name, value, _ in fields_of(first) if value != values[name]]


def numbers(recipe: Recipe, world_size: int) -> tuple[Derived, list[str]]:
    """The derived numbers on this many devices, and the advice of the checks; InputError for contradictions."""
    return derive(recipe, world_size), checks.check(recipe)


def shown(value: Any) -> str:
    """A value as a recipe has it."""
    if isinstance(value, float):
        return f"{value:g}"
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    if isinstance(value, str):
        return value or '""'
    return json.dumps(value, ensure_ascii=False)


def markdown() -> str:
    """The reference of all keys as a table of Markdown for each section."""
    lines = [
        *("# Recipe keys", ""),
        "A recipe lists the keys that differ from these defaults. `fastflower explain KEY` shows one in the terminal,",
        "and `python -m fastflower.explain --format md` writes this page.",
        "",
    ]
    for section, rows in _by_section():
        lines += [f"## {section}", "", "| key | default | allowed | meaning |", "|---|---|---|---|"]
        lines += [
            f"| `{key.name}` | {_cell(shown(key.default))} | {_cell(key.allowed)} | {_cell(key.meaning)} |"
            for key in rows
        ]
        lines.append("")
    return "\n".join(lines).rstrip()


def _by_section() -> Iterator[tuple[str, list[Key]]]:
    for spec in dataclasses.fields(Recipe):
        yield spec.name, [key for key in schema_keys() if key.name.partition(".")[0] == spec.name]


def _cell(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def _allowed(spec: dataclasses.Field) -> str:
    text = "see the meaning" if str(spec.type) == "Any" else allowed(str(spec.type))
    limits = " and ".join(
        f"{sign} {shown(spec.metadata[name])}" for name, sign in SIGNS.items() if name in spec.metadata
    )
    return f"{text}, {limits}" if limits else text


def _origin(layer: Layer | None, name: str | None, path: Path | None) -> str:
    if layer is None:
        return "default"
    if not layer.is_file:
        return "command line"
    source = Path(layer.source)
    if path is not None and source == path.resolve():
        return str(path) if name == str(path) else f"experiment {Path(name or '').name}"
    here = Path.cwd()
    return f"base {source.relative_to(here) if source.is_relative_to(here) else source}"
