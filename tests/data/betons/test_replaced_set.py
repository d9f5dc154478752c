"""A conversion that replaces the betons while a training opens them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastflower.core import files
from fastflower.data.betons import beton_file
from fastflower.data.betons.beton_file import open_beton
from fastflower.data.betons.beton_writer import BetonWriter
from fastflower.data.conversion.assemble import CONTENTS

NAME = "fold0_train.beton"


def write(folder: Path, *, value: int, rows: int) -> None:
    with BetonWriter(folder / NAME, rows) as writer:
        for row in range(rows):
            writer.append_raw(np.full((4, 4, 3), value, np.uint8), label=0, index=row)
        writer.commit()


@pytest.mark.parametrize("rows", [2, 3])
def test_beton_and_manifest_are_of_one_conversion(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another size or of the same, where only the checksums of its rows would tell."""
    write(Path("betons"), value=10, rows=2)
    write(Path("new"), value=20, rows=rows)
    read = beton_file.read_record

    def replaced_after_reading(path: Path, kind: type) -> object:
        manifest = read(path, kind)
        if Path("new").exists() and manifest.rows == 2 and not swapped:
            swapped.append(True)
            files.swap_in(Path("new"), Path("betons"), contents=CONTENTS)
        return manifest

    swapped: list[bool] = []
    monkeypatch.setattr(beton_file, "read_record", replaced_after_reading)
    beton = open_beton(Path("betons", NAME))
    beton.verify()
    assert swapped and beton.rows == rows
