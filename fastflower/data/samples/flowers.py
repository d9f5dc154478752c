"""Drawn flowers: reproducible photographs for the demo, without any download.

`draw` is a pure function of (species, seed, index). Fifteen species differ in petals, centre and habit, and
overlap in colour, size, position, light and background, so that no single colour or texture identifies one.
"""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from fastflower.core import seeding, workers
from fastflower.data.samples.flower_shapes import (
    SIDEWAYS,
    SPECIES,
    Colour,
    Pen,
    Petal,
    Rng,
    Species,
    draw_head,
    outline,
    rgb,
    rotation,
    shade,
    vary,
)
from fastflower.data.transforms import corruptions
from fastflower.recipe import derived

SIZE = 600
OVERSAMPLING = 2  # drawn twice as large, then halved: Pillow draws polygons without antialiasing
BACKDROP = 150  # side of the background in pixels: it is out of focus
# ids as an organiser's label file has them: neither sorted nor contiguous
CATEGORY_IDS = (245, 1734, 169, 1833, 173, 180, 1740, 191, 205, 1759, 164, 218, 1788, 233, 166)
CHINESE = (
    *("雏菊", "向日葵", "蒲公英", "毛茛", "樱花", "勿忘我", "虞美人", "三色堇"),
    *("百合", "水仙", "矢车菊", "玫瑰", "郁金香", "蓝铃花", "羽扇豆"),
)


def draw(species: int, seed: int, index: int) -> Image.Image:
    """One 600x600 RGB image of SPECIES[species]; equal arguments give equal pixels."""
    rng = seeding.generator(seed, species, index)
    image = _backdrop(rng, species).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    image = image.resize((SIZE * OVERSAMPLING,) * 2, Image.Resampling.NEAREST)  # halved again below
    _plants(image, SPECIES[species], rng)
    if rng.random() < 0.35:
        _blades(ImageDraw.Draw(image), image.width, rng=rng, count=int(rng.integers(1, 4)))
    return _photograph(image.reduce(OVERSAMPLING), rng)


@dataclass(frozen=True)
class DrawnContest:
    """Paths of a drawn contest: training images and labels, held-out images, and their true labels."""

    home: Path

    @property
    def train(self) -> Path:
        return self.home / "train"

    @property
    def labels(self) -> Path:
        return self.home / "train_labels.csv"

    @property
    def test(self) -> Path:
        return self.home / "test"

    @property
    def disturbed(self) -> Path:
        """The held-out images under the same names, each with one corruption."""
        return self.home / "test_disturbed"

    @property
    def truth(self) -> Path:
        return self.home / "truth.csv"


def class_sizes(head: int, tail: int) -> list[int]:
    """A long tail: sizes fall geometrically from head to tail, in a random order of the species."""
    ranks = seeding.generator(17).permutation(len(SPECIES)) / (len(SPECIES) - 1)
    return [round(head * (tail / head) ** rank) for rank in ranks]


class Shot(NamedTuple):
    """One photograph to draw."""

    name: str
    species: int
    number: int  # within the species; the held-out photographs come last
    held_out: bool


def write(
    home: Path,
    seed: int = 0,
    *,
    head: int = 130,
    tail: int = 18,
    held_out: int = 24,
    shuffle_labels: bool = False,
) -> DrawnContest:
    """Draw a contest: a long-tailed training split and `held_out` photographs per class, clean and corrupted.

    `shuffle_labels` permutes the training labels: any score above chance then comes from a leak.
    """
    contest = DrawnContest(home)
    for folder in (contest.train, contest.test, contest.disturbed):
        folder.mkdir(parents=True, exist_ok=True)
    sizes = class_sizes(head, tail)
    planned = [(k, index, index >= size) for k, size in enumerate(sizes) for index in range(size + held_out)]
    rng = seeding.generator(seed, len(planned))
    numbers = rng.permutation(len(planned)) + 1
    shots = sorted(
        Shot(f"img_{n:06d}.jpg", species=species, number=index, held_out=is_held_out)
        for n, (species, index, is_held_out) in zip(numbers, planned, strict=True)
    )
    take, progress = partial(_take, contest, seed), workers.Progress("photographs", len(shots))
    for _ in workers.map_ordered(take, zip(shots), count=workers.cores(0), on_progress=progress):
        pass
    training = [shot for shot in shots if not shot.held_out]
    classes = [shot.species for shot in training]
    if shuffle_labels:
        classes = rng.permutation(classes).tolist()
    _write_labels(contest.labels, training, classes)
    hidden = [shot for shot in shots if shot.held_out]
    _write_labels(contest.truth, hidden, [shot.species for shot in hidden])
    return contest


