"""Measurements on this machine: `python -m fastflower.bench loader|decoder|convert|predict|fuzz [--help]`."""

from __future__ import annotations

import importlib
import sys

from fastflower.core import errors

BENCHES = ("loader", "decoder", "convert", "predict", "fuzz")


def main(argv: list[str]) -> int | None:
    if not argv or argv[0] not in BENCHES:
        got = argv[0] if argv else "nothing"
        raise errors.InputError(
            f"bench: got {got}, choose from {', '.join(BENCHES)}; add --help for its options"
        )
    # the one alone, since start-up is measured
    bench = importlib.import_module(f"fastflower.bench.{argv[0]}")
    done: int | None = bench.main(argv[1:])
    return done


if __name__ == "__main__":
    errors.run(main, own_help=sys.argv[1:2] != ["--help"])
