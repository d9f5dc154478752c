"""`bench step`: training steps per second of whole trainers, fed from photographs, in one run.

Each trainer runs in a process of its own; they take turns, an epoch each, so that a busy machine favours none. Ratios
are medians over the rounds. The first epoch of each is not counted. On a GPU all compute in bf16 unless their name says
otherwise; on a CPU fastflower does where it has instructions for it, the others where their name says so.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import IO, Any

from fastflower.bench.pictures import photographs
from fastflower.core import processor
from fastflower.core.errors import EnvironmentFault, InputError
from fastflower.core.files import write_json

TITLES = {
    "resident": "fastflower, resident batches",
    "fastflower": "fastflower",
    "float32": "fastflower, train.amp=false",
    "same": "fastflower, crop, flip and MixUp",
    "stock": "Composer and FFCV, stock",
    "timm": "timm's train loop",
    "timm_channels_last": "timm's, --channels-last",
    "timm_bf16": "timm's, --channels-last --amp in bf16",
    "fastai": "fastai's Learner",
    "plain": "plain loop: DataLoader and Pillow",
    "plain_channels_last": "the same in channels_last format",
}
OPTIONAL = ("fastai",)  # peers that the lock does not hold
OURS = {"fastflower": "fastflower", "float32": "train.amp=false"}  # and the heading of its column of ratios
SPLIT = ("data.split=ratio", "data.n_splits=5")  # holds a fifth out, for any number of images
CLASSES = 10  # labels are drawn: speed does not depend on them


def main(argv: list[str]) -> int | None:
    parser = argparse.ArgumentParser("python -m fastflower.bench step", description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("data/train"), help="folder of JPEG photographs")
    parser.add_argument("--images", type=int, default=400, help="number of photographs; 0: all")
    parser.add_argument("--backbone", nargs="+", default=["test_resnet", "resnet18"])
    parser.add_argument("--size", type=int, default=96, help="side of the network's input in pixels")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5, help="epochs of each trainer that count")
    parser.add_argument("--threads", type=int, default=1, help="threads for computing, and for loading")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--trainers", nargs="+", choices=TITLES, help="those to compare; default: all that are installed"
    )
    parser.add_argument("--json", type=Path, help="path of the results as JSON")
    args = parser.parse_args(argv)
    trainers = runnable(args.trainers, args.device)
    if not args.data.is_dir() or not (files := photographs(args.data, args.images)):
        raise InputError(f"--data {args.data}: no folder with JPEG files; give one")
    if len(files) * 4 // 5 < 2 * args.batch:
        raise InputError(
            f"{len(files)} photographs: an epoch needs two batches of {args.batch} after a fifth is held out; "
            f"give {args.batch * 5 // 2 + 5} or more, or a smaller --batch"
        )
    rows = []
    with tempfile.TemporaryDirectory(prefix="fastflower-bench-") as work:
        project, stock_beton = prepare(Path(work), files, args.size)
        for backbone in args.backbone:
            settings = Settings(
                project=str(project), ffcv=str(stock_beton or ""), classes=CLASSES, backbone=backbone,
                size=args.size, batch=args.batch, epochs=args.rounds + 1, threads=args.threads, device=args.device,
            )  # fmt: skip
            rows += measure(Path(work), settings, trainers)
            print(table([row for row in rows if row["backbone"] == backbone]), flush=True)
    if args.json:
        write_json(args.json, rows)
    return None


def runnable(asked: Sequence[str] | None, device: str) -> list[str]:
    """The trainers asked for, by default all that run here; EnvironmentFault for one that does not."""
    absent = {
        name: f"not installed; pip install {name}" for name in OPTIONAL if not importlib.util.find_spec(name)
    }
    if device == "cuda":
        absent["timm_bf16"] = "the others compute in bf16 on a GPU, too: give timm_channels_last"
    elif not processor.multiplies_bf16():
        absent |= dict.fromkeys(("float32", "timm_bf16"), f"{processor.name()} has no bf16 instructions")
    for name in asked or ():
        if name in absent:
            raise EnvironmentFault(f"--trainers {name}: {absent[name]}, or leave it out")
    if not asked:
        for name, reason in absent.items():
            print(f"not compared: {name} ({reason})")
    return list(asked or (name for name in TITLES if name not in absent))


def prepare(work: Path, files: Sequence[Path], size: int) -> tuple[Path, Path | None]:
    """A converted project of the photographs in class folders, and a stock FFCV beton where FFCV is installed."""
    from PIL import Image

    project = work / "project"
    for number, file in enumerate(files):
        folder = project / "data/train" / f"class{number % CLASSES}"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, folder / f"{number}.jpg")
    words = ["data.root=data/train", "data.fold=0", "data.group=none", *SPLIT, f"data.img_size={size}"]
    words += [f"tta.scales=[{size}]"]
    command = [sys.executable, "-m", "fastflower.convert", *words]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"the photographs cannot be converted: {done.stderr.strip().splitlines()[-1]}")
    try:
        from fastflower.bench.stock_ffcv import write_stock
    except ImportError:
        return project, None
    path = work / "stock.beton"
    with contextlib.redirect_stderr(io.StringIO()):  # hides its progress bar
        write_stock(
            path, [(Image.open(f).convert("RGB"), i % CLASSES) for i, f in enumerate(files)], mode="jpg"
        )
    return project, path


@dataclass(frozen=True)
class Settings:
    """One configuration of the benchmark: files and folders, network, sizes, threads."""

    project: str  # folder with data/ and its betons
    ffcv: str  # stock FFCV beton of the same images, or empty
    classes: int
    backbone: str
    size: int
    batch: int
    epochs: int
    threads: int
    device: str


@dataclass
class Contender:
    """A trainer in a process of its own, which trains one epoch at a time."""

    name: str
    process: subprocess.Popen[str]
    errors: IO[str]

    @classmethod
    def start(cls, name: str, settings: Settings, folder: Path) -> Contender:
        path = folder / "settings.json"
        path.write_text(json.dumps(asdict(settings)))
        errors = tempfile.TemporaryFile("w+", dir=folder)  # noqa: SIM115, closed with the process
        threads = str(settings.threads)
        process = subprocess.Popen(
            [sys.executable, "-m", "fastflower.bench.trainers", name, str(path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
            env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
        )  # fmt: skip
        contender = cls(name, process, errors)
        try:
            contender.read(lambda line: line.strip() == "ready")
        except BaseException:
            contender.stop()
            raise
        return contender

    def epoch(self) -> dict[str, float]:
        """Train one epoch; returns its figures when its validation has ended too."""
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        figures: dict[str, float] = json.loads(self.read(lambda line: line.startswith("{")))
        self.read(lambda line: line.strip() == "ready")
        return figures

    def read(self, wanted: Callable[[str], bool]) -> str:
        """The next wanted line of its output; RuntimeError with its last words when it has ended."""
        assert self.process.stdout
        for line in self.process.stdout:
            if wanted(line):
                return line
        self.errors.seek(0)
        raise RuntimeError(f"{self.name} has ended: {self.errors.read()[-3000:]}")

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()


def measure(folder: Path, settings: Settings, trainers: Sequence[str]) -> list[dict[str, Any]]:
    """One row per trainer: images/s, processor ms, peak memory, and how many times as fast ours are."""
    names = [name for name in trainers if settings.ffcv or name != "stock"]
    contenders: list[Contender] = []
    try:
        for name in names:
            contenders.append(Contender.start(name, settings, folder))
        figures: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for turn in range(settings.epochs):
            order = contenders[turn % len(names) :] + contenders[: turn % len(names)]
            for contender in order:
                epoch = contender.epoch()
                if turn:
                    figures[contender.name].append(epoch)
    finally:
        for contender in contenders:
            contender.stop()
    speeds = {name: [epoch["images"] / epoch["wall"] for epoch in epochs] for name, epochs in figures.items()}
    return [
        {
            "backbone": settings.backbone, "size": settings.size, "batch": settings.batch, "trainer": TITLES[name],
            "images_per_s": round(median(speeds[name]), 1),
            "processor_ms_per_image": round(median(1e3 * e["processor"] / e["images"] for e in figures[name]), 2),
            "peak_mb": round(max(epoch["peak_mb"] for epoch in figures[name])),
            "faster": {ours: ratio(speeds[ours], speeds[name]) for ours in references(names)},
        }
        for name in names
    ]  # fmt: skip


def references(names: Sequence[str]) -> list[str]:
    """The trainers with a column of ratios: ours, or the first where none of ours runs."""
    return [name for name in OURS if name in names] or list(names[:1])


def ratio(speeds: Sequence[float], others: Sequence[float]) -> float:
    """The median over the rounds of one trainer's speed divided by another's."""
    return round(median(a / b for a, b in zip(speeds, others, strict=True)), 3)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table, with a column for each reference's speed over the row's."""
    ours = list(rows[0]["faster"])
    heads = [
        "network, size, batch",
        "trainer",
        "images/s",
        *(f"{OURS.get(name, TITLES[name])} is faster by" for name in ours),
    ]
    lines = [[*heads, "processor ms/image", "peak MB"], ["---"] * (len(heads) + 2)]
    for row in rows:
        lines.append(
            [
                f"{row['backbone']}, {row['size']}, {row['batch']}",
                row["trainer"],
                str(row["images_per_s"]),
                *(f"{row['faster'][name]:.2f}" for name in ours),
                str(row["processor_ms_per_image"]),
                str(row["peak_mb"]),
            ]
        )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
