"""JPEGs whose pixels are all there although the file ends oddly: without its end marker, or with bytes before it.

Cameras, phones and interrupted downloads leave such files; decoders warn of them as they do of damage. A file is
complete if it decodes without any warning once the odd bytes are replaced by a plain end marker.
"""

from __future__ import annotations

from collections.abc import Iterator

from fastflower.core.errors import InputError
from fastflower.data.decode.kernel import decode_file

START_OF_SCAN, END_OF_IMAGE = b"\xff\xda", b"\xff\xd9"
MOST_BYTES = 16  # arbitrary bytes before the end marker; longer rests are mostly codes that damage left over


def completed(data: bytes, size: tuple[int, int]) -> bytes | None:
    """The JPEG of `size` (height, width) with a plain ending; None if pixels are missing or damaged."""
    for candidate in _candidates(data):
        try:
            decode_file(candidate, size, size)
        except InputError:
            continue
        return candidate
    return None


def _candidates(data: bytes) -> Iterator[bytes]:
    end = data.find(END_OF_IMAGE, data.rfind(START_OF_SCAN))
    scan = data if end < 0 else data[:end]
    without_padding = scan.rstrip(scan[-1:])  # of one repeated byte, and of any length
    ends_in_escape = scan[len(without_padding) - 1 :].startswith(b"\xff\0")  # this zero belongs to the codes
    shorter = (scan[:-length] for length in range(1, MOST_BYTES + 1))
    for candidate in (scan, without_padding + b"\0" * ends_in_escape, *shorter):
        # other zeros at the end may stand for lost codes, and decode as grey blocks without a warning
        if not candidate.endswith(b"\0") or candidate.endswith(b"\xff\0"):
            yield candidate + END_OF_IMAGE
