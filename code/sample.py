"""The organiser's sample submission: the meaning of its columns, by their content, and the image of each row.

A sample is followed in full or not at all: Unfollowable names the first difference that stands in the way.
"""

from __future__ import annotations

import csv
import io
import os
import re
import unicodedata
from collections.abc import Callable
from typing import NamedTuple

from table import Column, Layout

DELIMITERS = ",;\t|"
SUFFIX = re.compile(r"\.(jpe?g|png|bmp|gif|webp)\s*$", re.IGNORECASE)
INDEX_WORDS = ("", "index", "unnamed: 0", "row", "nr", "no")
CLASS_WORDS = ("category", "class", "label", "target", "prediction", "species", "answer")
NUMBER_WORDS = ("confidence", "conf", "prob", "score", "certainty")
ODDS_PREFIX = re.compile(r"^(class|category|label|prob|proba|probability|p|score)[ _:-]+", re.IGNORECASE)
TOP_SEPARATORS = (" ", ";", "|", ",", ", ", "; ")  # between the classes of a cell
MOST_DIGITS = 18  # of a number in a name


class Unfollowable(Exception):
    """A sample that the table cannot follow; the text is the line to show."""


class Sample(NamedTuple):
    """The sample as read: its delimiter, its first row, and all others, each as wide as the first."""

    path: str
    delimiter: str
    header: list[str]
    rows: list[list[str]]

    def column(self, position: int) -> list[str]:
        """The fields of a column."""
        return [row[position] for row in self.rows]

    def answers(self) -> list[str]:
        """The fields of the column of classes, as far as it can be told without knowing the classes."""
        named = [n for n, field in enumerate(self.header) if n and _has_word(field, CLASS_WORDS)]
        return self.column(named[0] if named else 1) if len(self.header) > 1 else []


def read_sample(path: str, *, required: bool) -> Sample | None:
    """Read the sample with the delimiter that gives its rows one width; None when there is none."""
    try:
        with open(path, "rb") as file:
            text = file.read().decode("utf-8-sig", "surrogateescape")
    except FileNotFoundError:
        if required:
            raise Unfollowable(f"{path} does not exist; give the organiser's sample submission") from None
        return None
    except OSError as error:
        raise Unfollowable(f"{path} cannot be read ({error.strerror})") from None
    best: tuple[int, str, list[list[str]]] = (1, ",", [])
    for delimiter in DELIMITERS:
        try:
            rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if row]
        except csv.Error:
            continue
        if rows and len({len(row) for row in rows}) == 1:
            best = max(best, (len(rows[0]), delimiter, rows), key=lambda found: found[0])
    width, delimiter, rows = best
    if width < 2:
        raise Unfollowable(
            f"{path} is not a table of at least two columns separated by comma, semicolon, tab or |, "
            "with as many fields in each row"
        )
    return Sample(path, delimiter, [field.strip() for field in rows[0]], rows[1:])


def layout_of(sample: Sample, image: int, labelings: list[list[str]], *, second_class: bool) -> Layout:
    """The columns of the sample by their content; `image` is the position of the one that `match` found.

    `labelings` are the class ids in the order of the logits, then other names of the classes. Raises Unfollowable.
    """
    columns: dict[int, Column] = {image: Column("image")}
    labelings = [labeling for labeling in labelings if len(set(labeling)) == len(labeling)]
    _find_odds(sample, columns, labelings)
    _find_top(sample, columns, labelings)
    second_class = _find_answers(sample, columns, labelings, second_class=second_class)
    return Layout(
        sample.header, [columns[n] for n in range(len(sample.header))], sample.delimiter, second_class
    )


def unknown_answers(sample: Sample, layout: Layout, labelings: list[list[str]]) -> str:
    """A line on answers of the sample that are no classes, or empty; one answer in all rows is a placeholder."""
    known = {label for labeling in labelings for label in labeling}
    for position, column in enumerate(layout.columns):
        answers = {text.strip() for text in sample.column(position)} if column.kind == "class" else set()
        unknown = sorted(answers - known)
        if len(answers) > 1 and unknown:
            return (
                f"{sample.path} has {len(unknown)} answers that are no classes, the first is {unknown[0]!a}; the "
                f"table has the classes as they were trained, such as {column.texts[0]!a}"
            )
    return ""


