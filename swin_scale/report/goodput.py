"""What became of a run's wall time: its figures side by side, and a bar for every bucket of the ledger."""

from __future__ import annotations

from swin_scale.goodput import Goodput, lines
from swin_scale.report.document import facts
from swin_scale.report.svg import WIDTH, escape

LEFT, RIGHT, LANE, TOP = 132, 340, 22, 6
_COLOURS = {"compute": 3, "lost": 2, "restore": 2, "queue": 2, "down": 2, "unattributed": 4}
"""Of the style sheet: what was wanted, what was lost, what nobody can tell; the first for all else."""
_NOTE = (
    "Goodput is the share of the wall time in which steps were computed that count; with their waits for data and "
    "their recording it is the share of steps that count. Time is measured on rank 0; the wall time includes queues "
    "and breaks between lives."
)


def goodput_section(found: Goodput | None) -> str:
    """Figures and bars of a ledger; empty without one."""
    if found is None or found.wall_s <= 0:
        return ""
    shown: list[tuple[str, str, str]] = [
        ("Goodput", f"{100 * found.goodput:.1f} %", f"of {length(found.wall_s)}"),
        ("Steps that count", f"{100 * found.ettr:.1f} %", "effective training time ratio"),
        ("Lives", f"{found.lives:,}", f"a failure every {length(found.mtbf_s)}" if found.mtbf_s is not None else ""),
    ]
    if found.lost_steps:
        shown.append(("Steps done again", f"{found.lost_steps:,}", length(found.seconds["lost"])))
    if found.stall_s is not None:
        shown.append(("Stall of a save", length(found.stall_s), f"mean of {found.saves:,}"))
    if found.paused_s:
        shown.append(("Paused", length(found.paused_s), "ended as wanted, started again later"))
    untold = found.seconds["unattributed"]
    shown.append(("Unattributed", f"{100 * untold / found.wall_s:.2f} %", length(untold)))
    caption = "<figcaption><h3>Wall time</h3><span>of all lives, and between them</span></figcaption>"
    return (
        f'<h2>Goodput</h2><p class="note">{escape(_NOTE)}</p>{facts(shown)}'
        f'<div class="pictures part"><figure>{caption}{bars(found)}</figure></div>'
    )


def bars(found: Goodput) -> str:
    """A horizontal bar for every bucket that is not empty, its share and its length in words behind it."""
    rows = [(words, key, seconds) for words, key, seconds in lines(found) if seconds / found.wall_s >= 1e-5]
    longest = max((seconds for _, _, seconds in rows), default=1.0)
    body = []
    for at, (words, key, seconds) in enumerate(rows):
        middle = TOP + LANE * at + LANE / 2
        end = LEFT + max(1.0, (RIGHT - LEFT) * seconds / longest)
        share = f"{100 * seconds / found.wall_s:.1f} %, {length(seconds)}"
        body.append(f'<text class="lane" x="{LEFT - 8}" y="{middle + 4:g}">{escape(words)}</text>')
        path = f"M{LEFT} {middle - 7:g}H{end:.1f}v14H{LEFT}z"
        body.append(f'<g class="c{_COLOURS.get(key, 1)}"><path class="bar" d="{path}"/></g>')
        body.append(f'<text x="{end + 6:.1f}" y="{middle + 4:g}">{escape(share)}</text>')
    words = "; ".join(f"{name}: {100 * seconds / found.wall_s:.1f} %, {length(seconds)}" for name, _, seconds in rows)
    return (
        f'<svg id="p-goodput" viewBox="0 0 {WIDTH} {TOP + LANE * len(rows) + 4}" role="img" '
        f'aria-labelledby="t-goodput d-goodput"><title id="t-goodput">Wall time</title>'
        f'<desc id="d-goodput">{escape(words, 2000)}</desc>{"".join(body)}</svg>'
    )


def length(seconds: float) -> str:
    """``0.41 s``, ``12 s``, ``3 min 20 s``, ``2 h 5 min`` or ``3 d 4 h``."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"
