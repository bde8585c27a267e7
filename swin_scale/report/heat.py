"""Heat maps as inline SVG: cells of nine levels, a scale from 0 with its numbers, axes with names.

Cells of one level are one path of horizontal runs, so that a map of thousands stays small; the values themselves are in
an attribute that the page's script reads to show what is under the pointer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from swin_scale.report.curves import short
from swin_scale.report.palette import LEVELS, level
from swin_scale.report.svg import WIDTH, escape

LEFT, NAMED_LEFT, RIGHT, TOP = 44, 134, 472, 6
NAMED_ROWS = 24
"""Maps of at most so many rows have room for a name beside each, where rows have names."""


@dataclass(frozen=True, kw_only=True)
class Heat:
    """A map of values (rows, columns) from 0 up; NaN is left empty."""

    key: str
    """Part of the ids in the page: letters, digits, ``-``."""
    title: str
    words: str
    """The map in words, for people who do not see it."""
    values: np.ndarray
    top: float
    """Value at the dark end of the scale (pale on a dark page); larger ones look the same."""
    unit: str
    """After every number, such as `` %``."""
    rows: Sequence[str]
    columns: Sequence[str]
    row_axis: str
    column_axis: str
    named: bool = False
    """Whether rows have names rather than numbers."""

    @classmethod
    def of_places(cls, *, key: str, title: str, words: str, values: np.ndarray, top: float, unit: str) -> Heat:
        """A map of the places of an image, (H, W): rows and columns are numbered."""
        rows, columns = ([str(place) for place in range(length)] for length in values.shape)
        return cls(
            key=key,
            title=title,
            words=words,
            values=values,
            top=top,
            unit=unit,
            rows=rows,
            columns=columns,
            row_axis="row",
            column_axis="column",
        )


def draw(heat: Heat, *, tall: float = 170.0, square: bool = False) -> str:
    """The map with its axes, as wide as a picture; rows with names are as high as their text, others share `tall`.

    `square`: cells are, so that a map of places looks like the image.
    """
    count, width = heat.values.shape
    named = heat.named and count <= NAMED_ROWS
    left = NAMED_LEFT if named and max(map(len, heat.rows)) > 3 else LEFT
    bottom = TOP + (max(17.0 * count, 60.0) if named else tall)
    right = min(float(RIGHT), left + (bottom - TOP) * width / count) if square else float(RIGHT)
    bottom = TOP + (right - left) * count / width if square else bottom
    body = [_cells(heat, left, TOP, right - left, bottom - TOP)]
    step = (bottom - TOP) / count
    # Names of many rows have no room: they show under the pointer.
    for at in range(count) if named else ticks(count, 8) if max(map(len, heat.rows)) <= 4 else ():
        y = TOP + (at + 0.5) * step
        body.append(f'<text class="y" x="{left - 6}" y="{y:.1f}" dy="4">{escape(heat.rows[at], 16)}</text>')
    if left == LEFT:
        body.append(_turned(heat.row_axis, TOP, bottom))
    for at in ticks(width, 14 if max(map(len, heat.columns)) <= 3 else 7):
        x = left + (at + 0.5) * (right - left) / width
        body.append(f'<text class="x" x="{x:.1f}" y="{bottom + 15:g}">{escape(heat.columns[at], 9)}</text>')
    body.append(f'<text class="x" x="{(left + right) / 2:g}" y="{bottom + 31:g}">{escape(heat.column_axis)}</text>')
    return _frame(heat, f"0 0 {WIDTH} {bottom + 36:g}", body, (left, TOP, right - left, bottom - TOP))


def small(heat: Heat) -> str:
    """The cells alone, square, to be named by what stands around them."""
    rows, columns = heat.values.shape
    return _frame(heat, f"0 0 {columns} {rows}", [_cells(heat, 0, 0, columns, rows)], (0, 0, columns, rows))


def scale(top: float, unit: str) -> str:
    """The key of a scale: its nine levels and three numbers."""
    swatches = "".join(f'<path class="h{at}" d="M{20 * at} 0h20v10h-20z"/>' for at in range(len(LEVELS)))
    numbers = [float(f"{value:.3g}") for value in (0.0, top / 2, top)]
    ends = "".join(f"<span>{escape(short(number) + unit)}</span>" for number in numbers)
    return (
        f'<div class="scale"><svg viewBox="0 0 180 10" preserveAspectRatio="none" aria-hidden="true">{swatches}</svg>'
        f"<div>{ends}</div></div>"
    )


def _frame(heat: Heat, box: str, body: Sequence[str], area: tuple[float, float, float, float]) -> str:
    # Three digits tell more than nine levels do.
    values = [None if value != value else float(f"{value:.3g}") for value in heat.values.ravel().tolist()]
    data = {
        "area": area,
        "rows": [f"{heat.row_axis} {name}"[:120] for name in heat.rows],
        "columns": [f"{heat.column_axis} {name}"[:120] for name in heat.columns],
        "values": [int(v) if v is not None and v == int(v) else v for v in values],
        "unit": heat.unit,
    }
    text = json.dumps(data, separators=(",", ":"))
    return (
        f'<svg id="p-{heat.key}" viewBox="{box}" role="img" aria-labelledby="t-{heat.key} d-{heat.key}" '
        f'data-cells="{escape(text, len(text))}"><title id="t-{heat.key}">{escape(heat.title)}</title>'
        f'<desc id="d-{heat.key}">{escape(heat.words, 2000)}</desc>{"".join(body)}</svg>'
    )


def _cells(heat: Heat, x: float, y: float, width: float, height: float) -> str:
    rows, columns = heat.values.shape
    paths: list[list[str]] = [[] for _ in LEVELS]
    for at, row in enumerate(level(heat.values, heat.top).tolist()):
        start = 0
        for column in range(1, columns + 1):
            if column == columns or row[column] != row[start]:
                if row[start] >= 0:
                    paths[row[start]].append(f"M{start} {at}h{column - start}v1h{start - column}z")
                start = column
    drawn = "".join(f'<path class="h{at}" d="{"".join(runs)}"/>' for at, runs in enumerate(paths) if runs)
    place = f"translate({x:g} {y:g})scale({width / columns:.5g} {height / rows:.5g})"
    return f'<g class="cells" transform="{place}">{drawn}</g>'


def ticks(count: int, most: int) -> range:
    """Every first, second, fifth, tenth, ... place, so that at most `most` are named."""
    step = next(f * 10**e for e in range(9) for f in (1, 2, 5) if -(-count // (f * 10**e)) <= most)
    return range(0, count, step)


def _turned(words: str, top: float, bottom: float) -> str:
    middle = (top + bottom) / 2
    return f'<text class="x" transform="translate(11 {middle:g})rotate(-90)">{escape(words)}</text>'
