"""Faults of inputs, disks and clocks that a conversion meets: each is refused in one line, or changes nothing."""

from __future__ import annotations

import base64
import builtins
import io
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from painted import jpeg, picture
from PIL import Image

from fastflower import convert, recipe
from fastflower.data import folds, sets, sources, workers
from fastflower.data.betons import BetonWriter, open_beton
from fastflower.data.decode import decode_file
from fastflower.errors import EnvironmentFault, InputError

WORDS = [
    "data.img_size=16",
    "tta.scales=[16]",
    "data.n_splits=2",
    "data.workers=1",
    "robust.kinds=[occlusion]",
]


def project(
    more: dict[str, bytes] | None = None, ids: Callable[[int], str] = lambda k: str(k % 2)
) -> list[str]:
    """Eight photographs of two classes, and `more` files, all labelled."""
    files = {f"{k}.jpg": jpeg(picture(k)) for k in range(8)} | (more or {})
    Path("data/train").mkdir(parents=True)
    rows = ["filename,category_id"]
    for k, (name, data) in enumerate(files.items()):
        Path("data/train", name).write_bytes(data)
        quoted = name.replace('"', '""')
        rows.append(f'"{quoted}",{ids(k)}')
    Path("data/train_labels.csv").write_bytes(os.fsencode("\n".join(rows) + "\n"))
    return list(files)


def run(*words: str) -> None:
    assert convert.main([*WORDS, *words]) == 0


def test_files_without_a_label_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    project()
    Path("data/train/loose.jpg").write_bytes(b"1")
    run()
    assert "note: 1 images below data.root have no label, such as loose.jpg" in capsys.readouterr().out


def test_classes_of_one_name_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    names = project()
    rows = [f"{n},{k % 4},{['rose', 'lily', 'rose', 'iris'][k % 4]}" for k, n in enumerate(names)]
    Path("data/train_labels.csv").write_text("filename,category_id,english_name\n" + "\n".join(rows) + "\n")
    run()
    assert (
        "english_name: 1 names stand for several classes, such as 'rose' for 0, 2" in capsys.readouterr().out
    )


def test_a_header_that_promises_more_than_the_file_holds_is_refused() -> None:
    data = bytearray(jpeg(picture(1)))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 2] = (96).to_bytes(2, "big")  # 48 lines become 96
    project({"bad.jpg": bytes(data)})
    with pytest.raises(InputError, match=r"1 of 9 images cannot be used: bad.jpg cannot be decoded"):
        run()


# 16 x 16 pixels in arithmetic coding, by libjpeg-turbo
ARITHMETIC = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABALDA4MChAODQ4SERATGCgaGBYWGDEjJR0oOjM9PDkzODdASFxOQERXRTc4UG1RV19iZ2hnPk1xeXBk"
    "eFxlZ2P/2wBDARESEhgVGC8aGi9jQjhCY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2P/yQARCAAQABAD"
    "ASIAAhEBAxEB/8wACgAQEAUBEBEF/9oADAMBAAIRAxEAPwD/AGYIOabr4brQ6LoZdLuq8yJ2VJyijndA/9k="
)


def test_every_kind_of_jpeg_that_libjpeg_reads_is_stored() -> None:
    files = {
        "progressive.jpg": jpeg(picture(20, (16, 14)), progressive=True),
        "cmyk.jpg": jpeg(picture(21, (16, 14)).convert("CMYK"), progressive=True),
        "arithmetic.jpg": ARITHMETIC,
    }
    project(files)
    run("data.store=raw", "data.group=none")
    seen = set()
    for fold in (0, 1):
        opened = sets.open_fold(recipe.load(None, WORDS), fold)
        for row, index in enumerate(opened.val.index):
            name = opened.folds.filenames[index]
            if name in files:
                seen.add(name)
                want = np.asarray(Image.open(io.BytesIO(files[name])).convert("RGB"))
                assert np.array_equal(opened.val.row(row).reshape(want.shape), want)
    assert seen == set(files)


