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
        """The report of what this one reports, followed by `steps`.

        Where several keys were joined to one that is now split, each goes to the targets at its place in their order:
        parts of 32 ranks cut for 64 are 64 lines, not 2,048.
        """
        step_of = {source: step for step in steps for source in step.sources}
        total, seen = Counter(line.target for line in (*self.copied, *self.converted, *self.created)), Counter[str]()

        def change(line: Line) -> tuple[list[Line], bool]:
            name = line.target or ""
            seen[name] += 1
            return _to(line, step_of.get(name), seen[name] - 1, total[line.target])

        return self._through(change, ())

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


def _to(line: Line, step: Step | None, place: int, total: int) -> tuple[list[Line], bool]:
    """`line`, one of `total` with its target, with the targets of `step` at its place; and whether values change."""
    if step is None:
        return [line], False
    reason, count = _joined(line.reason, step.reason), max(total, len(step.targets))
    targets = [step.targets[i * len(step.targets) // count] for i in range(count) if i * total // count == place]
    return [Line(line.source, target, reason) for target in targets], step.change is not None


def _joined(*reasons: str) -> str:
    return ", ".join(dict.fromkeys(reason for reason in reasons if reason))


def _grouped(lines: Sequence[Line], most: int = 3) -> list[str]:
    """One row per reason, with the first few keys: 48 position tables resized alike are one fact, not 48."""
    groups: dict[str, dict[str, None]] = {}
    for line in lines:
        groups.setdefault(line.reason, {})[line.target or line.source or ""] = None
    rows = []
    for reason, names in groups.items():
        keys = list(names)
        more = f" and {len(keys) - most} more" if len(keys) > most else ""
        rows.append(f"{', '.join(keys[:most])}{more}: {reason}" if reason else f"{', '.join(keys[:most])}{more}")
    return rows
