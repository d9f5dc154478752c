"""The style, canvas and SVG output of all charts."""

from __future__ import annotations

import contextlib
import functools
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font

from fastflower.core.console import shortened

TEXT, FAINT = "#1b1f23", "#d3d9df"
SERIES = ("#0a6cc2", "#d1570c", "#12845a", "#a4368f", "#8a6d00", "#5b5fc7")
VARIABLES = {
    TEXT: "currentColor",
    FAINT: "var(--line)",
    **{c: f"var(--s{i})" for i, c in enumerate(SERIES, 1)},
}
LEGEND_ROW = 0.19  # inches
CJK = (  # usual families with Chinese letters, and the files that hold them
    *(
        ("Noto Sans CJK SC", "NotoSansCJK"),
        ("Noto Sans CJK JP", "NotoSansCJK"),
        ("Noto Sans SC", "NotoSansSC"),
    ),
    *(("Source Han Sans SC", "SourceHanSans"), ("Source Han Sans CN", "SourceHanSans")),
    *(("WenQuanYi Micro Hei", "wqy-microhei"), ("WenQuanYi Zen Hei", "wqy-zenhei")),
    *(("Droid Sans Fallback", "DroidSansFallback"), ("Microsoft YaHei", "msyh"), ("SimHei", "simhei")),
    *(("PingFang SC", "PingFang"), ("Hiragino Sans GB", "Hiragino Sans GB"), ("Heiti TC", "STHeiti")),
)


@functools.cache
def families() -> list[str]:
    """The charts' font families: letters that the first lacks are those of the next.

    Those of CJK that are installed count, also since matplotlib wrote its list of fonts: a sixth of a second.
    """
    if not _known() & {family for family, _ in CJK}:
        files = tuple(file for _, file in CJK)
        for path in font_manager.findSystemFonts():
            if Path(path).name.startswith(files):
                with contextlib.suppress(OSError, RuntimeError):  # a file that is no font
                    font_manager.fontManager.addfont(path)
    return ["DejaVu Sans", *(family for family, _ in CJK if family in _known())]


def _known() -> set[str]:
    return {font.name for font in font_manager.fontManager.ttflist}


_DIGITS = re.compile(r"(\d+\.\d{2})\d+")


@functools.cache
def chart_style() -> dict[Any, Any]:
    """Matplotlib's settings for all charts."""
    return {
        "svg.fonttype": "none",
        "font.family": families(),
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titley": 1.02,  # a fixed value spares matplotlib measuring every label
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": FAINT,
        "grid.linewidth": 0.6,
        "text.color": TEXT,
        "axes.labelcolor": TEXT,
        "axes.edgecolor": TEXT,
        "xtick.color": TEXT,
        "ytick.color": TEXT,
        "axes.linewidth": 0.6,
        "lines.linewidth": 1.6,
        "legend.frameon": False,
        "legend.fontsize": 8.5,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "savefig.facecolor": "none",
    }


@dataclass
class Chart:
    """A figure with its name in files and the text alternative for readers who cannot see it."""

    name: str
    title: str
    description: str
    figure: Figure

    def svg(self) -> str:
        """One <svg> element without fixed size; ids contain the chart's name, so that a page can hold many charts."""
        with matplotlib.rc_context(chart_style() | {"svg.hashsalt": self.name}):
            buffer = io.StringIO()
            self.figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        text = buffer.getvalue()
        text = text[text.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.S)
        text = re.sub(r"font-family: [^;\"]*;? ?", "", text)  # inherit the page's font
        text = re.sub(r'\b(?:d|x|y|points|transform)="[^"]*"', lambda m: _DIGITS.sub(r"\1", m[0]), text)
        text = re.sub(r'\bid="', f'id="{self.name}-', text)
        text = re.sub(r'(href="#|url\(#)', rf"\g<1>{self.name}-", text)
        text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
        text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
        for colour, variable in VARIABLES.items():
            text = text.replace(colour, variable)
        label = (
            (self.description or self.title).replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
        )
        return re.sub(r"<svg", f'<svg role="img" aria-label="{label}"', text, count=1).strip()

    def png(self) -> bytes:
        """The chart as a PNG on white, with twice the pixels of the screen version."""
        with matplotlib.rc_context(chart_style()):
            buffer = io.BytesIO()
            self.figure.savefig(buffer, format="png", dpi=160, facecolor="white", metadata={"Software": None})
        return buffer.getvalue()


def canvas(
    height: float = 2.7, layout: Literal["constrained"] | None = "constrained", free_below: float = 0
) -> tuple[Figure, Axes]:
    """An empty chart, 360 points wide and `height` inches high.

    layout=None uses fixed margins, which takes a tenth of the time, and leaves `free_below` inches under the axes.
    """
    with matplotlib.rc_context(chart_style()):
        total = height + free_below
        figure = Figure(figsize=(5, total), layout=layout)
        if layout is None:
            bottom = (0.46 + free_below) / total
            figure.subplots_adjust(left=0.13, right=0.98, top=1 - 0.27 / total, bottom=bottom)
        return figure, figure.add_subplot()


def axis_label(*names: str, longest: int = 18) -> str:
    """The first of the names that the charts' fonts can draw, cut to `longest` columns; '?' for what they lack."""
    name = next((name for name in names if name and all(map(is_drawable, name))), names[-1])
    missing = [letter for letter in "".join(names) if letter.isprintable() and not is_drawable(letter)]
    if missing:
        _say_missing(missing[0])
    text = "".join(letter if is_drawable(letter) else "?" for letter in name)
    return shortened(text, longest).replace("$", r"\$")  # a pair of them would begin a formula


@functools.cache
def is_drawable(letter: str) -> bool:
    """True if one of the charts' fonts has the letter; a page's SVG has the fonts of its reader, a PNG only these."""
    return letter.isprintable() and any(font.get_char_index(ord(letter)) for font in _fonts())


@functools.cache
def _fonts() -> list[FT2Font]:
    return [font_manager.get_font(font_manager.findfont(family)) for family in families()]


_said: set[str] = set()


def _say_missing(letter: str) -> None:
    """Print once that class names are not drawn as they are, and what to install."""
    if not _said:
        print(
            f"note: no font here has {letter} and other letters of the class names, so charts name classes by their "
            "ids; fonts-noto-cjk (Debian, Ubuntu) has those of Chinese"
        )
    _said.add(letter)
