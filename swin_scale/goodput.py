"""The ledger of a run, read: how much of the wall time of all its lives went into what, and what came of it.

``goodput.jsonl`` of the run directory is written by rank 0 (`swin_scale.ledger`); one life is one process. Its rows:

- first ``{"life", "start", "ranks", "job", "restart"}``: `start` in seconds since 1970;
- then ``{"life", "age", "time", "in", "s", "step"}``: seconds since the start by a clock that never jumps, the wall
  clock, the section that is open, the seconds of all sections so far, and the steps that are done (absent before the
  first); with `saving` where a checkpoint is about to be written, with `stall` once it cost so many seconds;
- at last the same with `end`, the exit code, and `stopped` where somebody asked for it.

Sums come from rows of one life by its own clock. The wall clock only tells the time between two lives. Sections are
timed one by one, so what they leave of the wall is found, not assumed: it is called unattributed.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from launcher import chain
from swin_scale.errors import EXIT_PREEMPTED, UserError
from swin_scale.log import iter_jsonl
from swin_scale.run_dir import read_stages
from swin_scale.sections import Section

LEDGER_NAME = "goodput.jsonl"
BUCKETS: Mapping[str, str] = {
    "compute": "compute",
    "data_wait": "data wait",
    "sync": "waiting for ranks",
    "recording": "recording",
    "save_stall": "saving",
    "evaluation": "evaluation",
    "lost": "steps done again",
    "restore": "going back",
    "set_up": "set-up",
    "closing": "closing",
    "queue": "in the queue",
    "down": "down between lives",
    "unattributed": "unattributed",
}
"""Key -> words. Together they are the wall time."""
OF_SECTION: Mapping[str, str] = {
    Section.SET_UP.value: "set_up",
    Section.DATA.value: "data_wait",
    Section.SYNC.value: "sync",
    Section.FORWARD.value: "compute",
    Section.BACKWARD.value: "compute",
    Section.ALL_TO_ALL.value: "compute",
    Section.OPTIMIZER.value: "compute",
    Section.RECORD.value: "recording",
    Section.CHECKPOINT.value: "save_stall",
    Section.EVALUATION.value: "evaluation",
    Section.RESTORE.value: "restore",
    Section.CLOSE.value: "closing",
}
STEPPING = ("compute", "data_wait", "sync", "recording")
"""What a step is made of: lost with it when it is done again."""
RECENT_STALLS = 5
INTERRUPTED = 130
"""Exit code after Ctrl-C."""
_INTENDED = (0, 2, EXIT_PREEMPTED, INTERRUPTED)
_SHORTEST_S, _LONGEST_S, _SHARE = 0.1, 60.0, 0.005


def row_interval_s(age_s: float) -> float:
    """Seconds between two rows of a life: few enough for months, and what a kill leaves untold stays a small share."""
    return min(max(_SHORTEST_S, _SHARE * age_s), _LONGEST_S)


@dataclass(frozen=True, kw_only=True)
class Goodput:
    """What became of the wall time of a run, all its lives and the time between them."""

    wall_s: float
    """From the first submission or start to the last row; without the time after an end that was wanted."""
    seconds: Mapping[str, float]
    """Of every bucket of `BUCKETS`; their sum is `wall_s`."""
    lives: int
    failures: int
    """Lives that nobody meant to end when they did."""
    uptime_s: float
    """Sum over the lives."""
    lost_steps: int
    saves: int
    stall_s: float | None
    """Mean over saves of what one stopped the run for; None before the first."""
    recent_stall_s: float | None
    """Median of the last `RECENT_STALLS`."""
    start_s: float
    """Queue and set-up ahead of the first step of all, which come once."""
    paused_s: float
    """After an end that was wanted, until somebody started the run again: no part of the wall time."""

    @property
    def goodput(self) -> float:
        """Share of the wall time in which steps were computed that count, 0 to 1."""
        return self.seconds["compute"] / self.wall_s if self.wall_s > 0 else 0.0

    @property
    def ettr(self) -> float:
        """Effective training time ratio, 0 to 1: the whole time of steps that count, waiting for data and recording
        included, over wall time, queues included (Kokolis et al., HPCA 2025)."""
        return self._kept_s / self.wall_s if self.wall_s > 0 else 0.0

    @property
    def pace(self) -> float:
        """The same without what comes once, ahead of the first step: what to expect of the time that is left."""
        rest = self.wall_s - self.start_s
        return self._kept_s / rest if rest > 0 else 0.0

    @property
    def mtbf_s(self) -> float | None:
        """Mean time between failures, in seconds of running; None without one."""
        return self.uptime_s / self.failures if self.failures else None

    @property
    def _kept_s(self) -> float:
        return sum(self.seconds[name] for name in STEPPING)

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON."""
        return {
            "goodput": self.goodput,
            "ettr": self.ettr,
            "wall_s": self.wall_s,
            "seconds": dict(self.seconds),
            "lives": self.lives,
            "failures": self.failures,
            "mtbf_s": self.mtbf_s,
            "lost_steps": self.lost_steps,
            "saves": self.saves,
            "stall_s": self.stall_s,
            "paused_s": self.paused_s,
        }


