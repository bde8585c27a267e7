"""The receipt of a load or a conversion: what became of every key of both sides."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Line:
    """One key: its name in the source (None when created), in the target (None when dropped), and why."""

    source: str | None
    target: str | None
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Every key accounted for: copied + converted + dropped = the source's keys, copied + converted + created = the
    target's keys. ``str(report)`` is a readable receipt."""

    source: str
    target: str
    copied: tuple[Line, ...] = ()
    """Same values; the name may differ."""
    converted: tuple[Line, ...] = ()
    """Values changed on purpose: resized, mapped, cast."""
    dropped: tuple[Line, ...] = ()
    created: tuple[Line, ...] = ()
    notes: tuple[str, ...] = ()

    def check(self, source_keys: Iterable[str], target_keys: Iterable[str]) -> None:
        """Assert that the four lists account for every key of both sides exactly once."""
        taken = Counter(line.source for line in (*self.copied, *self.converted, *self.dropped))
        given = Counter(line.target for line in (*self.copied, *self.converted, *self.created))
        assert taken == Counter(list(source_keys)), "the report misses or repeats keys of the source"
        assert given == Counter(list(target_keys)), "the report misses or repeats keys of the target"

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