def _take(contest: DrawnContest, seed: int, shot: Shot) -> None:
    buffer = io.BytesIO()
    picture = draw(shot.species, seed, shot.number)
    picture.save(buffer, "JPEG", quality=82 + (shot.species + shot.number) % 12)
    (contest.test if shot.held_out else contest.train).joinpath(shot.name).write_bytes(buffer.getvalue())
    if shot.held_out:
        combos = derived.combos(list(corruptions.STRENGTHS), "low")
        kind, level = combos[shot.number % len(combos)]
        with Image.open(buffer) as stored:
            pixels = corruptions.corrupt(
                np.array(stored), kind, level=level, key=corruptions.image_key(shot.name)
            )
        Image.fromarray(pixels).save(contest.disturbed / shot.name, "JPEG", quality=95, subsampling=0)
    workers.count_done()


def _write_labels(path: Path, shots: list[Shot], classes: list[int]) -> None:
    """Write a contest's label file: with a byte order mark, category ids, and names that training ignores."""
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["filename", "category_id", "chinese_name", "english_name"])
        for shot, k in zip(shots, classes, strict=True):
            writer.writerow([shot.name, CATEGORY_IDS[k], CHINESE[k], SPECIES[k].name])


def _plants(image: Image.Image, species: Species, rng: Rng) -> None:
    """Draw stems and leaves first, then all flower heads."""
    palette = species.palettes[rng.integers(len(species.palettes))]
    heads = {"few": (2, 4), "cluster": (5, 11), "single": (1, 2)}.get(species.habit, (1, 2))
    count = int(rng.integers(heads[0], heads[1] + 1)) if heads[1] > 2 or rng.random() < 0.3 else 1
    upright = species.habit in SIDEWAYS
    radius = rng.uniform(*species.radius) * (0.78 if count == 2 else 1.0)
    middle = rng.uniform(0.36, 0.64, 2)
    spread = radius * (1.25 if species.habit == "cluster" else 1.7) * math.sqrt(count) / 2
    green = _leaf_green(rng)
    flowers = []
    for k in range(count):
        angle = 2.39996 * k + rng.uniform(0, 0.8)
        far = 0.0 if count == 1 else spread * math.sqrt((k + 0.5) / count) * 1.3
        x, y = middle + far * np.array([math.cos(angle), math.sin(angle)])
        turn = rng.normal(0, 0.2) if upright or species.centre == "face" else rng.uniform(0, 2 * math.pi)
        squash = 1.0 if upright else rng.uniform(0.68, 1.0)
        flowers.append((x, y, radius * rng.uniform(0.88, 1.12), turn, squash))
    for x, y, size, _, _ in flowers:
        _stem(image, x, y=y, size=size, green=green, rng=rng)
    for x, y, size, turn, squash in flowers:
        pen = Pen(image, x, y=y, radius=size, turn=turn, squash=squash)
        draw_head(pen, species, palette=palette, rng=rng)


def _leaf_green(rng: Rng) -> Colour:
    return rng.uniform(0.22, 0.38), rng.uniform(0.45, 0.8), rng.uniform(0.28, 0.6)


def _stem(image: Image.Image, x: float, *, y: float, size: float, green: Colour, rng: Rng) -> None:
    foot = x + rng.normal(0, 0.12)
    t = np.linspace(0, 1, 14)
    bend = rng.normal(0, 0.06)
    path = np.stack([x + (foot - x) * t + bend * np.sin(np.pi * t), y + (1.1 - y) * t], axis=1)
    pen = Pen(image, 0, y=0, radius=1, turn=0)
    pen.matrix = np.eye(2) * image.width  # image units, y down
    pen.line(path, shade(green, 0.85), 0.012 + 0.02 * size)
    shape = outline(Petal(rng.uniform(0.25, 0.5), 0.4, 0.8))
    for _ in range(int(rng.integers(0, 4))):
        k = int(rng.integers(4, 13))
        angle = rng.choice([-1, 1]) * rng.uniform(0.5, 1.2) - math.pi / 2
        length = rng.uniform(0.12, 0.3)
        for scale, light in ((1.0, 0.75), (0.94, 1.0)):
            pen.fill((shape * length * scale) @ rotation(angle).T + path[k], shade(green, light))
        tip = path[k] + 0.9 * length * np.array([math.cos(angle), math.sin(angle)])
        pen.line(np.stack([path[k], tip]), shade(green, 1.3, 0.8), 0.004)


