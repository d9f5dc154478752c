"""Drawn eyes, open and closed: a contest of two classes of any size, without any download.

`draw` is a pure function of (seed, index) on whole batches, thousands of images a second. An eye is open if its lids
leave a gap of at least two pixels. Skin, gaze, lashes, brows, glasses, light, focus and resolution vary alike in
both classes.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from fastflower.core import seeding, workers

HEIGHT, WIDTH = 32, 64
OPEN = 0.532  # fraction of open eyes
CHUNK = 32  # images drawn at once: 0.8 MB of floats stay in the cache
FOLDER = 1000  # images in one folder
SKIN = ((0.95, 0.80, 0.70), (0.31, 0.20, 0.15))  # the fairest and the darkest
IRIS = ((0.22, 0.12, 0.07), (0.45, 0.62, 0.75))
WHITE = np.ones((3, 1, 1), np.float32)
DARK = np.array([0.09, 0.06, 0.06], np.float32)[:, None, None]


class _Dice:
    """Random numbers (N, 1, 1) for N images; every call uses a new stream of the counter-based generator."""

    def __init__(self, keys: np.ndarray) -> None:
        self.keys, self.stream = keys, 0

    def __call__(self, low: float, high: float) -> np.ndarray:
        self.stream += 1
        return (low + (high - low) * seeding.uniform(self.keys, self.stream)).astype(np.float32)[
            :, None, None
        ]

    def happens(self, probability: float) -> np.ndarray:
        return (self(0, 1) < probability).astype(np.float32)

    def mixture(self, colours: tuple[tuple[float, ...], tuple[float, ...]]) -> np.ndarray:
        """A random colour between two, (N, 3, 1, 1)."""
        first, second = np.array(colours, np.float32)[:, :, None, None]
        return first + (second - first) * self(0, 1)[:, None]


def draw(seed: int, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (N, 32, 64, 3) of the given indices, and bool (N,), true for open eyes."""
    keys = seeding.hash64(seeding.hash64(np.uint64(seed)) ^ np.asarray(indices, np.uint64))
    dice = _Dice(keys)
    is_open = dice.happens(OPEN)
    gap = np.where(is_open > 0, dice(0.3, 1), dice(0, 0.05))
    along, down = _axes(dice)
    image = _eye(dice, along, down=down, gap=gap)
    image = _surroundings(dice, along, down=down, image=image)
    return _photograph(dice, image), is_open[:, 0, 0] > 0


def _axes(dice: _Dice) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates of each pixel in eye units, whose corners lie at -1 and 1: along the eye, and downwards."""
    x = (np.arange(WIDTH, dtype=np.float32) - (WIDTH - 1) / 2) / (WIDTH / 2)
    y = (np.arange(HEIGHT, dtype=np.float32) - (HEIGHT - 1) / 2) / (WIDTH / 2)
    half, tilt = dice(0.58, 0.86), dice(-0.22, 0.22)
    x, y = x - dice(-0.14, 0.14), y[:, None] - dice(-0.05, 0.1)
    cos, sin = np.cos(tilt) / half, np.sin(tilt) / half
    return x * cos + y * sin, y * cos - x * sin


def _cover(distance: np.ndarray) -> np.ndarray:
    """The fraction of a pixel inside an edge, from the signed distance to it in eye units."""
    return np.clip(distance * (WIDTH * 0.36) + 0.5, 0, 1)


def _line(distance: np.ndarray, width: np.ndarray) -> np.ndarray:
    return np.exp(-((distance / width) ** 2))


def _paint(image: np.ndarray, colour: np.ndarray, cover: np.ndarray) -> np.ndarray:
    """Blend `colour` over an image (N, 3, H, W) with opacity `cover` (N, H, W)."""
    return image + (colour - image) * cover[:, None]


def _eye(dice: _Dice, along: np.ndarray, *, down: np.ndarray, gap: np.ndarray) -> np.ndarray:
    """Skin, eyeball and lids, float32 (N, 3, H, W) in 0..1; `gap` is 0 for shut lids and 1 for wide ones."""
    skew = along + dice(-0.25, 0.25) * (1 - along**2)
    arch = np.clip(1 - skew**2, 0, 1) ** dice(0.55, 0.95)
    above, lower = -dice(0.34, 0.56) * arch, dice(0.12, 0.26) * arch
    lid = lower + (above - lower) * gap
    skin = dice.mixture(SKIN)
    socket = 1 - dice(0, 0.3) * _line(down - above, dice(0.12, 0.3))
    image = skin * (socket * (1 + dice(-0.2, 0.2) * along + dice(-0.3, 0.3) * down))[:, None]
    image = _paint(image, image * 0.55, dice(0, 0.9) * _line(down - 1.35 * above + 0.08, dice(0.03, 0.06)))
    inside = _cover(down - lid) * _cover(lower - down) * (np.abs(along) < 1)
    image = _paint(image, _eyeball(dice, along, down=down, lid=lid), inside)
    thick, strength = dice(0.03, 0.08), dice(0.45, 0.98)
    near = np.clip(1.25 - np.abs(along), 0, 0.25) * 4
    image = _paint(image, DARK, strength * near * _line(down - lid + thick / 2, thick))
    hanging = np.where(gap < 0.1, 1, -1)  # the lashes of a shut eye point down
    teeth = 0.5 + 0.5 * np.cos(along * dice(30, 60) + dice(0, 6))
    fringe = (
        _cover(hanging * (down - lid)) * _line(down - lid, dice(0.05, 0.16)) * teeth * (np.abs(along) < 1)
    )
    image = _paint(image, DARK, strength * 0.7 * fringe)
    return _paint(image, DARK, dice(0, 0.5) * near * _line(down - lower, dice(0.02, 0.05)))


def _eyeball(dice: _Dice, along: np.ndarray, *, down: np.ndarray, lid: np.ndarray) -> np.ndarray:
    white = dice(0.6, 0.95)[:, None] * np.array([1.0, 0.97, 0.95], np.float32)[:, None, None]
    ball = white * (1 - 0.45 * _line(down - lid, dice(0.06, 0.16)))[:, None]  # the lid's shadow
    radius, gaze = dice(0.25, 0.36), dice(-0.4, 0.4)
    height = dice(-0.12, 0.04)
    far = np.hypot(along - gaze, down - height)
    iris = dice.mixture(IRIS) * (0.65 + 0.6 * far / radius)[:, None]
    ball = _paint(ball, iris, _cover(radius - far))
    ball = _paint(ball, DARK, 0.6 * _line(far - radius, dice(0.04, 0.06)))
    ball = _paint(ball, DARK, _cover(radius * dice(0.3, 0.6) - far))
    glint = np.hypot(along - gaze - dice(-0.15, 0.15), down - height + 0.1)
    return _paint(ball, WHITE, dice(0, 1) * _cover(dice(0.03, 0.09) - glint))


def _surroundings(dice: _Dice, along: np.ndarray, *, down: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Add a brow, and to some images glasses with their glare."""
    brow = _line(down + dice(0.62, 0.85) - dice(0, 0.15) * along**2, dice(0.05, 0.12))
    image = _paint(image, DARK * 2, dice.happens(0.6) * dice(0.4, 0.9) * brow * (np.abs(along) < 1.3))
    ring = np.hypot(along / dice(1.25, 1.45), down / dice(0.55, 0.8))
    worn = dice.happens(0.15)
    image = _paint(image, dice(0, 0.5)[:, None], worn * 0.9 * _line(ring - 1, dice(0.03, 0.09)))
    streak = _line(along + dice(-1, 1) * down - dice(-1, 1), dice(0.05, 0.25))
    return _paint(image, WHITE, worn * dice(0, 0.5) * streak * (ring < 1))