@dataclass
class _Life:
    name: str
    start: float
    time: float
    """Wall clock of the last row."""
    age: float = 0.0
    sections: Mapping[str, float] = field(default_factory=dict)
    """Seconds of each, up to the last row."""
    code: int | None = None
    """Of an end that was recorded."""
    over: bool = False
    """By its own or somebody's will, not to be followed by another life."""


class Book:
    """Adds up the rows of a ledger, in the order in which they were written."""

    def __init__(self, queued: Sequence[tuple[float, float]] = ()) -> None:
        """`queued`: when a job of the run waited, (from, to) in seconds since 1970."""
        self._queued = queued
        self._total = dict.fromkeys(BUCKETS, 0.0)
        self._life: _Life | None = None
        self._names: set[str] = set()
        # The time of steps since the marks at which a run may be put back: [first step, last step, seconds by name].
        self._kept: list[tuple[int, int, dict[str, float]]] = []
        self._position: int | None = None
        self._marked = True
        self._wall = self._uptime = self._paused = self._start = 0.0
        self._failures = self._lost_steps = self._saves = 0
        self._stall = 0.0
        self._stalls: deque[float] = deque(maxlen=RECENT_STALLS)
        self._stepping = self._resuming = False

    def next_stage(self) -> None:
        """The rows that follow are of the stage after, whose steps count from 0 again."""
        self._kept, self._position, self._marked = [], None, True
        if self._life is not None:
            self._life.over = False

    def add(self, row: Mapping[str, Any]) -> None:
        """Take in one row; what is no row of a ledger is left out."""
        name, start = row.get("life"), row.get("start")
        if not isinstance(name, str):
            return
        if _is_number(start):
            self._begin(_Life(name=name, start=float(start), time=float(start)))
            return
        age, time, sections = row.get("age"), row.get("time"), row.get("s")
        if not (_is_number(age) and _is_number(time) and isinstance(sections, dict)):
            return
        if self._life is None or self._life.name != name:  # its first row is lost
            if name in self._names:
                return  # of a process that was replaced, and woke up once more
            self._begin(_Life(name=name, start=float(time) - float(age), time=float(time) - float(age)))
        life = self._life
        assert life is not None
        step = row.get("step")
        seconds = {str(key): float(value) for key, value in sections.items() if _is_number(value)}
        self._advance(life, float(age), seconds, step if isinstance(step, int) and step >= 0 else None)
        life.time = float(time)
        if row.get("saving"):
            self._marked = True
        if _is_number(row.get("stall")):
            self._saves += 1
            self._stall += float(row["stall"])
            self._stalls.append(float(row["stall"]))
        if isinstance(row.get("end"), int):
            life.code = row["end"]
            life.over = life.code == 0 or bool(row.get("stopped"))

    def figures(self, until: float | None = None) -> Goodput | None:
        """All that the rows amount to; None where there is none.

        `until`: a moment, in seconds since 1970, up to which the run is known to be down or to wait.
        """
        life = self._life
        if life is None:
            return None
        total, wall = dict(self._total), self._wall
        if until is not None:
            self._down(total, life, gap := max(0.0, until - life.time), until)
            wall += gap
        ended_badly = life.code is not None and life.code not in _INTENDED
        return Goodput(
            wall_s=wall,
            seconds=total,
            lives=len(self._names),
            failures=self._failures + ended_badly,
            uptime_s=self._uptime,
            lost_steps=self._lost_steps,
            saves=self._saves,
            stall_s=self._stall / self._saves if self._saves else None,
            recent_stall_s=sorted(self._stalls)[len(self._stalls) // 2] if self._stalls else None,
            start_s=self._start,
            paused_s=self._paused,
        )

    def _begin(self, life: _Life) -> None:
        """Account for the time between the life before and this one."""
        before, self._life = self._life, life
        self._resuming = True
        self._names.add(life.name)
        if before is None:
            waited = sum(max(0.0, min(end, life.start) - begin) for begin, end in self._queued)
            self._total["queue"] += waited
            self._wall += waited
            self._start += waited
            return
        if before.name == life.name:  # one process, its next stage
            before.code = before.code or 0
        elif before.code is None or before.code not in _INTENDED:
            self._failures += 1
        gap = _gap(before, life)
        if before.over:
            self._paused += gap
            return
        self._down(self._total, before, gap, life.start)
        self._wall += gap

    def _down(self, total: dict[str, float], before: _Life, gap: float, end: float) -> None:
        """Put the `gap` seconds up to `end` to `total`.

        A process that was killed lived on after its last row, though no longer than until the next one was due. How
        long, and for what, nobody knows.
        """
        untold = min(gap, row_interval_s(before.age)) if before.code is None else 0.0
        begin = end - (gap - untold)
        queued = sum(max(0.0, min(to, end) - max(since, begin)) for since, to in self._queued)
        total["unattributed"] += untold
        total["queue"] += min(queued, gap - untold)
        total["down"] += gap - untold - min(queued, gap - untold)

    def _advance(self, life: _Life, age: float, sections: Mapping[str, float], step: int | None) -> None:
        """From the row before of the same life to this one."""
        spent = dict.fromkeys(BUCKETS, 0.0)
        for name, seconds in sections.items():
            if name in OF_SECTION:
                spent[OF_SECTION[name]] += max(0.0, seconds - life.sections.get(name, 0.0))
        passed = max(0.0, age - life.age)
        spent["unattributed"] = passed - sum(spent.values())
        for name, seconds in spent.items():
            self._total[name] += seconds
        self._wall += passed
        self._uptime += passed
        life.age = max(life.age, age)
        life.sections = {**life.sections, **{k: max(v, life.sections.get(k, 0.0)) for k, v in sections.items()}}
        position = self._position
        if not self._stepping:
            self._start += spent["set_up"]
            self._stepping = step is not None
        begin = position if position is not None else step or 0
        end = max(begin, step if step is not None else begin)
        share = {name: spent[name] for name in STEPPING}
        if self._marked or not self._kept:
            self._kept.append((begin, end, share))
            self._marked = False
        else:
            first, _, so_far = self._kept[-1]
            self._kept[-1] = (first, end, {name: so_far[name] + share[name] for name in STEPPING})
        if step is not None:
            self._position = step
            if position is not None and (self._resuming or step < position):
                self._go_back(position, step)
            self._resuming = False

    def _go_back(self, position: int, step: int) -> None:
        """Steps after `step` are done again: their time is lost, and that of one that was not finished."""
        self._lost_steps += max(0, position - step)
        while self._kept and max(self._kept[-1][0] + 1, self._kept[-1][1]) > step:
            first, last, share = self._kept.pop()
            # A part where no checkpoint marked the step; steps take about the same time.
            part = 1.0 if first >= step else (last - step) / (last - first)
            for name, spent in share.items():
                self._total[name] -= part * spent
                self._total["lost"] += part * spent
            if first < step:
                self._kept.append((first, step, {name: (1 - part) * spent for name, spent in share.items()}))
                break
        self._marked = True


def _gap(before: _Life, after: _Life) -> float:
    """Seconds from the last row of a life to the start of the next, by the wall clock.

    It may have been set meanwhile, or be another machine's: of the two readings that the life before left, the one that
    makes more sense counts, and there is no negative time.
    """
    gaps = (after.start - before.time, after.start - before.start - before.age)
    return min((gap for gap in gaps if gap >= 0), default=0.0)


def read(run_dir: Path, *, until: float | None = None) -> Goodput | None:
    """The figures of a run, or of all stages of one in stages; None where there is no ledger.

    `until`: see `Book.figures`. Raises OSError for a file that cannot be read.
    """
    return read_book(run_dir).figures(until)


def read_book(run_dir: Path) -> Book:
    """The ledger of a run, of all its stages if it has some, ready to be carried on."""
    book = Book(queued_times(chain.read_chain(run_dir)))
    try:
        stages = read_stages(run_dir)
    except UserError:
        stages = []
    for at, directory in enumerate(stages or [run_dir]):
        if at:
            book.next_stage()
        for row in iter_jsonl(directory / LEDGER_NAME):
            book.add(row)
    return book


def queued_times(rows: Iterable[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """When a job of a chain (rows of ``jobs.jsonl``) waited to be started, (from, to) in seconds since 1970."""
    found: list[tuple[float, float]] = []
    since: float | None = None
    for row in rows:
        moment = row.get("time")
        if not _is_number(moment):
            continue
        if row["event"] == "started":
            if since is not None:
                found.append((since, float(moment)))
            since = None
        elif row["event"] == "submitted" or (row["event"] == "ended" and row.get("action") == "again"):
            since = float(moment) if since is None else since
        elif row["event"] == "ended":
            since = None  # what was to follow is cancelled
    return found if since is None else [*found, (since, math.inf)]


def lines(figures: Goodput) -> list[tuple[str, str, float]]:
    """(words, key, seconds) of the buckets that are not empty, in their order."""
    return [(words, key, figures.seconds[key]) for key, words in BUCKETS.items() if figures.seconds[key] > 0]


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
