"""Loads recipes: a YAML file, its `base`, and `key=value` changes, checked against the schema key by key."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fastflower.core import metric, runs
from fastflower.core.errors import InputError, of_machine
from fastflower.core.own_parts import is_own
from fastflower.recipe.checks import check_name
from fastflower.recipe.schema import Recipe, fields_of

ABSENT = object()
SUFFIXES = (".yaml", ".yml")
LARGEST = 1_000_000  # bytes of a recipe
DEEPEST, MOST_ALIASES = 20, 20  # of YAML: the schema needs a depth of 4


@dataclass(frozen=True)
class Layer:
    """Keys that one source gives; `source` is a file, or the changes of the command line joined by spaces."""

    source: str
    keys: DictConfig
    is_file: bool = True

    def names(self, dotted: str) -> bool:
        """True if this layer gives the key a value."""
        return _value(self.keys, dotted) is not ABSENT


def load(path: str | Path | None = None, changes: list[str] | None = None) -> Recipe:
    """Read a recipe file and `key=value` changes into a validated Recipe.

    Raises InputError for anything unknown, mistyped, out of range, missing or contradictory.
    """
    return merge(read_layers(path, changes), path)


def read_layers(path: str | Path | None = None, changes: list[str] | None = None) -> list[Layer]:
    """The layers of a recipe, each of which overrules those before it: base recipes, the file, the changes."""
    layers = _layers(Path(path), ()) if path else []
    if changes:
        layers.append(Layer(" ".join(changes), _parse_changes(changes), is_file=False))
    return layers


def merge(layers: list[Layer], path: str | Path | None) -> Recipe:
    """The recipe of the defaults and these layers; `path` of the file names the experiment if no layer does."""
    merged = _schema()
    for layer in layers:
        unset = sorted(OmegaConf.missing_keys(layer.keys))
        if unset:  # OmegaConf would take the default
            raise InputError(
                f"{layer.source}: {unset[0]} has no value yet; replace the ??? by one, or remove the key"
            )
        try:
            merged = OmegaConf.merge(merged, layer.keys)
        except OmegaConfBaseException as error:
            raise InputError(_explain(layer.source, error, layer.keys)) from None
    try:
        recipe: Recipe = OmegaConf.to_object(merged)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise InputError(_explain(str(path), error)) from None
    name = recipe.exp.name or (Path(path).stem if path else "default")
    check_name(name)
    recipe = dataclasses.replace(
        recipe,
        exp=dataclasses.replace(recipe.exp, name=name),
        train=dataclasses.replace(recipe.train, clip_grad=_clip_grad(recipe, layers)),
    )
    for dotted, value, spec in fields_of(recipe):
        _check_limits(dotted, value, spec)
    metric.parse(recipe.select.metric)
    return recipe


@functools.cache
def _schema() -> Any:
    """The schema as OmegaConf checks it, built once: that takes four times as long as all else. Never changed."""
    return OmegaConf.structured(Recipe)


def to_yaml(recipe: Recipe) -> str:
    """The recipe as YAML with every key; `load` of this text gives an equal recipe."""
    tree = dataclasses.asdict(recipe)
    if recipe.opt.clip_grad is None:  # written out, the unused alias would contradict train.clip_grad
        del tree["opt"]["clip_grad"]
    return OmegaConf.to_yaml(OmegaConf.create(tree))


def _layers(path: Path, seen: tuple[Path, ...]) -> list[Layer]:
    """The layers of a recipe file and its base recipes, the outermost base first."""
    path = path.resolve()
    if path in seen:
        raise InputError(f"{path}: its base recipes form a circle; remove one `base:`")
    text = _read(path)
    tab = re.search(r"^ *\t", text, flags=re.M)
    if tab:
        line = text[: tab.start()].count("\n") + 1
        raise InputError(
            f"{path}:{line}: indented with a tab; YAML allows spaces only: replace each tab by two"
        )
    if isinstance(
        _check_structure(text, str(path)), yaml.ScalarEvent
    ):  # OmegaConf would take its text for a key
        raise InputError(f"{path}: a recipe is a map of keys, got text")
    try:
        layer = OmegaConf.create(text)
    except Exception as error:  # PyYAML and OmegaConf raise many kinds
        raise InputError(f"{path}: not valid YAML: {_cause(error)}") from None
    if not isinstance(layer, DictConfig):
        raise InputError(
            f"{path}: a recipe is a map of keys, got {type(OmegaConf.to_container(layer)).__name__}"
        )
    _keep_text(layer, yaml.load(text, yaml.BaseLoader))
    base = layer.pop("base", None)
    try:
        bases = _layers(path.parent / str(base), (*seen, path)) if base else []
    except InputError as error:
        if seen or not str(error).startswith("no recipe "):
            raise
        raise InputError(f"{path}: base = {base}: {error}") from None
    return [*bases, Layer(str(path), layer)]


def _check_structure(text: str, source: str) -> yaml.NodeEvent | None:
    """Refuse YAML that would exhaust stack or memory, by its events: PyYAML and OmegaConf build it by recursion.

    Returns the event of the outermost node.
    """
    depth, aliases, root = 0, 0, None
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            root = root or (event if isinstance(event, yaml.NodeEvent) else None)
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            aliases += isinstance(event, yaml.AliasEvent)
            if depth > DEEPEST or aliases > MOST_ALIASES:
                raise InputError(
                    f"{source}: not a recipe: more than {DEEPEST} lists and maps in each other, or {MOST_ALIASES} "
                    "aliases; the deepest value of a recipe is a list of lists in a section"
                )
    except yaml.YAMLError as error:
        raise InputError(f"{source}: not valid YAML: {_cause(error)}") from None
    return root


def _cause(error: Exception) -> str:
    """The cause and the line of a YAML error, without the text around it, which may be of any file."""
    mark = getattr(error, "problem_mark", None)
    cause = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    return " ".join(cause.split())[:200] + (f" (line {mark.line + 1})" if mark else "")


def _read(path: Path) -> str:
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path}: a recipe, or its base, is a file that ends in {' or '.join(SUFFIXES)}")
    try:
        if path.exists() and not (path.is_file() and path.stat().st_size <= LARGEST):
            raise InputError(f"{path}: a recipe is a file of at most {LARGEST // 1000} kB")
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.stem, [p.stem for p in path.parent.glob("*.yaml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}.yaml?" if near else ""
        installed = runs.shipped("recipes") / path.name
        if installed.is_file() and installed != path:
            hint = f"; did you mean {installed}, which came with fastflower?"
        raise InputError(f"no recipe {path}{hint}") from None
    except OSError as error:
        raise of_machine(error) from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error})") from None


def _parse_changes(changes: list[str]) -> Any:
    for change in changes:
        name = change.partition("=")[0]
        if not re.fullmatch(r"[A-Za-z_][\w]*(\.[A-Za-z_]\w*)*", name):
            key = key_of_option(name)
            example = f"here {key}={change.partition('=')[2]}" if key else "such as opt.lr_ref=1e-4"
            raise InputError(f"got '{change}'; a change is written key=value, {example}")
        _check_structure(change.partition("=")[2], change[:100])
    try:
        layer = OmegaConf.from_dotlist(changes)
        for change in reversed(changes):  # of several for one key the last holds, and becomes text first
            dotted, _, text = change.partition("=")
            written = yaml.load(text, yaml.BaseLoader)
            for name in reversed(dotted.split(".")):
                written = {name: written}
            _keep_text(layer, written)
    except Exception as error:  # YAML inside a value
        raise InputError(f"{' '.join(changes)[:200]}: {_cause(error)}") from None
    return layer


def _keep_text(layer: DictConfig, written: Any) -> None:
    """Give keys whose values are text what was written, where YAML reads 007, 1e3, 12:30 or off as something else.

    `written` is the same YAML with all its scalars as text; null stays null.
    """
    for dotted in _text_keys():
        value, text = _value(layer, dotted), written
        for name in dotted.split("."):
            text = text.get(name) if isinstance(text, dict) else None
        if isinstance(text, str) and isinstance(value, bool | int | float):
            OmegaConf.update(layer, dotted, text)
        elif isinstance(text, list) and OmegaConf.is_list(value) and len(text) == len(value):
            for position, item in enumerate(text):
                if isinstance(item, str) and isinstance(value[position], bool | int | float):
                    value[position] = item


@functools.cache
def _text_keys() -> tuple[str, ...]:
    """The keys that take text, one of several words, or a list of texts, and no other type."""
    kinds = {"str", "Own", "Auto", "list[str]"}
    return tuple(
        dotted
        for dotted, _, spec in fields_of(Recipe())
        if all(kind in kinds or kind.startswith("Literal") for kind in str(spec.type).split(" | "))
    )


def _explain(source: str, error: Exception, layer: DictConfig | None = None) -> str:
    """Turn an error of OmegaConf into one line: the key, the value, and the allowed values or the nearest key."""
    full_key = (getattr(error, "full_key", None) or "").partition("[")[0]
    text = str(error).split("\n")[0]
    specs = {dotted: spec for dotted, _, spec in fields_of(Recipe())}
    if "not in" in text:
        if not re.fullmatch(r"[\w.-]{1,60}", full_key):
            return f"{source}: not a recipe: it has keys that are no names"
        near = nearest(full_key, list(specs))
        return f"{source}: unknown key {full_key}" + (f"; did you mean {near}?" if near else "")
    if full_key in specs:
        value = re.search(r"[Vv]alue '(.*?)'", text)
        got = f" = {value[1].replace('None', 'null')}" if value else ""
        where = "" if f"{full_key}=" in source else f"{source}: "  # a change shows its key itself
        kind = str(specs[full_key].type)
        return f"{where}{full_key}{got}: must be {allowed(kind)}{_meant(got.removeprefix(' = '), kind)}"
    return (
        f"{source}: {_valued_section(error, layer)} is a section: it holds keys, as in opt.lr=1e-3 or, in a file, one "
        "a line with a space after the colon, and has no value itself"
    )


def _valued_section(error: Exception, layer: DictConfig | None) -> str:
    """The section of the schema to which a layer gives a value."""
    sections = [
        field.name for field in dataclasses.fields(Recipe) if dataclasses.is_dataclass(field.default_factory)
    ]
    given = [
        name
        for name in sections
        if layer is not None and name in layer and not OmegaConf.is_dict(layer[name])
    ]
    return (given or [getattr(error, "full_key", None) or "this"])[0]


KNOWN_AS = {  # other programs' names of settings, which resemble no key or a wrong one
    "learning_rate": "opt.lr",
    "batch_size": "train.batch_per_gpu",
    "epochs": "sched.cosine_epochs",
    "num_epochs": "sched.cosine_epochs",
    "t_max": "sched.cosine_epochs",
    "min_lr": "sched.eta_min",
    "scheduler": "sched.name",
    "optimizer": "opt.name",
    "num_workers": "data.workers",
    "dropout": "model.drop_rate",
    "label_smoothing": "reg.ls_eps",
    "use_amp": "train.amp",
    "use_semi_supervised": "semi.enabled",
    "num_folds": "data.n_splits",
    "k": "data.n_splits",
    "image_size": "data.img_size",
    "seeds": "seed",
    "layers": "model.backbone",
    "num_blocks": "model.backbone",
    "base_channels": "model.backbone",
    "arch_variant": "model.backbone",
    "width_mult": "model.backbone",
    "use_fusion": "model.backbone",
    "use_focal_loss": "loss.name",
}


VALUES_KNOWN_AS = {  # other programs' names of choices
    "cosineannealinglr": "warmup_cosine with sched.warmup_epochs=0",
    "cosineannealingwithwarmuplr": "warmup_cosine",
    "reducelronplateau": "plateau",
    "cycliclr": "cyclic",
    "crossentropyloss": "ce",
    "bcewithlogitsloss": "bce",
    "focalloss": "focal",
    "balancedsoftmax": "bsce",
    "null": "none",
}


def key_of_option(option: str) -> str | None:
    """The key that an option such as --lr or --batch-size means in other programs, if it is known."""
    name = option.lstrip("-").replace("-", "_").lower()
    keys = [dotted for dotted, _, _ in fields_of(Recipe()) if name in (dotted, dotted.rpartition(".")[2])]
    return KNOWN_AS.get(name) or (keys[0] if len(keys) == 1 else None)


def nearest(unknown: str, names: list[str]) -> str | None:
    """The key or section most similar to an unknown key: by full name, by last component, or by section."""
    if known := KNOWN_AS.get(unknown.lower()):
        return known
    last_components = {name.rsplit(".", 1)[-1]: name for name in names}
    sections = {spec.name: spec.name for spec in dataclasses.fields(Recipe)}
    for candidates, text, cutoff in (
        (sections, unknown, 0.8),
        (dict(zip(names, names, strict=True)), unknown, 0.5),
        (last_components, unknown.rsplit(".")[-1], 0.6),
        (sections, unknown.partition(".")[0], 0.6),
    ):
        near = difflib.get_close_matches(text, list(candidates), n=1, cutoff=cutoff)
        if near:
            return candidates[near[0]]
    return None


def _meant(value: str, annotation: str) -> str:
    """The hint at the choice that a refused value means, by its name elsewhere or by likeness; empty without one."""
    choices = re.findall(r"'(.*?)'", annotation)
    known = VALUES_KNOWN_AS.get(value.lower(), "")
    near = [known] if known.partition(" ")[0] in choices else difflib.get_close_matches(value, choices, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def allowed(annotation: str) -> str:
    """The values that an annotation of the schema allows, in plain English."""
    names = {
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "str": "text",
        "None": "null",
        "Own": "module:function",
    }
    kinds = annotation.strip("( )").replace("Auto", "Literal['auto']").split(" | ")
    if "float" in kinds and "int" in kinds:
        kinds.remove("int")
    alternatives = []
    for kind in kinds:
        inner = kind.partition("[")[2].rstrip("]")
        if kind.startswith("list"):
            alternatives.append(f"a list, each {names[inner]}")
        elif kind.startswith("Literal"):
            choices = re.findall(r"'(.*?)'", inner)
            alternatives.append(choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}")
        else:
            alternatives.append(names[kind])
    return " or ".join(alternatives)


def _check_limits(dotted: str, value: Any, spec: dataclasses.Field) -> None:
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    kind = str(spec.type)
    if "Own" in kind and value not in re.findall(r"'(.*?)'", kind) and not is_own(value):
        raise InputError(f"{dotted} = {value}: must be {allowed(kind)}{_meant(str(value), kind)}")
    if not _is_finite(value):
        raise InputError(f"{dotted} = {value}: must be finite; nan and inf are no settings")
    limits = {name: spec.metadata[name] for name in signs if name in spec.metadata}
    if not limits:
        return
    for item in value if isinstance(value, list) else [value]:
        if item is None or isinstance(item, str):
            continue
        within = (
            item > limits.get("gt", float("-inf")),
            item >= limits.get("ge", float("-inf")),
            item < limits.get("lt", float("inf")),
            item <= limits.get("le", float("inf")),
        )
        if item != item or not all(within):
            bounds = " and ".join(f"{signs[name]} {limit}" for name, limit in limits.items())
            raise InputError(f"{dotted} = {value}: must be {bounds}")


def _is_finite(value: Any) -> bool:
    """True if a value, and every number in its lists and maps, is neither infinite nor NaN."""
    if isinstance(value, dict):
        return all(_is_finite(item) for pair in value.items() for item in pair)
    if isinstance(value, list):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _clip_grad(recipe: Recipe, layers: list[Layer]) -> float | None:
    """The value of train.clip_grad or of its alias opt.clip_grad; InputError when both are given and differ."""
    if not any(layer.names("opt.clip_grad") for layer in layers):
        return recipe.train.clip_grad
    both = any(layer.names("train.clip_grad") for layer in layers)
    if both and recipe.train.clip_grad != recipe.opt.clip_grad:
        raise InputError(
            f"opt.clip_grad = {recipe.opt.clip_grad} and train.clip_grad = {recipe.train.clip_grad} "
            "are the same key; give one"
        )
    return recipe.opt.clip_grad


def _value(layer: Any, dotted: str) -> Any:
    """The value that a layer gives a key, which may be None; ABSENT when it does not name the key."""
    section, _, name = dotted.rpartition(".")
    keys = layer.get(section) if section else layer
    return keys.get(name) if OmegaConf.is_dict(keys) and name in keys else ABSENT
