"""Any source under official names: foreign layouts are recognised by their keys and put through their table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from swin_scale.convert import experts
from swin_scale.convert.layouts import recognise
from swin_scale.convert.report import Line, Report
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
    files: Weights
    """What `weights` are made of."""

    @property
    def keys(self) -> list[str]:
        """Every key of every file."""
        if not self.files.steps:
            return list(self.files.tensors)
        return [*dict.fromkeys(key for step in self.files.steps for key in step.sources), *self.files.left_out]

    def account(self, report: Report) -> Report:
        """`report`, which starts at the keys of `weights`, from `keys` on."""
        return self.from_files(report.before(self.steps, self.dropped))

    def from_files(self, report: Report) -> Report:
        """`report`, which starts at the keys of `files.tensors`, from `keys` on."""
        lines = [Line(key, None, reason) for key, reason in self.files.left_out.items()]
        return report.before(self.files.steps, lines)


def as_official(weights: Weights) -> View:
    """`weights` under official names; still read on demand. Keys that nothing explains keep their names."""
    plain = {key.removeprefix("module."): key for key in weights.tensors}
    found = recognise(plain)
    if found is None:
        return _official(weights)
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
        files=weights,
    )


def _official(weights: Weights) -> View:
    """Official names; experts get their present shapes."""
    clues = _clues(weights, {key: key for key in weights.tensors})
    if weights.steps or not any(map(experts.match, weights.tensors)):
        return View(weights=weights, layout="official", steps=(), dropped=(), clues=clues, files=weights)
    steps, left_out = experts.one_file_steps(weights)
    view = Renamed(weights, steps)
    dropped = [Line(key, None, reason) for key, reason in left_out.items()]
    clues = {key: clues[key] if clues[key].shape == tensor.shape else tensor for key, tensor in view.tensors.items()}
    return View(weights=view, layout="official", steps=steps, dropped=dropped, clues=clues, files=weights)


def _clues(weights: Weights, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Official name -> tensor; `names` are those of `weights`."""
    is_read = ".blocks.0.attn.relative_coords_table"  # the blocks of a stage share one
    found = {}
    for name, key in names.items():
        small = weights.tensors[key].numel() < 1 << 20
        found[name] = weights.read(key) if name.endswith(is_read) and small else weights.tensors[key]
    return found
