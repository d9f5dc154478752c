"""`bench fuzz`: damaged photographs by the thousand through code/predict.py, and a row for each of them.

Photographs are scaled small, saved in every format, and damaged in seeded ways. A portion is one run of the
predictor; it must end with exit code 0, its process must not have died, and every file must have a valid row.
Memory is told beside what importing torch alone takes in the same environment.
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
from fastflower.bench.predict import CLASSES, prepared
from fastflower.bundle import sandbox
from fastflower.core import runs
from fastflower.core.errors import InputError

BACKBONE, SIDE = "test_vit", 32  # what is tested is reading, so the network is the smallest there is
SOURCES = 12  # photographs
SECONDS = 60.0  # beyond the predictor's own limits, an image
# A process inherits the peak of the one that starts it, so a small one stands between; it says the peak last.
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
        "--portions", type=int, nargs=2, default=[0, 10], help="from the first up to the last"
    )
    parser.add_argument("--images", type=int, default=10_000, help="of each portion")
    args = parser.parse_args(argv)
    if not args.data.is_dir() or not (files := photographs(args.data, SOURCES)):
        raise InputError(f"--data {args.data}: no folder with JPEG files; give one")
    seeds = encoded(files)
    with tempfile.TemporaryDirectory(prefix="fastflower-fuzz-") as work:
        prepared(Path(work), BACKBONE, scales=[SIDE])
        root = sandbox.copy_hand_in(Path(work) / "hand-in", Path(work) / "bundle", [])
        alone, _ = measured([sys.executable, "-c", "import torch"], SECONDS)
        print(f"importing torch alone: {peak(alone):.0f} MB")
        for number in range(*args.portions):
            portion(root, seeds, number=number, count=args.images)
    return None


def encoded(files: Sequence[Path]) -> list[bytes]:
    """Small photographs in every format that the predictor reads."""
    made = []
    for number, file in enumerate(files):
        image = Image.open(file).convert("RGB").resize((96, 72), Image.Resampling.BICUBIC)
        for kind, words in (
            ("JPEG", {"quality": 60 + number}),
            ("JPEG", {"progressive": True, "subsampling": 2}),
            ("JPEG", {"exif": exif(number)}),
            ("PNG", {}),
            ("WEBP", {"quality": 70}),
            ("GIF", {}),
            ("BMP", {}),
        ):
            buffer = io.BytesIO()
            image.save(buffer, kind, **words)
            made.append(buffer.getvalue())
    return made


def exif(number: int) -> Image.Exif:
    """A note of how the camera was held."""
    note = Image.Exif()
    note[0x0112] = 1 + number % 8
    return note


def mutated(data: bytes, rng: random.Random) -> bytes:
    """One seeded fault: bits flipped, cut, doubled, overwritten, moved, zeroed, marked, or in the header."""
    kind, size = rng.randrange(9), len(data)
    a, b = sorted(rng.randrange(size) for _ in range(2))
    if kind == 0:
        return changed(data, {rng.randrange(size): 1 << rng.randrange(8) for _ in range(rng.randrange(1, 9))})
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
        return changed(data, {rng.randrange(head): rng.randrange(1, 256) for _ in range(3)})
    return data + rng.randbytes(rng.randrange(1, 2000))


def changed(data: bytes, by: dict[int, int]) -> bytes:
    """Bytes with some xored."""
    noisy = bytearray(data)
    for place, value in by.items():
        noisy[place] ^= value
    return bytes(noisy)


def measured(words: list[str], timeout: float) -> tuple[subprocess.CompletedProcess[str], float]:
    """Run a command: what it said, its peak of memory in MB as the last line, and the seconds it took."""
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *words], capture_output=True, text=True, timeout=timeout
    )
    return done, time.monotonic() - start


def peak(done: subprocess.CompletedProcess[str]) -> float:
    """Megabytes that a measured command took at most."""
    return float(done.stdout.split()[-1])


def portion(root: Path, seeds: list[bytes], *, number: int, count: int) -> None:
    """Damage, predict and check one portion; prints a line, raises InputError with what was wrong."""
    folder = root / "test_dataset"
    shutil.rmtree(folder)
    folder.mkdir()
    rng = random.Random(number)
    for index in range(count):
        (folder / f"{index:06d}.jpg").write_bytes(mutated(seeds[rng.randrange(len(seeds))], rng))
    words = [sys.executable, str(root / "code/predict.py"), "--device", "cpu"]
    done, spent = measured(words, SECONDS + count)
    about = json.loads((root / runs.SUBMISSION).with_suffix(".json").read_text(encoding="utf-8"))
    with open(root / runs.SUBMISSION, encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))[1:]
    faults = {
        f"exit code {done.returncode}": done.returncode != 0,
        "the working process died": "died" in done.stderr,
        "a name without a row": [row[0] for row in rows] != [f"{index:06d}.jpg" for index in range(count)],
        "a row out of range": not all(0 <= int(r[1]) < CLASSES and 0 < float(r[2]) <= 1 for r in rows),
        "a row neither predicted nor explained": about["predicted"] + len(about["unreadable"]) != count,
    }
    print(
        f"portion {number}: {count} files, {about['predicted']} read, {len(about['unreadable'])} refused, "
        f"{spent:.0f} s, at most {peak(done):.0f} MB",
        flush=True,
    )
    if any(faults.values()):
        wrong = [name for name, found in faults.items() if found]
        raise InputError(f"portion {number}: {'; '.join(wrong)}; last words: {done.stderr[-300:]}")
