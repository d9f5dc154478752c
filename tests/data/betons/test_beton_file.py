"""Betons: FFCV's own reader opens them, unfinished ones do not open, and every flipped bit is noticed."""

from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from isal.isal_zlib import crc32
from PIL import Image

from fastflower.core.errors import CorruptionError, EnvironmentFault, InputError
from fastflower.core.records import write_record
from fastflower.data.betons import beton_file, beton_writer
from fastflower.data.betons.beton_file import RAW, Beton, EncodedImage, open_beton
from fastflower.data.betons.beton_writer import BetonWriter
from fastflower.data.betons.manifest import Origin, StorageSettings, manifest_path
from fastflower.data.decode.kernel import Crop
from fastflower.data.loaders import eval_images, train_images

SETTINGS = StorageSettings(format=2, stored_side=36, store="raw", jpeg_quality=95, combos=(("blur", "low"),))
ORIGIN = Origin(split="train", fold=0, settings=SETTINGS, inputs_hash="a1", folds_hash="b2")


def picture(height: int, width: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8))
    return np.array(small.resize((width, height), Image.Resampling.BICUBIC))


def jpeg(pixels: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", **{"quality": 90, **options})
    return file.getvalue()


def write(path: Path, rows: int = 6) -> Beton:
    with BetonWriter(path, rows) as writer:
        for i in range(rows):
            pixels = picture(20 + i, 31, i)
            if i % 2:
                writer.append_raw(pixels, label=i % 3, index=100 + i)
            else:
                writer.append_jpeg(jpeg(pixels), height=20 + i, width=31, label=i % 3, index=100 + i)
        writer.commit(ORIGIN)
    return open_beton(path)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_columns_bytes_and_manifest(tmp_path: Path) -> None:
    beton = write(tmp_path / "a.beton")
    beton.verify()
    assert beton.labels.tolist() == [0, 1, 2, 0, 1, 2] and beton.labels.dtype == np.int64
    assert beton.index.tolist() == list(range(100, 106)) and beton.rows == 6
    assert beton.descriptors["height"].tolist() == [20, 21, 22, 23, 24, 25]
    assert set(beton.descriptors["width"]) == {31}
    assert beton.origin == ORIGIN and len(beton.manifest.checksums()) == 6
    for row in range(6):
        pixels = picture(20 + row, 31, row)
        assert beton.row(row).tobytes() == (pixels.tobytes() if row % 2 else jpeg(pixels))


@pytest.mark.slow
def test_ffcv_reads_it(tmp_path: Path) -> None:
    from ffcv import types
    from ffcv.reader import Reader

    for dtype, ffcv_dtype in ((beton_file.HEADER, types.HeaderType), (beton_file.FIELD, types.FieldDescType)):
        assert dtype.itemsize == ffcv_dtype.itemsize and dtype.names == ffcv_dtype.names
    beton, reader = write(tmp_path / "a.beton"), Reader(str(tmp_path / "a.beton"))
    assert reader.field_names == ["image", "label", "index"] and reader.num_samples == 6
    assert reader.metadata_type.itemsize == beton_file.metadata_type(1).itemsize
    assert reader.metadata["f1"].tolist() == beton.labels.tolist()
    assert reader.metadata["f2"].tolist() == beton.index.tolist()
    assert reader.metadata["f0"]["height"].tolist() == beton.descriptors["height"].tolist()
    assert reader.metadata["f0"]["data_ptr"].tolist() == reader.alloc_table["ptr"].tolist()
    assert reader.alloc_table["size"].tolist() == beton.descriptors["size"].tolist()


def test_same_rows_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "a.beton"), write(tmp_path / "b.beton")
    assert (tmp_path / "a.beton").read_bytes() == (tmp_path / "b.beton").read_bytes()


