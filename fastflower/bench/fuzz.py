"""`bench fuzz`: runs code/predict.py on thousands of damaged photographs and checks that each has a row.

Photographs are downscaled, saved in every format, and damaged at random with fixed seeds. A portion is one run of the
predictor: it must exit with code 0, its worker must survive, and every file must have a valid row. Peak memory is
printed, also that of importing torch alone in the same environment.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from fastflower.bench.pictures import photographs
from fastflower.bench.predict import CLASSES, write_random_bundle
from fastflower.core import runs
from fastflower.core.errors import InputError

BACKBONE, SIDE = "test_vit", 32  # the test is about reading, so the smallest network suffices
SOURCES = 12  # photographs
SECONDS = 60.0  # timeout, plus one second per image
# A process inherits the peak memory of its parent, so a small process starts the command and prints its peak last.
MEASURED = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
sys.exit(code)
"""


def main(argv: list[str]) -> int | None:
    parser = argparse.ArgumentParser("python -m fastflower.bench fuzz", description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("data/train"), help="folder of JPEG photographs")
    parser.add_argument(
        "--portions", type=int, nargs=2, default=[0, 10], help="first portion, and the one after the last"
    )
    parser.add_argument("--images", type=int, default=10_000, help="number of files in each portion")
    args = parser.parse_args(argv)
    if not args.data.is_dir() or not (files := photographs(args.data, SOURCES)):
        raise InputError(f"--data {args.data}: no folder with JPEG files; give one")
    from fastflower.bundle import sandbox  # here: torch and timm take seconds

    seeds = encoded(files)
    with tempfile.TemporaryDirectory(prefix="fastflower-fuzz-") as work:
        write_random_bundle(Path(work), BACKBONE, scales=[SIDE])
        root = sandbox.copy_hand_in(Path(work) / "hand-in", Path(work) / "bundle", [])
        result, _ = run_measured([sys.executable, "-c", "import torch"], SECONDS)
        print(f"importing torch alone: {peak_mb(result):.0f} MB")
        for number in range(*args.portions):
            run_portion(root, seeds, number=number, count=args.images)
    return None


def encoded(files: Sequence[Path]) -> list[bytes]:
    """Small images in every format that the predictor reads."""
    images = []
    for number, file in enumerate(files):
        image = Image.open(file).convert("RGB").resize((96, 72), Image.Resampling.BICUBIC)
        for image_format, options in (
            ("JPEG", {"quality": 60 + number}),
            ("JPEG", {"progressive": True, "subsampling": 2}),
            ("JPEG", {"exif": exif(number)}),
            ("PNG", {}),
            ("WEBP", {"quality": 70}),
            ("GIF", {}),
            ("BMP", {}),
        ):
            buffer = io.BytesIO()
            image.save(buffer, image_format, **options)
            images.append(buffer.getvalue())
    return images


def exif(number: int) -> Image.Exif:
    """EXIF data with one of the eight orientations."""
    data = Image.Exif()
    data[0x0112] = 1 + number % 8
    return data


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Data with one random fault: bits flipped, bytes cut, repeated, overwritten, moved, zeroed, a JPEG marker, ..."""
    kind, size = rng.randrange(9), len(data)
    a, b = sorted(rng.randrange(size) for _ in range(2))
    if kind == 0:
        return xored(data, {rng.randrange(size): 1 << rng.randrange(8) for _ in range(rng.randrange(1, 9))})
    if kind == 1:
        return data[:a]
    if kind == 2:
        return data[:a] + data[a:b] * 2 + data[b:]
    if kind == 3:
        return data[:a] + rng.randbytes(min(b - a, 50)) + data[b:]
    if kind == 4:
        return data[:a] + data[b:] + data[a:b]
    if kind == 5:
        return data[:a] + bytes(b - a) + data[b:]
    if kind == 6:
        marker = bytes([0xFF, rng.choice((0xC0, 0xC2, 0xC4, 0xD8, 0xD9, 0xDA, 0xDB, 0xDD, 0xE1, 0xFE))])
        return data[:a] + marker + data[a + 2 :]
    if kind == 7:
        head = min(size, 200)
        return xored(data, {rng.randrange(head): rng.randrange(1, 256) for _ in range(3)})
    return data + rng.randbytes(rng.randrange(1, 2000))


def xored(data: bytes, masks: dict[int, int]) -> bytes:
    """Bytes with the byte at each position xored with its mask."""
    noisy = bytearray(data)
    for position, mask in masks.items():
        noisy[position] ^= mask
    return bytes(noisy)


def run_measured(command: list[str], timeout: float) -> tuple[subprocess.CompletedProcess[str], float]:
    """Run a command; returns its result, with the peak memory in MB as last line of stdout, and its seconds."""
    start = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", MEASURED, *command], capture_output=True, text=True, timeout=timeout
    )
    return result, time.monotonic() - start


def peak_mb(result: subprocess.CompletedProcess[str]) -> float:
    """Peak memory in MB of a command run by run_measured."""
    return float(result.stdout.split()[-1])


def run_portion(root: Path, seeds: list[bytes], *, number: int, count: int) -> None:
    """Damage, predict and check one portion; prints a line, InputError names the checks that failed."""
    folder = root / "test_dataset"
    shutil.rmtree(folder)
    folder.mkdir()
    rng = random.Random(number)
    for index in range(count):
        (folder / f"{index:06d}.jpg").write_bytes(mutated(seeds[rng.randrange(len(seeds))], rng))
    command = [sys.executable, str(root / "code/predict.py"), "--device", "cpu"]
    result, seconds = run_measured(command, SECONDS + count)
    summary = json.loads((root / runs.SUBMISSION).with_suffix(".json").read_text(encoding="utf-8"))
    with open(root / runs.SUBMISSION, encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))[1:]
    faults = {
        f"exit code {result.returncode}": result.returncode != 0,
        "the working process died": "died" in result.stderr,
        "a name without a row": [row[0] for row in rows] != [f"{index:06d}.jpg" for index in range(count)],
        "a row out of range": not all(0 <= int(r[1]) < CLASSES and 0 < float(r[2]) <= 1 for r in rows),
        "a row neither predicted nor explained": summary["predicted"] + len(summary["unreadable"]) != count,
    }
    print(
        f"portion {number}: {count} files, {summary['predicted']} read, {len(summary['unreadable'])} refused, "
        f"{seconds:.0f} s, at most {peak_mb(result):.0f} MB",
        flush=True,
    )
    if any(faults.values()):
        failed = [name for name, occurred in faults.items() if occurred]
        raise InputError(f"portion {number}: {'; '.join(failed)}; end of stderr: {result.stderr[-300:]}")
