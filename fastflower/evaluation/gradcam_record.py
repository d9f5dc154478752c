"""gradcam.json: the Grad-CAM pictures of an experiment, and how much of the maps lies at the border of their images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from fastflower.core.errors import InputError
from fastflower.core.files import digest
from fastflower.core.records import read_record
from fastflower.evaluation.records import REMEDY


@dataclass(frozen=True, kw_only=True)
class BorderFraction:
    """The mean fraction of n Grad-CAM maps at the border of their images; None without a map."""

    n: int
    mean: float | None


@dataclass(frozen=True, kw_only=True)
class BackboneBorder:
    """The fractions at the border of a backbone's maps of right and of wrong predictions."""

    backbone: str
    wrong: BorderFraction
    right: BorderFraction


@dataclass(frozen=True, kw_only=True)
class GradCamPicture:
    """A picture in gradcam/ with the digest of its bytes: the map of `target`; border is None without evidence."""

    index: int
    filename: str
    label: int
    guess: int
    backbone: str
    right: bool
    target: int
    file: str
    digest: str
    border: float | None


@dataclass(frozen=True, kw_only=True)
class GradCams:
    """gradcam.json: the pictures, and the fractions of the maps at the border; even: that of a constant map."""

    FORMAT: ClassVar[int] = 1
    REMEDY: ClassVar[str] = REMEDY

    even: float
    border: list[BackboneBorder]
    images: list[GradCamPicture]


def read_gradcam(folder: Path, notes: list[str]) -> tuple[GradCams | None, dict[str, bytes]]:
    """The Grad-CAM maps and their pictures by file; a note instead of damaged ones."""
    if not (folder / "gradcam.json").is_file():
        return None, {}
    try:
        gradcam = read_record(folder / "gradcam.json", GradCams)
    except InputError as error:
        notes.append(f"{error}; the page lacks its Grad-CAM maps")
        return None, {}
    maps = {}
    for row in gradcam.images:
        data = path.read_bytes() if (path := folder / row.file).is_file() else b""
        if digest(data) == row.digest:
            maps[row.file] = data
    lost = [row.file for row in gradcam.images if row.file not in maps]
    if lost:
        notes.append(
            f"{folder}: {len(lost)} pictures are missing or damaged, first {lost[0]}; {GradCams.REMEDY}"
        )
    return gradcam, maps
