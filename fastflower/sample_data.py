"""Data to try a recipe on: `python -m fastflower.sample_data digits [folder]`, `... images test.csv folder`.

digits writes scikit-learn's handwritten digits as Kaggle's tables (into data/digits); images writes the rows of a
table of pixels as files that the predictor reads.
"""

from __future__ import annotations

from pathlib import Path

from fastflower import errors
from fastflower.data import digits
from fastflower.errors import InputError

KINDS = {"digits": "[folder]", "images": "<table of pixels> <folder>"}


def main(argv: list[str]) -> None:
    match argv:
        case ["digits", *folder] if len(folder) <= 1:
            lines = digits.write(Path(folder[0] if folder else "data/digits"))
        case ["images", table, folder]:
            lines = digits.unpack(Path(table), Path(folder))
        case _:
            forms = " or ".join(f"{kind} {words}" for kind, words in KINDS.items())
            raise InputError(f"got {' '.join(argv) or 'nothing'}; sample_data takes {forms}")
    print("\n".join(lines))


if __name__ == "__main__":
    errors.run(main)
