"""A run's page: head and summary, pictures, tables, most wanted first. Words from a file go through `escape`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from swin_scale.log import Row
from swin_scale.report.curves import Span, short
from swin_scale.report.document import Cells, date, document, facts, table
from swin_scale.report.goodput import goodput_section
from swin_scale.report.history import LISTED_SKIPS, History, number
from swin_scale.report.pictures import event_name, is_remarkable, lanes, pictures
from swin_scale.report.reconstructions import reconstructions
from swin_scale.report.routing import routing_section
from swin_scale.report.svg import CELLS, draw, escape, figure
from swin_scale.report.svg import lanes as draw_lanes

ENDS: Mapping[int, tuple[str, str]] = {
    0: ("good", "finished"),
    2: ("bad", "stopped: wrong input"),
    3: ("bad", "stopped: data"),
    4: ("bad", "stopped: checkpoint"),
    5: ("bad", "stopped: diverged"),
    6: ("wait", "stopped: a peer was lost"),
    75: ("wait", "preempted and saved"),
}
"""Exit code -> (class of the style sheet, words)."""

LISTED_EVENTS = 200
LISTED_SHARDS = 50

_NUMBERS = ("step", "top-1, %", "top-5, %", "loss", "samples", "unusable samples")


def page(history: History, written: float) -> str:
    """The whole document; `written` is the time it shows, in seconds since the epoch."""
    sections = [
        _head(history),
        summary(history),
        _pictures(history),
        reconstructions(history.directory),
        _routing(history),
        _evaluations(history),
        goodput_section(history.goodput),
        _skips(history),
        _events(history),
        _config(history),
        _environment(history),
    ]
    foot = f"Written {date(written)} from the files in the run directory."
    return document(f"{_name(history)}: run report", sections, foot)


def _name(history: History) -> str:
    return history.directory.resolve().name or "run"


def badge(history: History) -> str:
    """How the run ended, in its colour."""
    code = history.exit.get("code") if history.exit else None
    kind, words = ENDS.get(code, ("bad", "stopped: error")) if isinstance(code, int) else ("wait", "no end recorded")
    text = f"{words} (exit {code})" if isinstance(code, int) else f"{words}: still running, or killed"
    return f'<span class="badge {kind}">{escape(text)}</span>'


def _head(history: History) -> str:
    end = history.exit
    code = end.get("code") if end else None
    model = {key: value for key, value, _ in history.config}.get("model.name", "").strip('"')
    head = f"<header><h1>{escape(_name(history))}</h1>{badge(history)}"
    head += f"<p>{escape(' · '.join(part for part in (model, str(history.directory.resolve())) if part))}</p></header>"
    if end and code != 0 and end.get("cause"):
        head += f'<p class="cause"><b>rank {escape(end.get("rank"))}</b>: {escape(end["cause"], 4000)}</p>'
    return head


def summary(history: History) -> str:
    """The figures of a run side by side."""
    columns, steps = history.columns, history.steps
    found: list[tuple[str, str, str]] = []
    if len(steps):
        samples = columns["samples"][np.isfinite(columns["samples"])]
        again = f"{history.repeated:,} done again after a resume" if history.repeated else ""
        found.append(("Steps", f"{int(steps[-1]):,}", again))
        if len(samples):
            found.append(("Images seen", short(float(samples[-1])), ""))
        seconds = columns["step_s"][np.isfinite(columns["step_s"])]
        found.append(("Training time", _duration(float(seconds.sum())), _wall(history)))
        rates = columns["images_per_s"][np.isfinite(columns["images_per_s"])]
        if len(rates):
            found.append(("Images/s, median", short(float(np.median(rates))), f"mean {short(float(rates.mean()))}"))
        waited = columns["data_wait_s"][np.isfinite(columns["data_wait_s"])]
        if len(waited) and seconds.sum() > 0:
            found.append(("Waiting for data", f"{100 * waited.sum() / seconds.sum():.1f} %", "of the training time"))
        losses = np.flatnonzero(np.isfinite(columns["loss"]))
        if len(losses):
            found.append(("Last loss", short(float(columns["loss"][losses[-1]])), ""))
    best = max(history.named("eval"), key=lambda row: number(row.get("top1", -1)), default=None)
    if best is not None and number(best.get("top1")) == number(best.get("top1")):
        what = f"{'' if best.get('weights', 'master') == 'master' else best.get('weights')} at step {best['step']:,}"
        found.append(("Best top-1", f"{number(best.get('top1')):.2f} %", what.strip()))
    saved = [int(name.removeprefix("step_")) for name in history.checkpoints]
    found.append(("Last checkpoint", f"step {saved[-1]:,}" if saved else "none", f"{len(saved)} kept" if saved else ""))
    found.append(("Skipped samples", f"{history.skips.count:,}", ""))
    updates = int((columns["skipped"] == 1).sum())
    if updates:
        found.append(("Skipped updates", f"{updates:,}", "non-finite gradients"))
    resumes = [row for row in history.named("start") if row["step"] > 0]
    if resumes:
        found.append(("Resumes", str(len(resumes)), ""))
    return facts(found)


def _wall(history: History) -> str:
    """From the first start to the last thing recorded, breaks between runs included."""
    if not history.named("start"):
        return ""
    times = [number(row.get("time")) for row in (*history.events, history.exit or {})]
    times = [moment for moment in times if moment == moment]
    return f"{_duration(max(times) - min(times))} on the wall" if len(times) > 1 else ""


def _pictures(history: History) -> str:
    drawn, marks = pictures(history), [row for row in history.events if is_remarkable(row)]
    happened, span = lanes(history), _span(history)
    if span is None:
        return '<h2>Pictures</h2><p class="note">No step was recorded.</p>'
    figures = [figure(picture, draw(picture, span, marks)) for picture in drawn]
    if happened:
        caption = "<h3>Events</h3><span>one tick each</span>"
        figures.append(f"<figure><figcaption>{caption}</figcaption>{draw_lanes(happened, span)}</figure>")
    notes = []
    if any(one.kind == "curve" for picture in drawn for one in picture.series):
        notes.append("Strong lines are smoothed; the pale ones behind them hold every value of every step.")
    if marks:
        kinds = sorted({event_name(row) for row in marks})
        notes.append(f"Dashed upright lines: {', '.join(kinds)}.")
    note = f'<p class="note">{escape(" ".join(notes))}</p>' if notes else ""
    return f'<h2>Pictures</h2>{note}<div class="pictures">{"".join(figures)}</div>'


def _span(history: History) -> Span | None:
    """From the first step that anything is known of to the last."""
    places = [history.steps, *(steps for _, steps in lanes(history))]
    every = np.concatenate([p for p in places if len(p)] or [np.zeros(0, dtype=np.int64)])
    every = every[every > 0]
    return Span(first=int(every.min()), last=int(every.max()), most=CELLS) if len(every) else None


def _routing(history: History) -> str:
    span = _span(history)
    if span is None:
        return ""
    return routing_section(history, span, [row for row in history.events if is_remarkable(row)])


def _evaluations(history: History) -> str:
    rows = history.named("eval")
    keys = [key for key in ("top1", "top5", "loss", "samples", "unusable") if any(key in row for row in rows)]
    cells = [
        [f"{row['step']:,}", row.get("weights", "master"), *(short(number(row.get(key))) for key in keys)]
        for row in rows[-LISTED_EVENTS:]
    ]
    more = len(rows) - len(cells)
    names = {"top1": "top-1, %", "top5": "top-5, %", "unusable": "unusable samples"}
    note = f"The last {len(cells)} of {len(rows):,}." if more else ""
    return _section("Evaluations", ["step", "weights", *(names.get(k, k) for k in keys)], cells, note=note)


def _skips(history: History) -> str:
    skips = history.skips
    if not skips.count:
        return ""
    by_shard = table(["shard", "reason", "samples"], skips.by_shard[:LISTED_SHARDS], numeric=(2,))
    first = table(
        ["step", "shard", "key", "reason"],
        [[row.get(key) for key in ("step", "shard", "key", "reason")] for row in skips.first],
        numeric=(0,),
    )
    rest = len(skips.by_shard) - LISTED_SHARDS
    note = f'<p class="note">and {rest:,} more pairs of shard and reason</p>' if rest > 0 else ""
    listed = "All of them" if skips.count <= LISTED_SKIPS else f"The first {LISTED_SKIPS}"
    return (
        f'<h2>Skipped samples</h2>{by_shard}{note}<details class="more"><summary>{listed}</summary>{first}'
        '<p class="note">All are in <code>skipped.jsonl</code>.</p></details>'
    )


def _events(history: History) -> str:
    rows = [row for row in history.events if row["event"] != "eval"]
    shown = rows[-LISTED_EVENTS:]
    cells = []
    for row in shown:
        fields = {k: v for k, v in row.items() if k not in ("event", "step", "time", "environment")}
        moment = number(row.get("time"))
        cells.append([f"{row['step']:,}", event_name(row), date(moment) if moment == moment else "", _fields(fields)])
    note = f"The last {len(shown)} of {len(rows):,}." if len(rows) > len(shown) else ""
    return _section("Events", ["step", "event", "when", "what"], cells, note=note)


def _config(history: History) -> str:
    if not history.config:
        return ""
    lines, section = [], None
    for key, value, origin in history.config:
        head, _, name = key.rpartition(".")
        if head != section:
            lines.append(f'<tr class="head"><td colspan="3">{escape(head or "top level")}</td></tr>')
        section = head
        kind = ' class="default"' if origin == "default" else ""
        lines.append(
            f"<tr{kind}><td><code>{escape(name)}</code></td><td><code>{escape(value, 2000)}</code></td>"
            f'<td class="from">{escape(origin)}</td></tr>'
        )
    heads = "<thead><tr><th>key</th><th>value</th><th>from</th></tr></thead>"
    return (
        "<details open><summary>Configuration</summary>"
        f'<div class="table"><table>{heads}<tbody>{"".join(lines)}</tbody></table></div></details>'
    )


def _environment(history: History) -> str:
    """One column for each start that saw something else than the one before."""
    starts: list[tuple[Row, Mapping[str, Any]]] = []
    for row in history.named("start"):
        facts = row.get("environment")
        if isinstance(facts, dict) and (not starts or starts[-1][1] != facts):
            starts.append((row, facts))
    starts = starts[-6:]
    keys = list(dict.fromkeys(key for _, facts in starts for key in facts))
    cells = [[key, *(_plain(facts.get(key)) for _, facts in starts)] for key in keys]
    return _section("Environment", ["", *(f"from step {row['step']:,}" for row, _ in starts)], cells)


def _section(title: str, heads: Sequence[str], rows: Sequence[Cells], *, note: str = "") -> str:
    if not rows:
        return ""
    numeric = [at for at, head in enumerate(heads) if head in _NUMBERS]
    told = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<h2>{escape(title)}</h2>{told}{table(heads, rows, numeric=numeric)}"


def _fields(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {_plain(value)}" for key, value in fields.items() if value is not None)


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return short(value)
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h {minutes:02} min" if days else f"{hours}:{minutes:02}:{rest:02}"
