"""The page of a look at the routing: a summary, then load, confidence, classes and places of every MoE layer."""

from __future__ import annotations

import numpy as np

from swin_scale.report.curves import short
from swin_scale.report.document import date, document, facts, table
from swin_scale.report.heat import Heat, draw, scale, small, ticks
from swin_scale.report.survey import BINS, LayerSurvey, Survey, arrange, banded, explained, named, shares, top_classes
from swin_scale.report.svg import LEFT, RIGHT, WIDTH, escape

MAX_LAYERS = 48
MAX_BANDS = 100
MAX_PLACES = 48
"""Experts whose map of places is drawn, the busiest."""
MAX_SIDE = 16
TOP_CLASSES = 5
DEAD_SHARE = 0.01


def survey_page(survey: Survey, written: float) -> str:
    """The whole document; `written` is the time it shows, in seconds since the epoch."""
    layers = survey.layers[:MAX_LAYERS]
    more = len(survey.layers) - len(layers)
    body = [
        f"<header><h1>Routing of {escape(survey.title)}</h1><p>{escape(survey.model)} · {escape(survey.weights)}</p>"
        f"<p>{escape(', '.join(survey.data))}</p></header>",
        _facts(survey),
        "<h2>Layers</h2>",
        f'<p class="note">{escape(_how(survey))}</p>',
        _summary(layers),
        f'<p class="note">and {more} more layers</p>' if more else "",
        *(_layer(at, layer, survey) for at, layer in enumerate(layers)),
    ]
    return document(f"{survey.title}: routing", body, f"Written {date(written)}.")


def _how(survey: Survey) -> str:
    drops = "no choice is dropped" if survey.capacity_factor == 0 else f"capacity factor {survey.capacity_factor:g}"
    return (
        f"Counted in evaluation: no gate noise, {drops}; all choices of a token count, dropped too. Load variation "
        "is the standard deviation of the loads over their mean; its largest possible value stands beside it. “Class "
        "tells” and “place tells” say how much of the choice of an expert (its entropy) the class of the image, or the "
        "place in the image, accounts for: 0 % nothing, 100 % everything."
    )


def _facts(survey: Survey) -> str:
    seen = int((survey.layers[0].by_class.sum(1) > 0).sum()) if survey.layers else 0
    of = "all there are" if survey.images + survey.unusable >= survey.available else f"of {survey.available:,}"
    return facts(
        [
            ("Images", f"{survey.images:,}", of),
            ("Classes seen", f"{seen:,}", f"of {len(survey.classes):,}"),
            ("MoE layers", str(len(survey.layers)), ""),
            ("Experts a layer", " / ".join(map(str, sorted({layer.experts for layer in survey.layers}))), ""),
            ("Choices a token", " / ".join(map(str, sorted({layer.top_k for layer in survey.layers}))), ""),
            *([("Unusable samples", f"{survey.unusable:,}", "")] if survey.unusable else []),
        ]
    )


def _summary(layers: tuple[LayerSurvey, ...]) -> str:
    heads = ["layer", "places", "experts", "load variation", "busiest", "dead", "dropped", "confidence", "entropy",
             "class tells", "place tells"]  # fmt: skip
    rows = []
    for layer in layers:
        load, tokens = layer.load, max(layer.tokens, 1)
        most = np.sqrt(max(layer.experts / layer.top_k - 1, 0))
        entropy = layer.entropy_sum / tokens
        rows.append(
            [
                layer.name,
                " × ".join(map(str, layer.dropped.shape)),
                str(layer.experts),
                f"{np.sqrt(max(layer.experts * (load**2).sum() - 1, 0)):.2f} of {most:.2f}",
                f"{load.max() * layer.experts:.2f}×",
                str(int((load * layer.experts < DEAD_SHARE).sum())),
                f"{100 * layer.dropped.sum() / (tokens * layer.top_k):.1f} %",
                f"{layer.confidence_sum / tokens:.2f}",
                f"{max(entropy, 0):.2f} of {np.log(layer.experts):.2f} nats",
                f"{100 * explained(layer.by_class):.1f} %",
                f"{100 * explained(layer.by_place.reshape(-1, layer.experts)):.1f} %",
            ]
        )
    return table(heads, rows, numeric=range(1, len(heads)), key=True)


def _layer(at: int, layer: LayerSurvey, survey: Survey) -> str:
    figures = [
        _load(at, layer),
        _confidence(at, layer),
        _classes(at, layer, survey.classes),
        _dropped(at, layer),
        _places(at, layer),
    ]
    return (
        f"<h2>{escape(layer.name)}</h2>"
        f'<div class="pictures">{"".join(figures)}</div>{_favourites(layer, survey.classes)}'
    )


