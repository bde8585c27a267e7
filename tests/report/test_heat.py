"""Heat maps: every cell is painted once in its level, and the numbers are those of the values."""

import html
import json
import re

import numpy as np
import pytest

from swin_scale.report.heat import Heat, draw, scale, small
from swin_scale.report.palette import LEVELS, level, paint

RNG = np.random.default_rng(0)


def heat(values, **changes):
    rows, columns = values.shape
    fields = {
        "key": "x", "title": "T", "words": "W", "values": values, "top": float(np.nanmax(values)), "unit": " %",
        "rows": [str(i) for i in range(rows)], "columns": [str(i) for i in range(columns)], "row_axis": "row",
        "column_axis": "column", **changes,
    }  # fmt: skip
    return Heat(**fields)


def painted(text, shape):
    """Level of each cell, -1 where none; a cell painted twice fails."""
    found = np.full(shape, -1)
    for at, path in re.findall(r'class="h(\d)" d="([^"]+)"', text):
        for x, y, width, back in re.findall(r"M(\d+) (\d+)h(\d+)v1h-(\d+)z", path):
            cells = found[int(y), int(x) : int(x) + int(width)]
            assert width == back and (cells == -1).all() and cells.size == int(width)
            cells[:] = int(at)
    return found


@pytest.mark.parametrize("picture", [draw, small])
def test_every_cell_has_its_level_and_its_value(picture):
    values = RNG.random((7, 30)).round(2)
    values[2, 3:6] = np.nan
    values[0, 0] = 1.0
    text = picture(heat(values))
    assert (painted(text, values.shape) == level(values, 1.0)).all()
    data = json.loads(html.unescape(re.search(r'data-cells="([^"]+)"', text)[1]))
    assert data["values"] == [None if v != v else v for v in values.ravel().tolist()]
    assert (len(data["rows"]), len(data["columns"]), data["rows"][6]) == (7, 30, "row 6")


def test_levels_are_nine_equal_steps_from_zero():
    assert level(np.array([0, 0.1, 0.9, 1.0, 5.0, np.nan]), 0.9).tolist() == [0, 1, 8, 8, 8, -1]
    assert level(np.zeros(3), 0.0).tolist() == [0, 0, 0]


def test_colours_grow_darker_without_a_break():
    """Relative luminance (WCAG 2) falls from level to level, so the scale reads in grey and for any colour vision."""
    colours = paint(np.linspace(0, 1, 101)[None], 1.0)[0] / 255
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(luminance) < 0).all() and luminance[0] > 0.9 and luminance[-1] < 0.03
    ends = [tuple(int(c[i : i + 2], 16) for i in (1, 3, 5)) for c in (LEVELS[0], LEVELS[-1])]
    assert [tuple(c) for c in paint(np.array([[0.0, 2.0]]), 2.0)[0].tolist()] == ends


def test_names_and_ticks_fit_and_are_escaped():
    rows = ["<b>cat", *"abc"]
    text = draw(heat(np.ones((4, 3)), rows=rows, named=True))
    assert "&lt;b&gt;cat" in text and "<b>" not in text and text.count('class="y"') == 4
    many = draw(heat(np.ones((128, 200))))
    assert many.count('class="y"') == 7 and many.count('class="x"') <= 11 + 2
    assert len(many) < 128 * 200 * 4


def test_the_scale_says_its_ends_and_middle():
    assert re.findall(r"<span>([^<]+)</span>", scale(33.3333, " %")) == ["0 %", "16.7 %", "33.3 %"]
