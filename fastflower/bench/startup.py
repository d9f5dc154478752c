"""Start-up: seconds of fresh processes to the first training and evaluation batch, and to a refusal.

Warm: all files are in the page cache. Cold: Python compiles every module again, and the mapped files were dropped from
the page cache unless another process maps them.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REFUSING = ("convert", "train", "lrfind", "evaluate", "ensemble", "export")  # commands that take a recipe


def starts(beton: Path, size: int, *, turns: int) -> dict[str, float]:
    """Medians of `turns` warm and cold starts; torch_s: seconds of the warm start that importing torch took."""
    _start(beton, size)
    warm = sorted((_start(beton, size) for _ in range(turns)), key=lambda start: start["both_s"])[turns // 2]
    cold = []
    for _ in range(turns):
        with tempfile.TemporaryDirectory(prefix="fastflower-cold-") as empty_cache:
            for file in [*warm["mapped"], str(beton)]:
                _drop(Path(file))
            cold.append(_start(beton, size, PYTHONPYCACHEPREFIX=empty_cache)["both_s"])
    return {"warm_s": warm["both_s"], "torch_s": warm["torch_s"], "cold_s": sorted(cold)[turns // 2]}


def refusals() -> dict[str, float]:
    """CPU seconds in which each command that takes a recipe refuses an unknown key."""
    seconds = {}
    for command in REFUSING:
        before = _children_seconds()
        arguments = [sys.executable, "-m", f"fastflower.{command}", "unknown.key=1"]
        subprocess.run(arguments, capture_output=True, timeout=120, check=False)
        seconds[command] = round(_children_seconds() - before, 2)
    return seconds


def _children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def process_start() -> float:
    """Unix time at which this process started, from /proc."""
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK")


def _start(beton: Path, size: int, **environment: str) -> dict:
    command = [sys.executable, "-m", "fastflower.bench.startup", str(beton), str(size)]
    result = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120, check=True
    )
    start: dict = json.loads(result.stdout)
    return start


def _drop(file: Path) -> None:
    if file.is_file():
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _first_batches(path: Path, size: int) -> dict[str, object]:
    before = time.perf_counter()
    import torch  # noqa: F401

    after = time.perf_counter()
    import numpy as np

    from fastflower.data.betons.beton_file import open_beton
    from fastflower.data.decode.kernel import Crop
    from fastflower.data.loaders import EvalLoader, TrainLoader

    beton = open_beton(path)
    train = TrainLoader(
        beton, lambda epoch: np.arange(beton.rows), seed=0, batch=lambda epoch: min(64, beton.rows),
        size=lambda epoch: (size, size), crop=Crop(),
    )  # fmt: skip
    evaluation = EvalLoader(beton, 64, size=lambda: (size, size), factor=1.14, interpolation="bicubic")
    for loader in (train, evaluation):
        next(iter(loader))
    seconds = time.time() - process_start()
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
    return {"both_s": round(seconds, 2), "torch_s": round(after - before, 2), "mapped": sorted(mapped)}


if __name__ == "__main__":
    print(json.dumps(_first_batches(Path(sys.argv[1]), int(sys.argv[2]))))
