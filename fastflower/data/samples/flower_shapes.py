"""Drawing of single flowers: petals, centres and habits as polygons in flower units (centre 0, radius 1)."""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[float, float, float]  # hue, saturation, value in 0..1
Rng = np.random.Generator


@dataclass(frozen=True)
class Petal:
    """A petal from base 0 to tip 1: widest at `broad`, blunt for a small `point` and sharp at 1, tip cut by `notch`."""

    width: float
    broad: float = 0.6
    point: float = 0.45
    notch: float = 0.0


@dataclass(frozen=True)
class Species:
    """One class: range of the number of petals, their form, palettes of (tip, base) colours, centre and habit."""

    name: str
    petals: tuple[int, int]
    petal: Petal
    palettes: tuple[tuple[Colour, Colour], ...]
    centre: str = "none"
    centre_size: float = 0.2
    centre_colour: Colour = (0.13, 0.9, 0.9)
    rows: int = 1
    habit: str = "single"
    radius: tuple[float, float] = (0.2, 0.36)


WHITE, CREAM, YELLOW = (0.15, 0.03, 0.98), (0.13, 0.22, 0.97), (0.145, 0.88, 0.97)
GOLD, ORANGE, RED = (0.118, 0.95, 0.94), (0.065, 0.9, 0.96), (0.99, 0.88, 0.85)
PINK, ROSE, MAGENTA = (0.93, 0.3, 0.97), (0.95, 0.62, 0.88), (0.88, 0.7, 0.78)
VIOLET, PURPLE, BLUE = (0.74, 0.5, 0.84), (0.78, 0.68, 0.55), (0.63, 0.62, 0.9)
SKY, LIME, BROWN, DARK = (0.58, 0.36, 0.97), (0.2, 0.7, 0.75), (0.07, 0.72, 0.32), (0.8, 0.5, 0.14)

SPECIES = (
    Species("daisy", (15, 23), petal=Petal(0.2, 0.7), palettes=((WHITE, WHITE), (PINK, WHITE), (VIOLET, WHITE)),
            centre="disc", centre_size=0.25, centre_colour=GOLD),
    Species("sunflower", (18, 26), petal=Petal(0.24, 0.5, point=0.9), palettes=((YELLOW, GOLD), (GOLD, ORANGE)),
            centre="disc", centre_size=0.44, centre_colour=BROWN, rows=2),
    Species("dandelion", (30, 40), petal=Petal(0.09, 0.8, point=0.3), palettes=((YELLOW, GOLD), (GOLD, ORANGE)),
            rows=4),
    Species("buttercup", (5, 5), petal=Petal(0.95, 0.66), palettes=((YELLOW, GOLD), (GOLD, YELLOW)),
            centre="stamens", centre_size=0.34, centre_colour=LIME, habit="few", radius=(0.12, 0.19)),
    Species("cherry", (5, 5), petal=Petal(0.82, 0.7, point=0.4, notch=0.14),
            palettes=((PINK, ROSE), (WHITE, PINK), (PINK, WHITE)),
            centre="stamens", centre_size=0.42, centre_colour=MAGENTA, habit="cluster", radius=(0.11, 0.16)),
    Species("forget-me-not", (5, 5), petal=Petal(0.98, 0.66, point=0.5),
            palettes=((SKY, BLUE), (BLUE, VIOLET), (PINK, WHITE)),
            centre="eye", centre_size=0.24, centre_colour=YELLOW, habit="cluster", radius=(0.07, 0.11)),
    Species("poppy", (4, 6), petal=Petal(1.35, 0.74, point=0.34),
            palettes=((RED, DARK), (ORANGE, RED), (PINK, DARK)),
            centre="stamens", centre_size=0.34, centre_colour=DARK),
    Species("pansy", (5, 5), petal=Petal(1.2, 0.66, point=0.4),
            palettes=((VIOLET, DARK), (YELLOW, DARK), (PURPLE, YELLOW), (WHITE, PURPLE), (ORANGE, DARK)),
            centre="face"),
    Species("lily", (6, 6), petal=Petal(0.5, 0.45, point=0.95),
            palettes=((WHITE, PINK), (ORANGE, RED), (PINK, WHITE), (YELLOW, LIME)),
            centre="anthers", centre_size=0.5, centre_colour=BROWN, radius=(0.26, 0.4)),
    Species("daffodil", (6, 6), petal=Petal(0.68, 0.46, point=0.7),
            palettes=((YELLOW, YELLOW), (WHITE, CREAM), (CREAM, YELLOW)),
            centre="trumpet", centre_size=0.38, centre_colour=ORANGE),
    Species("cornflower", (9, 12), petal=Petal(0.42, 0.86, point=0.16, notch=0.34),
            palettes=((BLUE, VIOLET), (VIOLET, PURPLE), (PINK, ROSE)),
            centre="tuft", centre_size=0.36, centre_colour=PURPLE),
    Species("rose", (5, 5), petal=Petal(1.3, 0.68, point=0.34),
            palettes=((RED, RED), (PINK, ROSE), (CREAM, YELLOW), (WHITE, PINK)), centre="whorl", rows=4),
    Species("tulip", (3, 3), petal=Petal(0.62, 0.42, point=0.6),
            palettes=((RED, YELLOW), (YELLOW, RED), (MAGENTA, WHITE), (WHITE, PINK), (ORANGE, RED)), habit="cup"),
    Species("bluebell", (6, 10), petal=Petal(0.6), palettes=((BLUE, VIOLET), (VIOLET, SKY), (PINK, WHITE)),
            habit="bells"),
    Species("lupin", (40, 64), petal=Petal(0.8),
            palettes=((VIOLET, WHITE), (PURPLE, VIOLET), (PINK, ROSE), (BLUE, SKY), (YELLOW, ORANGE)),
            habit="spike"),
)  # fmt: skip


