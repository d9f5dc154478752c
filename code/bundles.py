"""What export or evaluate left for the predictor: where it lies, what it says, and what stands in for it."""

from __future__ import annotations

import contextlib
import csv
import glob
import hashlib
import json
import os
import re
from collections import Counter
from typing import Any

from table import Sample

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
FORMAT = 2


class Problem(Exception):
    """What stops the run, in one line, and its exit code."""

    def __init__(self, text: str, code: int = 2) -> None:
        super().__init__(text)
        self.code = code


def read(folder: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The bundle's description and the SHA-256 of its files."""
    if not os.path.isfile(os.path.join(folder, "bundle.json")):
        members = glob.glob(os.path.join(glob.escape(os.path.dirname(folder)), "*", "*__fold*_seed*.pth"))
        runs = {re.sub(r".*?__|_epoch.*", "", os.path.basename(path)) for path in members}
        raise Problem(
            f"no bundle in {folder} ({len(runs)} members beside it); run python -m fastflower.evaluate or export",
            4,
        )
    try:
        with open(os.path.join(folder, "SHA256"), encoding="ascii") as file:
            hashes = {name: value for value, name in (line.split() for line in file)}
        with open(os.path.join(folder, "bundle.json"), "rb") as file:
            data = file.read()
        if hashlib.sha256(data).hexdigest() != hashes.get("bundle.json"):
            raise ValueError("bundle.json is not the one that was exported")
        bundle = json.loads(data)
        if not isinstance(bundle, dict):
            raise ValueError("bundle.json holds no description")
    except (OSError, ValueError) as error:
        raise Problem(f"{folder} is damaged ({error}); copy it again", 3) from None
    if bundle.get("format") != FORMAT:
        raise Problem(
            f"{folder} has format {bundle.get('format')}, this predictor reads {FORMAT}; take its own code/"
        )
    return bundle, hashes


def substitute(folder: str, sample: Sample | None) -> dict[str, Any] | None:
    """Classes and prior for a table without networks: the bundle's, those of the training data, the sample's."""
    counts: dict[str, float] = {}
    for path in (os.path.join(folder, "classes.csv"), nearest("data/classes.csv")):
        damaged = contextlib.suppress(OSError, ValueError, KeyError, csv.Error)
        with damaged, open(path, encoding="utf-8-sig", newline="") as file:
            counts = {row["category_id"]: float(row["n"]) for row in csv.DictReader(file)}
        if counts:
            break
    counts = counts or Counter(sample.ids if sample else ())
    if not counts:
        return None
    prior = [count / max(1, sum(counts.values())) for count in counts.values()]
    return {"class_ids": list(counts), "prior": prior, "columns": "sample"}


def default() -> str:
    """The exported bundle; where there is none, the programs that evaluate last left beside members."""
    exported = nearest("results/model/bundle")
    left = glob.glob(os.path.join(glob.escape(nearest("results/model")), "*", "programs", "bundle.json"))
    if os.path.exists(exported) or not left:
        return exported
    return os.path.dirname(max(left, key=os.path.getmtime))


def nearest(*names: str) -> str:
    """The first path that is there, below the folder that holds code/ or else below the current one."""
    places = [os.path.join(place, *name.split("/")) for name in names for place in (ROOT, os.curdir)]
    return next((path for path in places if os.path.exists(path)), places[0])
