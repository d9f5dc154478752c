"""Photographs as pixels: one way of reading a file, and one stored size, for betons, evaluation and hand-in alike.

Pillow decodes (accurate DCT, smooth chroma); formats are chosen by content, from a short list, and everything
odd about a file is said in one line before it can cost memory or time.
"""

from __future__ import annotations

import io
import os
import stat
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from fastflower.core.errors import InputError

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP")
MOST_PIXELS = 64_000_000  # a header that claims more is refused before anything is allocated
MOST_SCANS = 500  # a progressive JPEG of 40 kB can hold thousands and cost a minute
LONGEST = 4  # stored images are at most this many stored sides long; views nearer to square never see the cut
ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
STRANGERS = (
    (b"version https://git-lfs", "a git-lfs pointer: run `git lfs pull`"),
    (b"<", "a web page or other markup"),
    (b"%PDF", "a PDF"),
    (b"II*\0", "a TIFF"),
    (b"MM\0*", "a TIFF"),
    (b"8BPS", "a Photoshop file"),
    (b"PK\3\4", "a zip archive"),
    (b"\xff\xd8", "a JPEG with a broken header or other than 8 bits a colour"),
)


def read_bytes(path: Path | str) -> bytes:
    """A regular file's bytes; a pipe or device is refused without waiting for it."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise InputError("is not a regular file")
    with os.fdopen(handle, "rb") as file:
        try:
            return file.read()
        except OSError as error:
            raise InputError(f"cannot be read: {error.strerror}") from None


@dataclass(frozen=True)
class Header:
    """What an image file says before it is decoded: the image, not yet read, and how it must be turned."""

    image: Image.Image
    turn: Image.Transpose | None

    @property
    def form(self) -> str:
        """Which of FORMATS it is; an MPO is several JPEGs, of which the first counts."""
        return "JPEG" if self.image.format == "MPO" else str(self.image.format)

    @property
    def jpeg(self) -> bool:
        """Whether it is a JPEG of colours or greys, which betons can hold as it is."""
        return self.form == "JPEG" and self.image.mode in ("RGB", "L")


@contextmanager
def _explained(data: bytes) -> Iterator[None]:
    """Pillow's many exceptions as one line."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of broken EXIF and large files; what matters raises here
        try:
            yield
        except UnidentifiedImageError:
            raise InputError(f"is no image of {', '.join(FORMATS)}{_stranger(data)}") from None
        except Image.DecompressionBombError:
            raise InputError(f"has more than {MOST_PIXELS // 1_000_000} million pixels") from None
        except (OSError, ValueError, SyntaxError, EOFError, struct.error, MemoryError) as error:
            raise InputError(
                f"cannot be decoded: {' '.join(str(error).split()) or type(error).__name__}"
            ) from None


def inspect(data: bytes) -> Header:
    """Look at an image file without decoding it; InputError when it cannot be an image or asks for too much."""
    if not data:
        raise InputError("is empty")
    if data.count(b"\xff\xda") > MOST_SCANS and data[:2] == b"\xff\xd8":
        raise InputError(f"is a JPEG of more than {MOST_SCANS} scans")
    with _explained(data):
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        if width * height > MOST_PIXELS:
            raise InputError(f"has {width} x {height} pixels, more than {MOST_PIXELS // 1_000_000} million")
        if image.format not in ("JPEG", "MPO"):
            image.load()  # others may keep their orientation behind the pixels
        return Header(image, TURNS.get(_orientation(image)))


def suits(name: str, form: str) -> bool:
    """Whether a file's name says its format, or none."""
    said = Path(name).suffix[1:].upper().replace("JPG", "JPEG")
    return said == form or said not in FORMATS


def header_size(path: str) -> tuple[int, int]:
    """(height, width) of an image file by its header alone. InputError when it is no image."""
    with _explained(b""), Image.open(path, formats=FORMATS) as image:
        return image.height, image.width


def decode(data: bytes) -> Image.Image:
    """The first frame as an upright RGB picture.

    Alpha lies over white; 16 bits become 8 by / 257; a broken orientation note is ignored. InputError otherwise.
    """
    header = inspect(data)
    with _explained(data):
        header.image.load()
        image = _rgb(header.image)
    return image if header.turn is None else image.transpose(header.turn)


def stored_size(height: int, width: int, side: int) -> tuple[int, int]:
    """(height, width) with the short side brought down to `side`; smaller images stay as they are."""
    short = min(width, height)
    return (height, width) if short <= side else (round(height * side / short), round(width * side / short))


def stored(image: Image.Image, side: int) -> Image.Image:
    """What a beton holds of a picture: the short side brought down to `side`, smaller ones left as they are.

    Beyond 4 x `side` the long one is cut, evenly so that the centre stays where it was.
    """
    height, width = stored_size(image.height, image.width, side)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (max(0, -(-(length - LONGEST * side) // 2)) for length in (width, height))
    return image.crop((left, top, width - left, height - top)) if left or top else image


def encode_jpeg(pixels: np.ndarray, quality: int) -> bytes:
    """A JPEG without chroma subsampling of uint8 (H, W, 3)."""
    sampling = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    words = [cv2.IMWRITE_JPEG_QUALITY, quality, *sampling]
    _, file = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), words)
    return file.tobytes()


def _orientation(image: Image.Image) -> int:
    if image.format == "JPEG" and not {"exif", "xmp"} & image.info.keys():
        return 1
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # a broken block raises many kinds; the picture is taken as it lies
        return 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _stranger(data: bytes) -> str:
    start = data[:64].lstrip(b"\xef\xbb\xbf \t\r\n")
    for mark, kind in STRANGERS:
        if start.startswith(mark):
            return f", but {kind}"
    return ", but text" if start.isascii() and start.decode("ascii").isprintable() else ""


SIDE = 144


def jpeg(pixels: np.ndarray, quality: int = 80) -> bytes:
    """uint8 (H, W, 3) as JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, optimize=True)
    return buffer.getvalue()


def small(pixels: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) with its short side brought to SIDE."""
    scale = SIDE / min(pixels.shape[:2])
    size = (round(pixels.shape[1] * scale), round(pixels.shape[0] * scale))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
