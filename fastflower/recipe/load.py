"""Loads recipes: a YAML file, its `base`, and `key=value` changes, checked against the schema key by key."""

from __future__ import annotations

import dataclasses
import difflib
import re
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fastflower.core.errors import InputError
from fastflower.recipe.schema import Recipe, fields_of

ABSENT = object()


def load(path: str | Path | None = None, words: list[str] | None = None) -> Recipe:
    """Read a recipe file and `key=value` words into a validated Recipe.

    Raises InputError for anything unknown, mistyped, out of range, missing or contradictory.
    """
    schema = OmegaConf.structured(Recipe)
    layers = _layers(Path(path), ()) if path else []
    if words:
        layers.append((" ".join(words), _parse_words(words)))
    merged = schema
    for source, layer in layers:
        try:
            merged = OmegaConf.merge(merged, layer)
        except OmegaConfBaseException as error:
            raise InputError(_explain(source, error)) from None
    try:
        recipe: Recipe = OmegaConf.to_object(merged)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise InputError(_explain(str(path), error)) from None
    if not recipe.exp.name:
        recipe.exp.name = Path(path).stem if path else "default"
    if not re.fullmatch(r"\w[\w.-]*", recipe.exp.name):
        raise InputError(f"exp.name = {recipe.exp.name}: letters, digits, _ . - only; it names folders")
    _unify_clip(recipe, layers)
    for dotted, value, spec in fields_of(recipe):
        _check_limits(dotted, value, spec)
    return recipe


def parse_command(argv: list[str]) -> Recipe:
    """`[recipe.yaml] [key=value ...]`, the words of every command."""
    files = [word for word in argv if "=" not in word]
    if len(files) > 1:
        raise InputError(
            f"got {len(files)} recipe files ({', '.join(files)}); give one, then key=value words"
        )
    return load(files[0] if files else None, [word for word in argv if "=" in word])


def to_yaml(recipe: Recipe) -> str:
    """The whole recipe, every key written out; `load` of this text gives the same recipe."""
    tree = dataclasses.asdict(recipe)
    if recipe.opt.clip_grad is None:  # written out, the unused alias would contradict train.clip_grad
        del tree["opt"]["clip_grad"]
    return OmegaConf.to_yaml(OmegaConf.create(tree))


