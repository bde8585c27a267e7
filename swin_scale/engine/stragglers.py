"""Which rank makes the others wait: every rank's own seconds per section, compared every so many steps.

In a synchronous step all ranks take equally long, since all wait for the slowest. So the whole step tells nothing; what
tells is work that a rank does before it meets the others: waiting for its data, and the forward pass up to the sum over
ranks that ends it (`Section.SYNC`). A slow rank has more of it, and waits less than the others. Backward and optimizer
end in sums over ranks too and are shown, not judged; a machine that is slow there is slow in its forward pass as well.

Where a forward pass exchanges tensors (parameters under ZeRO-3, tokens where experts are spread over ranks), it hides
its own waiting: a slow rank is then found by its data alone under ZeRO-3, and together with the ranks that it shares
experts with. That misses some and accuses nobody wrongly.

    HostPace, DevicePace (this rank's seconds, per step) -> StragglerWatch.report (one small gather, every so many
        steps) -> find_slow (rank 0) -> an event ``stragglers``, and ``slow_rank`` for whoever was slow `PATIENCE` times

On a GPU the host runs ahead and its seconds say little: there each change of section leaves an event on the device's
stream, and sections are timed by the device's own clock.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from swin_scale.engine.dist import Dist
from swin_scale.sections import Section, Sections

logger = logging.getLogger(__name__)

WORK = (Section.DATA, Section.FORWARD)
"""What a rank does by itself, before it meets others; these are judged."""
WAIT = (Section.SYNC, Section.ALL_TO_ALL)
"""Where it waits for those that have longer work."""
SHOWN = (
    Section.DATA, Section.SYNC, Section.FORWARD, Section.BACKWARD, Section.ALL_TO_ALL, Section.OPTIMIZER,
    Section.RECORD,
)  # fmt: skip
"""What a step is made of."""
TRIM = 0.1
"""Share of the longest steps that are left out of a mean: single hiccups make no straggler."""
PATIENCE = 2
"""Reports in a row in which a rank must be slow."""
TINY_S = 1e-4
"""Seconds below which the usual time of a section is too short to form a ratio with."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """From when on a rank is slow."""

    factor: float
    """Times the median over ranks."""
    share: float
    """Of a step, that it costs all the others."""


LIMITS: Mapping[str, Limits] = {
    # GPUs repeat to a few percent; cores are shared, with other jobs and with loaders.
    "cuda": Limits(factor=1.15, share=0.05),
    "cpu": Limits(factor=1.5, share=0.2),
}


@dataclass(frozen=True, kw_only=True)
class Slow:
    """One rank that is slow in one section."""

    rank: int
    host: str
    section: Section
    seconds: float
    """Of a step."""
    usual: float
    """The median over ranks, the lower one where there are two."""
    lost: float
    """Share of a step that all others wait for it."""

    @property
    def ratio(self) -> float:
        """Times the usual."""
        return self.seconds / max(self.usual, TINY_S)

    def row(self) -> dict[str, Any]:
        """As an event."""
        return {
            "rank": self.rank,
            "host": self.host,
            "section": self.section.value,
            "ratio": round(self.ratio, 3),
            "seconds": round(self.seconds, 6),
            "usual": round(self.usual, 6),
            "lost": round(self.lost, 4),
        }

    def __str__(self) -> str:
        return (
            f"rank {self.rank} on {self.host} is slow in {self.section.value}: {self.seconds:.4g} s of each step, "
            f"{self.ratio:.1f} times the median over ranks; all wait {100 * self.lost:.0f} % of a step for it"
        )


def find_slow(seconds: np.ndarray, hosts: Sequence[str], limits: Limits) -> list[Slow]:
    """The ranks that make others wait, the worst first; up to half of all ranks can be found.

    Args:
        seconds: (ranks, len(SHOWN)) of a step.
        hosts: of each rank.
    """
    ranks = len(seconds)
    step = float(np.median(seconds.sum(1)))
    waits = seconds[:, [SHOWN.index(section) for section in WAIT]].sum(1)
    others_wait = np.sort(waits)[ranks // 2]
    found = []
    for section in WORK:
        own = seconds[:, SHOWN.index(section)]
        usual = float(np.sort(own)[(ranks - 1) // 2])
        excess = own - usual
        slow = (own > limits.factor * usual) & (excess > limits.share * step)
        # Whoever is late at nobody's cost, as a rank that looks for its data while others still write, waits as well.
        slow &= others_wait - waits > excess / 2
        found += [
            Slow(
                rank=rank,
                host=hosts[rank],
                section=section,
                seconds=float(own[rank]),
                usual=usual,
                lost=float(excess[rank] / step),
            )
            for rank in np.flatnonzero(slow).tolist()
        ]
    return sorted(found, key=lambda slow: -slow.lost)


class Event(Protocol):
    """A mark on a device's stream, as `torch.cuda.Event`."""

    def record(self) -> None: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, end_event: Any, /) -> float: ...


