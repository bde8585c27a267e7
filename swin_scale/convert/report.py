"""The receipt of a load or a conversion: what became of every key of both sides."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from swin_scale.convert.weights import Step


@dataclass(frozen=True)
class Line:
    """One key: its name in the source (None when created), in the target (None when dropped), and why."""

    source: str | None
    target: str | None
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Every key accounted for: copied + converted + dropped = the source's keys, copied + converted + created = the
    target's keys. Where tensors are joined or split, a key is in several lines of `converted`, one for each of its
    parts. ``str(report)`` is a readable receipt."""

    source: str
    target: str
    copied: tuple[Line, ...] = ()
    """Same values; the name may differ."""
    converted: tuple[Line, ...] = ()
    """Values changed on purpose: resized, mapped, cast, joined, split."""
    dropped: tuple[Line, ...] = ()
    created: tuple[Line, ...] = ()
    notes: tuple[str, ...] = ()

    def check(self, source_keys: Iterable[str], target_keys: Iterable[str]) -> None:
        """Assert that the four lists account for every key of both sides, and only joined or split ones repeatedly."""
        taken = Counter(line.source for line in (*self.copied, *self.dropped))
        given = Counter(line.target for line in (*self.copied, *self.created))
        taken.update({line.source for line in self.converted})
        given.update({line.target for line in self.converted})
        assert taken == Counter(list(source_keys)), "the report misses or repeats keys of the source"
        assert given == Counter(list(target_keys)), "the report misses or repeats keys of the target"

    def before(self, steps: Iterable[Step], dropped: Iterable[Line] = ()) -> Report:
        """The report of `steps` (and what they left out) followed by what this one reports."""
        step_of = {target: step for step in steps for target in step.targets}
        return self._through(lambda line: _from(line, step_of.get(line.source or "")), dropped)

    def after(self, steps: Iterable[Step]) -> Report:
        """The report of what this one reports, followed by `steps`."""
        step_of = {source: step for step in steps for source in step.sources}
        return self._through(lambda line: _to(line, step_of.get(line.target or "")), ())

    def _through(self, change: Callable[[Line], tuple[list[Line], bool]], dropped: Iterable[Line]) -> Report:
        lists: dict[str, dict[Line, None]] = {name: {} for name in ("copied", "converted", "dropped", "created")}
        lists["dropped"].update(dict.fromkeys(dropped))
        for name in lists:
            for line in getattr(self, name):
                lines, changed = change(line)
                lists["converted" if changed and name == "copied" else name].update(dict.fromkeys(lines))
        copied, converted, dropped, created = (tuple(lines) for lines in lists.values())
        return dataclasses.replace(self, copied=copied, converted=converted, dropped=dropped, created=created)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        counts = ", ".join(
            f"{len(lines)} {what}"
            for what, lines in (
                ("copied", self.copied),
                ("converted", self.converted),
                ("dropped", self.dropped),
                ("created", self.created),
            )
        )
        text = [f"{self.source} -> {self.target}: {counts}"]
        for what, lines in (("converted", self.converted), ("dropped", self.dropped), ("created", self.created)):
            text += [f"  {what} {row}" for row in _grouped(lines)]
        text += [f"  note: {note}" for note in self.notes]
        return "\n".join(text)


def _from(line: Line, step: Step | None) -> tuple[list[Line], bool]:
    """`line` with the sources of `step` in place of its source, and whether values change."""
    if step is None:
        return [line], False
    reason = _joined(step.reason, line.reason)
    return [Line(source, line.target, reason) for source in step.sources], step.change is not None


def _to(line: Line, step: Step | None) -> tuple[list[Line], bool]:
    """`line` with the targets of `step` in place of its target, and whether values change."""
    if step is None:
        return [line], False
    reason = _joined(line.reason, step.reason)
    return [Line(line.source, target, reason) for target in step.targets], step.change is not None


def _joined(*reasons: str) -> str:
    return ", ".join(dict.fromkeys(reason for reason in reasons if reason))


def _grouped(lines: Sequence[Line], most: int = 3) -> list[str]:
    """One row per reason, with the first few keys: 48 position tables resized alike are one fact, not 48."""
    groups: dict[str, list[str]] = {}
    for line in lines:
        groups.setdefault(line.reason, []).append(line.target or line.source or "")
    rows = []
    for reason, keys in groups.items():
        more = f" and {len(keys) - most} more" if len(keys) > most else ""
        rows.append(f"{', '.join(keys[:most])}{more}: {reason}" if reason else f"{', '.join(keys[:most])}{more}")
    return rows