def _layers(path: Path, seen: tuple[Path, ...]) -> list[tuple[str, Any]]:
    """The file's own layer after those of its `base`, oldest first."""
    path = path.resolve()
    if path in seen:
        raise InputError(f"{path}: its base recipes form a circle; remove one `base:`")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise InputError(f"no recipe {path}{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    if re.search(r"^ *\t", text, flags=re.M):
        line = text[: re.search(r"^ *\t", text, flags=re.M).start()].count("\n") + 1  # type: ignore[union-attr]
        raise InputError(f"{path}:{line}: indented with a tab; YAML allows spaces only")
    try:
        layer = OmegaConf.create(text)
    except Exception as error:  # PyYAML and OmegaConf raise many kinds
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(layer, DictConfig):
        raise InputError(
            f"{path}: a recipe is a map of keys, got {type(OmegaConf.to_container(layer)).__name__}"
        )
    base = layer.pop("base", None)
    below = _layers(path.parent / str(base), (*seen, path)) if base else []
    return [*below, (str(path), layer)]


def _parse_words(words: list[str]) -> Any:
    for word in words:
        name = word.partition("=")[0]
        if not re.fullmatch(r"[A-Za-z_][\w]*(\.[A-Za-z_]\w*)*", name):
            raise InputError(f"got '{word}'; a change is written key=value, such as opt.lr_ref=1e-4")
    try:
        return OmegaConf.from_dotlist(words)
    except Exception as error:  # YAML inside a value
        raise InputError(f"{' '.join(words)}: {' '.join(str(error).split())}") from None


def _explain(source: str, error: Exception) -> str:
    """One line for what OmegaConf refuses: the key, what was got, and what is allowed or the nearest real key."""
    full_key = (getattr(error, "full_key", None) or "").partition("[")[0]
    text = str(error).split("\n")[0]
    specs = {dotted: spec for dotted, _, spec in fields_of(Recipe())}
    if "not in" in text:
        near = _nearest(full_key, list(specs))
        return f"{source}: unknown key {full_key}" + (f"; did you mean {near}?" if near else "")
    if full_key in specs:
        value = re.search(r"[Vv]alue '(.*?)'", text)
        got = f" = {value[1].replace('None', 'null')}" if value else ""
        where = "" if f"{full_key}=" in source else f"{source}: "  # a word says all that itself
        return f"{where}{full_key}{got}: must be {_allowed(str(specs[full_key].type))}"
    return f"{source}: a section holds keys, as in opt.lr=1e-3, and no value of its own"


def _nearest(wrong: str, names: list[str]) -> str | None:
    """The key that was meant by an unknown one: of a close name anywhere, or a section, or a key of that name."""
    tails = {name.rsplit(".", 1)[-1]: name for name in names}
    sections = {spec.name: spec.name for spec in dataclasses.fields(Recipe)}
    for candidates, word, cutoff in (
        (sections, wrong, 0.8),
        (dict(zip(names, names, strict=True)), wrong, 0.5),
        (tails, wrong.rsplit(".")[-1], 0.6),
        (sections, wrong.partition(".")[0], 0.6),
    ):
        near = difflib.get_close_matches(word, list(candidates), n=1, cutoff=cutoff)
        if near:
            return candidates[near[0]]
    return None


def _allowed(annotation: str) -> str:
    """What an annotation of the schema allows, in words."""
    words = {
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "str": "text",
        "None": "null",
    }
    kinds = annotation.replace("Auto", "Literal['auto']").split(" | ")
    if "float" in kinds and "int" in kinds:
        kinds.remove("int")
    said = []
    for kind in kinds:
        inner = kind.partition("[")[2].rstrip("]")
        if kind.startswith("list"):
            said.append(f"a list, each {words[inner]}")
        elif kind.startswith("Literal"):
            choices = re.findall(r"'(.*?)'", inner)
            said.append(choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}")
        else:
            said.append(words[kind])
    return " or ".join(said)


def _check_limits(dotted: str, value: Any, spec: dataclasses.Field) -> None:
    words = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    limits = {name: spec.metadata[name] for name in words if name in spec.metadata}
    if not limits:
        return
    for item in value if isinstance(value, list) else [value]:
        if item is None or isinstance(item, str):
            continue
        good = {
            "gt": item > limits.get("gt", float("-inf")),
            "ge": item >= limits.get("ge", float("-inf")),
            "lt": item < limits.get("lt", float("inf")),
            "le": item <= limits.get("le", float("inf")),
        }
        if item != item or not all(good.values()):
            allowed = " and ".join(f"{words[name]} {limit}" for name, limit in limits.items())
            raise InputError(f"{dotted} = {value}: must be {allowed}")


def _unify_clip(recipe: Recipe, layers: list[tuple[str, Any]]) -> None:
    """opt.clip_grad (seed 000 section 10) and train.clip_grad (its appendix) are one key."""
    given = [_value(layer, "opt.clip_grad") for _, layer in layers]
    if all(value is ABSENT for value in given):
        return
    explicit = any(_value(layer, "train.clip_grad") is not ABSENT for _, layer in layers)
    if explicit and recipe.train.clip_grad != recipe.opt.clip_grad:
        raise InputError(
            f"opt.clip_grad = {recipe.opt.clip_grad} and train.clip_grad = {recipe.train.clip_grad} "
            "are the same key; give one"
        )
    recipe.train.clip_grad = recipe.opt.clip_grad


def _value(layer: Any, dotted: str) -> Any:
    """What a layer says for a key, None included; ABSENT when it says nothing."""
    section, _, name = dotted.partition(".")
    below = layer.get(section)
    return below.get(name) if OmegaConf.is_dict(below) and name in below else ABSENT