def match(sample: Sample, names: list[bytes], folder: str) -> tuple[int, list[bytes]]:
    """The column of the images, and the image of each row, by the strictest key that fits all rows.

    Raises Unfollowable unless each row is one image and each image one row.
    """
    texts = [name.decode("utf-8", "surrogateescape") for name in names]
    closest: tuple[int, int, dict[str, list[bytes]], list[str]] = (-1, 0, {}, [])
    positions = sorted(range(len(sample.header)), key=lambda n: sample.header[n].lower() in INDEX_WORDS)
    for key in _keys(texts):
        files: dict[str, list[bytes]] = {}
        for text, name in zip(texts, names):
            files.setdefault(key(text), []).append(name)
        for position in positions:
            labels = [key(label) for label in sample.column(position)]
            hits = sum(label in files for label in set(labels))
            if hits == len(labels) == len(names) and len(files) == len(names):
                return position, [files[label][0] for label in labels]
            if hits > closest[0]:
                closest = hits, position, files, labels
    hits, position, files, labels = closest
    raise Unfollowable(
        f"{sample.path} {_difference(sample.column(position), labels, files=files, folder=folder, hits=hits)}"
    )


def _keys(names: list[str]) -> list[Callable[[str], str]]:
    """Ways to compare names, strictest first: whole, without suffix, without folders, in any case, as numbers."""

    def base(name: str) -> str:
        return name.replace("\\", "/").rpartition("/")[2]

    def folded(name: str) -> str:
        return unicodedata.normalize("NFC", stem(base(name)).strip()).casefold()

    def stem(name: str) -> str:
        return SUFFIX.sub("", name)

    def number(name: str) -> str:
        text = folded(name)
        return str(int(text)) if text.isascii() and text.isdigit() and len(text) <= MOST_DIGITS else text

    def from_one(name: str) -> str:
        text = number(name)
        return str(int(text) + 1) if "/" in name and text.isdigit() else text

    # rows of a .npz are `<stem>/<row>`, which organisers number from 0 or 1; photographs have a suffix
    numbered = [from_one] if all("/" in name and base(name).isdigit() for name in names) else []
    return [str, stem, base, lambda name: stem(base(name)), folded, number, *numbered]


def _difference(
    labels: list[str], keys: list[str], *, files: dict[str, list[bytes]], folder: str, hits: int
) -> str:
    """The first reason why the rows are not the images, in words."""
    listed: dict[str, str] = {}
    for label, key in zip(labels, keys):
        if key in listed and key in files:
            return f"lists {label!a} twice; each image needs one row"
        listed[key] = label
    count = sum(len(group) for group in files.values())
    unknown = [label for key, label in listed.items() if key not in files]
    if not hits:
        first = f", the first is {unknown[0]!a}" if unknown else ""
        return f"names none of the {count} images of {folder} in its {len(labels)} rows{first}"
    if unknown:
        return f"has {len(unknown)} rows that are not in {folder}, the first is {unknown[0]!a}"
    missing = sorted(group[0] for key, group in files.items() if key not in listed)
    if missing:
        return f"lacks {len(missing)} images of {folder}, the first is {os.fsdecode(missing[0])!a}"
    double = next(group for group in files.values() if len(group) > 1)
    pair = " and ".join(ascii(os.fsdecode(name)) for name in double[:2])
    return f"has one name for {pair}; rename one of them"


