"""Memory of the C library's allocator."""

from __future__ import annotations

import resource

import numpy as np
import pytest

from fastflower.core import host_memory
from fastflower.core.host_memory import keep_freed_memory

MIB = 2**20


def page_faults_of_a_large_block() -> int:
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    np.empty(64 * MIB, np.uint8).fill(1)
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before


def test_freed_memory_is_used_again_without_page_faults() -> None:
    keep_freed_memory()
    page_faults_of_a_large_block()
    assert page_faults_of_a_large_block() < 100  # of 16384 pages


def test_settings_of_the_environment_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000000")
    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda name: pytest.fail("the allocator was changed"))
    keep_freed_memory()
