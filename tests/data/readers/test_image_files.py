from __future__ import annotations

import io
import os
import socket
import struct
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastflower.core.errors import InputError
from fastflower.data.readers import image_files
from fastflower.data.readers.sources import FileSource
from support.sample_images import YCCK, YCCK_COLOURS, predictor_pictures

RNG = np.random.default_rng(0)


def picture(height: int = 60, width: int = 80) -> Image.Image:
    coarse = RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, form: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def rgb(data: bytes) -> np.ndarray:
    return np.array(image_files.decode(data))


@pytest.mark.parametrize("form", ["PNG", "BMP", "GIF", "WEBP", "JPEG"])
def test_formats_are_detected_by_content(form: str) -> None:
    data = encoded(picture(), form, **({"lossless": True} if form == "WEBP" else {}))
    Path("named.jpg").write_bytes(data)
    with Image.open(io.BytesIO(data)) as image:
        want = np.asarray(image.convert("RGB"))
    assert np.array_equal(rgb(image_files.read_bytes("named.jpg")), want)


@pytest.mark.parametrize("turn", range(1, 9))
def test_orientation_is_applied_once(turn: int) -> None:
    upright = np.asarray(picture())
    lying = {  # the stored pixels for each tag, by the Exif standard's names of the 0th row and column
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[turn]
    exif = Image.Exif()
    exif[image_files.ORIENTATION] = turn
    image = image_files.decode(encoded(Image.fromarray(np.ascontiguousarray(lying)), "PNG", exif=exif))
    assert np.array_equal(np.asarray(image), upright)
    assert (image_files.inspect(encoded(picture(), exif=exif)).turn is None) is (turn == 1)


@pytest.mark.parametrize("turn", [0, 9, 65535])
def test_an_invalid_orientation_is_ignored(turn: int) -> None:
    exif, image = Image.Exif(), picture()
    exif[image_files.ORIENTATION] = turn
    assert image_files.inspect(encoded(image, exif=exif)).turn is None
    assert np.array_equal(rgb(encoded(image, exif=exif)), rgb(encoded(image)))


@pytest.mark.parametrize("block", [b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0garbage", b"Exif\0\0"])
def test_a_broken_exif_block_is_ignored(block: bytes) -> None:
    image = picture()
    assert np.array_equal(rgb(encoded(image, exif=block)), rgb(encoded(image)))


def test_transparency_is_composited_over_white() -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    grey = Image.new("LA", (4, 4), (0, 0))
    assert (rgb(encoded(clear, "PNG")) == 255).all()
    assert rgb(encoded(half, "PNG"))[0, 0].tolist() == [255, 127, 127]
    assert (rgb(encoded(grey, "PNG")) == 255).all()
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    assert (rgb(encoded(palette, "PNG", transparency=0)) == 255).all()


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 256 * 4).astype(np.uint16).reshape(4, 256)
    got = rgb(encoded(Image.fromarray(ramp), "PNG"))
    assert np.array_equal(got[..., 0], ramp // 257)
    assert abs(got.mean() - 127) < 1


@pytest.mark.parametrize("mode", ["L", "1", "CMYK", "YCbCr", "P"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    source = picture().convert(mode)
    data = encoded(source, "JPEG", subsampling=0) if mode in ("CMYK", "YCbCr") else encoded(source, "PNG")
    got = rgb(data).astype(int)
    assert got.shape == (60, 80, 3)
    assert np.abs(got - np.asarray(source.convert("RGB"))).mean() < 3


def test_inverted_inks_of_adobe_become_colours() -> None:
    want = np.array(YCCK_COLOURS).reshape(2, 2, 3).repeat(8, 0).repeat(8, 1)
    for data in (YCCK, encoded(Image.fromarray(want.astype(np.uint8)).convert("CMYK"), quality=95)):
        assert b"Adobe" in data and not image_files.inspect(data).is_jpeg
        assert np.abs(rgb(data).astype(int) - want).mean() < 3


def test_only_grey_and_rgb_jpegs_keep_their_bytes() -> None:
    assert image_files.inspect(encoded(picture())).is_jpeg
    assert image_files.inspect(encoded(picture().convert("L"))).is_jpeg
    assert image_files.inspect(encoded(picture(), progressive=True)).is_jpeg
    assert not image_files.inspect(encoded(picture().convert("CMYK"))).is_jpeg
    assert not image_files.inspect(encoded(picture(), "PNG")).is_jpeg


def test_every_truncation_is_detected() -> None:
    data = encoded(picture(), quality=90)
    for cut in np.random.default_rng(1).integers(0, len(data) - 2, 300):
        with pytest.raises(InputError):
            image_files.decode(data[:cut])


def header_bomb(form: str = "JPEG", side: int = 65500) -> bytes:
    """A small file whose header claims a square image of this side."""
    data = bytearray(encoded(picture(), form))
    if form == "JPEG":
        size = data.index(b"\xff\xc0") + 5
        data[size : size + 4] = struct.pack(">HH", side, side)
    else:
        data[16:24] = struct.pack(">II", side, side)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def many_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan, a refinement, is repeated."""
    data = encoded(picture(200, 300), progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * count + data[-2:]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer: run `git lfs pull`"),
        (b"<!DOCTYPE html><html></html>", "but a web page"),
        (b"hello there", "but text"),
        (b"%PDF-1.4", "but a PDF"),
        (encoded(picture(), "TIFF"), "is not an image of type JPEG, PNG, BMP, GIF, WEBP, but a TIFF"),
        (header_bomb(), "more than 64 million"),
        (header_bomb("PNG"), "more than 64 million"),
        (header_bomb("JPEG", 12_000), "has 12000 x 12000 pixels, more than 64 million"),
        (header_bomb("PNG", 12_000), "has 12000 x 12000 pixels, more than 64 million"),
        (encoded(picture())[:400], "image bytes cannot be decoded"),
        (many_scans(5000), "is a JPEG of more than 500 scans"),
    ],
)
def test_a_file_that_is_no_image_is_refused_in_one_line(data: bytes, message: str) -> None:
    message = message.replace("image bytes ", "")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak of memory
    before, start = peak(), time.monotonic()
    with pytest.raises(InputError, match=message) as error:
        rgb(data)
    assert "\n" not in str(error.value)
    assert time.monotonic() - start < 2
    assert peak() - before < 300 * 1024


def peak() -> int:
    """This process's peak memory in kB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


FOREIGN = {
    form: encoded(picture(), form) for form in ("TIFF", "PPM", "ICO", "TGA", "PCX", "SGI", "DDS", "EPS")
}
FOREIGN |= {
    "PSD": b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 9, 9, 8, 3) + bytes(300),
    "FITS": b"SIMPLE  =                    T".ljust(80) + b"END".ljust(2800),
    "PDF": b"%PDF-1.4\n%\xe2\xe3\n",
    "float TIFF": encoded(Image.fromarray(np.ones((9, 9), np.float32)), "TIFF"),
}


@pytest.mark.parametrize("form", FOREIGN)
def test_foreign_parsers_are_never_started(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.init()
    allowed = {name: Image.OPEN[name] for name in image_files.FORMATS}
    foreign = dict.fromkeys(Image.OPEN, (lambda *a, **k: pytest.fail("a foreign parser ran"), None))
    monkeypatch.setattr(Image, "OPEN", foreign | allowed)
    Path("named.jpg").write_bytes(FOREIGN[form])
    for read in (image_files.decode, image_files.inspect):
        with pytest.raises(InputError, match=r"is not an image of type JPEG, PNG, BMP, GIF, WEBP"):
            read(FOREIGN[form])
    assert FileSource(Path()).size("named.jpg") is None


def test_the_size_is_read_from_the_header_alone() -> None:
    for form in image_files.FORMATS:
        Path("named.jpg").write_bytes(encoded(picture(), form))
        assert FileSource(Path()).size("named.jpg") == (60, 80)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Path("large.jpg").write_bytes(header_bomb("PNG", 12_000))
        assert FileSource(Path()).size("large.jpg") == (12_000, 12_000)


def test_anything_but_a_regular_file_is_refused_without_waiting() -> None:
    os.mkfifo("pipe.jpg")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket.jpg")
    start = time.monotonic()
    for name, message in (
        ("pipe.jpg", "is not a regular file"),
        ("socket.jpg", "cannot be read: No such device or address"),
        ("/dev/zero", "is not a regular file"),
        (".", "is not a regular file"),
        ("no.jpg", "cannot be read: No such file"),
    ):
        with pytest.raises(InputError, match=message):
            image_files.read_bytes(Path(name))
    assert time.monotonic() - start < 2


@pytest.mark.parametrize(
    ("size", "want"),
    [
        ((600, 400), (150, 100)),
        ((400, 600), (100, 150)),
        ((80, 70), (80, 70)),
        ((1, 1), (1, 1)),
        ((5000, 1), (400, 1)),
        ((3000, 300), (400, 100)),
        ((301, 100), (301, 100)),
        ((1001, 33), (399, 33)),
    ],
)
def test_the_short_side_is_reduced_and_the_long_one_is_bounded(
    size: tuple[int, int], want: tuple[int, int]
) -> None:
    assert image_files.stored(Image.new("RGB", size), 100).size == want


def test_the_crop_keeps_the_centre() -> None:
    image = picture(100, 1601)
    pixels, cut = np.asarray(image), np.asarray(image_files.stored(image, 100))
    left = (1601 - cut.shape[1]) // 2
    assert (1601 - cut.shape[1]) % 2 == 0
    assert np.array_equal(cut, pixels[:, left : left + cut.shape[1]])


def test_reencoding_keeps_colour_at_full_resolution() -> None:
    image = picture()
    data = image_files.encode_jpeg(np.asarray(image), 95)
    assert np.abs(rgb(data).astype(int) - np.asarray(image)).mean() < 2
    with Image.open(io.BytesIO(data)) as again:
        assert [tuple(layer[1:3]) for layer in again.layer] == [(1, 1)] * 3  # type: ignore[attr-defined]


def test_the_predictor_reads_the_same_pixels() -> None:
    pictures = predictor_pictures()
    exif = Image.Exif()
    exif[image_files.ORIENTATION] = 6
    odd = [
        encoded(picture(200, 300), exif=exif),
        encoded(picture().convert("CMYK")),
        YCCK,
        encoded(picture().convert("RGBA"), "WEBP"),
        encoded(Image.fromarray(RNG.integers(0, 65536, (90, 70)).astype(np.uint16)), "PNG"),
        encoded(picture().quantize(7), "GIF"),
        encoded(picture().convert("1"), "PNG"),
    ]
    for data in odd:
        Path("odd").write_bytes(data)
        theirs = pictures.read(b"odd")[0]
        ours = image_files.decode(data)
        assert np.array_equal(np.asarray(theirs), np.asarray(ours))
        assert np.array_equal(
            np.asarray(pictures.stored(theirs, 50)), np.asarray(image_files.stored(ours, 50))
        )
