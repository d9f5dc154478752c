"""Lists photographs, reads them, reduces them to the stored size and cuts the views of the networks.

With Pillow alone it gives the same pixels as the trainer's conversion and evaluation.
"""
# twin of fastflower/data/readers/image_files.py: limits, orientation, RGB conversion, stored size;
# and of image_folders.py there: hidden and system entries

from __future__ import annotations

import io
import os
import stat
import warnings
from typing import Any

import numpy as np
from PIL import Image

SUFFIXES = (b".jpg", b".jpeg", b".png", b".bmp", b".gif", b".webp")
SYSTEM_NAMES = (  # what systems and editors put between photographs
    *(b"__macosx", b"@eadir", b"@recycle", b"#recycle", b"#snapshot", b"$recycle.bin", b"recycler"),
    *(b"system volume information", b"lost+found", b"thumbs.db", b"ehthumbs.db", b"desktop.ini"),
    *(b"@recently-snapshot", b"@sharebin", b"@tmp", b"~snapshot", b"recycled", b"found.000", b"__pycache__"),
)
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP")
MOST_PIXELS = 64_000_000  # a header that claims more is refused before anything is decoded
MOST_BYTES = 1 << 29  # of a file; MOST_PIXELS take half of it at most, even uncompressed
MOST_SCANS = 500  # a progressive JPEG of 40 kB can hold thousands and cost a minute
LONGEST = 4  # stored pictures are cut to at most this many times the stored side
FEWEST_PIXELS = 0.05  # of a JPEG that ends early; the prediction from less would be a guess
END_OF_JPEG = b"\xff\xd9"
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}

warnings.filterwarnings(
    "ignore", module="PIL"
)  # of broken EXIF and the like, which the picture does not need


def find(folder: bytes) -> tuple[list[bytes], list[bytes]]:
    """List the photographs below a folder and the ignored entries: relative paths with '/', sorted by bytes.

    Photographs are regular files with an image suffix. Names are bytes, so that they reach the table unchanged under
    any locale. Hidden and system entries are copies and leftovers of other programs, never photographs. Folders that
    are links, which may lead in circles, or cannot be read are ignored.
    """
    photographs: list[bytes] = []
    ignored: list[bytes] = []

    def ignore_unreadable(error: OSError) -> None:
        ignored.append(error.filename)

    for parent, folders, files in os.walk(folder, onerror=ignore_unreadable):
        ignored += [
            path for name in folders if os.path.islink(path := os.path.join(parent, name)) or is_hidden(name)
        ]
        folders[:] = [name for name in folders if not is_hidden(name)]
        for name in files:
            path = os.path.join(parent, name)
            is_image = name.lower().rstrip().endswith(SUFFIXES) and not is_hidden(name)
            is_photograph = is_image and _is_regular(path)
            (photographs if is_photograph else ignored).append(path)
    photographs, ignored = (
        sorted(os.path.relpath(path, folder).replace(os.sep.encode(), b"/") for path in paths)
        for paths in (photographs, ignored)
    )
    return photographs, ignored


def is_hidden(path: bytes) -> bool:
    """True for a path with a hidden or system entry in it, such as `.ipynb_checkpoints/`, `@eaDir/` or `Thumbs.db`."""
    return any(part.lower() in SYSTEM_NAMES or part.startswith(b".") for part in path.split(b"/"))


def prepare(path: bytes, crops: list[dict[str, Any]]) -> tuple[list[np.ndarray], str]:
    """Decode a file once and cut every view: uint8 (h, w, 3) each, and the note of `read`.

    Any exception means that the file is unreadable.
    """
    image, note = read(path)
    return cut_views(image, crops), note


def cut_views(image: Image.Image, crops: list[dict[str, Any]]) -> list[np.ndarray]:
    """Cut every view of a picture, which is reduced to each stored size once."""
    sized = {side: stored(image, side) for side in {crop["stored_side"] for crop in crops}}
    return [cut_view(sized[crop["stored_side"]], crop) for crop in crops]


def read(path: bytes) -> tuple[Image.Image, str]:
    """Read the first frame as RGB: turned upright by EXIF, alpha over white, 16 bits scaled to 8; and a note, or "".

    A JPEG that ends early is read as far as it goes, with a note.
    """
    if not _is_regular(path):
        raise ValueError("not a regular file")
    if os.path.getsize(path) > MOST_BYTES:
        raise ValueError(f"larger than {MOST_BYTES >> 20} MiB")
    with open(path, "rb") as file:
        data = file.read()
    is_jpeg = data[:2] == b"\xff\xd8"
    if is_jpeg and data.count(b"\xff\xda") > MOST_SCANS:
        raise ValueError(f"a JPEG of more than {MOST_SCANS} scans")
    image, note = _open(data), ""
    try:
        image.load()
    except OSError as error:
        if not is_jpeg:
            raise
        image, note = _open(data + END_OF_JPEG), f"ends early ({error})"
        image.load()
        pixels = np.asarray(image.convert("RGB"))
        if (pixels != pixels[-1, -1]).any(axis=2).mean() < FEWEST_PIXELS:  # the missing ones are all alike
            raise
    turn = TURNS.get(_orientation(image))
    image = _rgb(image)
    return image if turn is None else image.transpose(turn), note


def _open(data: bytes) -> Image.Image:
    """Read the header of a picture; ValueError for one of too many pixels."""
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise ValueError(f"{width} x {height} pixels, more than {MOST_PIXELS // 1_000_000} million")
    return image


def stored(image: Image.Image, side: int | None) -> Image.Image:
    """Reduce the short side to `side`, as convert stores pictures; smaller ones stay, very long ones are cut."""
    if side is None:
        return image
    width, height = image.size
    short = min(width, height)
    if short > side:
        image = image.resize(
            (round(width * side / short), round(height * side / short)), Image.Resampling.BICUBIC
        )
    width, height = image.size
    left, top = (max(0, -(-(length - LONGEST * side) // 2)) for length in (width, height))
    return image.crop((left, top, width - left, height - top)) if left or top else image


def cut_view(image: Image.Image, crop: dict[str, Any]) -> np.ndarray:
    """Resample the largest centred box of the view's shape, divided by `factor`: uint8 (h, w, 3).

    With factor 0 it is the whole picture.
    """
    (width, height), (w, h) = image.size, (crop["width"], crop["height"])
    if crop["factor"] == 0:
        return np.array(image.resize((w, h), FILTERS[crop["interpolation"]]))
    scale = min(width / w, height / h) / crop["factor"]
    left, top = (width - w * scale) / 2, (height - h * scale) / 2
    box = (max(left, 0), max(top, 0), min(left + w * scale, width), min(top + h * scale, height))
    return np.array(image.resize((w, h), FILTERS[crop["interpolation"]], box=box))


def _is_regular(path: bytes) -> bool:
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # a broken EXIF block raises many kinds; the picture is not turned
        return 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")