@pytest.mark.parametrize(
    ("start", "bits", "said"),
    [
        (0xC1, 12, "is no image of JPEG, .*, but a JPEG with a broken header or other than 8 bits a colour"),
        (0xC3, 8, r"cannot be decoded \(Unsupported JPEG process: SOF type 0xc3\)"),  # lossless
        (0xC5, 8, r"cannot be decoded \(Unsupported JPEG process: SOF type 0xc5\)"),  # hierarchical
    ],
)
def test_other_kinds_of_jpeg_are_named(start: int, bits: int, said: str) -> None:
    data = bytearray(jpeg(picture(1)))
    at = data.index(b"\xff\xc0")
    data[at + 1], data[at + 4] = start, bits
    project({"odd.jpg": bytes(data)})
    with pytest.raises(InputError, match=rf"1 of 9 images cannot be used: odd.jpg {said}"):
        run()


def test_consoles_that_show_little_change_nothing(repo: Path) -> None:
    project({"花.jpg": jpeg(picture(30)), "草.jpg": jpeg(picture(30))})
    words = [sys.executable, "-m", "fastflower.convert", *WORDS]
    plain = {
        **os.environ,
        "PYTHONPATH": str(repo),
        "LC_ALL": "C",
        "COLUMNS": "20",
        "PYTHONIOENCODING": "ascii",
    }
    said = subprocess.run(words, env=plain, capture_output=True, timeout=120)
    assert said.returncode == 0, said.stderr
    assert b"another's bytes with another label, such as \\u8349.jpg and \\u82b1.jpg" in said.stdout
    closed = shlex.join([*words, "data.home=other"]) + " >&-"
    done = subprocess.run(["sh", "-c", closed], env=plain, capture_output=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, b"")
    for path in (*Path("data/betons").iterdir(), Path("data/folds.csv"), Path("data/duplicates.csv")):
        assert path.read_bytes() == Path("other", path.relative_to("data")).read_bytes()


def test_every_cut_of_a_jpeg_is_refused_by_the_decoder() -> None:
    data = jpeg(picture(2, (64, 48)))
    decode_file(data, 48, 64, (48, 64))
    for cut in range(data.index(b"\xff\xda") + 20, len(data) - 2):
        with pytest.raises(InputError, match="cannot be decoded"):
            decode_file(data[:cut], 48, 64, (48, 64))


@pytest.mark.parametrize("size", [(1, 1), (2, 63), (63, 2), (7, 1), (70_000, 2)])
def test_extreme_shapes_are_stored_and_opened(size: tuple[int, int]) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", size, (9, 99, 199)).save(buffer, "PNG")
    names = project({"odd.png": buffer.getvalue()})
    run("data.group=none")
    for fold in (0, 1):
        opened = sets.open_fold(recipe.load(None, WORDS), fold)
        for beton in (opened.train, opened.val):
            for row in np.flatnonzero(beton.index == names.index("odd.png")):
                assert 1 <= min(beton.heights[row], beton.widths[row]) <= 18
                assert max(beton.heights[row], beton.widths[row]) <= 4 * 18


def test_odd_names_go_through_a_conversion_byte_by_byte() -> None:
    odd = [
        "a b.jpg",
        "c,d.jpg",
        'e"f.jpg',
        "=g.jpg",
        "花🌸.jpg",
        "e\u0301.jpg",
        "\u00e9.jpg",
        "x" * 250 + ".jpg",
        "n\nl.jpg",
    ]
    project({name: jpeg(picture(20 + k)) for k, name in enumerate(odd)})
    run()
    found = folds.read_folds(Path("data/folds.csv"))
    assert set(odd) < set(found.filenames)
    sets.open_fold(recipe.load(None, WORDS), 0)


def test_words_and_odd_numbers_are_ordinary_labels() -> None:
    tokens = ["nan", "NA", "null", "None", "-3", "9" * 40, "1e5", "１２"]
    project(ids=lambda k: tokens[k % 8])
    run("data.split=ratio")
    assert set(folds.read_folds(Path("data/folds.csv")).category_ids) == set(tokens)


