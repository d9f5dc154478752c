"""`bench decoder`: cost of the fast training decoder in pixels and in accuracy.

A small network is trained twice from the same weights on the same crops in the same order: once with
decode_train, once with Pillow's full decode and antialiased bilinear resize. Both are evaluated on the same
pixels. Reports the PSNR between the two and the paired difference of top-1 over the seeds with its
95 % interval (Student's t).
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from fastflower.core import files, seeding
from fastflower.core.errors import InputError
from fastflower.data.betons.beton_file import Beton, open_beton
from fastflower.data.betons.beton_writer import BetonWriter
from fastflower.data.decode.kernel import Crop, crop_box, decode_eval, decode_train

if TYPE_CHECKING:
    import torch

CROP, BATCH = Crop((0.5, 1.0)), 32
Views = Callable[[np.ndarray, np.ndarray, int], np.ndarray]  # rows, keys, size to uint8 (B, size, size, 3)


def main(argv: list[str]) -> int | None:
    parser = argparse.ArgumentParser("python -m fastflower.bench decoder", description=__doc__)
    parser.add_argument(
        "--data", type=Path, help="folder with train/ and train_labels.csv (default: digits only)"
    )
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--json", type=Path, help="path of the results as JSON")
    args = parser.parse_args(argv)
    if args.seeds < 2:
        raise InputError(f"--seeds {args.seeds}: an interval needs at least 2")
    sets: list[tuple[str, list[tuple[bytes, int]], int]] = [("digits", digits(), 24)]
    if args.data:
        sets.append((args.data.resolve().name, photographs(args.data), 48))
    rows = []
    for name, images, size in sets:
        with tempfile.TemporaryDirectory(prefix="fastflower-bench-") as work:
            rows.append(
                row := {
                    "set": name,
                    **compare(images, Path(work), size=size, epochs=args.epochs, seeds=args.seeds),
                }
            )
        print(
            "{set}: {train} images trained on at {size} px, {epochs} epochs, {seeds} seeds, n = {n}; "
            "top-1 fast {fast:.4f}, exact {exact:.4f}, difference {difference:+.4f} "
            "[{low:+.4f}, {high:+.4f}]; PSNR {psnr:.1f} dB, lowest {psnr_min:.1f}".format(**row),
            flush=True,
        )
    if args.json:
        files.write_json(args.json, rows)
    return None


def digits() -> list[tuple[bytes, int]]:
    """scikit-learn's digits as grey JPEG files of 96 x 96."""
    from sklearn.datasets import load_digits

    data = load_digits()
    scaled = (data.images * 15.9).astype(np.uint8)
    images = [Image.fromarray(each).resize((96, 96), Image.Resampling.BICUBIC) for each in scaled]
    return [(_jpeg(image), int(label)) for image, label in zip(images, data.target, strict=True)]


def photographs(folder: Path) -> list[tuple[bytes, int]]:
    """(bytes, class index) for each row of train_labels.csv."""
    if not (folder / "train_labels.csv").is_file():
        raise InputError(f"--data {folder}: no train_labels.csv; give a folder with it and train/")
    with (folder / "train_labels.csv").open(encoding="utf-8", newline="") as file:
        table = [(line["filename"], line["category_id"]) for line in csv.DictReader(file)]
    classes = sorted({category for _, category in table})
    return [((folder / "train" / name).read_bytes(), classes.index(category)) for name, category in table]


