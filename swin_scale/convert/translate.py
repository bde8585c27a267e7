"""Any source under official names: foreign layouts are recognised by their keys and put through their table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from swin_scale.convert.layouts import recognise
from swin_scale.convert.report import Line
from swin_scale.convert.weights import Renamed, Step, Weights


@dataclass(frozen=True, kw_only=True)
class View:
    """Weights under official names, how they got there, and what tells their model."""

    weights: Weights
    layout: str
    """``official``, or the foreign format that was recognised."""
    steps: Sequence[Step]
    """From the source's keys; empty for official ones."""
    dropped: Sequence[Line]
    clues: Mapping[str, Tensor]
    """Official name -> shape on the meta device; the coordinate tables, whose values tell the window, are read."""


def as_official(weights: Weights) -> View:
    """`weights` under official names; still read on demand. Keys that nothing explains keep their names."""
    plain = {key.removeprefix("module."): key for key in weights.tensors}
    found = recognise(plain)
    if found is None:
        return View(
            weights=weights,
            layout="official",
            steps=(),
            dropped=(),
            clues=_clues(weights, {k: k for k in weights.tensors}),
        )
    name, layout = found
    steps, dropped = layout.inbound(plain)
    steps = [Step(tuple(plain[key] for key in s.sources), s.targets, s.change, s.reason) for s in steps]
    view = Renamed(weights, steps)
    tables = {official: plain[key] for key in plain if (official := layout.official_name(key)) is not None}
    return View(
        weights=view,
        layout=name,
        steps=steps,
        dropped=[Line(plain[line.source or ""], None, line.reason) for line in dropped],
        clues={**view.tensors, **_clues(weights, tables)},
    )


def _clues(weights: Weights, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Official name -> tensor; `names` are those of `weights`."""
    is_read = ".blocks.0.attn.relative_coords_table"  # the blocks of a stage share one
    found = {}
    for name, key in names.items():
        small = weights.tensors[key].numel() < 1 << 20
        found[name] = weights.read(key) if name.endswith(is_read) and small else weights.tensors[key]
    return found