class Pen:
    """Draws in flower units: centre (0, 0), radius 1, y up; rotated by `turn`, foreshortened by `squash`."""

    def __init__(
        self, image: Image.Image, x: float, *, y: float, radius: float, turn: float, squash: float = 1.0
    ) -> None:
        self.draw = ImageDraw.Draw(image)
        self.centre = np.array([x, y]) * image.width
        self.radius = radius * image.width
        lean = turn * 1.7 + 0.6  # direction of the tilt, different from that of the turn
        tilt = rotation(lean) @ np.diag([1.0, squash]) @ rotation(-lean)
        self.matrix = (np.diag([1.0, -1.0]) @ tilt @ rotation(turn)) * self.radius

    def fill(self, points: np.ndarray, colour: Colour) -> None:
        """Fill a polygon of (N, 2) points."""
        self.draw.polygon((points @ self.matrix.T + self.centre).ravel().tolist(), fill=rgb(colour))

    def line(self, points: np.ndarray, colour: Colour, width: float) -> None:
        pixels = (points @ self.matrix.T + self.centre).ravel().tolist()
        self.draw.line(pixels, fill=rgb(colour), width=max(1, round(width * self.radius)), joint="curve")

    def dot(self, x: float, y: float, *, radius: float, colour: Colour) -> None:
        angle = np.linspace(0, 2 * np.pi, 20, endpoint=False)
        self.fill(np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle)], axis=1), colour)


def rotation(angle: float) -> np.ndarray:
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, -s], [s, c]])


def rgb(colour: Colour) -> tuple[int, int, int]:
    r, g, b = colorsys.hsv_to_rgb(colour[0] % 1.0, min(max(colour[1], 0), 1), min(max(colour[2], 0), 1))
    return round(255 * r), round(255 * g), round(255 * b)


def shade(colour: Colour, value: float, saturation: float = 1.0) -> Colour:
    return colour[0], colour[1] * saturation, colour[2] * value


def blend(a: Colour, b: Colour, fraction: float) -> Colour:
    """Colour between a (0) and b (1), the short way around the hue circle; a grey takes the hue of the other."""
    from_hue, to_hue = (b[0], b[0]) if a[1] < 0.1 else (a[0], a[0] if b[1] < 0.1 else b[0])
    turn = (to_hue - from_hue + 0.5) % 1.0 - 0.5
    return from_hue + turn * fraction, a[1] + (b[1] - a[1]) * fraction, a[2] + (b[2] - a[2]) * fraction


def vary(colour: Colour, rng: Rng) -> Colour:
    hue, saturation, value = rng.normal(0, [0.012, 0.05, 0.03])
    return colour[0] + hue, colour[1] * (1 + saturation), min(colour[2] + value, 1.0)


