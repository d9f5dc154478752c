"""From one command to many trainings: which keys vary over which values, and what each run is called."""

from __future__ import annotations

import copy
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

SHARED = ("seed", "model.backbone")  # a run's files say these, so that all their values share one experiment
RANGE = re.compile(r"(?P<log>log:)?(?P<low>[-+.\deE]+?)\.\.(?P<high>[-+.\deE]+)")


@dataclass(frozen=True)
class Axis:
    """A key and the values that it takes, one after the other."""

    key: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Range:
    """A key that a search draws between two numbers, inclusive; `whole` for a key of whole numbers."""

    key: str
    low: float
    high: float
    log: bool
    whole: bool


@dataclass(frozen=True, eq=False)
class Task:
    """One training: the command's words for it, its recipe and its run; `settings` are the axes' values."""

    words: tuple[str, ...]
    recipe: Recipe
    run: Run
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.run.exp} {self.run.stem}"


@dataclass(frozen=True)
class Words:
    """A campaign's `key=value` words, taken apart."""

    plain: list[str]
    axes: list[Axis]
    ranges: list[Range]


def read_words(words: list[str]) -> Words:
    """Split `key=value` words: plain ones, lists for keys that take one value, and ranges for a search.

    A list for a key that itself takes lists (data.fold, data.img_size) is that key's value, as in every command.
    """
    plain: list[str] = []
    axes: list[Axis] = []
    ranges: list[Range] = []
    for word in words:
        name, _, value = word.partition("=")
        hint = _hint(name)
        if value.startswith("[") and hint is not None and not _takes_list(hint):
            axes.append(Axis(name, _values(word)))
        elif (match := RANGE.fullmatch(value)) and hint is not None:
            ranges.append(_range(name, match, hint))
        else:
            plain.append(word)
    keys = [axis.key for axis in axes] + [own.key for own in ranges]
    twice = [key for key in keys if keys.count(key) > 1 or any(word.startswith(f"{key}=") for word in plain)]
    if twice:
        raise InputError(f"{twice[0]} is given twice; give it once, as a value, a list or a range")
    if "exp.name" in keys:
        raise InputError("exp.name is one name; the campaign makes the names of its experiments from it")
    return Words(plain, axes, ranges)


def tasks(files: list[str], words: Words) -> list[Task]:
    """Every fold of every combination of values for every recipe file, the folds fastest.

    All are checked before any starts: InputError for what `recipe.load` and `derived.check` refuse, and for two
    that would be the same run.
    """
    if words.ranges:
        raise InputError(
            f"{words.ranges[0].key} has a range, which needs a search; add --trials N, or give a list of values"
        )
    found = [
        task
        for file in files
        for settings in combinations(words.axes)
        for task in trainings(file, words.plain, settings=settings)
    ]
    runs: dict[Run, Task] = {}
    for task in found:
        other = runs.setdefault(task.run, task)
        if other is not task:
            raise InputError(
                f"two trainings would be the same run, {task.name}; give the recipes different names of experiments"
            )
    return found


def combinations(axes: list[Axis]) -> list[dict[str, Any]]:
    """Every way to give each axis one of its values, the last axis fastest."""
    return [
        {axis.key: value for axis, value in zip(axes, values, strict=True)}
        for values in itertools.product(*(axis.values for axis in axes))
    ]


def trainings(file: str, plain: list[str], *, settings: dict[str, Any], exp: str = "") -> list[Task]:
    """The folds of one combination of values; `exp` names its experiment, else the values do."""
    words = [*plain, *(f"{key}={written(value)}" for key, value in settings.items())]
    loaded = load(file, words)
    checks.check(loaded)
    loaded.exp.name = exp or loaded.exp.name + suffix(settings)
    words = [word for word in words if not word.startswith(("exp.name=", "data.fold="))]
    found = []
    for fold in derived.fold_numbers(loaded):
        own = copy.deepcopy(loaded)  # loading again would give the same, and cost a fifth of a second
        own.data.fold = fold
        run = Run(own.exp.name, own.model.backbone, fold, own.seed)
        found.append(Task((file, *words, f"data.fold={fold}", f"exp.name={run.exp}"), own, run, settings))
    return found


def suffix(settings: dict[str, Any]) -> str:
    """What the values that no file name says add to the experiment's: -lr_0.001-batch_per_gpu_16."""
    own = {key: value for key, value in settings.items() if key not in SHARED}
    tails = [short(key, list(own)) for key in own]
    parts = [f"-{tail}_{written(value)}" for tail, value in zip(tails, own.values(), strict=True)]
    return "".join(re.sub(r"[^\w.-]+", "_", part) for part in parts)


def short(key: str, keys: list[str]) -> str:
    """The last part of a dotted key, or all of it when another key ends alike."""
    tail = key.rpartition(".")[2]
    return key if sum(other.rpartition(".")[2] == tail for other in keys) > 1 else tail


def written(value: Any) -> str:
    """A value as a word of the command."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return repr(value) if isinstance(value, float) else str(value)


def _hint(dotted: str) -> Any:
    """The annotated type of a recipe's key, or None when there is no such key."""
    node: Any = Recipe
    for part in dotted.split("."):
        if not dataclasses.is_dataclass(node):
            return None
        node = get_type_hints(node).get(part)
    return None if node is None or dataclasses.is_dataclass(node) else node


def _kinds(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the type alone."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _takes_list(hint: Any) -> bool:
    return any(kind is Any or get_origin(kind) in (list, dict) for kind in _kinds(hint))


def _values(word: str) -> tuple[Any, ...]:
    key, _, _ = word.partition("=")
    try:
        values = OmegaConf.to_container(OmegaConf.from_dotlist([word]))
    except Exception as error:  # YAML inside a value
        raise InputError(f"{word}: {' '.join(str(error).split())}") from None
    for part in key.split("."):
        values = values[part]  # type: ignore[index,call-overload]
    if not isinstance(values, list) or not values:
        raise InputError(f"{word}: a list of one value or more, such as {key}=[a,b]")
    texts = [written(value) for value in values]
    double = [text for text in texts if texts.count(text) > 1]
    if double:
        raise InputError(f"{word}: {double[0]} is in the list twice; take one out")
    return tuple(values)


def _range(key: str, match: re.Match[str], hint: Any) -> Range:
    whole, log = int in _kinds(hint) and float not in _kinds(hint), bool(match["log"])
    if not {int, float} & set(_kinds(hint)):
        raise InputError(f"{key}={match[0]}: a range is for numbers; give a list of values for {key}")
    try:
        low, high = float(match["low"]), float(match["high"])
    except ValueError:
        low, high = 1.0, 0.0
    good = low < high and (low > 0 or not log) and (not whole or (low == int(low) and high == int(high)))
    if not good:
        raise InputError(
            f"{key}={match[0]}: a range is low..high with low below high, log:low..high with both above 0"
            + (", both whole numbers" if whole else "")
        )
    return Range(key, low, high, log, whole)
