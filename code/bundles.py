"""Finds and reads the bundle that export or evaluate wrote, and the class frequencies to use where there is none."""

from __future__ import annotations

import csv
import glob
import hashlib
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from sample import Sample

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
FORMAT = 6
CLASS_COLUMNS = ["class_idx", "category_id", "n"]  # of classes.csv; names follow
CHECK = "check"  # the column of row checksums in classes.csv
ESCAPE = re.compile(r"\\(x([01][0-9a-f]|7f|[89][0-9a-f])|u20(2[89a-e]|6[6-9]))")
REPLACED = 75  # exit code of a run whose bundle was replaced while it was loaded: it starts again

# The fields of bundle.json: a type, a value, a list of one kind, a map of fields; a tuple lists alternatives.
# twin of the records in fastflower/bundle/description.py
FIELDS = {
    "class_ids": [str],
    "prior": [float],
    "columns": ("two", "three", "binary", "odds", "top", "sample"),
    "labels": [str],
    "top_k": int,
    "separator": str,
    "half": ("all", "gpu", "none"),
    "temperature": float,
    "hflip": bool,
    "reduce": ("mean", "vote"),
    "space": ("logits", "probabilities"),
    "correction": (None, {"source": [float], "target": ("em", [float])}),
    "pairs": (None, {"arrays": [str], "shape": ("auto", [int])}),
    "crops": [
        {
            "height": int,
            "width": int,
            "factor": float,
            "interpolation": ("bicubic", "bilinear"),
            "stored_side": int,
        }
    ],
    "programs": [
        {
            "file": str,
            "inputs": [str],
            "norms": [{"conv": str, "norm": str, "eps": float}],
            "half_keeps": (None, [str]),
        }
    ],
    "members": [
        {
            "name": str,
            "weights": str,
            "weight": float,
            "views": [{"crop": int, "program": int}],
            "expected": [[float]],
            "checkpoint": (None, str),
        }
    ],
}
TYPE_NAMES = {
    str: "text", int: "a whole number", float: "a number", bool: "true or false", None: "null", dict: "a map",
    list: "a list",
}  # fmt: skip


class Problem(Exception):
    """An error that ends the run: the line to show and the exit code."""

    def __init__(self, text: str, code: int = 2) -> None:
        super().__init__(text)
        self.code = code


class Unusable(Exception):
    """No member of the bundle can be run; the text is the line to show."""


class Classes(NamedTuple):
    """Class ids in the order of the logits, their training frequencies (C,), and the kind of table to write.

    `labels` are the texts of the classes in the table, `top_k` and `separator` those of a cell with several.
    """

    ids: list[str]
    prior: list[float]
    columns: str
    labels: list[str]
    top_k: int = 5
    separator: str = " "


