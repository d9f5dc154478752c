"""python -m fastflower.draw eyes|pairs [rows=...] [held_out=...] [seed=0] [home=data/<kind>]: make a contest.

The same words draw the same pixels. Nothing is downloaded, and nothing that is there is replaced.
"""

from __future__ import annotations

import time
from pathlib import Path

from fastflower import errors
from fastflower.data import eyes, pairs
from fastflower.errors import InputError

KINDS = {"eyes": eyes.write, "pairs": pairs.write}


def main(argv: list[str]) -> int:
    """Draw one kind of contest and say where it lies."""
    kind, options = parse(argv)
    home = Path(options.pop("home", f"data/{kind}"))
    started = time.monotonic()
    KINDS[kind](home, **{name: int(value) for name, value in options.items()})
    print(f"{kind} in {home}: {time.monotonic() - started:.0f} s")
    return 0


def parse(argv: list[str]) -> tuple[str, dict[str, str]]:
    """The kind and the options; InputError says what there is."""
    kinds = [word for word in argv if "=" not in word]
    if len(kinds) != 1 or kinds[0] not in KINDS:
        raise InputError(f"got {' '.join(kinds) or 'nothing'}; draw one of {', '.join(KINDS)}")
    options = dict(word.split("=", 1) for word in argv if "=" in word)
    for name, value in options.items():
        if name not in ("rows", "held_out", "seed", "home"):
            raise InputError(f"got {name}={value}; the options are rows, held_out, seed and home")
        if name != "home" and not value.isdecimal():
            raise InputError(f"{name}={value}: must be a whole number from 0")
    return kinds[0], options


if __name__ == "__main__":
    errors.run(main)
