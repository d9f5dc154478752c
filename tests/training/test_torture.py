"""A few cases of `make torture` on two ranks."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.dist
def test_two_ranks_that_are_killed_end_like_uninterrupted_ones():
    """One kill at a point, and one exception on a rank, which the other rank names as the cause when it exits."""
    words = ["--ranks", "2", "--points", "1", "--random", "0", "--recipes", "1", "--seed", "5"]
    script = Path(__file__).parents[1] / "support/torture.py"
    done = subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    total = re.search(r"^all +(\d+) +(\d+) +(\d+) +(\d+) +(\d+)$", done.stdout, re.MULTILINE)
    assert total is not None
    cases, kills, _, _, differences = map(int, total.groups())
    assert (cases, kills, differences) == (2, 1, 0)
