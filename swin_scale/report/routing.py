"""MoE layers in a run's report: curves of their figures, which experts were busy when, where tokens were dropped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from swin_scale.log import Row
from swin_scale.report.curves import Span, short
from swin_scale.report.heat import Heat, scale, small
from swin_scale.report.heat import draw as draw_heat
from swin_scale.report.history import History, LayerMap
from swin_scale.report.pictures import Picture, Series
from swin_scale.report.svg import CELLS, draw, escape, figure

COLOURS = 4
"""Layers that are told apart by colour; of more, the extremes and the median are drawn."""
MAX_LAYERS = 24
MAX_COLUMNS = 64

_PICTURES = (
    ("load_cv", "Load variation", "standard deviation over mean of the experts' loads", False),
    ("load_max", "Busiest expert", "load over the mean load", False),
    ("rank_load_max", "Busiest rank", "load over the mean of an EP group's ranks", False),
    ("dropped", "Dropped choices", "share", True),
    ("dead", "Dead experts", "with under 1 % of an even share", True),
    ("entropy", "Router entropy", "nats per token", True),
    ("confidence", "Router confidence", "mean largest probability", True),
    ("a2a_share", "Waiting in all-to-alls", "share of the step's time", True),
)
"""Figure, title, unit, whether the axis starts at 0."""


def routing_section(history: History, span: Span, marks: Sequence[Row]) -> str:
    """The section of a run with MoE layers; empty for other runs."""
    drawn = [figure(picture, draw(picture, span, marks)) for picture in routing_pictures(history)]
    if not drawn:
        return ""
    maps = [*_maps(history)]
    more = f'<h3 class="part">Experts and places</h3><div class="pictures">{"".join(maps)}</div>' if maps else ""
    note = "Every point is the mean over a log interval, over all ranks."
    return f'<h2>Routing</h2><p class="note">{note}</p><div class="pictures">{"".join(drawn)}</div>{more}'


def routing_pictures(history: History) -> list[Picture]:
    """Curves of the recorded figures, less those that say nothing, such as all-to-alls on one process."""
    found = []
    for name, title, unit, from_zero in _PICTURES:
        layers = history.routing.figures.get(name, {})
        series = _series(history.routing.steps, layers)
        still = {"rank_load_max": 1.0, "a2a_share": 0.0}.get(name)
        if series and not (still is not None and all((s.values[np.isfinite(s.values)] == still).all() for s in series)):
            found.append(
                Picture(
                    key=f"moe-{name.replace('_', '-')}", title=title, unit=unit, series=series, log=False,
                    from_zero=from_zero,
                )
            )  # fmt: skip
    return found


def _series(steps: np.ndarray, layers: Mapping[str, np.ndarray]) -> tuple[Series, ...]:
    seen = {name: values for name, values in layers.items() if np.isfinite(values).any()}
    if len(seen) > COLOURS:
        table = np.stack(list(seen.values()))
        here = np.isfinite(table).any(0)
        steps, table = steps[here], table[:, here]
        # The highest first, so that the key is in the order of the lines.
        seen = {
            "highest layer": np.nanmax(table, 0),
            "median layer": np.nanmedian(table, 0),
            "lowest layer": np.nanmin(table, 0),
        }
    return tuple(
        # Few points are joined over the steps between them, which have none.
        Series(label=name, steps=steps, values=values, colour=1 + at, kind="line" if len(steps) > CELLS else "points")
        for at, (name, values) in enumerate(seen.items())
    )


def _maps(history: History) -> Sequence[str]:
    names = list(dict.fromkeys(name for _, _, layers in history.routing.maps for name in layers))
    there = {name: [(last, m[name]) for _, last, m in history.routing.maps if name in m] for name in names[:MAX_LAYERS]}
    found = [_load(at, name, maps) for at, (name, maps) in enumerate(there.items())]
    found += _dropped(history.routing.maps[-1]) if there else []
    if len(names) > MAX_LAYERS:
        found.append(f'<p class="note">and {len(names) - MAX_LAYERS} more layers</p>')
    return found


def _load(at: int, name: str, maps: Sequence[tuple[int, LayerMap]]) -> str:
    """Experts down, time across: load as a multiple of an even share."""
    experts = len(maps[-1][1].load)
    maps = [(step, one) for step, one in maps if len(one.load) == experts]
    picked = [maps[i] for i in np.unique(np.linspace(0, len(maps) - 1, MAX_COLUMNS).round().astype(int))]
    values = np.stack([one.load for _, one in picked], axis=1) * experts
    top = max(2.0, float(np.ceil(values.max())))
    last = values[:, -1]
    words = f"Last: expert {int(last.argmax())} has {short(float(last.max()))} even shares, "
    words += f"expert {int(last.argmin())} {short(float(last.min()))}."
    heat = Heat(
        key=f"load-{at}",
        title=f"Load of experts, {name}",
        words=words,
        values=values,
        top=top,
        unit=" even shares",
        rows=[str(expert) for expert in range(len(values))],
        columns=[short(step) for step, _ in picked],
        row_axis="expert",
        column_axis="step",
    )
    return framed(heat, name, "load of each expert, in even shares", draw_heat(heat), words)


def _dropped(latest: tuple[int, int, Mapping[str, LayerMap]]) -> list[str]:
    """Where in the images choices were dropped in the last stretch of steps: a small map for each layer, one scale."""
    first, last, layers = latest
    percent = {name: 100 * one.dropped for name, one in layers.items() if one.dropped.any()}
    if not percent:
        return []
    top = max(float(values.max()) for values in percent.values())
    minis = []
    for at, (name, values) in enumerate(list(percent.items())[:MAX_LAYERS]):
        row, column = np.unravel_index(int(values.argmax()), values.shape)
        share = f"{values.mean():.3g} %"
        heat = Heat.of_places(
            key=f"dropped-{at}",
            title=f"Dropped choices by place, {name}",
            words=f"{share} in all, {short(float(values.max()))} % at row {row}, column {column}",
            values=values,
            top=top,
            unit=" % dropped",
        )
        minis.append(f"<div><b>{escape(name)} <span>{escape(share)}</span></b>{small(heat)}</div>")
    caption = "<h3>Dropped choices by place in the image</h3>"
    caption += f"<span>steps {first:,} to {last:,}, share of choices</span>{scale(top, ' %')}"
    drawn = f'<div class="minis large">{"".join(minis)}</div>'
    return [f'<figure class="wide"><figcaption>{caption}</figcaption>{drawn}</figure>']


def framed(heat: Heat, title: str, unit: str, drawn: str, words: str) -> str:
    """A heat map in its frame, with its scale."""
    caption = f"<h3>{escape(title)}</h3><span>{escape(unit)}</span>{scale(heat.top, _short_unit(heat.unit))}"
    return f"<figure><figcaption>{caption}</figcaption>{drawn}<p>{escape(words, 2000)}</p></figure>"


def _short_unit(unit: str) -> str:
    return "×" if unit == " even shares" else unit
