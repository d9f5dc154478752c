"""Plan of a campaign: the trainings that one command names, from lists of values, folds and seeds."""

from __future__ import annotations

import dataclasses
import itertools
import re
import types
from dataclasses import dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf

from fastflower.core.errors import InputError
from fastflower.core.runs import Run
from fastflower.recipe import Recipe, checks, derived, load

RUN_KEYS = ("seed", "model.backbone")  # part of the file names of a run, which therefore share an experiment
RANGE = re.compile(r"(?P<log>log:)?(?P<low>[-+.\deE]+?)\.\.(?P<high>[-+.\deE]+)")


@dataclass(frozen=True)
class Axis:
    """A recipe key and the list of values to train."""

    key: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Range:
    """A key that a search samples between two numbers, inclusive, on a log scale if `log`."""

    key: str
    low: float
    high: float
    log: bool
    integer: bool


@dataclass(frozen=True, eq=False)
class Task:
    """One training: arguments of the train command, recipe and run; `settings` maps each varied key to its value."""

    arguments: tuple[str, ...]
    recipe: Recipe
    run: Run
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.run.exp} {self.run.stem}"


@dataclass(frozen=True)
class Overrides:
    """The key=value arguments of a campaign: fixed values, lists of values, and ranges of a search."""

    fixed: list[str]
    axes: list[Axis]
    ranges: list[Range]


def parse_overrides(arguments: list[str]) -> Overrides:
    """Sort key=value arguments into fixed values, lists of values, and ranges of a search.

    A list for a key that itself takes lists (data.fold, data.img_size) is one value, as in every command.
    """
    fixed: list[str] = []
    axes: list[Axis] = []
    ranges: list[Range] = []
    for argument in arguments:
        name, _, value = argument.partition("=")
        hint = _hint(name)
        if value.startswith("[") and hint is not None and not _takes_list(hint):
            axes.append(Axis(name, _values(argument)))
        elif (match := RANGE.fullmatch(value)) and hint is not None:
            ranges.append(_range(name, match, hint))
        else:
            fixed.append(argument)
    keys = [axis.key for axis in axes] + [interval.key for interval in ranges]
    repeated = [
        key for key in keys if keys.count(key) > 1 or any(item.startswith(f"{key}=") for item in fixed)
    ]
    if repeated:
        raise InputError(f"{repeated[0]} is given twice; give it once, as a value, a list or a range")
    if "exp.name" in keys:
        raise InputError(
            "exp.name must be one name; the campaign derives the names of its experiments from it"
        )
    return Overrides(fixed, axes, ranges)


def tasks(files: list[str], overrides: Overrides) -> list[Task]:
    """One task for every recipe file, combination of values and fold; folds vary fastest.

    All are checked before any starts. Raises InputError for an invalid recipe and for two tasks of the same run.
    """
    if overrides.ranges:
        raise InputError(
            f"{overrides.ranges[0].key} has a range, which needs a search; add --trials N, or give a list of values"
        )
    planned = [
        task
        for file in files
        for settings in combinations(overrides.axes)
        for task in fold_tasks(file, overrides.fixed, settings=settings)
    ]
    runs: set[Run] = set()
    for task in planned:
        if task.run in runs:
            raise InputError(
                f"two trainings would write the same run, {task.name}; give the recipes different values of exp.name"
            )
        runs.add(task.run)
    return planned


def combinations(axes: list[Axis]) -> list[dict[str, Any]]:
    """Every combination of one value per axis; the last axis varies fastest."""
    return [
        {axis.key: value for axis, value in zip(axes, values, strict=True)}
        for values in itertools.product(*(axis.values for axis in axes))
    ]