def read(folder: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Read bundle.json, checked field by field, and the SHA-256 of each file of the bundle."""
    if not os.path.isfile(os.path.join(folder, "bundle.json")):
        raise Problem(
            f"no bundle in {folder} ({len(members_beside(folder))} members beside it); "
            "run python -m fastflower.export or python -m fastflower.evaluate",
            4,
        )
    try:
        hashes = read_hashes(folder)
        with open(os.path.join(folder, "bundle.json"), "rb") as file:
            data = file.read()
        if hashlib.sha256(data).hexdigest() != hashes.get("bundle.json"):
            raise ValueError("bundle.json is not the exported one: its SHA-256 differs")
        bundle = json.loads(data)
        if not isinstance(bundle, dict):
            raise ValueError("bundle.json is not a map of fields")
        if bundle.get("format") == FORMAT:
            check_fields(bundle, FIELDS, "")
            check_references(bundle)
    except (OSError, ValueError, RecursionError) as error:
        raise Problem(f"{folder} is damaged ({error}); copy it again", 3) from None
    if bundle.get("format") != FORMAT:
        raise Problem(
            f"{folder} has format {bundle.get('format')}, this predictor reads {FORMAT}; "
            "use the code/ folder that came with the bundle"
        )
    return bundle, hashes


def read_hashes(folder: str) -> dict[str, str]:
    """The SHA-256 of each file of a bundle, as its file SHA256 lists them."""
    with open(os.path.join(folder, "SHA256"), encoding="ascii") as file:
        return {name: value for value, name in (line.split() for line in file)}


def is_replaced(folder: str, hashes: dict[str, str]) -> bool:
    """True if a bundle is no longer the one of these hashes, as when an export has published another."""
    try:
        return read_hashes(folder) != hashes
    except (OSError, ValueError):
        return True


def members_beside(folder: str) -> set[str]:
    """The trained members in the folders beside that of a bundle, each run of training once."""
    members = glob.glob(os.path.join(glob.escape(os.path.dirname(folder)), "*", "*__fold*_seed*.pth"))
    return {re.sub(r".*?__|_epoch.*", "", os.path.basename(path)) for path in members}


def experiment_of(bundle: dict[str, Any]) -> str:
    """The experiment that trained the first member, where it was trained beside this predictor, or ""."""
    name = f"{bundle['members'][0]['name']}.pth"
    paths = glob.glob(os.path.join(glob.escape(nearest("results/model")), "*", glob.escape(name)))
    return os.path.basename(os.path.dirname(paths[0])) if paths else ""


def check_fields(value: Any, kind: Any, field: str) -> None:
    """Raise ValueError with the path of the first field that is missing or wrong."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    nested = next((choice for choice in kinds if type(choice) is type(value) in (dict, list)), None)
    if isinstance(nested, dict):
        for name, item in nested.items():
            path = f"{field}.{name}" if field else name
            if name not in value:
                raise ValueError(f"bundle.json: {path} is missing")
            check_fields(value[name], item, path)
    elif isinstance(nested, list):
        for position, item in enumerate(value):
            check_fields(item, nested[0], f"{field}[{position}]")
    elif not any(_fits(value, choice) for choice in kinds):
        names = [type(choice) if isinstance(choice, (dict, list)) else choice for choice in kinds]
        allowed = " or ".join(TYPE_NAMES.get(name, name) for name in names)
        raise ValueError(f"bundle.json: {field} is {json.dumps(value)[:60]}, must be {allowed}")


def _fits(value: Any, choice: Any) -> bool:
    if isinstance(choice, type):
        return type(value) is choice or (choice is float and type(value) is int)
    return value is choice or (isinstance(choice, str) and value == choice)


def check_references(bundle: dict[str, Any]) -> None:
    """Raise ValueError for fields that do not fit each other."""
    classes = len(bundle["class_ids"])
    if not classes or len(bundle["prior"]) != classes:
        raise ValueError(f"bundle.json: prior has {len(bundle['prior'])} values for {classes} class_ids")
    if len(bundle["labels"]) != classes or len(set(bundle["labels"])) != classes:
        raise ValueError(f"bundle.json: labels must be a text of its own for each of {classes} class_ids")
    if bundle["top_k"] < 1 or not bundle["separator"]:
        raise ValueError("bundle.json: top_k must be 1 or more, and separator must not be empty")
    if bundle["columns"] == "binary" and classes != 2:
        raise ValueError(f"bundle.json: columns is binary for {classes} class_ids, must be for 2")
    for name, shares in (bundle["correction"] or {}).items():
        if shares != "em" and (len(shares) != classes or not min(shares) > 0):
            raise ValueError(
                f"bundle.json: correction.{name} must have a share above 0 for {classes} class_ids"
            )
    for number, member in enumerate(bundle["members"]):
        field = f"bundle.json: members[{number}]"
        if len(member["expected"]) != len(member["views"]):
            raise ValueError(
                f"{field} has {len(member['expected'])} expected for {len(member['views'])} views"
            )
        if any(len(logits) != classes for logits in member["expected"]):
            raise ValueError(f"{field}.expected must have {classes} logits for each view")
        for view in member["views"]:
            for name, entries in (("crop", bundle["crops"]), ("program", bundle["programs"])):
                if not 0 <= view[name] < len(entries):
                    raise ValueError(f"{field} uses {name} {view[name]} of {len(entries)}")


def classes_of(bundle: dict[str, Any]) -> Classes:
    return Classes(
        *(bundle[name] for name in ("class_ids", "prior", "columns", "labels", "top_k", "separator"))
    )


def fallback_classes(folder: str, sample: Sample | None, notes: list[str]) -> Classes | None:
    """Classes for a table without networks: the bundle's, else the training data's, else the sample's.

    A line for each damaged file is appended to `notes`.
    """
    rows = next(_class_tables(folder, notes), [])
    counts = {row["category_id"]: float(row["n"]) for row in rows}
    counts = counts or Counter(sample.answers() if sample else ())
    if not counts:
        return None
    total = max(1, sum(counts.values()))
    return Classes(list(counts), [count / total for count in counts.values()], "sample", list(counts))


def labelings(folder: str, class_ids: list[str], notes: list[str]) -> list[list[str]]:
    """The class ids, then the classes' names from classes.csv, in the order of the logits; `notes` as above."""
    for rows in _class_tables(folder, notes):
        if [row["category_id"] for row in rows] == class_ids:
            columns = [name for name in rows[0] if name not in (*CLASS_COLUMNS, CHECK)]
            return [class_ids, *([row[name] for row in rows] for name in columns)]
    return [class_ids]


def _class_tables(folder: str, notes: list[str]) -> Iterator[list[dict[str, str]]]:
    """The rows of the classes.csv of the bundle, then of the training data; a note instead of a damaged one."""
    for path in (os.path.join(folder, "classes.csv"), nearest("data/classes.csv")):
        if os.path.exists(path):
            try:
                yield read_checked_rows(path)
            except (OSError, ValueError, KeyError, csv.Error) as error:
                notes.append(f"{path} is left out: {error}")


# twin of read_sealed in fastflower/core/tables.py
def read_checked_rows(path: str) -> list[dict[str, str]]:
    """The rows of a classes.csv, whose column `check` is a CRC-32 of the cells to its left; ValueError if damaged."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines = list(csv.reader(file))
    header = lines[0] if lines else []
    if header[:3] != CLASS_COLUMNS or CHECK not in header or not lines[1:]:
        raise ValueError(f"it has not the columns {', '.join(CLASS_COLUMNS)} and {CHECK}, or no rows")
    rows = []
    for number, cells in enumerate(lines[1:]):
        row = dict(zip(header, map(_restored, cells)))
        checked = "\0".join([str(number), str(len(lines) - 1), *list(row.values())[: header.index(CHECK)]])
        crc = zlib.crc32(checked.encode("utf-8", "surrogateescape"))
        if len(cells) != len(header) or row[CHECK] != f"{crc:08x}":
            raise ValueError(f"row {number} is damaged or was edited, or rows are missing")
        rows.append(row)
    return rows


def _restored(cell: str) -> str:
    """A cell with its control characters, which the table writes as \\x1b or \\u202e."""
    if not ESCAPE.search(cell):
        return cell
    return re.sub(
        r"\\(\\|x(..)|u(....))",
        lambda mark: "\\" if mark[1] == "\\" else chr(int(mark[2] or mark[3], 16)),
        cell,
        flags=re.DOTALL,
    )


def default_folder() -> str:
    """The exported bundle; where there is none, the programs that evaluate wrote last beside members."""
    exported, evaluated = nearest("results/model/bundle"), last_evaluated()
    return exported if os.path.exists(exported) or not evaluated else evaluated


def last_evaluated() -> str:
    """The folder of the programs that evaluate wrote last beside members, or ""."""
    pattern = os.path.join(glob.escape(nearest("results/model")), "*", "programs", "bundle.json")
    return os.path.dirname(max(glob.glob(pattern), key=os.path.getmtime, default=""))


def outdated_by(folder: str) -> str:
    """The experiment whose members were evaluated after the exported bundle in a folder was written, or ""."""
    evaluated, exported = last_evaluated(), nearest("results/model/bundle")
    if not evaluated or os.path.realpath(folder) != os.path.realpath(exported):
        return ""
    newer, older = (os.path.getmtime(os.path.join(path, "bundle.json")) for path in (evaluated, exported))
    return os.path.dirname(evaluated) if newer > older else ""


def nearest(*names: str) -> str:
    """The first existing path below the folder that holds code/, else below the current folder."""
    paths = [os.path.join(folder, *name.split("/")) for name in names for folder in (ROOT, os.curdir)]
    return next((path for path in paths if os.path.exists(path)), paths[0])
