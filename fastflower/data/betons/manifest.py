"""The manifest beside a beton: its size and checksums, and the data, folds and settings it was converted from."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

import numpy as np

UNLABELLED = "unlabelled"  # the split of images without labels
NO_FOLD = -1  # the fold of images without labels


def manifest_path(path: Path) -> Path:
    """`fold0_train.beton` -> `fold0_train.beton.json`."""
    return path.with_name(path.name + ".json")


@dataclass(frozen=True)
class StorageSettings:
    """Everything in a recipe that decides the stored pixels."""

    format: int
    stored_side: int  # pixels; larger images are reduced to this short side
    store: str  # raw or jpeg
    jpeg_quality: int
    combos: tuple[tuple[str, str], ...]  # (kind, level) of each set of corrupted copies
    own_corruptions: tuple[tuple[str, str], ...] = ()  # (kind, digest of its source) of the user's own kinds


@dataclass(frozen=True)
class Origin:
    """The data, folds and settings that a beton was converted from.

    Unlabelled images have the fold NO_FOLD and hashes of their names and bytes only.
    """

    split: str
    fold: int
    settings: StorageSettings
    inputs_hash: str
    classes_hash: str = ""
    labels_hash: str = ""
    folds_hash: str = ""

    @property
    def stored_side(self) -> int:
        return self.settings.stored_side

    @property
    def combos(self) -> tuple[tuple[str, str], ...]:
        """The (kind, level) of the copies in this beton, in their order; empty unless it is val_corrupt."""
        return self.settings.combos if self.split == "val_corrupt" else ()

    def differences(self, expected: Origin) -> list[str]:
        """Names of the fields that differ."""
        return [
            field.name for field in fields(self) if getattr(self, field.name) != getattr(expected, field.name)
        ]


@dataclass(frozen=True)
class Manifest:
    """Sizes, checksums and origin; betons that convert did not write have no origin."""

    FORMAT: ClassVar[int] = 1
    REMEDY: ClassVar[str] = "run convert again"

    fastflower: str  # version that wrote it; informative, never compared
    rows: int
    images_per_row: int
    size: int
    head_crc: int  # of header, metadata and allocation table
    crc: str  # CRC-32 of each image, eight hex digits each; one text, as a list of a million numbers loads slowly
    origin: Origin | None = None

    @property
    def is_consistent(self) -> bool:
        """True if there is one checksum for each image of each row."""
        return (
            self.rows > 0 and self.images_per_row > 0 and len(self.crc) == 8 * self.rows * self.images_per_row
        )

    def checksums(self) -> np.ndarray:
        """CRC-32 of each image: uint32 (rows * images_per_row,)."""
        return np.frombuffer(bytes.fromhex(self.crc), ">u4").astype(np.uint32)


def pack_checksums(crc: np.ndarray) -> str:
    """Checksums uint32 (N,) as the text of `Manifest.crc`."""
    return crc.astype(">u4").tobytes().hex()