def _find_odds(sample: Sample, columns: dict[int, Column], labelings: list[list[str]]) -> None:
    """Add the columns that are headed by a class each; raises Unfollowable when some classes have none."""
    for labeling in labelings:
        for clean in (str, lambda field: ODDS_PREFIX.sub("", field).casefold()):
            classes = {clean(label.strip()): position for position, label in enumerate(labeling)}
            found = {
                n: classes[clean(field)]
                for n, field in enumerate(sample.header)
                if n not in columns and clean(field) in classes
            }
            lacking = sorted(set(classes.values()) - set(found.values()))
            if len(found) < 2 or len(classes) != len(labeling) or len(found) > len(labeling):
                continue
            if lacking:
                raise Unfollowable(
                    f"{sample.path} has columns for {len(found)} of {len(labeling)} classes; "
                    f"it lacks {labeling[lacking[0]]!a}"
                )
            columns.update({n: Column("odds", position=position) for n, position in found.items()})
            return


def _find_top(sample: Sample, columns: dict[int, Column], labelings: list[list[str]]) -> None:
    """Add the first column whose cells hold several classes each, with their separator."""
    for n in range(len(sample.header)):
        values = sample.column(n)
        if n in columns or any(set(values) <= set(labeling) for labeling in labelings):
            continue
        for labeling in labelings:
            for separator in TOP_SEPARATORS:
                cells = [value.split(separator) for value in values]
                longest = max(map(len, cells), default=0)
                if longest > 1 and {text for cell in cells for text in cell} <= set(labeling):
                    columns[n] = Column("top", tuple(labeling), min(longest, len(labeling)), separator)
                    return


def _find_answers(
    sample: Sample, columns: dict[int, Column], labelings: list[list[str]], *, second_class: bool
) -> bool:
    """Add the columns of class, number and index, and return whether the number is of the second class."""
    has_odds = len(columns) > 1
    rest = [n for n in range(len(sample.header)) if n not in columns]
    for n in rest:
        if len(rest) > 1 or has_odds:
            values = sample.column(n)
            counting = any(values == [str(row + first) for row in range(len(values))] for first in (0, 1))
            if sample.header[n].lower() in INDEX_WORDS and counting:
                columns[n] = Column("copy", tuple(values))
    rest = [n for n in rest if n not in columns]
    by_word = [n for n in rest if _has_word(sample.header[n], CLASS_WORDS)]
    labeled = {
        n: labeling for labeling in labelings[::-1] for n in rest if set(sample.column(n)) <= set(labeling)
    }
    numeric = [n for n in rest if all(_is_share(value) for value in sample.column(n))]
    decimal = [n for n in numeric if n not in labeled and any("." in value for value in sample.column(n))]
    answers = (
        [n for n in by_word if n in labeled] or list(labeled) or [n for n in by_word if n not in decimal]
    )
    words = [n for n in rest if _has_word(sample.header[n], NUMBER_WORDS)]
    answers = [n for n in answers if n not in words] or answers
    if not answers and len(rest) == 1 and not has_odds and not decimal and not words:
        answers = rest
    if len(answers) > 1:
        named = " and ".join(ascii(sample.header[n]) for n in answers[:2])
        raise Unfollowable(f"{sample.path} has two columns that may be the class, {named}")
    for n in answers:
        columns[n] = Column("class", tuple(labeled.get(n, labelings[0])))
    rest = [n for n in rest if n not in columns]
    numbers = [n for n in rest if n in words and n in numeric] or [n for n in rest if n in numeric]
    for n in numbers[:1]:
        columns[n] = Column("number")
        second_class = second_class or (not answers and len(labelings[0]) == 2)
    for n in rest:
        if n not in columns:
            raise Unfollowable(
                f"{sample.path} has the column {sample.header[n]!a}, which is neither the image, its class, a "
                "confidence, nor the probability of a class"
            )
    if not answers and not has_odds and not (numbers and second_class):
        raise Unfollowable(f"{sample.path} has no column for the class, in {sample.header}")
    return second_class


def _has_word(field: str, words: tuple[str, ...]) -> bool:
    return any(word in field.lower() for word in words)


def _is_share(value: str) -> bool:
    try:
        return 0 <= float(value) <= 1
    except ValueError:
        return False