def outline(petal: Petal) -> np.ndarray:
    """Closed outline (N, 2) along +x with length 1: width t^a (1-t)^b, with its maximum at a / (a + b)."""
    t = (1 - np.cos(np.linspace(0, np.pi, 15))) / 2
    a, b = petal.point * petal.broad / (1 - petal.broad), petal.point
    half = t**a * (1 - t) ** b
    half *= petal.width / 2 / half.max()
    x = t.copy()
    x[-1] -= petal.notch
    return np.concatenate([np.stack([x, half], axis=1), np.stack([x, -half], axis=1)[-2:0:-1]])


def _petal(pen: Pen, shape: np.ndarray, *, angle: float, length: float, tip: Colour, base: Colour) -> None:
    """One petal as nested outlines from its dark rim to its base, with a rib."""
    turn = rotation(angle).T
    steps = ((1.0, 1.0, shade(tip, 0.78)), (0.965, 0.93, tip), (0.8, 0.72, blend(tip, base, 0.25)),
             (0.6, 0.56, blend(tip, base, 0.6)), (0.4, 0.42, base))  # fmt: skip
    for along, across, colour in steps:
        pen.fill((shape * [along * length, across * length]) @ turn, colour)
    rib = np.array([[0.15 * length, 0.0], [0.8 * length, 0.0]]) @ turn
    pen.line(rib, shade(blend(tip, base, 0.4), 0.9), 0.012)


def _radial(pen: Pen, species: Species, *, tip: Colour, base: Colour, rng: Rng) -> None:
    """Rows of petals around a centre, the outer rows first."""
    count = int(rng.integers(species.petals[0], species.petals[1] + 1))
    shape = outline(species.petal)
    phase = rng.uniform(0, 2 * math.pi)
    for row in range(species.rows):
        length = 1.0 - row * 0.8 / species.rows
        light = 0.82 + 0.18 * (row + 1) / species.rows
        angles = phase + row * math.pi / count * 1.1 + 2 * math.pi / count * np.arange(count)
        jitter = rng.normal(0, 0.25 / count, count)
        for angle, off in zip(angles, jitter, strict=True):
            long, bright = length * rng.uniform(0.92, 1.04), light * rng.uniform(0.94, 1.04)
            _petal(pen, shape, angle=angle + off, length=long, tip=shade(tip, bright), base=base)
    if species.centre in CENTRES:
        colour = vary(species.centre_colour, rng)
        CENTRES[species.centre](pen, species.centre_size, colour=colour, tip=tip, rng=rng)


def _disc(pen: Pen, size: float, *, colour: Colour, tip: Colour, rng: Rng) -> None:
    """Florets in a golden-angle spiral."""
    pen.dot(0, 0, radius=size, colour=shade(colour, 0.7))
    pen.dot(0, 0, radius=size * 0.9, colour=colour)
    steps = np.arange(70)
    angles, radii = steps * 2.39996, size * 0.93 * np.sqrt(steps / 70)
    for step in range(70):
        light = 1.25 if step % 3 else 0.75
        x, y = radii[step] * math.cos(angles[step]), radii[step] * math.sin(angles[step])
        pen.dot(x, y, radius=size * 0.06, colour=shade(colour, light))


def _stamens(pen: Pen, size: float, *, colour: Colour, tip: Colour, rng: Rng) -> None:
    for angle in np.linspace(0, 2 * math.pi, 18, endpoint=False) + rng.uniform(0, 1):
        end = size * rng.uniform(0.7, 1.1) * np.array([math.cos(angle), math.sin(angle)])
        pen.line(np.array([[0.0, 0.0], end]), shade(colour, 0.9, 0.8), 0.02)
        pen.dot(end[0], end[1], radius=0.04, colour=shade(colour, 1.25))
    pen.dot(0, 0, radius=size * 0.42, colour=shade(colour, 0.85))
    pen.dot(0, 0, radius=size * 0.25, colour=LIME)


def _eye(pen: Pen, size: float, *, colour: Colour, tip: Colour, rng: Rng) -> None:
    pen.dot(0, 0, radius=size * 1.25, colour=WHITE)
    pen.dot(0, 0, radius=size, colour=colour)
    pen.dot(0, 0, radius=size * 0.4, colour=shade(colour, 0.4))


