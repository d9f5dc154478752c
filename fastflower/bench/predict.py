"""`bench predict`: the hand-in against the loop that a contest entry usually is, at equal views, in one run.

The plain loop opens a photograph with Pillow, makes each view with torchvision's transforms and gives it to timm's
network alone. Both sides take the same photographs in turns, so that a busy machine favours neither; start-up is
told apart. Weights are random: speed does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import transforms as T

from fastflower.bench.pictures import photographs
from fastflower.bundle import sandbox, writer
from fastflower.core import checkpoint, runs
from fastflower.core.errors import InputError
from fastflower.core.files import write_json
from fastflower.model import backbones
from fastflower.model.network import Network, NetworkSpec, build_network
from fastflower.recipe import load

CLASSES, FACTOR = 17, 1.14


def main(argv: list[str]) -> int | None:
    parser = argparse.ArgumentParser("python -m fastflower.bench predict", description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("data/train"), help="folder of JPEG photographs")
    parser.add_argument("--images", type=int, default=64, help="use the first so many")
    parser.add_argument("--backbone", nargs="+", default=["resnet10t"])
    parser.add_argument(
        "--scales", type=int, nargs="+", default=[128, 160], help="sizes of the views, mirrored too"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", help="cpu, cuda")
    parser.add_argument("--half", default="gpu", help="the key bundle.half")
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args(argv)
    if not args.data.is_dir() or not (files := photographs(args.data, args.images)):
        raise InputError(f"--data {args.data}: no folder with JPEG files; give one")
    rows = []
    with tempfile.TemporaryDirectory(prefix="fastflower-bench-") as work:
        for number, name in enumerate(args.backbone):
            place = Path(work) / str(number)
            rows.append(
                measure(
                    place,
                    name,
                    files=files,
                    scales=args.scales,
                    rounds=args.rounds,
                    device=args.device,
                    half=args.half,
                )
            )
            show(rows[-1])
    if args.json:
        write_json(args.json, rows)
    return None


def measure(
    place: Path,
    backbone: str,
    *,
    files: Sequence[Path],
    scales: list[int],
    rounds: int,
    device: str,
    half: str,
) -> dict[str, Any]:
    """Images/s of both sides in each round, start-up apart, and how often they name the same class."""
    place.mkdir()
    network, spec = prepared(place, backbone, scales=scales, half=half)
    root = sandbox.copy_hand_in(place / "hand-in", place / "bundle", list(files))
    plain = plain_loop(network, spec, scales=scales, device=device)
    plain(files[:2])
    ours, theirs, starts = [], [], []
    labels, precision = np.empty(0), ""
    for _ in range(rounds):
        start = time.perf_counter()
        labels = plain(files)
        theirs.append(len(files) / (time.perf_counter() - start))
        first, pace, precision = predictor(root, device)
        starts.append(first)
        ours.append(pace)
    got = (root / runs.SUBMISSION).read_text().splitlines()[1:]
    same = np.mean([int(row.split(",")[1]) == label for row, label in zip(got, labels, strict=True)])
    ratios = np.array(ours) / np.array(theirs)
    return {
        "backbone": backbone,
        "scales": scales,
        "images": len(files),
        "plain_per_s": round(float(np.median(theirs)), 2),
        "ours_per_s": round(float(np.median(ours)), 2),
        "ratio": round(float(np.median(ratios)), 2),
        "ratios": [round(float(ratio), 2) for ratio in ratios],
        "first_row_s": round(float(np.median(starts)), 1),
        "same_class": round(float(same), 3),
        "precision": precision,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device != "cpu" else "CPU",
    }


def prepared(
    place: Path, backbone: str, *, scales: list[int], half: str = "gpu"
) -> tuple[Network, NetworkSpec]:
    """A network with random weights, and a bundle of it in place/bundle."""
    torch.manual_seed(0)
    sizes = [(scales[-1], scales[-1])]
    profile = backbones.profile(backbone, sizes)
    spec = NetworkSpec(
        backbone, "linear", 30.0, 0.3, CLASSES, sizes[0], profile.mean, profile.std, profile.interpolation
    )
    network = build_network(spec).eval()
    path = place / f"best_combo__{backbone}__fold0_seed0_epoch1_score0.0000.pth"
    words = [f"tta.scales={scales}", f"data.img_size={scales[-1]}", f"bundle.half={half}"]
    meta = {
        **spec.meta(), "resize_factor": FACTOR, "stored_side": round(max(scales) * FACTOR),
        "class_ids": [str(number) for number in range(CLASSES)], "class_hash": "", "class_counts": [1] * CLASSES,
        "fold": 0, "seed": 0, "epoch": 1, "weights": "raw",
    }  # fmt: skip
    checkpoint.save(path, network.state_dict(), meta)
    (place / "bundle").mkdir()
    members = writer.load_members([path], "fp32")
    writer.write(place / "bundle", members, shares=np.ones(1), recipe=load(None, words), temperature=1.0)
    return network, spec


def plain_loop(
    network: Network, spec: NetworkSpec, *, scales: list[int], device: str
) -> Callable[[Sequence[Path]], np.ndarray]:
    """Class indices of files, one photograph and one view after another."""
    network.to(device)
    mode = T.InterpolationMode(spec.interpolation)
    views = [
        T.Compose(
            [
                T.Resize(round(side * FACTOR), mode),
                T.CenterCrop(side),
                *([T.RandomHorizontalFlip(1.0)] if flip else []),
                T.ToTensor(),
                T.Normalize(spec.mean, spec.std),
            ]
        )
        for side in scales
        for flip in (False, True)
    ]

    @torch.no_grad()
    def run(files: Sequence[Path]) -> np.ndarray:
        labels = []
        for file in files:
            with Image.open(file) as opened:
                image = opened.convert("RGB")
            logits = [network.head(network.backbone(view(image)[None].to(device))) for view in views]
            labels.append(int(torch.stack(logits).mean(0).argmax()))
        return np.array(labels)

    return run


def predictor(root: Path, device: str) -> tuple[float, float, str]:
    """Seconds from the start of the process to the first row, images/s after it, and the precision it chose."""
    shutil.rmtree(root / "results/results", ignore_errors=True)
    words = [sys.executable, str(root / "code/predict.py"), "--device", device]
    start = time.perf_counter()
    first, lines = 0.0, []
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout or ():
            lines.append(line)
            if line.startswith("predict: 1 of"):
                first = time.perf_counter() - start
    if process.returncode:
        raise InputError(f"code/predict.py failed ({process.returncode}): {''.join(lines)[-300:]}")
    about = json.loads((root / runs.SUBMISSION).with_suffix(".json").read_text())
    return first, 1000 / about["ms_per_image"], about["device"].rpartition(", ")[2]


def show(row: dict[str, Any]) -> None:
    """Print one network's line."""
    print(
        f"{row['backbone']} at {row['scales']} x 2, {row['images']} photographs, {row['threads']} threads, "
        f"{row['device']}: plain {row['plain_per_s']:.2f} images/s, "
        f"predict.py {row['ours_per_s']:.2f} in {row['precision']}, "
        f"ratio {row['ratio']:.2f} {row['ratios']}; first row after {row['first_row_s']:.1f} s; "
        f"same class on {row['same_class']:.1%}",
        flush=True,
    )