def _figure(title: str, unit: str, drawn: str, words: str, *, heat: Heat | None = None) -> str:
    key = scale(heat.top, heat.unit) if heat else ""
    caption = f"<h3>{escape(title)}</h3><span>{escape(unit)}</span>{key}"
    told = f"<p>{escape(words, 2000)}</p>" if words else ""
    return f"<figure><figcaption>{caption}</figcaption>{drawn}{told}</figure>"


def _bars(key: str, title: str, words: str, values: np.ndarray, names: list[str], axis: str, unit: str,
          line: float | None = None) -> str:  # fmt: skip
    """Bars from 0, one for each value, with a dashed line across at `line`."""
    top, bottom, count = 8.0, 176.0, len(values)
    high = max(float(values.max(initial=0)), line or 0.0, 1e-9) * 1.06
    step = (RIGHT - LEFT) / count
    gap = min(0.2 * step, 4.0)
    body = []
    for tick in (0.0, high / 2.12, high / 1.06):
        y = bottom - tick / high * (bottom - top)
        body.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{RIGHT}"/>')
        label = short(float(f"{tick:.3g}"))
        body.append(f'<text class="y" x="{LEFT - 6}" y="{y:.1f}" dy="4">{escape(label + unit)}</text>')
    for i, value in enumerate(values.tolist()):
        x, height = LEFT + i * step + gap / 2, value / high * (bottom - top)
        told = escape(f"{axis} {names[i]}: {value:.3g}{unit}")
        outline = f"M{x:.1f} {bottom:g}v{-height:.1f}h{step - gap:.1f}v{height:.1f}z"
        body.append(f'<path class="bar" d="{outline}"><title>{told}</title></path>')
    if line is not None:
        y = bottom - line / high * (bottom - top)
        body.append(f'<path class="mark" d="M{LEFT} {y:.1f}H{RIGHT}"/>')
    for i in ticks(count, 14):
        body.append(f'<text class="x" x="{LEFT + (i + 0.5) * step:.1f}" y="{bottom + 15:g}">{escape(names[i])}</text>')
    body.append(f'<path class="axis" d="M{LEFT} {bottom:g}H{RIGHT}"/>')
    body.append(f'<text class="x" x="{(LEFT + RIGHT) / 2:g}" y="{bottom + 31:g}">{escape(axis)}</text>')
    return (
        f'<svg id="p-{key}" class="c1" viewBox="0 0 {WIDTH} {bottom + 36:g}" role="img" '
        f'aria-labelledby="t-{key} d-{key}"><title id="t-{key}">{escape(title)}</title>'
        f'<desc id="d-{key}">{escape(words, 2000)}</desc>{"".join(body)}</svg>'
    )


def _load(at: int, layer: LayerSurvey) -> str:
    percent = 100 * layer.load
    busy, idle = int(layer.load.argmax()), int(layer.load.argmin())
    words = f"The dashed line is an even share, {_percent(1 / layer.experts)}. Busiest: expert {busy} with "
    words += f"{_percent(layer.load[busy])}; idlest: expert {idle} with {_percent(layer.load[idle])}."
    names = [str(expert) for expert in range(layer.experts)]
    drawn = _bars(f"load-{at}", f"Load of experts, {layer.name}", words, percent, names, "expert", " %",
                  100 / layer.experts)  # fmt: skip
    return _figure("Load", "share of all choices", drawn, words)


def _confidence(at: int, layer: LayerSurvey) -> str:
    percent = 100 * layer.confidence / max(layer.confidence.sum(), 1)
    mean = layer.confidence_sum / max(layer.tokens, 1)
    used = np.flatnonzero(layer.first_choices)
    by_expert = layer.confidence_by_expert[used] / layer.first_choices[used]
    words = f"Mean {mean:.2f}; chance is {1 / layer.experts:.2g}."
    if len(used):
        high, low = int(by_expert.argmax()), int(by_expert.argmin())
        words += f" Of the tokens whose first choice it is, expert {used[high]} is surest, {by_expert[high]:.2f}, and "
        words += f"expert {used[low]} least sure, {by_expert[low]:.2f}."
    title, axis = f"Confidence, {layer.name}", "largest gate probability, from"
    drawn = _bars(f"confidence-{at}", title, words, percent, [f"{b / BINS:g}" for b in range(BINS)], axis, " %")
    return _figure("Confidence", "share of tokens", drawn, words)


