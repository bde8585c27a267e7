"""Pictures as inline SVG: everything is in the file, can be read without a script, and takes its colours from the page.

Coordinates are in a box of `WIDTH` x `HEIGHT`, which the page scales; lines keep their width.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Sequence

import numpy as np

from swin_scale.log import Row
from swin_scale.report.curves import Axis, Envelope, Span, axis_for, envelope, linear_ticks, short, smooth
from swin_scale.report.pictures import Picture, Series, event_name

WIDTH, HEIGHT = 480, 232
LEFT, RIGHT, TOP, BOTTOM = 50, 472, 8, 196
CELLS = RIGHT - LEFT
"""Most cells a picture is cut into: one a unit of width."""

_SMOOTH_FROM = 24
_MARKED_POINTS = 60
_LANE = 24
_LANE_LEFT = 118
_MARKERS = ("M{x} {y}m-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0z", "M{x} {y}m-3-3h6v6h-6z", "M{x} {y}m0-4l4 4l-4 4l-4-4z",
            "M{x} {y}m0-4l4 7h-8z")  # fmt: skip
"""Circle, square, diamond, triangle: series can be told apart without their colours."""


def escape(text: object, limit: int = 400) -> str:
    """`text` for any place of the page, shortened to `limit` characters."""
    plain = str(text)
    return html.escape(plain if len(plain) <= limit else f"{plain[:limit]}…", quote=True)


def draw(picture: Picture, span: Span, events: Sequence[Row]) -> str:
    """One picture over the steps of `span`, `events` as vertical marks."""
    axis = axis_for([s.values for s in picture.series], log=picture.log, from_zero=picture.from_zero, top=picture.top)
    envelopes = [envelope(series.steps, series.values, span) for series in picture.series]
    body = [*_vertical(axis), *_horizontal(span), *_marks(events, span)]
    for at, (series, cells) in enumerate(zip(picture.series, envelopes)):
        drawn = _points(series, cells, axis, span, at) if series.kind == "points" else _curve(series, cells, axis, span)
        body.append(f'<g class="c{series.colour}">{"".join(drawn)}</g>')
    words = "; ".join(describe(picture))
    return _frame(picture.key, picture.title, words, HEIGHT, body, _hover(picture.series, envelopes, span))


def figure(picture: Picture, drawn: str) -> str:
    """A picture in its frame, with its title, its unit, the key of its colours, and its words."""
    keys = "".join(f'<span class="key c{one.colour}">{escape(one.label)}</span>' for one in picture.series)
    caption = f"<h3>{escape(picture.title)}</h3><span>{escape(picture.unit)}</span>"
    caption += keys if len(picture.series) > 1 else ""
    words = "<br>".join(escape(line) for line in describe(picture))
    return f"<figure><figcaption>{caption}</figcaption>{drawn}<p>{words}</p></figure>"


def describe(picture: Picture) -> list[str]:
    """The picture in words: last, smallest and largest value of each series, and at which step."""
    parts = []
    for series in picture.series:
        here = np.flatnonzero(np.isfinite(series.values))
        low, high = here[np.argmin(series.values[here])], here[np.argmax(series.values[here])]

        values = {name: float(series.values[at]) for name, at in (("last", here[-1]), ("low", low), ("high", high))}
        words = f"{short(values['last'])} throughout"
        if values["low"] != values["high"]:
            words = f"last {short(values['last'])}, "
            words += f"lowest {short(values['low'])} (step {int(series.steps[low]):,}), "
            words += f"highest {short(values['high'])} (step {int(series.steps[high]):,})"
        parts.append(f"{series.label}: {words}")
    return parts


def lanes(rows: Sequence[tuple[str, np.ndarray]], span: Span) -> str:
    """What happened when: a lane for each kind of event, a tick for each event."""
    bottom = TOP + _LANE * len(rows)
    body = list(_horizontal(span, left=_LANE_LEFT, bottom=bottom))
    for at, (name, steps) in enumerate(rows):
        middle = TOP + _LANE * at + _LANE / 2
        body.append(f'<text class="lane" x="{_LANE_LEFT - 8}" y="{middle + 4:g}">{escape(name, 18)}</text>')
        body.append(f'<path class="grid" d="M{_LANE_LEFT} {middle:g}H{RIGHT}"/>')
        places = sorted({round(_LANE_LEFT + span.fraction(step) * (RIGHT - _LANE_LEFT), 1) for step in steps.tolist()})
        path = "".join(f"M{x:g} {middle - 7:g}v14" for x in places)
        body.append(f'<path class="tick c{1 + at % 4}" d="{path}"/>')
    words = "; ".join(f"{name}: {len(steps)}" for name, steps in rows)
    return _frame("events", "Events", words, bottom + 36, body, None)


def _frame(key: str, title: str, words: str, height: int, body: Sequence[str], hover: str | None) -> str:
    data = f' data-hover="{escape(hover, len(hover))}"' if hover else ""
    return (
        f'<svg id="p-{key}" viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="t-{key} d-{key}"{data}>'
        f'<title id="t-{key}">{escape(title)}</title><desc id="d-{key}">{escape(words, 2000)}</desc>'
        f"{''.join(body)}</svg>"
    )


def _vertical(axis: Axis) -> Iterator[str]:
    ticks = axis.ticks()
    for tick, fraction in zip(ticks, axis.fraction(np.array(ticks)).tolist()):
        y = f"{BOTTOM - fraction * (BOTTOM - TOP):.1f}"
        yield f'<path class="grid" d="M{LEFT} {y}H{RIGHT}"/>'
        yield f'<text class="y" x="{LEFT - 6}" y="{y}" dy="4">{short(tick)}</text>'


def _horizontal(span: Span, left: int = LEFT, bottom: int = BOTTOM) -> Iterator[str]:
    yield f'<path class="axis" d="M{left} {bottom}H{RIGHT}"/>'
    ticks = [tick for tick in linear_ticks(span.first - 1, span.last) if tick == int(tick)]
    if span.first not in ticks and span.last - span.first < 3:
        ticks = list(range(span.first, span.last + 1))
    for tick in ticks:
        if span.first - 1 <= tick <= span.last:
            x = left + span.fraction(tick) * (RIGHT - left)
            yield f'<path class="axis" d="M{x:.1f} {bottom}v4"/>'
            yield f'<text class="x" x="{x:.1f}" y="{bottom + 16}">{short(tick)}</text>'
    yield f'<text class="x" x="{(left + RIGHT) / 2:g}" y="{bottom + 32}">step</text>'


def _marks(events: Sequence[Row], span: Span) -> Iterator[str]:
    seen: set[int] = set()
    for event in events:
        x = round(LEFT + span.fraction(event["step"]) * (RIGHT - LEFT))
        if x not in seen:
            seen.add(x)
            title = f"{event_name(event)} at step {event['step']:,}"
            yield f'<path class="mark" d="M{x} {TOP}V{BOTTOM}"><title>{escape(title)}</title></path>'


def _curve(series: Series, cells: Envelope, axis: Axis, span: Span) -> Iterator[str]:
    """The extremes of every cell as a band (or the raw line, where a cell is a step), and the line over it."""
    x = LEFT + (np.arange(span.cells) + 0.5) * (RIGHT - LEFT) / span.cells
    middle = axis.fraction(cells.mean)
    smoothed = series.kind == "curve" and int(np.isfinite(middle).sum()) >= _SMOOTH_FROM
    if bool((cells.high > cells.low).any()):
        yield f'<path class="band" d="{_band(x, _y(axis.fraction(cells.low)), _y(axis.fraction(cells.high)))}"/>'
    elif smoothed:
        yield f'<path class="raw" d="{_line(x, _y(middle))}"/>'
    line = smooth(middle, max(1, span.cells // 50)) if smoothed else middle
    yield f'<path class="line" d="{_line(x, _y(line))}"/>'


def _points(series: Series, cells: Envelope, axis: Axis, span: Span, at: int) -> Iterator[str]:
    here = np.flatnonzero(np.isfinite(series.values))
    cell = span.at(series.steps[here])
    last = np.append(cell[1:] != cell[:-1], True)
    places = [LEFT + span.fraction(step) * (RIGHT - LEFT) for step in series.steps[here][last].tolist()]
    heights = _y(axis.fraction(series.values[here][last]))
    yield f'<path class="line" d="{_line(np.array(places), heights)}"/>'
    if len(places) <= _MARKED_POINTS:
        marker = _MARKERS[at % len(_MARKERS)]
        shapes = "".join(marker.format(x=f"{x:.1f}", y=f"{y:.1f}") for x, y in zip(places, heights.tolist()))
        yield f'<path class="dot" d="{shapes}"/>'


def _y(fractions: np.ndarray) -> np.ndarray:
    return BOTTOM - fractions * (BOTTOM - TOP)


def _runs(values: np.ndarray) -> Iterator[slice]:
    """The stretches of `values` without NaN."""
    edges = np.flatnonzero(np.diff(np.isfinite(values).astype(np.int8), prepend=0, append=0))
    yield from (slice(int(start), int(stop)) for start, stop in zip(edges[::2], edges[1::2]))


def _join(x: np.ndarray, y: np.ndarray) -> str:
    return " ".join(f"{a:.1f} {b:.1f}" for a, b in zip(x.tolist(), y.tolist()))


def _line(x: np.ndarray, y: np.ndarray) -> str:
    """A path through all points, broken at NaN; a point alone between two gaps is a dot (its line has round ends)."""
    return "".join(f"M{_join(x[run], y[run])}" + ("h0" if run.stop - run.start == 1 else "") for run in _runs(y))


def _band(x: np.ndarray, low: np.ndarray, high: np.ndarray) -> str:
    return "".join(f"M{_join(x[run], high[run])} {_join(x[run][::-1], low[run][::-1])}z" for run in _runs(low))


def _hover(series: Sequence[Series], envelopes: Sequence[Envelope], span: Span) -> str:
    """JSON for the script that shows values: [x, first step of the cell, words] of each cell that holds any."""
    rows = []
    for cell in range(span.cells):
        words = []
        for one, cells in zip(series, envelopes):
            low, high = float(cells.low[cell]), float(cells.high[cell])
            if low == low:
                values = short(low) if low == high else f"{short(low)} to {short(high)}"
                words.append(f"{one.label} {values}")
        if words:
            step = span.first + -(-cell * (span.last - span.first + 1) // span.cells)
            x = LEFT + (cell + 0.5) * (RIGHT - LEFT) / span.cells
            rows.append([round(x, 1), step, "\n".join(words)])
    return json.dumps(rows, separators=(",", ":"))
