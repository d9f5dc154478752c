"""The cards that a build of torch has kernels for, and the environment that has them for the others."""

from __future__ import annotations

import pytest

from fastflower.core.cards import has_kernels, lack

OLDER = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]  # of torch 2.7 for CUDA 12.6
NEWER = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]  # of torch 2.11 for CUDA 13.0


@pytest.mark.parametrize(
    ("card", "older", "newer"),
    [
        ((6, 1), True, False),  # GTX 1080
        ((7, 5), True, True),  # RTX 2080
        ((8, 9), True, True),  # RTX 4090
        ((9, 0), True, True),  # H200
        ((10, 0), False, True),  # B200
        ((12, 0), False, True),  # RTX 5090
    ],
)
def test_a_card_needs_kernels_of_its_own_generation(card, older, newer):
    assert (has_kernels(card, OLDER), has_kernels(card, NEWER)) == (older, newer)


def test_later_cards_compile_what_is_kept_as_source_and_silence_is_no_refusal():
    assert has_kernels((12, 0), ["sm_90", "compute_90"]) and not has_kernels((8, 9), ["sm_90", "compute_90"])
    assert has_kernels((12, 0), []) and has_kernels((9, 0), ["sm_90a"])


def test_the_line_names_the_environment_for_the_card():
    assert lack((12, 0), OLDER).endswith("sm_90; use make setup NEXT=1, which has a newer torch")
    assert lack((6, 1), NEWER).endswith("sm_120; use make setup, which has an older torch")
