"""`bench loader`: speed of loading training batches against other libraries, interleaved in one run.

Ratios are computed within a round, so a busy period of the machine does not favour a contender; ratios of processor
time are valid on a shared machine too. Start-up (from process start to the first batch) and peak memory are measured
in a fresh process for each contender.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from fastflower.bench.contenders import CONTENDERS, STOCK, available, check_stock
from fastflower.bench.pictures import Epoch, Pictures, photographs
from fastflower.bench.startup import process_start, refusals, starts
from fastflower.core.errors import InputError
from fastflower.core.files import write_json


def main(argv: list[str]) -> int | None:
    parser = argparse.ArgumentParser("python -m fastflower.bench loader", description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("data/train"), help="folder of JPEG photographs")
    parser.add_argument("--images", type=int, default=0, help="number of photographs; 0: all")
    parser.add_argument("--size", type=int, nargs="+", default=[224, 320])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--only", nargs="+", help="only contenders whose name contains one of these words, and stock FFCV"
    )
    parser.add_argument("--json", type=Path, help="path of the results as JSON")
    # measures one contender's start in a fresh process
    parser.add_argument("--probe", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not args.data.is_dir() or not (files := photographs(args.data, args.images)):
        raise InputError(f"--data {args.data}: no folder with JPEG files; give one")
    check_stock()
    if args.probe:
        name, work = args.probe
        print(
            json.dumps(probe(name, Pictures(files, Path(work)), size=args.size[0], threads=args.threads[0])),
            flush=True,
        )
        os._exit(0)  # threads of some libraries crash at interpreter exit
    names = [n for n in available() if n == STOCK or not args.only or any(word in n for word in args.only)]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="fastflower-bench-") as work:
        pictures = Pictures(files, Path(work))
        print(f"{len(files)} photographs, {args.rounds} rounds; ratios to {STOCK}: median [quartiles]")
        for size in args.size:
            for threads in args.threads:
                measured = measure(pictures, names, size=size, threads=threads, rounds=args.rounds)
                for row in measured:
                    row |= _fresh(row["contender"], args, pictures=pictures, size=size, threads=threads)
                show(measured)
                rows += measured
        beton = pictures.beton("original", 0).path
        start = {
            "contender": "fastflower, start of both loaders",
            "size": args.size[0],
            **starts(beton, args.size[0], turns=min(3, args.rounds)),
            "refusal_s": refusals(),
        }
        print(
            f"\nfirst training and first evaluation batch, size {start['size']}, from process start: "
            f"{start['warm_s']:.1f} s warm (importing torch takes {start['torch_s']:.1f} s of it), "
            f"{start['cold_s']:.1f} s cold\nCPU seconds to the refusal of an unknown key: "
            + ", ".join(f"{command} {seconds:.1f}" for command, seconds in start["refusal_s"].items())
        )
        rows.append(start)
    if args.json:
        write_json(args.json, rows)
    return None


def measure(
    pictures: Pictures, names: list[str], *, size: int, threads: int, rounds: int
) -> list[dict[str, Any]]:
    """One row per contender: median images/s, and the ratio to stock FFCV with its quartiles."""
    epochs = {name: CONTENDERS[name](pictures, size, threads) for name in names}
    for epoch in epochs.values():
        seconds(epoch)  # warms up compilers, caches and workers
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for turn in range(rounds):
        order = deque(names)
        order.rotate(turn)
        for name in order:
            times[name].append(seconds(epochs[name]))
    rows = []
    for name in names:
        ratios = np.array(times[STOCK]) / np.array(times[name])
        low, middle, high = np.percentile(ratios[:, 0], [25, 50, 75])
        wall, processor = np.median(times[name], axis=0)
        rows.append(
            {
                "contender": name,
                "size": size,
                "threads": threads,
                "images_per_s": round(len(pictures.files) / float(wall), 1),
                "images_per_cpu_s": round(len(pictures.files) / float(processor), 1),
                "ratio_to_stock_ffcv": round(middle, 3),
                "ratio_q1": round(low, 3),
                "ratio_q3": round(high, 3),
                "ratio_cpu": round(float(np.median(ratios[:, 1])), 3),
            }
        )
    return rows


def seconds(epoch: Epoch) -> tuple[float, float]:
    """Wall and processor seconds of one epoch; batches are discarded."""
    start, spent = time.perf_counter(), _processor()
    for _ in epoch():
        pass
    return time.perf_counter() - start, _processor() - spent


def probe(name: str, pictures: Pictures, *, size: int, threads: int) -> dict[str, float]:
    """Seconds from process start to the first batch, and peak memory after one epoch."""
    batches = iter(CONTENDERS[name](pictures, size, threads)())
    next(batches)
    first = time.time() - process_start()
    for _ in batches:
        pass
    processes = ["self", *(str(child.pid) for child in multiprocessing.active_children())]
    return {"first_batch_s": round(first, 2), "peak_mb": round(sum(map(_peak, processes)))}


def show(rows: list[dict[str, Any]]) -> None:
    """Print the rows of one size and thread count as a table."""
    print(f"\nsize {rows[0]['size']}, threads {rows[0]['threads']}")
    columns = (
        f"{'img/s/core':>10}{'ratio':>9} {'[q1, q3]':>16}{'cpu ratio':>11}{'first batch':>13}{'peak':>10}"
    )
    print(f"{'':38}{columns}")
    for row in rows:
        quartiles = f"[{row['ratio_q1']:.2f}, {row['ratio_q3']:.2f}]"
        speed = row["images_per_s"] / row["threads"]
        print(
            f"{row['contender']:38}{speed:10.0f}{row['ratio_to_stock_ffcv']:9.2f} {quartiles:>16}"
            f"{row['ratio_cpu']:11.2f}{row['first_batch_s']:11.1f} s{row['peak_mb']:7.0f} MB",
            flush=True,
        )


def _fresh(
    name: str, args: argparse.Namespace, *, pictures: Pictures, size: int, threads: int
) -> dict[str, float]:
    command = [sys.executable, "-m", "fastflower.bench", "loader", "--data", str(args.data)]
    command += ["--images", str(args.images), "--size", str(size), "--threads", str(threads)]
    result = subprocess.run(
        [*command, "--probe", name, str(pictures.work)], capture_output=True, text=True, timeout=600
    )
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise InputError(f"{name} failed in a fresh process ({result.returncode}): {reason}")
    start: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return start


def _processor() -> float:
    """Processor seconds of this process and its live children, which are the workers of loaders."""
    ticks = 0
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def _peak(process: str) -> float:
    """Peak memory of a process in MB."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