def fold_tasks(file: str, fixed: list[str], *, settings: dict[str, Any], exp: str = "") -> list[Task]:
    """One task per fold for one combination of values; without `exp` the values name the experiment."""
    arguments = [*fixed, *(f"{key}={format_value(value)}" for key, value in settings.items())]
    loaded = load(file, arguments)
    checks.check(loaded)
    experiment = dataclasses.replace(loaded.exp, name=exp or loaded.exp.name + name_suffix(settings))
    arguments = [item for item in arguments if not item.startswith(("exp.name=", "data.fold="))]
    planned = []
    for fold in derived.fold_numbers(loaded):
        # loading again would give the same recipe and cost a fifth of a second
        recipe = dataclasses.replace(loaded, exp=experiment, data=dataclasses.replace(loaded.data, fold=fold))
        checks.check_name(recipe.exp.name)
        run = Run(exp=recipe.exp.name, backbone=recipe.model.backbone, fold=fold, seed=recipe.seed)
        planned.append(
            Task(
                arguments=(file, *arguments, f"data.fold={fold}", f"exp.name={run.exp}"),
                recipe=recipe,
                run=run,
                settings=settings,
            )
        )
    return planned


def name_suffix(settings: dict[str, Any]) -> str:
    """Suffix of the experiment's name, such as -lr_0.001-batch_per_gpu_16, from the keys outside RUN_KEYS."""
    named = {key: value for key, value in settings.items() if key not in RUN_KEYS}
    entries = [f"-{short_key(key, list(named))}_{format_value(value)}" for key, value in named.items()]
    return "".join(re.sub(r"[^\w.-]+", "_", entry) for entry in entries)


def short_key(key: str, keys: list[str]) -> str:
    """The last component of a dotted key, or the full key when another key ends the same way."""
    tail = key.rpartition(".")[2]
    return key if sum(other.rpartition(".")[2] == tail for other in keys) > 1 else tail


def format_value(value: Any) -> str:
    """A value as text for the command line."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return repr(value) if isinstance(value, float) else str(value)


def _hint(dotted: str) -> Any:
    """Annotated type of a recipe key, or None when there is no such key."""
    node: Any = Recipe
    for name in dotted.split("."):
        if not dataclasses.is_dataclass(node):
            return None
        node = get_type_hints(node).get(name)
    return None if node is None or dataclasses.is_dataclass(node) else node


def _kinds(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or the single type."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _takes_list(hint: Any) -> bool:
    return any(kind is Any or get_origin(kind) in (list, dict) for kind in _kinds(hint))


def _values(argument: str) -> tuple[Any, ...]:
    key, _, _ = argument.partition("=")
    try:
        values = OmegaConf.to_container(OmegaConf.from_dotlist([argument]))
    except Exception as error:  # invalid YAML in the value
        raise InputError(f"{argument}: {' '.join(str(error).split())}") from None
    for name in key.split("."):
        values = values[name]  # type: ignore[index,call-overload]
    if not isinstance(values, list) or not values:
        raise InputError(f"{argument}: must be a list of one value or more, such as {key}=[a,b]")
    texts = [format_value(value) for value in values]
    repeated = [text for text in texts if texts.count(text) > 1]
    if repeated:
        raise InputError(f"{argument}: {repeated[0]} is in the list twice; remove one")
    return tuple(values)


def _range(key: str, match: re.Match[str], hint: Any) -> Range:
    integer, log = int in _kinds(hint) and float not in _kinds(hint), bool(match["log"])
    if not {int, float} & set(_kinds(hint)):
        raise InputError(f"{key}={match[0]}: only numbers have ranges; give a list of values for {key}")
    try:
        low, high = float(match["low"]), float(match["high"])
    except ValueError:
        low, high = 1.0, 0.0
    whole_numbers = low == int(low) and high == int(high)
    if not (low < high and (low > 0 or not log) and (whole_numbers or not integer)):
        raise InputError(
            f"{key}={match[0]}: a range is low..high with low below high, log:low..high with both above 0"
            + (", both whole numbers" if integer else "")
        )
    return Range(key, low=low, high=high, log=log, integer=integer)
