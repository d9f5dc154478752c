"""What a written report says: the cells of its tables, the points of its charts in the units of their axes."""

from __future__ import annotations

import html as entities
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

Curve = tuple[np.ndarray, np.ndarray]


def words(markup: str) -> str:
    """The text of a piece of HTML, its tags as spaces."""
    return " ".join(entities.unescape(re.sub(r"<[^>]+>", " ", markup)).split())


def tables(html: str) -> dict[str, list[list[str]]]:
    """id -> the text of the rows of each table's body and foot; without an id by its first cell."""
    found = {}
    for attributes, content in re.findall(r"<table([^>]*)>(.*?)</table>", html, flags=re.S):
        name = re.search(r'id="([^"]+)"', attributes)
        content = re.sub(r"<thead>.*?</thead>", "", content, flags=re.S)
        rows = [
            [words(cell) for cell in re.findall(r"<t[hd][ >].*?</t[hd]>", row, flags=re.S)]
            for row in re.findall(r"<tr.*?</tr>", content, flags=re.S)
        ]
        found[name[1] if name else rows[0][0]] = [row for row in rows if row]
    return found


def markdown_tables(text: str) -> dict[str, list[list[str]]]:
    """The first word of the heading above and the place below it, "Result 1" -> the rows of each table."""
    found: dict[str, list[list[str]]] = {}
    for section in re.split(r"^## \d+\. ", text, flags=re.M)[1:]:
        blocks = re.findall(r"(?:^\|.*\n?)+", section, flags=re.M)
        for place, block in enumerate(blocks, 1):
            rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in block.splitlines()]
            found[f"{section.split()[0]} {place}"] = rows[2:]
    return found


@dataclass
class Drawing:
    """Lines and points by the name that the legend gives their colour; without a legend the name is empty."""

    said: str
    lines: dict[str, Curve] = field(default_factory=dict)
    points: dict[str, Curve] = field(default_factory=dict)
    bars: dict[str, list[Curve]] = field(default_factory=dict)


def drawings(html: str) -> dict[str, Drawing]:
    """Every chart of a page by its name."""
    found = {}
    for svg in re.findall(r"<svg role=\"img\" aria-label.*?</svg>", html, flags=re.S):
        name = re.search(r'id="([^"]+)-figure_1"', svg)
        if name:
            found[name[1]] = drawing(svg)
    return found


def drawing(svg: str) -> Drawing:
    """A chart's curves, read back through the ticks of its axes."""
    root = ET.fromstring(svg)
    axes = next(node for node in root.iter() if _id(node).endswith("-axes_1"))
    x, y = (
        _scale(next(node for node in axes if _id(node).endswith(f"matplotlib.axis_{n}")), side)
        for n, side in ((1, "x"), (2, "y"))
    )
    found, names = Drawing(root.get("aria-label", "")), _legend(root)
    for group in axes:
        kind = _id(group).rsplit("-", 1)[-1]
        markers = {id(node) for defs in group.iter() if _tag(defs) == "defs" for node in defs.iter()}
        for node in group.iter():
            name = names.get(_ink(node), "" if not names and _ink(node)[0] else None)
            if name is None or id(node) in markers:
                continue
            if _tag(node) == "use":
                at = np.array([[float(node.get("x", "nan")), float(node.get("y", "nan"))]])
            elif _tag(node) == "path":
                pairs = re.findall(r"(-?[\d.]+) (-?[\d.]+)", node.get("d", ""))
                at = np.array(pairs, dtype=float)
            else:
                continue
            if kind.startswith("PathCollection") and _tag(node) == "path":
                at = (at.min(0, keepdims=True) + at.max(0, keepdims=True)) / 2  # a circle's centre
            curve = (x(at[:, 0]), y(at[:, 1]))
            if kind.startswith("line2d") and _tag(node) == "path":
                found.lines[name] = curve
            elif kind.startswith("LineCollection"):
                found.bars.setdefault(name, []).append(curve)
            else:
                before = found.points.get(name, (np.empty(0), np.empty(0)))
                found.points[name] = (np.append(before[0], curve[0]), np.append(before[1], curve[1]))
    return found


def _scale(axis: ET.Element, side: str) -> Callable[[np.ndarray], np.ndarray]:
    """From the picture's units to those of the axis, linear or logarithmic, whichever its ticks lie on."""
    places, values, power = [], [], 1.0
    for group in axis:
        text = "".join(group.itertext()).strip().replace("−", "-")
        if "tick_" not in _id(group):
            power = (
                float(text) if re.fullmatch(r"1e-?\d+", text) else power
            )  # beside the axis, for all its ticks
            continue
        mark = next(node for node in group.iter() if _tag(node) == "use")
        value = _number(group)
        if value is not None:
            places.append(float(mark.get(side, "nan")))
            values.append(value)
    if len(values) < 2:  # an axis of names
        return lambda at: at
    x, y = np.array(places), np.array(values) * power
    linear = np.polynomial.Polynomial.fit(x, y, 1)
    if not any(_tag(node) == "tspan" for node in axis.iter()) and np.ptp(linear(x) - y) < 0.01 * np.ptp(y):
        return linear
    by_power = np.polynomial.Polynomial.fit(x, np.log10(y), 1)
    return lambda at: 10 ** by_power(at)


def _number(tick: ET.Element) -> float | None:
    """The number a tick bears, powers of ten too; None for a name or nothing."""
    spans = [node for node in tick.iter() if _tag(node) == "tspan"]
    raised = "".join((s.text or "") for s in spans if "font-size: 6" in s.get("style", ""))
    text = "".join((s.text or "") for s in spans if "font-size: 6" not in s.get("style", ""))
    text = (text if spans else "".join(tick.itertext())).strip().replace("−", "-")
    try:
        if not spans:
            return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        factor = text.removesuffix("10").removesuffix("×").strip()
        return float(factor or 1) * 10.0 ** float(raised.replace("−", "-"))
    except ValueError:
        return None


def _legend(root: ET.Element) -> dict[tuple[str, bool], str]:
    """Colour and dash -> name."""
    names, ink = {}, None
    for legend in (node for node in root.iter() if "-legend_" in _id(node)):
        for node in legend.iter():
            if "var(--s" in _ink(node)[0]:
                ink = _ink(node)
            elif _tag(node) == "text" and ink:
                names[ink] = (node.text or "").strip()
    return names


def _ink(node: ET.Element) -> tuple[str, bool]:
    style = node.get("style", "")
    colour = re.search(r"var\(--s\d\)", style)
    return (colour[0] if colour else "", "dasharray" in style)


def _id(node: ET.Element) -> str:
    return node.get("id", "")


def _tag(node: ET.Element) -> str:
    return node.tag.rsplit("}", 1)[-1]
