"""`bench predict`: the hand-in against the plain loop of a typical contest entry, with the same views, in one run.

The plain loop opens a photograph with Pillow, makes each view with torchvision's transforms and runs timm's network on
one view at a time. Both sides alternate on the same photographs, so a busy machine favours neither; start-up is
reported separately. Weights are random: speed does not depend on them.
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
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

import fastflower
from fastflower.bench.pictures import photographs
from fastflower.core import runs
from fastflower.core.errors import InputError
from fastflower.core.files import write_json
from fastflower.recipe import load

if TYPE_CHECKING:
    from fastflower.model.network import Network, NetworkSpec

CLASSES, FACTOR = 17, 1.14


def main(argv: list[str]) -> int | None:
    parser = argparse.ArgumentParser("python -m fastflower.bench predict", description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("data/train"), help="folder of JPEG photographs")
    parser.add_argument("--images", type=int, default=64, help="number of photographs")
    parser.add_argument("--backbone", nargs="+", default=["resnet10t"])
    parser.add_argument(
        "--scales", type=int, nargs="+", default=[128, 160], help="sizes of the views; each is also mirrored"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", help="cpu, cuda")
    parser.add_argument("--half", default="gpu", help="value of the recipe key bundle.half")
    parser.add_argument("--json", type=Path, help="path of the results as JSON")
    args = parser.parse_args(argv)
    if not args.data.is_dir() or not (files := photographs(args.data, args.images)):
        raise InputError(f"--data {args.data}: no folder with JPEG files; give one")
    rows = []
    with tempfile.TemporaryDirectory(prefix="fastflower-bench-") as work:
        for number, name in enumerate(args.backbone):
            folder = Path(work) / str(number)
            rows.append(
                measure(
                    folder,
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
    folder: Path,
    backbone: str,
    *,
    files: Sequence[Path],
    scales: list[int],
    rounds: int,
    device: str,
    half: str,
) -> dict[str, Any]:
    """Images/s of both sides without start-up, start-up seconds, and the fraction of equal predictions."""
    import torch  # here, as in the functions below: its import takes seconds, which a refusal does not spend

    from fastflower.bundle import sandbox

    folder.mkdir()
    network, spec = write_random_bundle(folder, backbone, scales=scales, half=half)
    root = sandbox.copy_hand_in(folder / "hand-in", folder / "bundle", list(files))
    plain = plain_loop(network, spec, scales=scales, device=device)
    plain(files[:2])
    predictor_speeds, plain_speeds, starts = [], [], []
    labels, precision = np.empty(0), ""
    for _ in range(rounds):
        start = time.perf_counter()
        labels = plain(files)
        plain_speeds.append(len(files) / (time.perf_counter() - start))
        start_seconds, speed, precision = run_predictor(root, device)
        starts.append(start_seconds)
        predictor_speeds.append(speed)
    rows = (root / runs.SUBMISSION).read_text().splitlines()[1:]
    agreement = np.mean([int(row.split(",")[1]) == label for row, label in zip(rows, labels, strict=True)])
    ratios = np.array(predictor_speeds) / np.array(plain_speeds)
    return {
        "backbone": backbone,
        "scales": scales,
        "images": len(files),
        "plain_per_s": round(float(np.median(plain_speeds)), 2),
        "ours_per_s": round(float(np.median(predictor_speeds)), 2),
        "ratio": round(float(np.median(ratios)), 2),
        "ratios": [round(float(ratio), 2) for ratio in ratios],
        "first_row_s": round(float(np.median(starts)), 1),
        "same_class": round(float(agreement), 3),
        "precision": precision,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device != "cpu" else "CPU",
    }


def write_random_bundle(
    folder: Path, backbone: str, *, scales: list[int], half: str = "gpu"
) -> tuple[Network, NetworkSpec]:
    """A network with random weights, also written as a bundle to folder/bundle."""
    import torch

    from fastflower.bundle import writer
    from fastflower.model import backbones
    from fastflower.model.member import MemberMeta, save_member
    from fastflower.model.network import NetworkSpec, build_network

    torch.manual_seed(0)
    sizes = [(scales[-1], scales[-1])]
    profile = backbones.profile(backbone, sizes)
    spec = NetworkSpec(
        backbone, "linear", 30.0, 0.3, CLASSES, sizes[0], profile.mean, profile.std, profile.interpolation
    )
    network = build_network(spec).eval()
    path = folder / f"best_combo__{backbone}__fold0_seed0_epoch1_score0.0000.pth"
    overrides = [f"tta.scales={scales}", f"data.img_size={scales[-1]}", f"bundle.half={half}"]
    meta = MemberMeta(
        **vars(spec),
        resize_factor=FACTOR,
        stored_side=round(max(scales) * FACTOR),
        class_ids=tuple(str(number) for number in range(CLASSES)),
        class_hash="",
        class_counts=(1,) * CLASSES,
        folds_hash="",
        exp="bench",
        fold=0,
        seed=0,
        epoch=1,
        recipe="",
        version=fastflower.__version__,
        kind="best_combo",
        weights="raw",
        scores={},
    )
    save_member(path, network.state_dict(), meta)
    (folder / "bundle").mkdir()
    members = writer.load_members([path], "fp32")
    writer.write_bundle(
        folder / "bundle", members, weights=np.ones(1), recipe=load(None, overrides), temperature=1.0
    )
    return network, spec


def plain_loop(
    network: Network, spec: NetworkSpec, *, scales: list[int], device: str
) -> Callable[[Sequence[Path]], np.ndarray]:
    """A function from files to class indices (N,), one photograph and one view at a time."""
    network.to(device)
    import torch
    from torchvision import transforms as T

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
    def predict(files: Sequence[Path]) -> np.ndarray:
        labels = []
        for file in files:
            with Image.open(file) as opened:
                image = opened.convert("RGB")
            logits = [network.head(network.backbone(view(image)[None].to(device))) for view in views]
            labels.append(int(torch.stack(logits).mean(0).argmax()))
        return np.array(labels)

    return predict


def run_predictor(root: Path, device: str) -> tuple[float, float, str]:
    """Seconds from process start to the first row, images/s after it, and the precision that predict.py chose."""
    shutil.rmtree(root / "results/results", ignore_errors=True)
    command = [sys.executable, str(root / "code/predict.py"), "--device", device]
    start = time.perf_counter()
    first, lines = 0.0, []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout or ():
            lines.append(line)
            if line.startswith("predict: 1 of"):
                first = time.perf_counter() - start
    if process.returncode:
        raise InputError(f"code/predict.py failed ({process.returncode}): {''.join(lines)[-300:]}")
    summary = json.loads((root / runs.SUBMISSION).with_suffix(".json").read_text())
    return first, 1000 / summary["ms_per_image"], summary["device"].rpartition(", ")[2]


def show(row: dict[str, Any]) -> None:
    """Print the row of one network."""
    print(
        f"{row['backbone']} at {row['scales']} x 2, {row['images']} photographs, {row['threads']} threads, "
        f"{row['device']}: plain {row['plain_per_s']:.2f} images/s, "
        f"predict.py {row['ours_per_s']:.2f} in {row['precision']}, "
        f"ratio {row['ratio']:.2f} {row['ratios']}; first row after {row['first_row_s']:.1f} s; "
        f"same class on {row['same_class']:.1%}",
        flush=True,
    )
