"""JPEGs that decoders warn of although every pixel is there are converted; those that lack pixels are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastflower import convert
from fastflower.core.errors import InputError
from fastflower.data.betons import fold_set
from fastflower.data.folds import read_folds
from fastflower.data.readers import image_files
from fastflower.data.readers.jpeg_endings import completed
from fastflower.recipe import load
from support.sample_images import jpeg, picture, predictor_pictures

SIZE = (30, 36)  # width, height
SMALL = ["data.img_size=16", "tta.scales=[16]", "data.n_splits=2", "data.workers=1", "data.group=none"]


def plain(**options: object) -> bytes:
    return jpeg(picture(3, SIZE), **options)


def jfif(major: int, minor: int) -> bytes:
    data = bytearray(plain())
    at = data.index(b"JFIF\0") + 5
    data[at : at + 2] = bytes([major, minor])
    return bytes(data)


def scan_parameters(*values: int) -> bytes:
    data = bytearray(plain())
    at = data.index(b"\xff\xda") + 11
    data[at : at + 3] = bytes(values)
    return bytes(data)


PROGRESSIVE, GREY = plain(progressive=True), jpeg(picture(3, SIZE).convert("L"))
HARMLESS = {
    "jfif 0.00": jfif(0, 0),
    "jfif 2.01": jfif(2, 1),
    "jfif 3.00": jfif(3, 0),
    "scan 0 0 0": scan_parameters(0, 0, 0),
    "scan 0 62 0": scan_parameters(0, 62, 0),
    "scan 1 63 16": scan_parameters(1, 63, 16),
    "one byte before the end": plain()[:-2] + b"\x5a\xff\xd9",
    "bytes before the end": plain()[:-2] + b"\x12\x34\x56\x78\x9a\xbc\xde" + b"\xff\xd9",
    "zeros before the end": plain()[:-2] + bytes(400) + b"\xff\xd9",
    "fill bytes before the end": plain()[:-2] + b"\xff" * 9 + b"\xff\xd9",
    "zeros instead of the end": plain()[:-2] + bytes(2),
    "many zeros instead of the end": plain()[:-2] + bytes(3000),
    "no end": plain()[:-2],
    "scan 0 0 0, no end": scan_parameters(0, 0, 0)[:-2],
    "half an end": plain()[:-1],
    "bytes after the end": plain() + b"camera notes",
    "progressive, no end": PROGRESSIVE[:-2],
    "progressive, zeros instead of the end": PROGRESSIVE[:-2] + bytes(64),
    "progressive, bytes before the end": PROGRESSIVE[:-2] + b"\x12\x34\xff\xd9",
    "grey, zeros instead of the end": GREY[:-2] + bytes(16),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_every_pixel_is_there_for_the_trainer_and_the_predictor(name: str) -> None:
    original = PROGRESSIVE if "progressive" in name else GREY if "grey" in name else plain()
    expected = np.asarray(image_files.decode(original))
    assert np.array_equal(np.asarray(image_files.decode(HARMLESS[name])), expected)
    Path("a.jpg").write_bytes(HARMLESS[name])
    assert np.array_equal(np.asarray(predictor_pictures().read(b"a.jpg")[0]), expected)


@pytest.mark.parametrize("store", ["raw", "jpeg"])
def test_a_conversion_stores_all_their_pixels(store: str) -> None:
    Path("data/train").mkdir(parents=True)
    for k, data in enumerate(HARMLESS.values()):
        Path(f"data/train/{k:02d}.jpg").write_bytes(data)
    rows = "".join(f"{k:02d}.jpg,{k % 2}\n" for k in range(len(HARMLESS)))
    Path("data/train_labels.csv").write_text(f"filename,category_id\n{rows}")
    words = [*SMALL, "data.img_size=32", "tta.scales=[32]", f"data.store={store}", "data.split=kfold"]
    assert convert.main(words) == 0
    names = read_folds(Path("data/folds.csv")).filenames
    seen = 0
    for fold in (0, 1):
        opened = fold_set.open_fold(load(None, words), fold)
        for beton in (opened.train, opened.val):
            beton.verify()
            for row, index in enumerate(beton.index):
                data = beton.row(row).tobytes()
                stored = np.asarray(image_files.decode(data)) if data[:2] == b"\xff\xd8" else beton.row(row)
                expected = np.asarray(image_files.decode(Path("data/train", names[index]).read_bytes()))
                assert np.array_equal(stored.reshape(expected.shape), expected)
                seen += 1
    assert seen == 2 * len(HARMLESS)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("padding", [0, 1, 2, 40, 4000])
def test_files_that_lack_pixels_stay_refused(padding: int, progressive: bool) -> None:
    """Cut at any byte of the scan, with zeros in place of the rest, with or without an end marker."""
    data = plain(progressive=progressive)
    start = data.rindex(b"\xff\xda") + 20
    # the last code may end anywhere in the last byte: without it the padding can be all that is lacking
    for cut in np.random.default_rng(padding).integers(start, len(data) - 4, 25):
        for ending in (b"", b"\xff\xd9"):
            assert completed(data[:cut] + bytes(padding) + ending, SIZE[::-1]) is None


def test_a_progressive_file_without_its_last_scans_stays_refused() -> None:
    """Cut between two scans it decodes without a warning, only less sharply."""
    data = plain(progressive=True)
    starts = [at for at in range(len(data)) if data.startswith(b"\xff\xda", at)]
    assert len(starts) > 4 and completed(data[:-2], SIZE[::-1]) == data
    for start in starts[1:]:
        table = data.rfind(b"\xff\xc4", 0, start)  # the Huffman table that belongs to the scan
        cut = table if data.find(b"\xff\xda", table) == start else start
        for ending in (b"", b"\xff\xd9", bytes(50)):
            assert completed(data[:cut] + ending, SIZE[::-1]) is None


def test_a_hole_of_zeros_stays_refused() -> None:
    data = plain()
    middle = (data.index(b"\xff\xda") + len(data)) // 2
    holed = data[:middle] + bytes(len(data) - middle - 2) + b"\xff\xd9"
    with pytest.raises(InputError, match="cannot be decoded"):
        assert completed(holed, SIZE[::-1]) is None
        image_files.decode(data[:middle])