def _blades(draw: ImageDraw.ImageDraw, side: int, *, rng: Rng, count: int) -> None:
    """Draw blades of grass in front of the flowers."""
    for _ in range(count):
        x, lean = rng.uniform(0, 1), rng.normal(0, 0.2)
        width, top = rng.uniform(0.01, 0.03), rng.uniform(0.2, 0.75)
        t = np.linspace(0, 1, 10)
        edge = x + lean * t**2
        y = 1 - (1 - top) * t
        left, right = np.stack([edge - width * (1 - t), y], 1), np.stack([edge + width * (1 - t), y], 1)[::-1]
        draw.polygon((np.concatenate([left, right]) * side).ravel().tolist(), fill=rgb(_leaf_green(rng)))


def _backdrop(rng: Rng, species: int) -> Image.Image:
    """A background of meadow, sky, shade or soil, out of focus, often with other flowers in it."""
    scene = rng.integers(4)
    top, bottom = (
        ((0.3, 0.5, 0.45), (0.27, 0.65, 0.25)),  # meadow
        ((0.57, rng.uniform(0.15, 0.5), 0.95), (0.26, 0.45, 0.55)),  # sky over a field
        ((0.33, 0.5, 0.16), (0.3, 0.6, 0.3)),  # shade
        ((0.09, 0.3, 0.5), (0.08, 0.45, 0.28)),  # soil
    )[scene]
    fraction = np.linspace(0, 1, BACKDROP)[:, None]
    column = np.array(rgb(vary(top, rng))) * (1 - fraction) + np.array(rgb(vary(bottom, rng))) * fraction
    image = Image.fromarray(np.repeat(column[:, None].astype(np.uint8), BACKDROP, axis=1))
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(15, 45))):
        x, y = rng.uniform(-0.1, 1.1), rng.uniform(0.35 if scene == 1 else -0.1, 1.1)
        wide, high = rng.uniform(0.02, 0.16), rng.uniform(0.03, 0.2)
        leaf = rgb(shade(_leaf_green(rng), rng.uniform(0.5, 1.4)))
        draw.ellipse([BACKDROP * v for v in (x - wide, y - high, x + wide, y + high)], fill=leaf)
    for _ in range(int(rng.integers(0, 4))):  # a flower of another kind, far away
        distant = SPECIES[(species + rng.integers(1, len(SPECIES))) % len(SPECIES)]
        size = rng.uniform(0.04, 0.1)
        x, y = rng.uniform(0, 1), rng.uniform(0.2, 1)
        pen = Pen(image, x, y=y, radius=size, turn=rng.normal(0, 0.3), squash=rng.uniform(0.7, 1))
        draw_head(pen, distant, palette=distant.palettes[rng.integers(len(distant.palettes))], rng=rng)
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(1.2, 3.2)))


def _photograph(image: Image.Image, rng: Rng) -> Image.Image:
    """Apply light from one side, white balance, focus and grain."""
    if rng.random() < 0.3:
        image = image.filter(ImageFilter.BoxBlur(rng.uniform(0.5, 2.0)))
    pixels = np.asarray(image).astype(np.float32)
    grid = np.linspace(-1, 1, SIZE, dtype=np.float32)
    angle, fall = rng.uniform(0, 2 * math.pi), rng.uniform(0, 0.28)
    light = 1 + fall * (math.cos(angle) * grid[None, :] + math.sin(angle) * grid[:, None])
    gain = rng.uniform(0.72, 1.2) * (1 + rng.normal(0, 0.04, 3))
    pixels *= light[..., None].astype(np.float32)
    pixels *= gain.astype(np.float32)
    grain = rng.standard_normal((SIZE, SIZE), dtype=np.float32)
    grain *= np.float32(rng.uniform(0, 9))
    pixels += grain[..., None]
    return Image.fromarray(np.clip(pixels, 0, 255, out=pixels).astype(np.uint8))
