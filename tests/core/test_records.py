"""Records are read back as written, and every defect of a file is reported in one line."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest

from fastflower.core.errors import CorruptionError, InputError
from fastflower.core.records import FieldError, from_plain, read_record, to_plain, write_record


@dataclass(frozen=True)
class Score:
    name: str
    value: float | None
    interval: tuple[float, float] = (0.0, 1.0)


@dataclass(frozen=True)
class Table:
    FORMAT: ClassVar[int] = 2
    REMEDY: ClassVar[str] = "run evaluate again"

    kind: Literal["clean", "corrupt"]
    rows: list[Score]
    by_fold: dict[int, list[float]] = field(default_factory=dict)
    extra: Any = None
    done: bool = True


PATH = Path("table.json")


def test_a_record_is_read_as_it_was_written() -> None:
    table = Table("clean", [Score("top-1", 0.1 + 0.2, (1e-300, 0.4))], {0: [1 / 3], 11: []}, {"a": [1, None]})
    write_record(PATH, table)
    assert read_record(PATH, Table) == table


def test_numpy_numbers_and_non_finite_values_become_json() -> None:
    plain = to_plain(
        Table("clean", [Score("a", np.float64("nan")), Score("b", np.float32(0.5))], done=np.bool_(True))
    )  # type: ignore[arg-type]
    assert plain["rows"][0]["value"] is None and plain["rows"][1]["value"] == 0.5 and plain["done"] is True


def test_every_flipped_bit_is_detected() -> None:
    write_record(PATH, Table("clean", [Score("top-1", 0.25)], {3: [1.5]}))
    content = PATH.read_bytes()
    for bit in range(8 * len(content)):
        broken = bytearray(content)
        broken[bit // 8] ^= 1 << bit % 8
        PATH.write_bytes(broken)
        try:
            table = read_record(PATH, Table)
        except InputError as error:
            assert str(PATH) in str(error) and "run evaluate again" in str(error)
        else:  # only white space changed
            assert table == Table("clean", [Score("top-1", 0.25)], {3: [1.5]})


def test_every_truncated_file_is_detected() -> None:
    write_record(PATH, Table("clean", []))
    content = PATH.read_bytes()
    for length in range(len(content) - 2):
        PATH.write_bytes(content[:length])
        with pytest.raises(CorruptionError, match=r"table\.json.*run evaluate again"):
            read_record(PATH, Table)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "dark"}, r'kind is "dark", must be one of clean, corrupt'),
        ({"rows": 3}, "rows is 3, must be a list"),
        ({"rows": [{"name": "a"}]}, r"rows\[0\]\.value is missing"),
        ({"rows": [{"name": 1, "value": 1}]}, r"rows\[0\]\.name is 1, must be text"),
        ({"rows": [{"name": "a", "value": "b"}]}, r'rows\[0\]\.value is "b", must be float \| None'),
        (
            {"rows": [{"name": "a", "value": 1, "interval": [1]}]},
            r"rows\[0\]\.interval has 1 items, must have 2",
        ),
        ({"by_fold": {"x": []}}, "by_fold has the key 'x', must be a whole number"),
        ({"by_fold": {"1": [True]}}, r"by_fold\.1\[0\] is true, must be a number"),
        ({"done": 1}, "done is 1, must be true or false"),
        ({"kind": "gone"}, "kind is missing"),
        ({"colour": "red"}, "colour is unknown"),
    ],
)
def test_a_field_of_another_type_is_named_with_its_path(changes: dict[str, Any], words: str) -> None:
    write_record(PATH, Table("clean", []))
    content = {
        name: value
        for name, value in json.loads(PATH.read_text()).items()
        if name not in ("checksum", "format")
    }
    content = {name: value for name, value in {**content, **changes}.items() if value != "gone"}
    with pytest.raises(FieldError, match=f"^{words}$"):
        from_plain(Table, content)


def test_another_version_and_a_missing_file_name_the_remedy() -> None:
    with pytest.raises(InputError, match=r"table\.json: no such file; run evaluate again"):
        read_record(PATH, Table)
    write_record(PATH, Table("clean", []))
    PATH.write_text(PATH.read_text().replace('"format": 2', '"format": 7'))
    with pytest.raises(
        InputError, match=r"table\.json has format 7, this version reads 2; run evaluate again"
    ):
        read_record(PATH, Table)


def test_an_edit_by_hand_is_reported() -> None:
    write_record(PATH, Table("clean", [Score("top-1", 0.25)]))
    PATH.write_text(PATH.read_text().replace("0.25", "0.99"))
    with pytest.raises(CorruptionError, match=r"table\.json is damaged or was edited: its checksum differs"):
        read_record(PATH, Table)


def test_a_hostile_file_is_reported_in_one_line() -> None:
    for text in ("[" * 100_000, "null", "[]", "{}", '{"checksum": 1}', "\x00"):
        PATH.write_text(text)
        with pytest.raises(CorruptionError, match="not a complete record; run evaluate again"):
            read_record(PATH, Table)
