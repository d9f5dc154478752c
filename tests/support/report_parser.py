"""Parser of written reports: the cells of their tables, the points of their charts in the units of the axes."""

from __future__ import annotations

import html as entities
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

Curve = tuple[np.ndarray, np.ndarray]


def text_of(markup: str) -> str:
    """Text of a piece of HTML, with tags replaced by spaces."""
    return " ".join(entities.unescape(re.sub(r"<[^>]+>", " ", markup)).split())


def tables(html: str) -> dict[str, list[list[str]]]:
    """Table id, or the first cell without an id -> the text of the cells in body and footer."""
    rows_by_table = {}
    for attributes, content in re.findall(r"<table([^>]*)>(.*?)</table>", html, flags=re.S):
        name = re.search(r'id="([^"]+)"', attributes)
        content = re.sub(r"<thead>.*?</thead>", "", content, flags=re.S)
        rows = [
            [text_of(cell) for cell in re.findall(r"<t[hd][ >].*?</t[hd]>", row, flags=re.S)]
            for row in re.findall(r"<tr.*?</tr>", content, flags=re.S)
        ]
        rows_by_table[name[1] if name else rows[0][0]] = [row for row in rows if row]
    return rows_by_table


def markdown_tables(markdown: str) -> dict[str, list[list[str]]]:
    """First word of the section and number of the table in it, "Result 1" -> the rows without the header."""
    rows_by_table: dict[str, list[list[str]]] = {}
    for section in re.split(r"^## \d+\. ", markdown, flags=re.M)[1:]:
        blocks = re.findall(r"(?:^\|.*\n?)+", section, flags=re.M)
        for number, block in enumerate(blocks, 1):
            rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in block.splitlines()]
            rows_by_table[f"{section.split()[0]} {number}"] = rows[2:]
    return rows_by_table


@dataclass
class Drawing:
    """Lines, points and error bars of a chart by their name in the legend, or under "" without a legend."""

    description: str
    lines: dict[str, Curve] = field(default_factory=dict)
    points: dict[str, Curve] = field(default_factory=dict)
    bars: dict[str, list[Curve]] = field(default_factory=dict)


def drawings(html: str) -> dict[str, Drawing]:
    """Every chart of a page by its name."""
    charts = {}
    for svg in re.findall(r"<svg role=\"img\" aria-label.*?</svg>", html, flags=re.S):
        name = re.search(r'id="([^"]+)-figure_1"', svg)
        if name:
            charts[name[1]] = drawing(svg)
    return charts


def drawing(svg: str) -> Drawing:
    """Curves of a chart in the units of its axes, converted by means of the ticks."""
    root = ET.fromstring(svg)
    axes = next(node for node in root.iter() if _id(node).endswith("-axes_1"))
    x, y = (
        _scale(next(node for node in axes if _id(node).endswith(f"matplotlib.axis_{n}")), side)
        for n, side in ((1, "x"), (2, "y"))
    )
    chart, names = Drawing(root.get("aria-label", "")), _legend(root)
    for group in axes:
        kind = _id(group).rsplit("-", 1)[-1]
        markers = {id(node) for defs in group.iter() if _tag(defs) == "defs" for node in defs.iter()}
        for node in group.iter():
            name = names.get(_ink(node), "" if not names and _ink(node)[0] else None)
            if name is None or id(node) in markers:
                continue
            if _tag(node) == "use":
                xy = np.array([[float(node.get("x", "nan")), float(node.get("y", "nan"))]])
            elif _tag(node) == "path":
                xy = np.array(re.findall(r"(-?[\d.]+) (-?[\d.]+)", node.get("d", "")), dtype=float)
            else:
                continue
            if kind.startswith("PathCollection") and _tag(node) == "path":
                xy = (xy.min(0, keepdims=True) + xy.max(0, keepdims=True)) / 2  # centre of a circle
            curve = (x(xy[:, 0]), y(xy[:, 1]))
            if kind.startswith("line2d") and _tag(node) == "path":
                chart.lines[name] = curve
            elif kind.startswith("LineCollection"):
                chart.bars.setdefault(name, []).append(curve)
            else:
                xs, ys = chart.points.get(name, (np.empty(0), np.empty(0)))
                chart.points[name] = (np.append(xs, curve[0]), np.append(ys, curve[1]))
    return chart


def _scale(axis: ET.Element, side: str) -> Callable[[np.ndarray], np.ndarray]:
    """Function from SVG units to those of the axis; linear or logarithmic is decided by the ticks."""
    positions, values, power = [], [], 1.0
    for group in axis:
        text = "".join(group.itertext()).strip().replace("−", "-")
        if "tick_" not in _id(group):
            if re.fullmatch(r"1e-?\d+", text):  # factor of all ticks, written beside the axis
                power = float(text)
            continue
        mark = next(node for node in group.iter() if _tag(node) == "use")
        value = _number(group)
        if value is not None:
            positions.append(float(mark.get(side, "nan")))
            values.append(value)
    if len(values) < 2:  # an axis of names
        return lambda position: position
    x, y = np.array(positions), np.array(values) * power
    linear = np.polynomial.Polynomial.fit(x, y, 1)
    if not any(_tag(node) == "tspan" for node in axis.iter()) and np.ptp(linear(x) - y) < 0.01 * np.ptp(y):
        return linear
    exponent = np.polynomial.Polynomial.fit(x, np.log10(y), 1)
    return lambda position: 10 ** exponent(position)


def _number(tick: ET.Element) -> float | None:
    """Number of a tick, including powers of ten; None for a name or an empty tick."""
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
    """(colour, dashed) -> name."""
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