def test_no_row_crosses_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beton_writer, "PAGE", 1 << 12)
    with BetonWriter(tmp_path / "a.beton", 9) as writer:
        for i, height in enumerate((9, 20, 30, 5, 200, 40, 41, 42, 1)):  # the fifth is larger than a page
            writer.append_raw(picture(height, 31, i), 0, i)
        writer.commit()
    beton = open_beton(tmp_path / "a.beton")
    beton.verify()
    page = int(beton.data[: beton_file.HEADER.itemsize].view(beton_file.HEADER)["page_size"][0])
    first, last = beton.descriptors["offset"], beton.descriptors["offset"] + beton.descriptors["size"] - 1
    assert page == 1 << 15 and (first // page == last // page).all()


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.beton"
    write(path)
    content, rng = path.read_bytes(), np.random.default_rng(0)
    edges = {0, 3, 8, 16, 25, 1000, 3147, 3160, len(content) - 1, len(content) - 100, len(content) - 145}
    for position in [*edges, *rng.integers(0, len(content), 200).tolist()]:
        damaged = bytearray(content)
        damaged[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(CorruptionError, match=r"a\.beton.*run convert again"):
            open_beton(path).verify()


@pytest.mark.parametrize("images_per_row", [1, 2])
def test_rows_are_checked_when_they_are_read_and_only_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images_per_row: int
) -> None:
    path, checked = tmp_path / "a.beton", []
    with BetonWriter(path, 4, images_per_row=images_per_row) as writer:
        for row in range(4):
            pixels = [picture(9, 8, 2 * row + side) for side in range(images_per_row)]
            writer.append(0, row, *(EncodedImage(RAW, p.data.cast("B"), 9, 8) for p in pixels))
        writer.commit()
    last = int(open_beton(path)._allocation["ptr"][-1])
    content = path.read_bytes()
    for bit in range(0, 8 * 9 * 8 * 3, 37):  # of the last image, of the second of a pair
        damaged = bytearray(content)
        damaged[last + bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        os.utime(path, ns=(0, bit))  # a clock may be too coarse to tell two writes apart
        beton = open_beton(path)
        view = {"size": (8, 8), "factor": 1.0, "interpolation": "bilinear"}
        eval_images(beton, np.array([2, 0]), **view)
        for _ in range(2):
            with pytest.raises(CorruptionError, match=r"row 3 .*; delete it and run convert again"):
                eval_images(beton, np.array([1, 3]), **view)
            with pytest.raises(CorruptionError, match="row 3 "):
                keys = np.zeros(1, np.uint64)
                train_images(beton, np.array([3]), keys=keys, size=(8, 8), crop=Crop())
    path.write_bytes(content)
    rows = np.arange(4)
    open_beton(path).verify_rows(rows)
    monkeypatch.setattr(beton_file, "crc32", lambda data, crc=0: checked.append(data) or crc32(data, crc))
    beton = open_beton(path)
    checked.clear()  # of the head
    beton.verify_rows(rows)
    assert not checked


def test_zeros_between_pages_are_checked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beton_writer, "PAGE", 1 << 12)
    path = tmp_path / "a.beton"
    beton = write(path)
    ends = (beton.descriptors["offset"] + beton.descriptors["size"]).astype(np.int64)
    gaps = beton.descriptors["offset"][1:].astype(np.int64) - ends[:-1]
    after = int(gaps.argmax())
    assert gaps[after] > 3
    with open(path, "r+b") as file:
        file.seek(ends[after] + 3)
        file.write(b"x")
    with pytest.raises(CorruptionError, match=f"row {after + 1} "):
        open_beton(path).verify()


def test_damage_names_the_row_of_the_label_table(tmp_path: Path) -> None:
    path = tmp_path / "a.beton"
    offset = int(write(path).descriptors["offset"][3])
    with open(path, "r+b") as file:
        file.seek(offset + 100)
        file.write(b"\x01\x02\x03")
    with pytest.raises(CorruptionError, match=r"row 3 \(row 103 of folds.csv\): its bytes have changed"):
        open_beton(path).verify()


@pytest.mark.parametrize("change", [-1, 1, -3000, 4096])
def test_other_sizes_are_refused(tmp_path: Path, change: int) -> None:
    path = tmp_path / "a.beton"
    size = write(path).data.size
    os.truncate(path, size + change)
    with pytest.raises(CorruptionError, match=f"{size + change} bytes, its manifest says {size}"):
        open_beton(path)


def test_missing_and_unfinished(tmp_path: Path) -> None:
    path = tmp_path / "a.beton"
    with pytest.raises(InputError, match=r"no beton .*a\.beton; run convert"):
        open_beton(path)
    write(path)
    manifest_path(path).unlink()
    with pytest.raises(InputError, match="convert did not finish"):
        open_beton(path)
    os.truncate(path, 0)
    manifest_path(path).write_text("{}")
    with pytest.raises(CorruptionError, match="not a complete record"):
        open_beton(path)


def test_manifest_of_fewer_rows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.beton"
    manifest = write(path).manifest
    for inconsistent in (
        replace(manifest, rows=5),
        replace(manifest, rows=5, crc=manifest.crc[: 5 * 8]),
        replace(manifest, rows=10**9, crc=""),
    ):
        write_record(manifest_path(path), inconsistent)
        with pytest.raises(CorruptionError):
            open_beton(path)


def test_read_back_catches_a_disk_that_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, fsync = tmp_path / "a.beton", os.fsync

    def lying(handle: int) -> None:
        fsync(handle)
        os.pwrite(handle, b"\x55\xaa", 4000)

    write(path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lying)
    with pytest.raises(CorruptionError):
        write(path)
    assert path.read_bytes() == before and names(tmp_path) == ["a.beton", "a.beton.json"]


def test_too_few_and_too_many_rows(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least one row"):
        BetonWriter(tmp_path / "a.beton", 0)
    with BetonWriter(tmp_path / "a.beton", 2) as writer:
        writer.append_raw(picture(4, 4, 0), 0, 0)
        with pytest.raises(InputError, match="1 rows written, 2 announced"):
            writer.commit()
    with BetonWriter(tmp_path / "a.beton", 1) as writer:
        writer.append_raw(picture(4, 4, 0), 0, 0)
        with pytest.raises(InputError, match="more rows than the 1 announced"):
            writer.append_raw(picture(4, 4, 0), 0, 0)
        with pytest.raises(InputError, match="raw rows are uint8"):
            writer.append_raw(np.zeros((4, 4)), 0, 0)
    with BetonWriter(tmp_path / "a.beton", 1) as writer, pytest.raises(InputError, match="sides reach 65535"):
        writer.append_jpeg(b"x", height=70000, width=3, label=0, index=0)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EnvironmentFault, match=r"cannot write \(No space left on device\)"):
        write(tmp_path / "a.beton")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault, match="cannot write"):
        BetonWriter(tmp_path / "file" / "a.beton", 1)


def test_a_killed_writer_leaves_the_old_beton(tmp_path: Path) -> None:
    path = tmp_path / "a.beton"
    before = write(path).data.tobytes()
    script = (
        "import sys, os, signal, numpy as np\nfrom pathlib import Path\n"
        "from fastflower.data.betons.beton_writer import BetonWriter\n"
        "writer = BetonWriter(Path(sys.argv[1]), 2)\nwriter.append_raw(np.zeros((9, 9, 3), np.uint8), 0, 0)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", script, str(path)]).returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 3
    assert open_beton(path).data.tobytes() == before
    write(path)  # the next writer removes the temporary file
    assert names(tmp_path) == ["a.beton", "a.beton.json"]


def test_readers_keep_the_file_they_opened(tmp_path: Path) -> None:
    path = tmp_path / "a.beton"
    old = write(path)
    content = old.data.tobytes()
    write(path, rows=3)
    assert old.data.tobytes() == content and open_beton(path).rows == 3
    path.unlink()
    old.verify()
