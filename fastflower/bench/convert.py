"""`bench convert`: converting photographs to betons against FFCV's DatasetWriter, with the same workers in one run.

fastflower runs the complete `convert`: decoding and checking every image, hashing, near-duplicates, folds, all betons
of every fold with corrupted copies, read back from disk. The stock writer writes every image once.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image

from fastflower.bench.contenders import check_stock
from fastflower.bench.pictures import photographs
from fastflower.core.errors import InputError
from fastflower.core.files import write_json
from fastflower.data.betons.beton_writer import BetonWriter
from fastflower.data.labels import read_labels
from fastflower.recipe import load

STOCK = "ffcv DatasetWriter, jpeg q90, once"
ROWS = (1_000, 20_000)


def main(argv: list[str]) -> int | None:
    parser = argparse.ArgumentParser("python -m fastflower.bench convert", description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("data/train"), help="folder of JPEG photographs")
    parser.add_argument("--images", type=int, default=0, help="number of photographs; 0: all")
    parser.add_argument("--size", type=int, default=128, help="the recipe's largest image size")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--memory", action="store_true", help=f"also measure peak memory at {ROWS[0]} and {ROWS[1]} rows"
    )
    parser.add_argument("--json", type=Path, help="path of the results as JSON")
    parser.add_argument("--probe", nargs=2, help=argparse.SUPPRESS)  # one conversion in a fresh process
    args = parser.parse_args(argv)
    if not args.probe and not (args.data.is_dir() and photographs(args.data, 1)):
        raise InputError(f"--data {args.data}: no folder with JPEG files; give one")
    check_stock()
    import fastflower.data.conversion.pipeline  # noqa: F401  # before any clock starts, after all refusals

    if args.probe:
        print(json.dumps(probe(Path(args.probe[0]), Path(args.probe[1]), args.workers)), flush=True)
        return None
    files = photographs(args.data, args.images)
    with tempfile.TemporaryDirectory(prefix="fastflower-bench-") as work:
        rows = measure(files, Path(work), size=args.size, workers=args.workers, rounds=args.rounds)
        show(rows, len(files), args.workers)
        if args.memory:
            memory = [_fresh(files, Path(work), count=count, workers=args.workers) for count in ROWS]
            rows += memory
            for row in memory:
                print(f"{row['rows']} rows: peak {row['peak_mb']:.0f} MB, {row['seconds']:.1f} s")
    if args.json:
        write_json(args.json, rows)
    return None


def measure(
    files: tuple[Path, ...], work: Path, *, size: int, workers: int, rounds: int
) -> list[dict[str, Any]]:
    """Seconds of each contender in each round; every round converts again."""
    contenders: dict[str, Callable[[Path], None]] = {
        STOCK: lambda folder: stock(files, folder / "stock.beton", workers=workers, longest=512),
        "fastflower, five folds and corrupted sets, raw": lambda folder: convert(
            files, folder, size=size, workers=workers, store="raw"
        ),
        "fastflower, five folds and corrupted sets, jpeg": lambda folder: convert(
            files, folder, size=size, workers=workers, store="jpeg"
        ),
        "ffcv DatasetWriter, jpeg q90, whole images": lambda folder: stock(
            files, folder / "stock.beton", workers=workers, longest=1 << 15
        ),
        "fastflower, one split, bytes as they are": lambda folder: write_original(
            files, folder / "original.beton"
        ),
    }
    (work / "warm").mkdir()  # so that imports are not measured
    stock(files[:8], work / "warm/stock.beton", workers=workers, longest=512)
    convert(files[:40], work / "warm", size=size, workers=workers, store="raw")
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name, run_contender in contenders.items():
            folder = work / f"{number}-{len(times[name])}"
            folder.mkdir()
            os.sync()  # so that writes of the previous contender are not measured
            start = time.perf_counter()
            run_contender(folder)
            times[name].append(time.perf_counter() - start)
            subprocess.run(["rm", "-rf", str(folder)], check=True)
    return [
        {
            "contender": name,
            "seconds": round(float(np.median(taken)), 3),
            "rounds": [round(t, 3) for t in taken],
        }
        for name, taken in times.items()
    ]


def stock(files: tuple[Path, ...], path: Path, *, workers: int, longest: int) -> None:
    """FFCV's writer on RGB images, as a torchvision dataset yields them."""
    from fastflower.bench.stock_ffcv import write_stock

    with contextlib.redirect_stderr(io.StringIO()):  # hides its progress bar
        write_stock(path, cast(Any, _ImageDataset(files)), mode="jpg", workers=workers, longest=longest)


