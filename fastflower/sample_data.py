"""Generated data sets: `python -m fastflower.sample_data digits|eyes|food|pairs [home=data/<kind>] [key=value ...]`.

digits are scikit-learn's in Kaggle's file formats, pairs are pairs of them, eyes are drawn, and food is drawn flowers
in the folders of a contest with unlabelled photographs. All have the key `held_out`, all but digits `rows` and `seed`,
and food `unlabelled`. Equal arguments give equal pixels, and nothing is downloaded.
`... images <table of pixels> <folder>` writes the rows of a CSV as image files that the predictor reads.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from pathlib import Path

from fastflower.core import console, errors, files
from fastflower.core.errors import InputError
from fastflower.data.samples import digit_pairs, digits, eyes, food

KINDS: dict[str, Callable[..., None]] = {
    "digits": digits.write,
    "eyes": eyes.write,
    "food": food.write,
    "pairs": digit_pairs.write,
}


def main(argv: list[str]) -> None:
    """Write one kind of data and print its folder."""
    if argv[:1] == ["images"] and len(argv) == 3:
        stack = digits.unpack(Path(argv[1]), Path(argv[2]))
        print(f"{argv[2]}: {stack.rows} images of {stack.height}x{stack.width}")
        return
    kind, options = parse(argv)
    home = Path(options.pop("home", f"data/{kind}"))
    started = time.monotonic()
    with files.filling(home) as folder:
        KINDS[kind](folder, **{name: int(value) for name, value in options.items()})
    print(f"{kind} in {home}: {time.monotonic() - started:.0f} s")
    if home == Path(f"data/{kind}"):  # where the recipe looks
        console.print_next("doctor", [f"recipes/{kind}{'' if kind == 'digits' else '_small'}.yaml"])


def parse(argv: list[str]) -> tuple[str, dict[str, str]]:
    """The kind and its options; InputError lists the allowed ones."""
    kinds = [argument for argument in argv if "=" not in argument]
    if len(kinds) != 1 or kinds[0] not in KINDS:
        raise InputError(
            f"got {' '.join(argv) or 'nothing'}; sample_data takes one of {', '.join(KINDS)}, "
            "or images <table of pixels> <folder>"
        )
    options = dict(argument.split("=", 1) for argument in argv if "=" in argument)
    allowed = list(inspect.signature(KINDS[kinds[0]]).parameters)
    for name, value in options.items():
        if name not in allowed:
            raise InputError(f"got {name}={value}; the keys of {kinds[0]} are {', '.join(allowed)}")
        if name != "home" and not value.isdecimal():
            raise InputError(f"{name}={value}: must be a whole number from 0")
    return kinds[0], options


if __name__ == "__main__":
    errors.run_command(main)
