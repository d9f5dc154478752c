"""The name and the bf16 instructions of this machine's processor."""

from __future__ import annotations

import platform
from pathlib import Path

BF16 = {"avx512_bf16", "amx_bf16"}  # flags of Linux for instructions that multiply bf16 and add in float32


def name() -> str:
    """The processor's model, such as "AMD EPYC 9654"; the architecture where Linux does not state it."""
    models = (line.partition(":")[2].strip() for line in _lines() if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def multiplies_bf16() -> bool:
    """True when this processor has bf16 instructions; without them bf16 is slower than float32."""
    # twin of multiplies_bf16 in code/networks.py, which imports nothing of fastflower
    flags = (line.partition(":")[2].split() for line in _lines() if line.startswith("flags"))
    return not BF16.isdisjoint(next(flags, []))


def _lines() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