def _classes(at: int, layer: LayerSurvey, classes: tuple[str, ...]) -> str:
    order, experts = arrange(layer.by_class)
    bands = banded(order, MAX_BANDS)
    if not bands:
        return ""
    part = 100 * shares(layer.by_class.astype(np.float64))
    values = np.stack([part[band].mean(0) for band in bands])[:, experts]
    each = len(bands) == len(order)
    how = "a row is a class" if each else f"a row is the mean of {len(bands[-1])} or {len(bands[0])} classes"
    words = f"Order: {how}, beside those that favour the same expert; experts that share classes are neighbours."
    heat = Heat(
        key=f"classes-{at}",
        title=f"Classes and experts, {layer.name}",
        words=words,
        values=values,
        top=float(values.max()),
        unit=" %",
        rows=[classes[band[0]] if each else named(classes, band.tolist()) for band in bands],
        columns=[str(expert) for expert in experts],
        row_axis="class" if each else "classes",
        column_axis="expert",
        named=each,
    )
    return _figure("Classes", "share of a class’s choices by expert", draw(heat, tall=330), words, heat=heat)


def _places(at: int, layer: LayerSurvey) -> str:
    part = 100 * shares(_pooled(layer.by_place).astype(np.float64))
    busiest = np.sort(np.argsort(-layer.load, kind="stable")[:MAX_PLACES])
    top = float(np.nanmax(part[..., busiest], initial=0.0))
    minis = []
    for expert in busiest.tolist():
        values = part[..., expert]
        label = f"expert {expert}"
        heat = Heat.of_places(
            key=f"places-{at}-{expert}",
            title=f"Places of {label}, {layer.name}",
            words=f"from {np.nanmin(values, initial=100.0):.3g} % to {np.nanmax(values, initial=0.0):.3g} %",
            values=values,
            top=top,
            unit=" %",
        )
        share = _percent(layer.load[expert])
        minis.append(f"<div><b>{escape(label)} <span>{escape(share)}</span></b>{small(heat)}</div>")
    rest = layer.experts - len(busiest)
    words = "The picture is the image, top row first; one scale for all. Beside each name its share of all choices."
    words += f" The {rest} least used experts are left out." if rest else ""
    words += f" Places are pooled to {part.shape[0]} × {part.shape[1]}." if part.shape != layer.by_place.shape else ""
    caption = f"<h3>Places</h3><span>share of a place’s choices by expert</span>{scale(top, ' %')}"
    wide = ' class="wide"' if len(busiest) > 8 or layer.dropped.any() else ""
    return (
        f'<figure{wide}><figcaption>{caption}</figcaption><div class="minis">{"".join(minis)}</div>'
        f"<p>{escape(words)}</p></figure>"
    )


def _pooled(by_place: np.ndarray) -> np.ndarray:
    """Counts (H, W, E) added up in equal squares, the least that leave at most `MAX_SIDE` rows and columns."""
    size = -(-max(by_place.shape[:2]) // MAX_SIDE)
    rows, columns = (np.arange(0, length, size) for length in by_place.shape[:2])
    return np.add.reduceat(np.add.reduceat(by_place, rows, axis=0), columns, axis=1)


def _dropped(at: int, layer: LayerSurvey) -> str:
    if not layer.dropped.any():
        return ""
    percent = 100 * layer.dropped / max(layer.tokens * layer.top_k / layer.dropped.size, 1)
    row, column = np.unravel_index(int(percent.argmax()), percent.shape)
    words = f"Most, {percent.max():.3g} %, at row {row}, column {column}."
    heat = Heat.of_places(
        key=f"dropped-{at}",
        title=f"Dropped choices by place, {layer.name}",
        words=words,
        values=percent,
        top=float(percent.max()),
        unit=" %",
    )
    return _figure("Dropped", "share of a place’s choices", draw(heat, tall=330, square=True), words, heat=heat)


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %" if share == 0 or share >= 1e-4 else "under 0.01 %"


def _favourites(layer: LayerSurvey, classes: tuple[str, ...]) -> str:
    """The classes that use each expert most, as a table that can be folded away."""
    seen = layer.by_class.sum(1)
    least = int(np.median(seen[seen > 0]) / 4) if (seen > 0).any() else 1
    rows = [
        [
            str(expert),
            _percent(layer.load[expert]),
            ", ".join(f"{classes[label].split(',')[0]} ({100 * share:.0f} %)" for label, share in best),
        ]
        for expert, best in enumerate(top_classes(layer.by_class, TOP_CLASSES, least))
    ]
    opened = " open" if layer.experts <= 16 else ""
    made = table(
        ["expert", "load", "classes that use it most, and the share of their choices"], rows, numeric=(1,), key=True
    )
    return f'<details class="more"{opened}><summary>Classes by expert</summary>{made}</details>'
