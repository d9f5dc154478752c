"""Benchmarks on this machine: `python -m fastflower.bench NAME [--help]`, NAME being one of BENCHES."""

from __future__ import annotations

import importlib
import sys

from fastflower.core import errors

BENCHES = (
    "loader",
    "step",
    "decoder",
    "convert",
    "predict",
    "fuzz",
    "attack",
    "kills",
    "backbones",
    "honesty",
    "ablation",
    "screening",
    "accuracy",
)


def main(argv: list[str]) -> int | None:
    if not argv or argv[0] not in BENCHES:
        got = argv[0] if argv else "nothing"
        raise errors.InputError(
            f"bench: got {got}, choose from {', '.join(BENCHES)}; add --help for its options"
        )
    # imports only the requested benchmark, since start-up time is measured
    bench = importlib.import_module(f"fastflower.bench.{argv[0]}")
    code: int | None = bench.main(argv[1:])
    return code


if __name__ == "__main__":
    errors.run_command(main, parses_help=sys.argv[1:2] != ["--help"])