def compare(
    images: list[tuple[bytes, int]], work: Path, *, size: int, epochs: int, seeds: int
) -> dict[str, Any]:
    """Train on four fifths of the images with each decoder and seed, and evaluate on the rest."""
    with BetonWriter(work / "all.beton", len(images)) as writer:
        for i, (data, label) in enumerate(images):
            width, height = Image.open(io.BytesIO(data)).size
            writer.append_jpeg(data, height=height, width=width, label=label, index=i)
        writer.commit()
    beton = open_beton(work / "all.beton")
    is_test = np.arange(beton.rows) % 5 == 0
    train_rows, test_rows = np.flatnonzero(~is_test), np.flatnonzero(is_test)
    test_views = np.empty((test_rows.size, size, size, 3), np.uint8)
    decode_eval(beton, test_rows, out=test_views, factor=1.14, interpolation="bilinear", threads=1)
    decoders = {"fast": fast_views(beton), "exact": exact_views(beton)}
    keys = seeding.row_keys(0, 0, positions=np.arange(train_rows.size), rows=train_rows)
    first, second = (views(train_rows, keys, size).astype(np.float32) for views in decoders.values())
    psnr = 10 * np.log10(255**2 / np.maximum(((first - second) ** 2).mean((1, 2, 3)), 1e-3))
    scores = np.array(
        [
            [
                train(
                    beton,
                    train_rows,
                    test=(test_rows, test_views),
                    views=views,
                    size=size,
                    epochs=epochs,
                    seed=seed,
                )
                for views in decoders.values()
            ]
            for seed in range(seeds)
        ]
    )
    paired = scores[:, 0] - scores[:, 1]
    from scipy import stats

    half = stats.t.ppf(0.975, seeds - 1) * paired.std(ddof=1) / seeds**0.5
    return {
        "train": int(train_rows.size), "n": int(test_rows.size), "size": size, "epochs": epochs, "seeds": seeds,
        "fast": float(scores[:, 0].mean()), "exact": float(scores[:, 1].mean()),
        "difference": float(paired.mean()), "low": float(paired.mean() - half), "high": float(paired.mean() + half),
        "psnr": float(np.median(psnr)), "psnr_min": float(psnr.min()),
    }  # fmt: skip


def fast_views(beton: Beton) -> Views:
    """Crops by decode_train."""

    def views(rows: np.ndarray, keys: np.ndarray, size: int) -> np.ndarray:
        out = np.empty((rows.size, size, size, 3), np.uint8)
        decode_train(beton, rows, keys=keys, out=out, crop=CROP, threads=1)
        return out

    return views


def exact_views(beton: Beton) -> Views:
    """The same crops by Pillow, from the fully decoded images."""
    images = [Image.open(io.BytesIO(beton.row(i).tobytes())).convert("RGB") for i in range(beton.rows)]

    def views(rows: np.ndarray, keys: np.ndarray, size: int) -> np.ndarray:
        out = np.empty((rows.size, size, size, 3), np.uint8)
        for i, (row, key) in enumerate(zip(rows, keys, strict=True)):
            image = images[row]
            top, left, h, w, flip = crop_box(
                int(key), image.height, width=image.width, size=(size, size), crop=CROP
            )
            view = image.crop((left, top, left + w, top + h)).resize((size, size), Image.Resampling.BILINEAR)
            out[i] = np.asarray(view)[:, ::-1] if flip else np.asarray(view)
        return out

    return views


def train(
    beton: Beton, rows: np.ndarray, *, test: tuple[np.ndarray, np.ndarray], views: Views, size: int, epochs: int,
    seed: int,
) -> float:  # fmt: skip
    """Top-1 on the test views of a small network trained by AdamW with a one-cycle schedule."""
    import torch  # here: its import takes two seconds, which a refusal does not spend
    from torch import nn

    seeding.seed_all(seed)
    labels, widths = torch.from_numpy(beton.labels), (3, 16, 32, 64, 64)
    layers: list[nn.Module] = []
    for i, o in itertools.pairwise(widths):
        layers += [nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2)]
    network = nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], int(labels.max()) + 1)
    )
    steps = epochs * (rows.size // BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-2, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for epoch in range(epochs):
        shuffled = seeding.generator(seed, epoch).permutation(rows)
        keys = seeding.row_keys(seed, epoch, positions=np.arange(shuffled.size), rows=shuffled)
        for start in range(0, shuffled.size // BATCH * BATCH, BATCH):
            batch = slice(start, start + BATCH)
            loss = nn.functional.cross_entropy(
                network(_input(views(shuffled[batch], keys[batch], size))), labels[shuffled[batch]]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    network.eval()
    with torch.inference_mode():
        guess = network(_input(test[1])).argmax(1)
    return float((guess == labels[test[0]]).float().mean())


def _input(pixels: np.ndarray) -> torch.Tensor:
    import torch

    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 64 - 2


def _jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()