def _face(pen: Pen, rng: Rng) -> None:
    """A pansy's whiskers and eye."""
    for angle in np.linspace(-2.6, -0.54, 9):
        end = rng.uniform(0.4, 0.55) * np.array([math.cos(angle), math.sin(angle)])
        pen.line(np.array([[0.0, 0.0], end]), DARK, 0.02)
    pen.dot(0, 0, radius=0.09, colour=YELLOW)
    pen.dot(0, -0.03, radius=0.05, colour=LIME)


def _anthers(pen: Pen, size: float, *, colour: Colour, tip: Colour, rng: Rng) -> None:
    """A lily's freckles and six long stamens."""
    for _ in range(40):
        angle, far = rng.uniform(0, 2 * math.pi), rng.uniform(0.15, 0.5)
        pen.dot(far * math.cos(angle), far * math.sin(angle), radius=0.012, colour=shade(colour, 1.2))
    pen.dot(0, 0, radius=0.1, colour=LIME)
    lean = rng.uniform(0, 2 * math.pi)
    for angle in np.linspace(0, 2 * math.pi, 6, endpoint=False) + lean:
        end = size * rng.uniform(0.85, 1.1) * np.array([math.cos(angle), math.sin(angle)])
        pen.line(np.array([[0.0, 0.0], end]), (0.2, 0.35, 0.85), 0.022)
        across = np.array([-math.sin(angle), math.cos(angle)]) * 0.055
        pen.line(np.array([end - across, end + across]), colour, 0.045)


def _trumpet(pen: Pen, size: float, *, colour: Colour, tip: Colour, rng: Rng) -> None:
    """A daffodil's frilled corona, with its depth."""
    angle = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    frill = 1 + 0.09 * np.sin(12 * angle + rng.uniform(0, 6))
    ring = np.stack([np.cos(angle) * frill, np.sin(angle) * frill], axis=1)
    for scale, light in ((1.0, 0.8), (0.93, 1.0), (0.72, 0.85), (0.5, 0.6)):
        pen.fill(ring * size * scale, shade(colour, light))
    for k in range(6):
        pen.dot(0.09 * math.cos(k), 0.09 * math.sin(k), radius=0.03, colour=YELLOW)


def _tuft(pen: Pen, size: float, *, colour: Colour, tip: Colour, rng: Rng) -> None:
    """Upright inner florets: short dark strokes."""
    for _ in range(34):
        angle, far = rng.uniform(0, 2 * math.pi), size * rng.uniform(0.2, 1.0)
        direction = np.array([math.cos(angle), math.sin(angle)])
        stroke = np.array([direction * far * 0.4, direction * far])
        pen.line(stroke, shade(colour, rng.uniform(0.8, 1.5)), 0.03)
        pen.dot(direction[0] * far, direction[1] * far, radius=0.022, colour=(0.86, 0.35, 0.95))


def _whorl(pen: Pen, size: float, *, colour: Colour, tip: Colour, rng: Rng) -> None:
    """A rose's rolled heart: arcs of a spiral, darker inside."""
    pen.dot(0, 0, radius=0.3, colour=shade(tip, 0.72))
    for turn in range(9):
        angle = turn * 2.4 + np.linspace(0, 2.6, 10)
        far = 0.3 - 0.03 * turn
        arc = np.stack([np.cos(angle), np.sin(angle)], axis=1)
        pen.fill(np.concatenate([arc * far, arc[::-1] * (far * 0.72)]), shade(tip, 1.02 - 0.05 * turn))
        pen.line(arc * far * 0.72, shade(tip, 0.6), 0.012)


CENTRES = {
    "disc": _disc, "stamens": _stamens, "eye": _eye, "anthers": _anthers,
    "trumpet": _trumpet, "tuft": _tuft, "whorl": _whorl,
}  # fmt: skip


def _cup(pen: Pen, species: Species, *, tip: Colour, base: Colour, rng: Rng) -> None:
    """A tulip from the side: three petals behind, two beside, one in front."""
    shape = outline(species.petal)
    spread = rng.uniform(0.16, 0.34)
    petals = ((-0.6, 0.78, 1.75), (0.6, 0.78, 1.75), (-1.0, 0.95, 1.72), (1.0, 0.95, 1.72), (0.0, 1.05, 1.66))
    steps = ((1.0, 1.0, 0.0), (0.96, 0.9, 0.0), (0.7, 0.74, 0.2), (0.45, 0.6, 0.55), (0.25, 0.45, 0.9))
    for lean, light, length in petals:
        turn = rotation(math.pi / 2 + lean * spread).T
        for along, across, fraction in steps:
            colour = shade(blend(tip, base, fraction), light * (0.8 if along == 1.0 else 1.0))
            pen.fill((shape * [length * along, length * across * 0.95]) @ turn + [0, -0.85], colour)


