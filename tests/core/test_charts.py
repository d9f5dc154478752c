"""Letters in charts: a font that has them where one is installed, else ids and one line, never boxes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import matplotlib
import numpy as np
import pytest
from matplotlib import font_manager

from fastflower.core import charts
from fastflower.core.charts import Chart, axis_label, canvas, chart_style
from fastflower.core.console import aligned, shortened, text_width
from fastflower.data.conversion.class_chart import class_chart
from fastflower.data.labels import ClassMap, LabelTable

NAMES = ("玫瑰", "向日葵", "Löwenzahn")


@pytest.fixture
def only_dejavu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine without a font for Chinese."""
    dejavu = font_manager.get_font(font_manager.findfont("DejaVu Sans"))
    monkeypatch.setattr(charts, "_fonts", lambda: [dejavu])
    monkeypatch.setattr(charts, "_said", set())
    charts.is_drawable.cache_clear()
    yield
    charts.is_drawable.cache_clear()


def table() -> LabelTable:
    rows = np.repeat(np.arange(3), [5, 3, 2])
    ids = [NAMES[row] for row in rows]
    sizes = np.ones(len(rows), np.int64)
    return LabelTable([str(k) for k in range(len(rows))], ids, rows, sizes, ClassMap(NAMES))


def test_names_without_a_font_are_ids_and_one_line(only_dejavu: None, capsys) -> None:
    assert [axis_label(name, str(k)) for k, name in enumerate(NAMES)] == ["0", "1", "Löwenzahn"]
    assert axis_label("a玫瑰") == "a??"
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("note: no font here has 玫 and other letters") and "fonts-noto-cjk" in line


def test_charts_of_chinese_names_warn_of_no_glyph() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert class_chart(table())[:4] == b"\x89PNG"
        figure, axes = canvas()
        with matplotlib.rc_context(chart_style()):
            axes.set_yticks([0, 1, 2], [axis_label(name, str(k)) for k, name in enumerate(NAMES)])
        Chart("confusion", "", "", figure).png()


def test_a_chinese_font_is_used_where_one_is_installed() -> None:
    if len(charts.families()) == 1:
        pytest.skip("no font of charts.CJK is installed")
    assert axis_label("玫瑰", "164") == "玫瑰" and chart_style()["font.family"] == charts.families()


def test_chinese_letters_take_two_columns() -> None:
    assert [shortened(name, 6) for name in ("玫瑰花", "向日葵花", "dandelion")] == [
        "玫瑰花",
        "向日…",
        "dande…",
    ]
    assert text_width("e\u0301") == 1
    assert aligned([["class", "n"], ["玫瑰", "10"]]).splitlines() == ["class   n", "玫瑰   10"]