class HostPace:
    """Seconds of each section between one `step` and the next, by the host's clock."""

    def __init__(self, sections: Sections) -> None:
        self._sections = sections
        self._steps: list[list[float]] = []
        self._last = self._now()

    def step(self) -> None:
        """A step has been done."""
        now = self._now()
        self._steps.append([after - before for after, before in zip(now, self._last)])
        self._last = now

    def take(self) -> np.ndarray:
        """(steps, len(SHOWN)) seconds since it was last asked."""
        steps, self._steps = self._steps, []
        return np.array(steps, np.float64).reshape(-1, len(SHOWN))

    def restart(self) -> None:
        """Forget what was not taken; the next step begins now."""
        self._steps, self._last = [], self._now()

    def _now(self) -> list[float]:
        seconds = self._sections.seconds()
        return [seconds[section] for section in SHOWN]


class DevicePace:
    """The same by a device's clock: what the device did, or waited for, in each section."""

    def __init__(self, sections: Sections, new_event: Callable[[], Event]) -> None:
        """`new_event`: makes an event that can be timed."""
        self._new_event = new_event
        self._free: list[Event] = []
        self._marks: list[tuple[Section | None, Event]] = []
        """Each section that began, and an event at its beginning."""
        self._ends: list[int] = []
        """The marks at which steps ended."""
        self._sections = sections
        sections.listen(self._mark)

    def step(self) -> None:
        """A step has been done."""
        self._mark(self._sections.current, always=True)
        self._ends.append(len(self._marks) - 1)

    def take(self) -> np.ndarray:
        """(steps, len(SHOWN)) seconds since it was last asked; waits for the device."""
        rows = np.zeros((len(self._ends), len(SHOWN)))
        if self._ends:
            self._marks[self._ends[-1]][1].synchronize()
        first = 0
        for row, end in zip(rows, self._ends):
            for (section, begin), (_, after) in zip(self._marks[first:end], self._marks[first + 1 : end + 1]):
                if section in SHOWN:
                    row[SHOWN.index(section)] += begin.elapsed_time(after) / 1e3
            first = end
        self._forget(first)
        return rows

    def restart(self) -> None:
        """Forget what was not taken; the next step begins now."""
        self._mark(self._sections.current, always=True)
        self._forget(len(self._marks) - 1)

    def _forget(self, before: int) -> None:
        self._free += [event for _, event in self._marks[:before]]
        self._marks, self._ends = self._marks[before:], []

    def _mark(self, section: Section | None, *, always: bool = False) -> None:
        # A section that says that it goes on is no change: a long evaluation leaves one mark.
        if always or not self._marks or self._marks[-1][0] is not section:
            event = self._free.pop() if self._free else self._new_event()
            event.record()
            self._marks.append((section, event))