def _bells(pen: Pen, species: Species, *, tip: Colour, base: Colour, rng: Rng) -> None:
    """Bells hanging to one side of an arching stem."""
    count = int(rng.integers(*species.petals))
    side = 1 if rng.random() < 0.5 else -1
    t = np.linspace(0, 1, 24)
    stem = np.stack([side * 0.75 * t**2.2, -1.6 + 2.5 * t - 0.35 * t**4], axis=1)
    pen.line(stem, (0.27, 0.6, 0.42), 0.05)
    half = np.stack([[0.05, 0.15, 0.19, 0.2, 0.2, 0.22, 0.3], np.linspace(0, -0.52, 7)], axis=1)
    rim = np.array([[0.2, -0.57], [0.1, -0.5], [0, -0.58], [-0.1, -0.5], [-0.2, -0.57]])
    bell = np.concatenate([half, rim, (half * [-1, 1])[::-1]])
    for k in range(count):
        x, y = stem[int(23 - k * 16 / count)]
        size = 0.72 + 0.35 * k / count
        swing = rng.normal(side * 0.25 * (1 if k % 2 else -0.8), 0.12)
        top = np.array([x + swing * 0.5, y - 0.05])
        turned = bell * size @ rotation(swing).T
        pen.line(np.array([[x, y], top]), (0.27, 0.5, 0.4), 0.025)
        light = rng.uniform(0.88, 1.05)
        pen.fill(turned + top, shade(tip, 0.75 * light))
        pen.fill(turned * 0.92 + top, shade(tip, light))
        pen.fill(turned * [0.5, 0.85] + top, shade(blend(tip, base, 0.4), 1.05 * light))


def _spike(pen: Pen, species: Species, *, tip: Colour, base: Colour, rng: Rng) -> None:
    """Whorls of small pea flowers on a straight stem, smaller towards the top."""
    count = int(rng.integers(*species.petals))
    pen.line(np.array([[0.0, -1.8], [0.0, 1.1]]), (0.27, 0.6, 0.4), 0.06)
    for k in np.linspace(0, 1, count):
        wide = 0.36 * (1 - k) ** 0.7 + 0.04
        for side in rng.permutation([-1.0, -0.35, 0.35, 1.0]):
            x, y = side * wide * rng.uniform(0.75, 1.05), -0.85 + 1.95 * k + rng.normal(0, 0.02)
            size = (0.115 - 0.06 * k) * rng.uniform(0.85, 1.15)
            light = rng.uniform(0.8, 1.08) * (0.85 + 0.15 * abs(side))
            pen.dot(x, y, radius=size, colour=shade(tip, 0.75 * light))
            pen.dot(x, y + size * 0.15, radius=size * 0.82, colour=shade(tip, light))
            pen.dot(x, y - size * 0.2, radius=size * 0.42, colour=base)


def draw_head(pen: Pen, species: Species, *, palette: tuple[Colour, Colour], rng: Rng) -> None:
    """Draw one flower head of any habit."""
    tip, base = vary(palette[0], rng), vary(palette[1], rng)
    if species.habit in SIDEWAYS:
        SIDEWAYS[species.habit](pen, species, tip=tip, base=base, rng=rng)
    elif species.centre == "face":
        shape = outline(species.petal)
        upper = blend(tip, palette[1], rng.uniform(0, 0.5))
        lower = ((-0.15, 0.9, tip), (3.29, 0.9, tip), (-1.57, 0.95, tip))
        for angle, length, colour in ((1.05, 1.0, upper), (2.09, 1.0, upper), *lower):
            _petal(pen, shape, angle=angle, length=length, tip=colour, base=base)
        _face(pen, rng)
    else:
        _radial(pen, species, tip=tip, base=base, rng=rng)


SIDEWAYS = {"cup": _cup, "bells": _bells, "spike": _spike}
