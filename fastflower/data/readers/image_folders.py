"""Folders of image files: what is listed and what is left out, and how a name in a label file finds its file."""

from __future__ import annotations

import os
import re
import stat
import unicodedata
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from fastflower.core.errors import InputError
from fastflower.core.tables import escaped
from fastflower.data.readers.image_files import header_size, read_bytes

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp")
# twin of code/pictures.py: what systems and editors put between photographs; names that start with a dot count too
SYSTEM_NAMES = frozenset(
    {
        *("__macosx", "@eadir", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "recycler"),
        *("system volume information", "lost+found", "thumbs.db", "ehthumbs.db", "desktop.ini"),
        *("@recently-snapshot", "@sharebin", "@tmp", "~snapshot", "recycled", "found.000", "__pycache__"),
    }
)


def is_hidden(name: str) -> bool:
    """True if a path has a hidden or system entry in it, such as .ipynb_checkpoints/, @eaDir/, ._a.jpg or Thumbs.db.

    Such entries are copies and leftovers of other programs, never images, classes or rows of a table.
    """
    return any(
        part.casefold() in SYSTEM_NAMES or (part.startswith(".") and part not in (".", ".."))
        for part in name.split("/")
    )


class Listing(NamedTuple):
    """The image files below a folder, and the hidden entries and linked folders left out: relative paths in order."""

    images: list[str]
    hidden: list[str]
    links: list[str]

    def notices(self, root: Path) -> list[str]:
        """A line for each kind of entry that was left out."""
        kinds = (
            ("hidden or system entries", "were left out", self.hidden),
            ("links to folders", "were not followed; their images do not count", self.links),
        )
        return [
            f"{len(names)} {noun} below {root} {verdict}, such as {escaped(names[0])}"
            for noun, verdict, names in kinds
            if names
        ]


def list_images(root: Path) -> Listing:
    """List the image files below a folder, at any depth; InputError for a folder that cannot be read."""

    def refuse(error: OSError) -> None:
        raise InputError(
            f"{escaped(str(error.filename))}: cannot be listed: {error.strerror}; make it readable"
        )

    images: list[str] = []
    hidden: list[str] = []
    links: list[str] = []
    for parent, folders, files in os.walk(root, onerror=refuse):
        below = os.path.relpath(parent, root)
        paths = {name: name if below == "." else f"{below}/{name}" for name in (*folders, *files)}
        hidden += [path for name, path in paths.items() if is_hidden(name)]
        folders[:] = [name for name in folders if not is_hidden(name)]
        links += [paths[name] for name in folders if os.path.islink(os.path.join(parent, name))]
        images += [paths[name] for name in files if _is_image(name) and not is_hidden(name)]
    return Listing(*(sorted(paths, key=lambda path: path.split("/")) for paths in (images, hidden, links)))


def has_class_folders(root: Path) -> bool:
    """True if a folder has subfolders that can be classes."""
    return any(entry.is_dir() and not is_hidden(entry.name) for entry in root.iterdir())


def composed(name: str) -> str:
    """A name with its accents composed (NFC): two spellings of one name become equal."""
    return unicodedata.normalize("NFC", name)


def _is_image(name: str) -> bool:
    return os.path.splitext(name.rstrip())[1].lower() in SUFFIXES


class Check(NamedTuple):
    """The result of checking an image without opening it.

    problem: empty if there is none. size: in bytes. identity: equal for two names of one file, such as a link and its
    target.
    """

    problem: str
    size: int = 0
    identity: str = ""


@dataclass(frozen=True)
class FileSource:
    """Image files below a folder; a name is `prefix` and the path relative to the folder."""

    root: Path
    prefix: str = ""
    images_per_row: int = 1
    from_arrays: bool = False
    in_one_file: bool = False
    _folders: dict[str, dict[str, list[str]]] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def _real_root(self) -> str:
        return os.path.realpath(self.root)

    def _path(self, name: str) -> str:
        return os.path.join(self._real_root, name.removeprefix(self.prefix))

    def files(self, names: list[str]) -> list[str]:
        """The files whose bytes decide the pixels of these rows: one a row."""
        return [self._path(name) for name in names]

    def check(self, name: str) -> Check:
        """Check that a name is a regular file below the root; links that leave the root are refused."""
        name = name.removeprefix(self.prefix)
        if not name or "\0" in name:
            return Check("is not a file name")
        if (
            name.startswith(("/", "~"))
            or ".." in name.split("/")
            or "\\" in name
            or re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", name)
        ):
            return Check("must be a path below data.root, parts joined by '/'")
        try:
            real = os.path.realpath(os.path.join(self._real_root, name), strict=True)
            state = os.stat(real)
        except FileNotFoundError:
            return Check("does not exist")
        except OSError as error:
            return Check(f"cannot be read: {error.strerror}")
        if os.path.commonpath([self._real_root, real]) != self._real_root:
            return Check("is a link that leaves data.root")
        if not stat.S_ISREG(state.st_mode):
            return Check("is not a regular file")
        return Check("", state.st_size, real)

    def respelled(self, name: str) -> list[str]:
        """The names of files that a missing name can mean: with other accents, or with the ending that it lacks.

        Both happen when label files and photographs were made on different systems.
        """
        folders, *parts = [""], *name.split("/")
        for position, part in enumerate(parts):
            is_file = position == len(parts) - 1
            folders = [
                f"{folder}/{entry}".lstrip("/")
                for folder in folders
                for entry in self._entries(folder, with_stems=is_file).get(composed(part), [])
            ]
        return folders

    def _entries(self, folder: str, *, with_stems: bool) -> dict[str, list[str]]:
        """The entries of a folder by their composed names and, for files, by their names without the ending."""
        key = f"{folder}/{with_stems}"
        if key not in self._folders:
            entries: dict[str, list[str]] = {}
            path = os.path.join(self._real_root, folder)
            for name in sorted(os.listdir(path)) if os.path.isdir(path) else []:
                if is_hidden(name):
                    continue
                spellings = {composed(name)}
                if with_stems and _is_image(name):
                    spellings.add(composed(os.path.splitext(name)[0]))
                for spelling in spellings:
                    entries.setdefault(spelling, []).append(name)
            self._folders[key] = entries
        return self._folders[key]

    def load(self) -> None:
        """Do nothing: every image is a file."""

    def read(self, name: str, number: int) -> bytes:
        """The bytes of a file."""
        return read_bytes(self._path(name))

    def size(self, name: str) -> tuple[int, int] | None:
        """(height, width) from the file's header; None if it cannot be read."""
        try:
            return header_size(self._path(name))
        except Exception:  # any parser error; the conversion reports it when it reads the file
            return None
