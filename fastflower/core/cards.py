"""The GPUs that a build of torch has kernels for: a card that is newer or older than all of them runs nothing.

A card has a compute capability, such as (8, 9); a build names those it was compiled for, such as `sm_86`, whose
kernels run on all cards of the same first number from there on, and `compute_90`, which the driver compiles for any
later card.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

Capability = tuple[int, int]


def has_kernels(card: Capability, built_for: Sequence[str]) -> bool:
    """True if a build of torch runs on a card; also for a build that does not say what it was compiled for."""
    known = [_parse(name) for name in built_for]
    return not known or any(
        capability <= card and (kind == "compute" or capability[0] == card[0]) for kind, capability in known
    )


def lack(card: Capability, built_for: Sequence[str]) -> str:
    """The end of a line on a card without kernels: what torch has, and the environment that has them."""
    newest = max(capability for _, capability in map(_parse, built_for))
    setup = (
        "make setup NEXT=1, which has a newer torch"
        if card > newest
        else "make setup, which has an older torch"
    )
    return f"has compute capability {card[0]}.{card[1]}, this torch knows {' '.join(built_for)}; use {setup}"


def _parse(name: str) -> tuple[str, Capability]:
    """`sm_120` to ("sm", (12, 0)); letters behind the number name variants of one card."""
    found = re.fullmatch(r"(sm|compute)_(\d+)(\d)[a-z]*", name)
    if found is None:
        raise ValueError(f"{name} names no compute capability")
    return found[1], (int(found[2]), int(found[3]))
