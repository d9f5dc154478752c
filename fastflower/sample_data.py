"""Data to try a recipe on: `python -m fastflower.sample_data digits|eyes|pairs [home=data/<kind>] [key=value ...]`.

digits are scikit-learn's, as Kaggle's tables; pairs are made of them; eyes are drawn. `held_out` is a key of each,
`rows` and `seed` of eyes and pairs. The same words give the same pixels, and nothing is downloaded.
`... images <table of pixels> <folder>` writes a table's rows as files that the predictor reads.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from pathlib import Path

from fastflower.core import errors
from fastflower.core.errors import InputError
from fastflower.data.samples import digit_pairs, digits, eyes

KINDS: dict[str, Callable[..., None]] = {
    "digits": digits.write,
    "eyes": eyes.write,
    "pairs": digit_pairs.write,
}


def main(argv: list[str]) -> None:
    """Make one kind of data and say where it lies."""
    if argv[:1] == ["images"] and len(argv) == 3:
        made = digits.unpack(Path(argv[1]), Path(argv[2]))
        print(f"{argv[2]}: {made.rows} images of {made.height}x{made.width}")
        return
    kind, options = parse(argv)
    home = Path(options.pop("home", f"data/{kind}"))
    started = time.monotonic()
    KINDS[kind](home, **{name: int(value) for name, value in options.items()})
    print(f"{kind} in {home}: {time.monotonic() - started:.0f} s")


def parse(argv: list[str]) -> tuple[str, dict[str, str]]:
    """The kind and its keys; InputError says what there is."""
    kinds = [word for word in argv if "=" not in word]
    if len(kinds) != 1 or kinds[0] not in KINDS:
        raise InputError(
            f"got {' '.join(argv) or 'nothing'}; sample_data takes one of {', '.join(KINDS)}, "
            "or images <table of pixels> <folder>"
        )
    options = dict(word.split("=", 1) for word in argv if "=" in word)
    allowed = list(inspect.signature(KINDS[kinds[0]]).parameters)
    for name, value in options.items():
        if name not in allowed:
            raise InputError(f"got {name}={value}; the keys of {kinds[0]} are {', '.join(allowed)}")
        if name != "home" and not value.isdecimal():
            raise InputError(f"{name}={value}: must be a whole number from 0")
    return kinds[0], options


if __name__ == "__main__":
    errors.run(main)
