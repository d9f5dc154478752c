"""Image files as pixels: the one way to read and shrink an image, for betons, evaluation and bundle alike.

Pillow decodes (accurate DCT, smooth chroma). The format is detected by content, from a short list, and a suspicious
file is refused in one line before it can cost memory or time.
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
from fastflower.data.readers.jpeg_endings import completed

# twin of code/pictures.py: limits, orientation, RGB conversion, stored size
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP")
MAX_PIXELS = 64_000_000  # a header that claims more is refused before anything is allocated
MAX_SCANS = 500  # a progressive JPEG of 40 kB can hold thousands and cost a minute
MAX_ASPECT = 4  # a long stored side is cropped to this many short ones, outside every view nearer to square
THUMBNAIL_SIDE = 144  # short side of an image on a page
ORIENTATION = 0x0112  # the Exif tag
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
FOREIGN_SIGNATURES = (
    (b"version https://git-lfs", "a git-lfs pointer: run `git lfs pull`"),
    (b"<", "a web page or other markup"),
    (b"%PDF", "a PDF"),
    (b"II*\0", "a TIFF"),
    (b"MM\0*", "a TIFF"),
    (b"8BPS", "a Photoshop file"),
    (b"PK\3\4", "a zip archive"),
    (b"\0\0\0\x0cJXL ", "a JPEG XL image: save it as JPEG or PNG"),
    (b"\xff\x0a", "a JPEG XL image: save it as JPEG or PNG"),
    (b"\xff\xd8", "a JPEG with a broken header or other than 8 bits a colour"),
)
CONTAINER_BRANDS = (
    (b"avi", "an AVIF image: save it as JPEG or PNG"),
    *((brand, "a HEIC photograph: save it as JPEG or PNG") for brand in (b"hei", b"hev", b"mif1", b"msf1")),
)


def read_bytes(path: Path | str) -> bytes:
    """Read a regular file; a pipe or device is refused without waiting for it."""
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
    """An image file before it is decoded: Pillow's lazy image, and the transpose that turns it upright."""

    image: Image.Image
    turn: Image.Transpose | None

    @property
    def format(self) -> str:
        """One of FORMATS; an MPO holds several JPEGs, of which the first is read."""
        return "JPEG" if self.image.format == "MPO" else str(self.image.format)

    @property
    def is_jpeg(self) -> bool:
        """True for an RGB or greyscale JPEG, whose bytes a beton can hold unchanged."""
        return self.format == "JPEG" and self.image.mode in ("RGB", "L")


@contextmanager
def _explained(data: bytes) -> Iterator[None]:
    """Turn Pillow's many exceptions into an InputError of one line."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about broken EXIF and large files; serious faults raise below
        try:
            yield
        except UnidentifiedImageError:
            raise InputError(f"is not an image of type {', '.join(FORMATS)}{_foreign_kind(data)}") from None
        except Image.DecompressionBombError:
            raise InputError(f"has more than {MAX_PIXELS // 1_000_000} million pixels") from None
        except (OSError, ValueError, SyntaxError, EOFError, struct.error, MemoryError) as error:
            raise InputError(
                f"cannot be decoded: {' '.join(str(error).split()) or type(error).__name__}"
            ) from None


def inspect(data: bytes) -> Header:
    """Parse an image file's header without decoding; InputError if it is no image or would cost too much to decode."""
    if not data:
        raise InputError("is empty")
    if data.count(b"\xff\xda") > MAX_SCANS and data[:2] == b"\xff\xd8":
        raise InputError(f"is a JPEG of more than {MAX_SCANS} scans")
    with _explained(data):
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise InputError(f"has {width} x {height} pixels, more than {MAX_PIXELS // 1_000_000} million")
        if image.format not in ("JPEG", "MPO"):
            image.load()  # other formats may store the orientation after the pixels
        return Header(image, TURNS.get(_orientation(image)))


def matches_format(name: str, detected: str) -> bool:
    """True unless a file's suffix names one of FORMATS other than the detected one."""
    named = Path(name).suffix[1:].upper().replace("JPG", "JPEG")
    return named == detected or named not in FORMATS


def header_size(path: str) -> tuple[int, int]:
    """(height, width) from an image file's header alone; InputError if it is no image."""
    with _explained(b""), Image.open(path, formats=FORMATS) as image:
        return image.height, image.width


def decode(data: bytes) -> Image.Image:
    """Decode the first frame as an upright RGB image.

    Alpha is composited over white, 16 bits become 8 by / 257, and a broken orientation tag is ignored. Raises
    InputError if the file cannot be decoded.
    """
    header = inspect(data)
    try:
        with _explained(data):
            header.image.load()
    except InputError:
        whole = completed(data, (header.image.height, header.image.width)) if header.is_jpeg else None
        if whole is None:
            raise
        return decode(whole)
    with _explained(data):
        image = _rgb(header.image)
    return image if header.turn is None else image.transpose(header.turn)


def stored_size(height: int, width: int, side: int) -> tuple[int, int]:
    """(height, width) with the short side reduced to `side`; smaller images keep their size."""
    short = min(width, height)
    return (height, width) if short <= side else (round(height * side / short), round(width * side / short))


def stored(image: Image.Image, side: int) -> Image.Image:
    """The image as a beton holds it: its short side reduced to `side` (smaller images keep their size).

    A long side over MAX_ASPECT x `side` is cropped by the same even amount at both ends, so the centre stays.
    """
    height, width = stored_size(image.height, image.width, side)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (max(0, -(-(length - MAX_ASPECT * side) // 2)) for length in (width, height))
    return image.crop((left, top, width - left, height - top)) if left or top else image


def encode_jpeg(pixels: np.ndarray, quality: int) -> bytes:
    """Encode uint8 (H, W, 3) as a JPEG without chroma subsampling."""
    sampling = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    options = [cv2.IMWRITE_JPEG_QUALITY, quality, *sampling]
    _, data = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), options)
    return data.tobytes()


def _orientation(image: Image.Image) -> int:
    if image.format == "JPEG" and not {"exif", "xmp"} & image.info.keys():
        return 1
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # a broken EXIF block raises many types; the image is then taken as upright
        return 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _foreign_kind(data: bytes) -> str:
    """The kind of a file that is no image, by its first bytes, as the end of a message; empty if unknown."""
    if data[4:8] == b"ftyp":
        brands = data[8 : int.from_bytes(data[:4], "big")][:64]
        kinds = (kind for brand, kind in CONTAINER_BRANDS if brand in brands)
        return f", but {next(kinds, 'a video')}"
    start = data[:64].lstrip(b"\xef\xbb\xbf \t\r\n")
    for mark, kind in FOREIGN_SIGNATURES:
        if start.startswith(mark):
            return f", but {kind}"
    return ", but text" if start.isascii() and start.decode("ascii").isprintable() else ""


def thumbnail_jpeg(pixels: np.ndarray, quality: int = 80) -> bytes:
    """Encode uint8 (H, W, 3) as a JPEG for a page."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, optimize=True)
    return buffer.getvalue()


def thumbnail(pixels: np.ndarray) -> np.ndarray:
    """Resize uint8 (H, W, 3) to a short side of THUMBNAIL_SIDE."""
    scale = THUMBNAIL_SIDE / min(pixels.shape[:2])
    size = (round(pixels.shape[1] * scale), round(pixels.shape[0] * scale))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
