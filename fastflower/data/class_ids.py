"""Class ids as people type them: spellings that mean one class are merged, and what cannot be a class is refused.

Ids stay as they are written ('007' is not '7'), because the organiser compares them by text; only invisible differences
between rows are removed.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from decimal import Decimal

from fastflower.core.tables import escaped
from fastflower.data.readers.image_folders import composed
from fastflower.data.readers.label_files import LabelRow

# zero-width spaces, byte order mark, soft hyphen, marks and isolates of the writing direction
INVISIBLE = re.compile("[\u00ad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff]")
# joiners, fillers, selectors of a glyph's form: invisible too, but some words and emoji are written with them
HARDLY_VISIBLE = re.compile("[\u034f\u115f\u1160\u200c\u200d\u3164\ufe00-\ufe0f\uffa0\U000e0000-\U000e01ef]")
SPACES = re.compile(r"\s+")  # any of Unicode's, such as the non-breaking space
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
JOINTS = re.compile(r"[\s,;|/+&]+")  # marks with which people join two labels into one
INTEGER = re.compile(r"-?[0-9]{1,300}")
FLOAT = re.compile(r"(-?[0-9]+)\.0+")
NUMBER = re.compile(r"[-+]?[0-9]{1,300}(\.[0-9]{1,300})?([eE][-+]?[0-9]{1,3})?")
MISSING = "nan"  # how NumPy and pandas write a missing value
# how people and other programs write one; each may as well be the name of a class
DOUBTFUL = frozenset(("none", "null", "nil", "na", "n/a", "n.a.", "#n/a", "<na>", "nat", "?", "-", "--", "."))


def clean(category_id: str) -> str:
    """An id without invisible characters and outer spaces, its inner spaces plain ones."""
    if category_id.isascii() and category_id.isprintable():  # nearly all are
        return category_id.strip()
    return SPACES.sub(" ", INVISIBLE.sub("", category_id)).strip()


def visible(name: str) -> str:
    """A class's name as text that terminals and pages can show: control characters become question marks."""
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", clean(name))


def order_ids(ids: set[str]) -> tuple[str, ...]:
    """Class ids in canonical order: numbers by value, then text, as in 007, 7, 9, 10, rose."""

    def rank(category_id: str) -> tuple[int, int, str]:
        number = INTEGER.fullmatch(category_id)
        return (0, int(category_id), category_id) if number else (1, 0, category_id)

    return tuple(sorted(ids, key=rank))


def canonicalise(rows: list[LabelRow], notices: list[str]) -> list[str]:
    """Merge the spellings of each id in place, and if all are written like 12.0, turn them into 12.

    Returns the problems: rows without a label and ids that cannot be classes.
    """
    cleaned = {text: clean(text) for text in {row.category_id for row in rows}}
    faults = {category_id: _fault(category_id) for category_id in cleaned.values()}
    problems, changed = [], 0
    for row in rows:
        changed += cleaned[row.category_id] != row.category_id
        row.category_id = cleaned[row.category_id]
        if faults[row.category_id]:
            problems.append(f"{row.where}: {faults[row.category_id]} '{escaped(row.filename)}'")
    if changed:
        notices.append(f"{changed} labels had spaces around them, or invisible characters")
    _compose(rows, notices)
    return problems + _unify_numbers(rows, {text for text, fault in faults.items() if not fault}, notices)


def suspicions(ids: Iterable[str]) -> list[str]:
    """Notices of ids that are different classes but may be meant as one, or as several."""
    known = set(ids)
    lines = []
    numbers = defaultdict(list)
    for category_id in sorted(filter(NUMBER.fullmatch, known)):
        numbers[Decimal(category_id)].append(category_id)
    lines += [f"'{same[0]}' and '{same[1]}' are different classes" for same in numbers.values() if same[1:]][
        :1
    ]
    lines += [
        f"{category_id!r} is a class; if it marks images without a label, remove their rows"
        for category_id in sorted(known)
        if category_id.casefold() in DOUBTFUL or (category_id == "-1" and "0" in known and "-2" not in known)
    ]
    folded = defaultdict(list)
    for category_id in sorted(known):
        text = HARDLY_VISIBLE.sub("", unicodedata.normalize("NFKC", category_id))
        key = re.sub(r"[\s_-]+", "", text.casefold())
        folded[key].append(category_id)
    # a minus sign and the width of digits make numbers differ
    alike = [same for key, same in folded.items() if len(same) > 1 and not key.isdigit()]
    if alike:
        shown = [ascii(text) if HARDLY_VISIBLE.search(text) else repr(text) for text in alike[0][:2]]
        lines.append(
            f"{len(alike)} pairs of classes differ only in case, width, spaces or invisible characters, such as "
            f"{' and '.join(shown)}; if they are one class, write them in one way"
        )
    joined = sorted(i for i in known if len(parts := JOINTS.split(i)) > 1 and known.issuperset(parts))
    if joined:
        lines.append(
            f"{len(joined)} classes are made of the ids of others, such as {joined[0]!r}; each is a class of its own, "
            "as every image has one label"
        )
    return lines


def _fault(category_id: str) -> str:
    if not category_id:
        return "empty label for"
    if category_id.casefold() == MISSING:
        return (
            f"the label '{category_id}' is a missing value, not a class; give the class or remove the row of"
        )
    if CONTROL.search(category_id):
        return f"the label '{escaped(category_id)}' has control characters; remove them from that of"
    return ""


def _compose(rows: list[LabelRow], notices: list[str]) -> None:
    """Give ids that differ only in how accents are encoded their most frequent spelling; one string for each class."""
    counts = Counter(row.category_id for row in rows)
    spellings = defaultdict(list)
    for category_id in counts:
        spellings[category_id if category_id.isascii() else composed(category_id)].append(category_id)
    chosen = {
        spelling: max(same, key=lambda text: (counts[text], text == key))
        for key, same in spellings.items()
        for spelling in same
    }
    for row in rows:
        row.category_id = chosen[row.category_id]
    merged = [same for same in spellings.values() if len(same) > 1]
    if merged:
        notices.append(
            f"{len(merged)} classes are written with accents encoded in two ways, such as '{merged[0][0]}'; "
            "the spellings were merged"
        )


def _unify_numbers(rows: list[LabelRow], ids: set[str], notices: list[str]) -> list[str]:
    """Turn ids like 12.0 into 12 if all of `ids` are such; returns the problem if some of them are."""
    floats = {category_id for category_id in ids if FLOAT.fullmatch(category_id)}
    integers = {category_id for category_id in ids if INTEGER.fullmatch(category_id)}
    if floats and integers:
        first, second = (next(row for row in rows if row.category_id in kind) for kind in (floats, integers))
        return [
            f"labels are written both as '{first.category_id}' ({first.where}) "
            f"and as '{second.category_id}' ({second.where}); write them all in one way"
        ]
    if floats and len(floats) == len(ids):
        example = next(row.category_id for row in rows if row.category_id in floats)
        notices.append(f"labels such as {example} are taken as whole numbers")
        whole = {category_id: FLOAT.sub(r"\1", category_id) for category_id in floats}
        for row in rows:
            row.category_id = whole.get(row.category_id, row.category_id)
    return []
