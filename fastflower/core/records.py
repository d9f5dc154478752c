"""Records: dataclasses stored as JSON files, each with one writer and one reader, a version and a checksum.

A record is a dataclass with two class variables: FORMAT, the version of its layout, and REMEDY, the instruction that
error messages end with. The checksum covers every field, so a flipped bit or a manual edit is reported.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import types
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar, Union, get_args, get_origin, get_type_hints

from fastflower.core.errors import CorruptionError, InputError, of_machine
from fastflower.core.files import digest, finite, write_atomic


class Record(Protocol):
    """A dataclass that can be written as a JSON file."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    FORMAT: ClassVar[int]
    REMEDY: ClassVar[str]


R = TypeVar("R", bound=Record)
T = TypeVar("T")


def write_record(path: Path, record: Record) -> None:
    """Write a record atomically, fields in the order of the class; NaN and infinity become null."""
    content = {"format": record.FORMAT, **to_plain(record)}
    text = json.dumps(
        {**content, "checksum": _checksum(content)}, indent=1, ensure_ascii=False, allow_nan=False
    )
    write_atomic(path, text + "\n")


def read_record(path: Path, kind: type[R]) -> R:
    """Read a record.

    Raises InputError when the file is missing or of another version, CorruptionError when it is damaged; both end with
    the record's REMEDY.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; {kind.REMEDY}") from None
    except OSError as error:
        raise of_machine(error) from None
    except UnicodeDecodeError as error:
        raise CorruptionError(f"{path} is damaged: not UTF-8 ({error.reason}); {kind.REMEDY}") from None
    try:
        content = json.loads(text)
        checksum = content.pop("checksum")
        version = content["format"]
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        raise CorruptionError(f"{path} is damaged: not a complete record; {kind.REMEDY}") from None
    if version != kind.FORMAT:
        raise InputError(f"{path} has format {version}, this version reads {kind.FORMAT}; {kind.REMEDY}")
    if checksum != _checksum(content):
        raise CorruptionError(f"{path} is damaged or was edited: its checksum differs; {kind.REMEDY}")
    del content["format"]
    try:
        return from_plain(kind, content)
    except FieldError as error:
        raise CorruptionError(f"{path}: {error}; {kind.REMEDY}") from None


class FieldError(ValueError):
    """A field that is missing, unknown or of the wrong type; the text names it with its path in the record."""


def to_plain(value: Any) -> Any:
    """A record, or any value in one, as JSON's types: dicts with text keys, lists, numbers, text, null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(name): to_plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return finite(value)


def from_plain(kind: type[T], value: Any, where: str = "") -> T:
    """A value of the annotated type `kind` from JSON's types; raises FieldError with the path `where` it failed."""
    return _convert(kind, value, where)


def _convert(kind: Any, value: Any, where: str) -> Any:
    if kind is Any:
        return value
    origin, arguments = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, value, where)
    if origin in (Union, types.UnionType):
        return _union(kind, value, where)
    if origin is Literal:
        if value not in arguments:
            raise _wrong(where, value, f"one of {', '.join(map(str, arguments))}")
        return value
    if origin is list or kind is list:
        _require(value, list, where=where, name="a list")
        kind_of_item = arguments[0] if arguments else Any
        return [_convert(kind_of_item, item, f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is tuple:
        return _tuple(arguments, value, where)
    if origin is dict or kind is dict:
        _require(value, dict, where=where, name="a map")
        kind_of_key, kind_of_item = arguments or (str, Any)
        return {
            _key(kind_of_key, name, where): _convert(kind_of_item, item, _below(where, name))
            for name, item in value.items()
        }
    return _scalar(kind, value, where)


def _dataclass(kind: Any, value: Any, where: str) -> Any:
    _require(value, dict, where=where, name="a map")
    hints, values = _hints(kind), {}
    for field in dataclasses.fields(kind):
        if field.name in value:
            values[field.name] = _convert(hints[field.name], value[field.name], _below(where, field.name))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise FieldError(f"{_below(where, field.name)} is missing")
    unknown = sorted(set(value) - {field.name for field in dataclasses.fields(kind)})
    if unknown:
        raise FieldError(f"{_below(where, unknown[0])} is unknown")
    return kind(**values)


def _union(kind: Any, value: Any, where: str) -> Any:
    errors = []
    for choice in get_args(kind):
        try:
            return _convert(choice, value, where)
        except FieldError as error:
            errors.append(error)
    raise errors[-1] if len(errors) == 1 else _wrong(where, value, str(kind).replace("typing.", ""))


def _tuple(arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    _require(value, list, where=where, name="a list")
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(_convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if len(value) != len(arguments):
        raise FieldError(f"{where} has {len(value)} items, must have {len(arguments)}")
    return tuple(
        _convert(kind, item, f"{where}[{i}]")
        for i, (kind, item) in enumerate(zip(arguments, value, strict=True))
    )


def _scalar(kind: Any, value: Any, where: str) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind in (None, type(None)):
        _require(value, type(None), where=where, name="null")
        return None
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise _wrong(where, value, _NAMES.get(kind, kind.__name__))
    return value


_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def _key(kind: Any, name: str, where: str) -> Any:
    try:
        return name if kind in (str, Any) else kind(name)
    except ValueError:
        raise FieldError(f"{where} has the key '{name}', must be {_NAMES.get(kind, kind.__name__)}") from None


def _require(value: Any, kind: type, *, where: str, name: str) -> None:
    if not isinstance(value, kind):
        raise _wrong(where, value, name)


def _wrong(where: str, value: Any, wanted: str) -> FieldError:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return FieldError(
        f"{where or 'the record'} is {text[:60]}{'...' if len(text) > 60 else ''}, must be {wanted}"
    )


def _below(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _checksum(content: dict[str, Any]) -> str:
    """Sixteen hex characters over the content, whatever the order of its keys and the layout of the file."""
    return digest(json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":")))