class _ImageDataset:
    """Map-style dataset of (image, label)."""

    def __init__(self, files: tuple[Path, ...]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> tuple[Image.Image, int]:
        return Image.open(self.files[row]).convert("RGB"), 0


def convert(files: tuple[Path, ...], folder: Path, *, size: int, workers: int, store: str) -> None:
    """The work of the convert command, without its output."""
    labels, classes = folder / "labels.csv", max(2, min(17, len(files) // 10))
    root = Path(os.path.commonpath([file.parent for file in files]))
    names = [file.relative_to(root) for file in files]
    labels.write_text(
        "filename,category_id\n" + "".join(f"{name},{row % classes}\n" for row, name in enumerate(names))
    )
    overrides = [
        f"data.root={root}", f"data.csv={labels}", f"data.home={folder}", f"data.img_size={size}",
        f"tta.scales=[{size}]", f"data.workers={workers}", f"data.store={store}",
    ]  # fmt: skip
    from fastflower.data.conversion import pipeline

    settings = load(None, overrides)
    with contextlib.redirect_stdout(io.StringIO()):
        pipeline.convert(settings, read_labels(settings))


def write_original(files: tuple[Path, ...], path: Path) -> None:
    """Write one split of original bytes, without encoding; checksummed and read back."""
    with BetonWriter(path, len(files)) as writer:
        for row, file in enumerate(files):
            data = file.read_bytes()
            with Image.open(io.BytesIO(data)) as image:
                width, height = image.size
            writer.append_jpeg(data, height=height, width=width, label=0, index=row)
        writer.commit()


def show(rows: list[dict[str, Any]], images: int, workers: int) -> None:
    """Print seconds, images/s and the speed relative to the matching stock writer."""
    print(
        f"{images} photographs, {workers} workers; median seconds, images/s, speed relative to the stock writer"
    )
    for row in rows:
        full_size = "whole" in row["contender"] or "as they are" in row["contender"]
        base = next(r for r in rows if "ffcv" in r["contender"] and ("whole" in r["contender"]) == full_size)
        row["ratio_to_stock_ffcv"] = round(base["seconds"] / row["seconds"], 3)
        speed = images / row["seconds"]
        print(f"{row['contender']:52}{row['seconds']:8.2f} s{speed:8.0f}/s{row['ratio_to_stock_ffcv']:8.2f}")


def probe(root: Path, folder: Path, workers: int) -> dict[str, float]:
    """Convert the images in `root` and return the peak memory of this process and its workers."""
    files = photographs(root, 0)
    start = time.perf_counter()
    peak, ended = [0.0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.1):
            peak[0] = max(peak[0], _memory_mb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    convert(files, folder, size=32, workers=workers, store="raw")
    ended.set()
    watcher.join()
    return {"rows": len(files), "peak_mb": round(peak[0]), "seconds": round(time.perf_counter() - start, 2)}


def _memory_mb() -> float:
    """MB of anonymous memory of this process and its children, shared pages once; the kernel can drop mapped files."""
    pids = ["self", *(str(child.pid) for child in multiprocessing.active_children())]
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
            total += next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss_Anon:"))
    return total / 1024


def _fresh(files: tuple[Path, ...], work: Path, *, count: int, workers: int) -> dict[str, Any]:
    """Convert `count` small images, most of them links to the first ones, in a fresh process."""
    root = work / f"rows{count}"
    root.mkdir()
    for number in range(count):
        name = root / f"{number:06d}.jpg"
        source = files[number % len(files)]
        if number < len(files):
            with Image.open(source) as image:
                image.convert("RGB").resize((64, 48)).save(name, "JPEG", quality=90)
        else:
            os.link(root / f"{number % len(files):06d}.jpg", name)
    folder = work / f"converted{count}"
    folder.mkdir()
    command = [sys.executable, "-m", "fastflower.bench", "convert", "--workers", str(workers)]
    result = subprocess.run(
        [*command, "--probe", str(root), str(folder)], capture_output=True, text=True, timeout=1200
    )
    if result.returncode:
        raise InputError(f"{count} rows: {(result.stderr.strip().splitlines() or ['no message'])[-1]}")
    row: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return row
