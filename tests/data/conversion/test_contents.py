"""A conversion is up to date only while every byte that it read is the same, whatever sizes and clocks say."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastflower import convert
from fastflower.core.errors import InputError
from fastflower.data.betons import fold_set
from fastflower.data.readers import contents
from fastflower.recipe import load
from support.sample_images import jpeg, picture

ARGUMENTS = [
    "data.img_size=16",
    "tta.scales=[16]",
    "data.n_splits=2",
    "data.workers=1",
    "robust.kinds=[occlusion]",
    "data.group=none",
]
CHANGED = r"images changed since data/folds.csv was made, such as "


def padded(data: bytes, size: int) -> bytes:
    """The JPEG with a comment that makes the file `size` bytes long."""
    length = size - len(data) - 2
    return data[:2] + b"\xff\xfe" + length.to_bytes(2, "big") + b" " * (length - 2) + data[2:]


@pytest.fixture
def equally_long() -> list[Path]:
    """Eight JPEGs of two classes in folders, all of one size in bytes."""
    files = [jpeg(picture(k)) for k in range(8)]
    size = max(map(len, files)) + 16
    paths = []
    for k, data in enumerate(files):
        path = Path(f"data/train/{k % 2}/{k}.jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(padded(data, size))
        paths.append(path)
    return paths


def run(*arguments: str) -> None:
    assert convert.main([*ARGUMENTS, *arguments]) == 0


def swap(first: Path, second: Path) -> None:
    """Exchange the contents of two files, and give them their old times back."""
    states = [(path, path.read_bytes(), path.stat()) for path in (first, second)]
    for (path, _, state), (_, data, _) in zip(states, reversed(states), strict=True):
        path.write_bytes(data)
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an hour pass, so that every file is old enough to be remembered."""
    now = time.time_ns()
    monkeypatch.setattr(contents.time, "time_ns", lambda: now + 3600 * 10**9)


@pytest.mark.parametrize("old", [False, True], ids=["young", "old"])
def test_photographs_of_equal_length_that_changed_places_are_noticed(
    equally_long: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], old: bool
) -> None:
    if old:
        later(monkeypatch)
    run()
    run()
    assert "up to date: 8 images" in capsys.readouterr().out
    swap(*equally_long[:2])
    with pytest.raises(InputError, match=rf"2 {CHANGED}0/0.jpg"):
        run()
    with pytest.raises(InputError, match=r"is stale: other inputs_hash than"):
        fold_set.open_fold(load(None, ARGUMENTS), 0)
    swap(*equally_long[:2])
    run()
    assert "up to date: 8 images" in capsys.readouterr().out


def test_arrays_whose_pixels_were_all_replaced_are_noticed() -> None:
    rng, y = np.random.default_rng(0), np.array([0, 1] * 6)

    def replace() -> None:
        np.savez("train.npz", x=rng.integers(0, 256, (12, 28, 28), dtype=np.uint8), y=y)

    def stored() -> bytes:
        return fold_set.open_fold(load(None, [*ARGUMENTS, "data.root=train.npz"]), 0).train.row(0).tobytes()

    replace()
    run("data.root=train.npz")
    before = stored()
    replace()
    with pytest.raises(InputError, match=rf"12 {CHANGED}train/00"):
        run("data.root=train.npz")
    Path("data/folds.csv").unlink()
    run("data.root=train.npz")
    assert stored() != before


def test_unlabelled_photographs_that_changed_are_converted_again(
    equally_long: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    loose = [Path("loose", path.name) for path in equally_long[:3]]
    loose[0].parent.mkdir()
    for path, other in zip(loose, equally_long, strict=False):
        path.write_bytes(other.read_bytes())
    run("data.unlabelled=loose", "data.store=jpeg")
    swap(*loose[:2])
    recipe = load(None, [*ARGUMENTS, "data.unlabelled=loose"])
    with pytest.raises(InputError, match=r"unlabelled.beton is stale: other inputs_hash"):
        fold_set.open_unlabelled(recipe)
    capsys.readouterr()
    run("data.unlabelled=loose", "data.store=jpeg")
    assert "up to date" not in capsys.readouterr().out
    assert fold_set.open_unlabelled(recipe).rows == 3


def test_unchanged_files_are_not_read_again(
    equally_long: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    later(monkeypatch)
    run()
    read: list[str] = []
    real = contents._sha256
    monkeypatch.setattr(contents, "_sha256", lambda file: (read.append(file), real(file))[1])
    run()
    fold_set.open_fold(load(None, ARGUMENTS), 0)
    assert read == []
    equally_long[3].touch()
    run()
    assert [Path(file).name for file in read] == ["3.jpg"]
    run()
    assert len(read) == 1 and capsys.readouterr().out.count("up to date") == 3


@pytest.mark.parametrize("damage", ["missing", "cut", "edited", "read-only"])
def test_what_was_remembered_is_only_a_short_cut(
    equally_long: list[Path], monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    later(monkeypatch)
    run()
    memory = Path("data/contents.json")
    text = memory.read_text()
    if damage == "missing":
        memory.unlink()
    elif damage == "read-only":

        def refuse(*_: Any) -> None:
            raise OSError(30, "Read-only file system")

        equally_long[0].touch()
        monkeypatch.setattr(contents, "write_record", refuse)
    else:
        memory.write_text(text[:-40] if damage == "cut" else text.replace("a", "b"))
    run()
    swap(*equally_long[2:4])
    with pytest.raises(InputError, match=rf"2 {CHANGED}0/2.jpg"):
        run()
