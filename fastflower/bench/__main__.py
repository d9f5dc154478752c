"""Measurements on this machine: `python -m fastflower.bench loader|predict|fuzz [--help]`."""

from __future__ import annotations

from fastflower import errors
from fastflower.bench import fuzz, loader, predict

BENCHES = {"loader": loader.main, "predict": predict.main, "fuzz": fuzz.main}


def main(argv: list[str]) -> int | None:
    if not argv or argv[0] not in BENCHES:
        got = argv[0] if argv else "nothing"
        raise errors.InputError(
            f"bench: got {got}, choose from {', '.join(BENCHES)}; add --help for its options"
        )
    return BENCHES[argv[0]](argv[1:])


if __name__ == "__main__":
    errors.run(main)