@dataclass(frozen=True, kw_only=True)
class Report:
    """What rank 0 found in one comparison."""

    fields: dict[str, Any]
    """Of the event ``stragglers``."""
    begun: list[Slow] = field(default_factory=list)
    """Who is found to be slow for the first time since it was not."""


class StragglerWatch:
    """Compares the ranks every so many steps. Every method is called by all ranks together."""

    def __init__(self, sections: Sections, dist: Dist, *, every: int) -> None:
        """`every`: steps; 0 compares never, as one rank alone does."""
        self._dist, self._every = dist, every if dist.world > 1 else 0
        self._limits = LIMITS[dist.device.type]
        self._counts: dict[tuple[int, Section], int] = {}
        self._hosts: list[str] = []
        self._steps = 0
        self._pace: HostPace | DevicePace | None = None
        if self._every:
            self._hosts = dist.gather_json("hosts", socket.gethostname()) or []
            timed = dist.device.type == "cuda"
            self._pace = DevicePace(sections, _cuda_event) if timed else HostPace(sections)

    def step(self) -> None:
        """A step has been done."""
        if self._pace is not None:
            self._pace.step()
            self._steps += 1

    def restart(self) -> None:
        """What happened since the last step is not a step's."""
        if self._pace is not None:
            self._pace.restart()
            self._steps = 0

    def report(self) -> Report | None:
        """Compare, if it is time; only rank 0 learns what was found."""
        if self._pace is None or self._steps < self._every:
            return None
        steps, self._steps = self._steps, 0
        means = self._dist.all_gather_floats(trimmed_mean(self._pace.take()).tolist())
        return self._judge(np.array(means), steps) if self._dist.is_main else None

    def _judge(self, means: np.ndarray, steps: int) -> Report:
        slow = find_slow(means, self._hosts, self._limits)
        before, self._counts = self._counts, {}
        for s in slow:
            self._counts[s.rank, s.section] = before.get((s.rank, s.section), 0) + 1
        for (rank, section), count in before.items():
            if count >= PATIENCE and (rank, section) not in self._counts:
                logger.info("rank %d on %s is no longer slow in %s", rank, self._hosts[rank], section.value)
        begun = [s for s in slow if self._counts[s.rank, s.section] == PATIENCE]
        rows = [s.row() for s in slow if self._counts[s.rank, s.section] >= PATIENCE]
        fields = {"steps": steps, "lost": max((row["lost"] for row in rows), default=0.0), "slow": rows}
        return Report(fields={**fields, **summary(means, self._hosts)}, begun=begun)


def trimmed_mean(steps: np.ndarray) -> np.ndarray:
    """(columns,) mean over (steps, columns), in each column without the largest `TRIM` of its values."""
    kept = max(1, len(steps) - int(np.ceil(TRIM * len(steps))))
    mean: np.ndarray = np.sort(steps, axis=0)[:kept].mean(0)
    return mean


def summary(means: np.ndarray, hosts: Sequence[str]) -> dict[str, Any]:
    """Seconds of a step by section, over ranks and by host, as an event has it.

    Args:
        means: (ranks, len(SHOWN)).
        hosts: of each rank.
    """
    used = [i for i, section in enumerate(SHOWN) if means[:, i].any()]
    sections = {
        SHOWN[i].value: {
            "min": round(float(means[:, i].min()), 6),
            "median": round(float(np.median(means[:, i])), 6),
            "max": round(float(means[:, i].max()), 6),
            "slowest": int(means[:, i].argmax()),
        }
        for i in used
    }
    by_host = {}
    for host in dict.fromkeys(hosts):
        here = means[[i for i, other in enumerate(hosts) if other == host]]
        by_host[host] = {SHOWN[i].value: round(float(np.median(here[:, i])), 6) for i in used}
    return {"sections": sections, "hosts": by_host}


def _cuda_event() -> Event:
    event: Event = torch.cuda.Event(enable_timing=True)
    return event