def _photograph(dice: _Dice, image: np.ndarray) -> np.ndarray:
    """Apply light, white balance, infra-red cameras, low resolution, focus and grain; uint8 (N, H, W, 3)."""
    count = len(image)
    balance = np.stack([dice(-0.06, 0.06) for _ in range(3)], axis=1)
    image = image * (dice(0.4, 1.2)[:, None] + balance)
    image = _paint(image, image.mean(1, keepdims=True), dice.happens(0.2))
    coarse = image.reshape(count, 3, HEIGHT // 2, 2, WIDTH // 2, 2).mean((3, 5), keepdims=True)
    coarse = np.broadcast_to(coarse, (count, 3, HEIGHT // 2, 2, WIDTH // 2, 2)).reshape(image.shape)
    image = _paint(image, coarse, dice.happens(0.3))
    soft = (dice.happens(0.6) * dice(0, 1))[:, None] / 4
    for axis in (2, 3):
        side = image.shape[axis]
        near, after = (image.take(np.clip(np.arange(side) + step, 0, side - 1), axis) for step in (-1, 1))
        image = image + (near + after - 2 * image) * soft
    positions = np.arange(HEIGHT * WIDTH, dtype=np.uint64)
    bits = seeding.hash64(dice.keys[:, None] ^ seeding.hash64(positions))
    total = bits.view(np.uint16).reshape(count, -1, 4).sum(2, dtype=np.float32)  # of four 16-bit words
    grain = (total / 0x8000 - 4).reshape(count, HEIGHT, WIDTH) * dice(0, 0.03)  # nearly normal
    pixels = np.clip(image + grain[:, None], 0, 1) * np.float32(255) + np.float32(0.5)
    return np.ascontiguousarray(pixels.astype(np.uint8).transpose(0, 2, 3, 1))


def write(home: Path, *, rows: int = 20000, held_out: int = 1000, seed: int = 0) -> None:
    """Draw a contest in `home`: train/ and train_labels.csv, and held-out images in test/ with truth.csv.

    category_id is 0 for closed and 1 for open eyes.
    """
    splits = [("train", "train_labels.csv", 0, rows), ("test", "truth.csv", rows, held_out)]
    for split, labels, first, count in splits:
        (home / split).mkdir(parents=True, exist_ok=True)
        chunks = [range(first + start, first + min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
        draw_chunk, progress = partial(_write, home / split, seed), workers.Progress(split, count)
        with (home / labels).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("filename", "category_id"))
            for chunk_rows in workers.map_ordered(
                draw_chunk, zip(chunks), count=workers.cores(0), on_progress=progress
            ):
                writer.writerows(chunk_rows)


def _write(folder: Path, seed: int, numbers: range) -> list[tuple[str, int]]:
    """Write one chunk as JPEG files; returns its rows of the label file."""
    images, is_open = draw(seed, np.arange(numbers.start, numbers.stop))
    names = list(_names(numbers))
    for subfolder in {Path(name).parent for name in names}:
        (folder / subfolder).mkdir(exist_ok=True)
    qualities = 70 + (seeding.uniform(np.asarray(numbers, np.uint64), seed) * 26).astype(int)
    for name, image, quality in zip(names, images, qualities.tolist(), strict=True):
        Image.fromarray(image).save(folder / name, "JPEG", quality=quality)
    workers.count_done(len(numbers))
    return list(zip(names, is_open.astype(int).tolist(), strict=True))


def _names(numbers: range) -> Iterator[str]:
    for number in numbers:
        yield f"{number // FOLDER:04}/{number:07}.jpg"
