"""A few cases of `make torture` on two ranks."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from support import torture
from support.forked import fork


@pytest.mark.dist
def test_two_ranks_that_are_killed_end_like_uninterrupted_ones():
    """One kill at a point, and one exception on a rank, which the other rank names as the cause when it exits."""
    words = ["--ranks", "2", "--points", "1", "--random", "0", "--recipes", "1", "--seed", "5"]
    output = Path("output.txt")
    status = os.waitpid(fork(lambda: torture.main(words), output), 0)[1]
    assert status == 0, output.read_text()
    total = re.search(r"^all +(\d+) +(\d+) +(\d+) +(\d+) +(\d+)$", output.read_text(), re.MULTILINE)
    assert total is not None
    cases, kills, _, _, differences = map(int, total.groups())
    assert (cases, kills, differences) == (2, 1, 0)
