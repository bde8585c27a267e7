"""The result of `bench kernels` for people: a table, and a picture of the ratios."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from swin_scale.bench.measure import CONTROL
from swin_scale.report.curves import log_ticks, short
from swin_scale.report.svg import escape

_MODES = {"forward": "forward", "forward+backward": "both"}

_STYLE = """
:root{color-scheme:light dark}
svg{--ground:#fff;--ink:#1b2330;--soft:#5b6675;--rule:#dde2e9;--c1:#0072b2;--c2:#d55e00;--c3:#00805e;--c4:#a8488a}
@media (prefers-color-scheme:dark){svg{--ground:#10151c;--ink:#e6ebf2;--soft:#9aa7b8;--rule:#2c3744;
--c1:#56b4e9;--c2:#ff9a56;--c3:#35cba0;--c4:#e79ac8}}
text{font:11px system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif;fill:var(--soft)}
.ground{fill:var(--ground)}.head{font-size:15px;font-weight:600;fill:var(--ink)}
.shape{font-weight:600;fill:var(--ink)}.name{text-anchor:end}.tick{text-anchor:middle}
.grid{stroke:var(--rule);fill:none}.one{stroke:var(--soft);fill:none}.span{stroke:var(--ink);fill:none}
.c1{fill:var(--c1)}.c2{fill:var(--c2)}.c3{fill:var(--c3)}.c4{fill:var(--c4)}
"""
"""Colours as those of the reports (Okabe and Ito)."""

_WIDTH, _NAMES, _PANEL, _GAP, _BAR, _HEAD, _TOP = 960, 104, 340, 72, 14, 22, 76


def table(figures: Mapping[str, Any]) -> str:
    """One line per code, shape, mode and way of launching; what is wanted; then memory, and who is missing and why."""
    settings, machine = figures["settings"], figures["hardware"]
    where = machine["gpu"]["name"] if machine["gpu"] else f"{machine['cpu']}, {machine['threads']} threads"
    lines = [f"window attention  batch {settings['batch']}  {where}"]
    lines += [f"({settings['note']})"] if settings["note"] else []
    lines += [_ceilings(dtype, rates) for dtype, rates in figures["ceilings"].items()]
    lines.append(
        f"{'':<18}{'code':<15}{'ms':>9}{'ours is':>10}  95 % interval     "
        f"{'GB/s':>6}{'memory':>8}{'softmax':>8}  wanted           error"
    )
    for case in figures["cases"]:
        lines += _case(case)
    for op in figures["ops"]:
        lines += _op(op)
    lines += [f"left out, no time: {name}" for name in figures["left_out"]]
    if 2 * settings["rounds"] < 40:
        lines.append(f"not a claim: {2 * settings['rounds']} pairs, 40 are needed (--rounds 20)")
    return "\n".join(lines)


def _ceilings(dtype: str, rates: Mapping[str, Any]) -> str:
    words = [f"copy {rates['copy_bytes_per_s'] / 1e9:.0f} GB/s", f"matmul {rates['matmul_flops'] / 1e12:.2f} TFLOP/s"]
    words += [f"exp {rates['exp_per_s'] / 1e9:.0f} G/s"] if rates["exp_per_s"] else []
    return f"this machine, {dtype}: {', '.join(words)}"


def _case(case: Mapping[str, Any]) -> Iterator[str]:
    shape = case["shape"]
    yield (
        f"{case['title']}, {case['dtype']}: {shape['hw'][0]} x {shape['hw'][1]} tokens, {shape['dim']} channels, "
        f"{shape['heads']} heads, windows of {shape['tokens']}; ours {case['ours']}"
    )
    if "failed" in case:
        yield f"  NOT TIMED, ours is wrong: {case['failed']}"
    for launch, modes in case.get("launches", {}).items():
        for mode, measured in modes.items():
            for name in measured["seconds"]:
                errors = case["gate"].get(name, case["gate"]["ours"])
                error = errors["output"] if mode == "forward" else max(errors.values())
                yield f"{_line(_MODES[mode] + ', ' + launch, name, measured)}{error:.1e}"
    memory = case.get("memory")
    if memory:
        peaks = ", ".join(f"{name} {peak / 1e6:.0f}" for name, peak in memory["bytes"].items())
        bar = f" (wanted: at most {memory['at_most']:.3f})" if memory["at_most"] else ""
        share = f"; ours is {memory['share']:.3f} of official-amp{bar}" if memory["share"] else ""
        yield f"  peak MB above the inputs: {peaks}{share}"
    yield from (f"  missing: {name}: {reason}" for name, reason in case["missing"].items())


def _op(op: Mapping[str, Any]) -> Iterator[str]:
    yield f"{op['title']}, {op['dtype']}: {op['what']}"
    if "failed" in op:
        yield f"  NOT TIMED, ours is wrong: {op['failed']}"
    for launch, modes in op.get("launches", {}).items():
        for mode, measured in modes.items():
            for name in measured["seconds"]:
                errors = op["gate"].get(name, op["gate"]["ours"])
                yield f"{_line(_MODES[mode] + ', ' + launch, name, measured)}{max(errors.values()):.1e}"
    yield from (f"  missing: {name}: {reason}" for name, reason in op["missing"].items())


def _line(where: str, name: str, measured: Mapping[str, Any]) -> str:
    achieved, ratio = measured["achieved"][name], measured["ratios"].get(name)
    found = f"{ratio['median']:>8.3f}x  {ratio['lower']:.3f} to {ratio['upper']:.3f}" if ratio else ""
    parts = [
        f"{achieved['of_floor'][kind]:.0%}" if kind in achieved["of_floor"] else "" for kind in ("memory", "softmax")
    ]
    bar = measured["bars"].get(name)
    wanted = f"{bar['at_least']:.3g} {'reached' if bar['reached'] else 'NOT reached'}" if bar else ""
    return (
        f"  {where:<16}{name:<15}{measured['seconds'][name]['median'] * 1e3:>9.4f}  {found:<26} "
        f"{achieved['bytes_per_s'] / 1e9:>6.0f}{parts[0]:>8}{parts[1]:>8}  {wanted:<17}"
    )


# -- the picture -------------------------------------------------------------------------------------------------------


def picture(figures: Mapping[str, Any]) -> str:
    """Ratios as bars on a logarithmic axis, a panel for each mode, a group for each shape and op; an SVG of its own.

    To the right of the line at 1 ours is faster. The thin line over a bar's end is its 95 % interval. Of the ways of
    launching, the last one measured is drawn: graphs, where there are any.
    """
    groups = [group for group in map(_group, [*figures["cases"], *figures["ops"]]) if group is not None]
    low, high = _range(groups)
    heights = [_HEAD + _BAR * len(names) for _, names, _ in groups]
    height = _TOP + sum(heights) + 30
    body = [f'<rect class="ground" width="{_WIDTH}" height="{height}"/>']
    gpu = figures["hardware"]["gpu"]
    where = gpu["name"] if gpu else f"{figures['hardware']['cpu']}, {figures['hardware']['threads']} threads"
    body.append('<text class="head" x="16" y="22">How many times as fast ours is</text>')
    what = f"{where}, batch {figures['settings']['batch']}"
    body.append(f'<text x="16" y="40">{escape(what)}</text>')
    for panel, mode in enumerate(_MODES):
        left = 16 + _NAMES + panel * (_PANEL + _GAP + 16)
        scale = _Scale(low, high, left)
        body.append(f'<text class="shape" x="{left}" y="{_TOP - 14}">{escape(mode)}</text>')
        for tick in scale.ticks():
            x = scale(tick)
            body.append(f'<path class="{"one" if tick == 1 else "grid"}" d="M{x:.1f} {_TOP - 6}V{height - 26}"/>')
            body.append(f'<text class="tick" x="{x:.1f}" y="{height - 10}">{escape(short(tick))}</text>')
        top = float(_TOP)
        for (title, names, by_mode), taken in zip(groups, heights):
            if panel == 0:
                body.append(f'<text class="shape" x="16" y="{top + 12:g}">{escape(title)}</text>')
            body += _bars(by_mode.get(mode, {}), names, scale, top + _HEAD - 4, left if panel == 0 else None)
            top += taken
    words = "Ratios of seconds, peer to ours; above 1 ours is faster. The table beside this file has all figures."
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" aria-labelledby="t d">'
        f'<title id="t">Kernels against their peers</title><desc id="d">{escape(words)}</desc>'
        f"<style>{_STYLE}</style>{''.join(body)}</svg>\n"
    )


class _Scale:
    """Ratios to places of a panel that begins at `left`."""

    def __init__(self, low: float, high: float, left: float) -> None:
        self.low, self.high, self.left = low, high, left

    def __call__(self, ratio: float) -> float:
        return self.left + _PANEL * math.log(ratio / self.low) / math.log(self.high / self.low)

    def ticks(self) -> list[float]:
        return sorted({1.0, *log_ticks(self.low, self.high)})


def _group(case: Mapping[str, Any]) -> tuple[str, list[str], dict[str, Any]] | None:
    """Title, the codes of any mode, and mode -> code -> ratio; None where nothing was timed."""
    if not case.get("launches"):
        return None
    modes = {mode: measured["ratios"] for mode, measured in list(case["launches"].values())[-1].items()}
    names = list(dict.fromkeys(name for ratios in modes.values() for name in ratios if name != CONTROL))
    return f"{case['title']}, {case['dtype']}", names, modes


def _range(groups: list[tuple[str, list[str], dict[str, Any]]]) -> tuple[float, float]:
    ends = [
        ratio[end]
        for _, names, modes in groups
        for ratios in modes.values()
        for name, ratio in ratios.items()
        if name in names
        for end in ("lower", "upper")
    ]
    return min([0.8, *ends]) * 0.95, max([2.0, *ends]) * 1.05


def _bars(
    ratios: Mapping[str, Any], names: list[str], scale: _Scale, top: float, labels_at: float | None
) -> Iterator[str]:
    for i, name in enumerate(names):
        middle = top + _BAR * (i + 0.5)
        if labels_at is not None:
            yield f'<text class="name" x="{labels_at - 8:g}" y="{middle + 4:g}">{escape(name)}</text>'
        ratio = ratios.get(name)
        if ratio is None:
            continue
        one, end = scale(1.0), scale(ratio["median"])
        told = f"{name}: {ratio['median']:.3g} ({ratio['lower']:.3g} to {ratio['upper']:.3g})"
        yield (
            f'<rect class="c{1 + i % 4}" x="{min(one, end):.1f}" y="{middle - 5:g}" width="{abs(end - one):.1f}" '
            f'height="10"><title>{escape(told)}</title></rect>'
        )
        yield f'<path class="span" d="M{scale(ratio["lower"]):.1f} {middle:g}H{scale(ratio["upper"]):.1f}"/>'
        beside = max(scale(ratio["upper"]), one) + 5
        told = f"{ratio['median']:.2f}" if ratio["median"] < 10 else f"{ratio['median']:.1f}"
        yield f'<text x="{beside:.1f}" y="{middle + 4:g}">{told}</text>'
