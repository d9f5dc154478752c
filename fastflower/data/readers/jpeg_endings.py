"""JPEGs whose pixels are all there although the file ends oddly: without its end marker, or with bytes before it.

Cameras, phones and interrupted downloads leave such files; decoders warn of them as they do of damage. A file is
complete if it decodes without any warning once the odd bytes are replaced by a plain end marker.
"""

from __future__ import annotations

from collections.abc import Iterator

from fastflower.core.errors import InputError
from fastflower.data.decode.kernel import decode_file

START_OF_SCAN, END_OF_IMAGE = b"\xff\xda", b"\xff\xd9"
PROGRESSIVE = 0xC2
START_OF_FRAME = (0xC0, 0xC1, PROGRESSIVE)  # baseline, extended, progressive
MOST_BYTES = 16  # arbitrary bytes before the end marker; longer rests are mostly codes that damage left over


def completed(data: bytes, size: tuple[int, int]) -> bytes | None:
    """The JPEG of `size` (height, width) with a plain ending; None if pixels are missing or damaged."""
    if not _has_all_scans(data):
        return None
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


def _has_all_scans(data: bytes) -> bool:
    """True if the scans refine every coefficient of every component to its last bit.

    A progressive file that is cut between two scans decodes without a warning, only less sharply.
    """
    components: set[int] = set()
    progressive = False
    bits: dict[tuple[int, int], int] = {}  # bits still missing, by component and coefficient
    for marker, segment in _segments(data):
        if marker in START_OF_FRAME:
            components, progressive = set(segment[6::3]), marker == PROGRESSIVE
        elif marker == START_OF_SCAN[1]:
            count = segment[0]
            first, last, approximation = segment[2 * count + 1 : 2 * count + 4]
            for component in segment[1 : 2 * count + 1 : 2]:
                for coefficient in range(first, last + 1) if progressive else range(64):
                    bits[component, coefficient] = approximation & 15 if progressive else 0
    return all(bits.get((component, k), 1) == 0 for component in components for k in range(64))


def _segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The marker segments of a JPEG, (marker, content without its length), up to the end or the first flaw."""
    position = 2
    while (position := data.find(b"\xff", position)) >= 0 and position + 4 <= len(data):
        marker = data[position + 1]
        if (
            marker in (0, 1, 0xFF) or 0xD0 <= marker <= 0xD9
        ):  # coded data, fill bytes, markers without content
            position += 1 if marker == 0xFF else 2
            continue
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        yield marker, data[position + 4 : position + 2 + length]
        position += 2 + length