def test_a_read_error_is_listed_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    project()
    real = sources.read_bytes

    def broken(path: str) -> bytes:
        if str(path).endswith("3.jpg"):
            raise InputError("cannot be read: Input/output error")
        return real(path)

    monkeypatch.setattr(sources, "read_bytes", broken)
    with pytest.raises(
        InputError, match=r"1 of 8 images cannot be used: 3.jpg cannot be read: Input/output error"
    ):
        run()


def test_a_file_that_changes_after_it_was_read_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    project()
    run("data.home=want")
    real = sources.read_bytes

    def read_then_swap(path: str) -> bytes:
        data = real(path)
        if "/data/train/" in str(path):
            Path(path).write_bytes(jpeg(picture(99)))
        return data

    monkeypatch.setattr(sources, "read_bytes", read_then_swap)
    run()
    for path in Path("want/betons").glob("*.beton"):
        assert path.read_bytes() == Path("data/betons", path.name).read_bytes()


@pytest.mark.parametrize("number", [0, 1, 5, 9])
def test_a_full_disk_at_any_write_leaves_the_old_set(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    project()
    run()
    before = {path.name: path.read_bytes() for path in Path("data/betons").iterdir()}
    count, real = iter(range(10_000)), BetonWriter.append

    def append(writer: BetonWriter, *row: Any) -> None:
        if next(count) == number:
            raise OSError(28, "No space left on device", "beton")
        real(writer, *row)

    monkeypatch.setattr(BetonWriter, "append", append)
    with pytest.raises(
        EnvironmentFault, match=r"data.home = data: No space left on device .*; make room there"
    ):
        run("robust.level=medium")
    assert {path.name: path.read_bytes() for path in Path("data/betons").iterdir()} == before
    assert not list(Path("data").glob(".betons.*"))


def test_short_writes_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Short(io.FileIO):
        def write(self, data: Any) -> int:
            return super().write(memoryview(data).cast("B")[:7])

    rows = [np.full((4, 5, 3), k, np.uint8) for k in range(6)]
    real = Path.open
    with monkeypatch.context() as patch:
        patch.setattr(
            Path,
            "open",
            lambda path, mode, buffering: io.BufferedWriter(Short(path, "w"), 64),  # type: ignore[arg-type]
        )
        writer = BetonWriter(tmp_path / "a.beton", 6)
    assert Path.open is real
    with writer:
        for k, pixels in enumerate(rows):
            writer.raw(pixels, k, k)
        writer.commit({})
    beton = open_beton(tmp_path / "a.beton")
    beton.verify()
    assert [int(beton.row(k)[0]) for k in range(6)] == list(range(6))


def test_inputs_are_never_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    project()
    real = builtins.open

    def watched(path: Any, mode: str = "r", *more: Any, **options: Any) -> Any:
        assert not (set(mode) & set("wax+") and "data/train/" in str(path))
        return real(path, mode, *more, **options)

    monkeypatch.setattr(builtins, "open", watched)
    before = sorted(os.listdir("data/train"))
    run()
    assert sorted(os.listdir("data/train")) == before


def test_clocks_decide_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    names = project()
    run()
    for name in names:
        os.utime(Path("data/train", name), (4e9, 4e9))
    run()
    assert "up to date" in capsys.readouterr().out


def test_an_error_of_the_work_itself_reaches_the_caller() -> None:
    def work(k: int) -> int:
        if k == 3:
            raise InputError("row 3 is wrong")
        workers.beat()
        return k

    for count in (1, 2):
        with pytest.raises(InputError, match="row 3 is wrong"):
            list(workers.run(work, ((k,) for k in range(8)), count, lambda done: None))
    heard: list[int] = []
    assert list(
        workers.run(lambda k: (workers.beat(), k)[1], ((k,) for k in range(8)), 2, heard.append)
    ) == list(range(8))
    assert heard[-1] == 8


def test_the_distribution_is_drawn() -> None:
    project()
    run()
    with Image.open("data/class_stats.png") as image:
        assert image.size == (990, 440)
        assert len(np.unique(np.asarray(image.convert("L")))) > 20
