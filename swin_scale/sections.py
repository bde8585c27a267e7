"""What this process is doing right now, and how long it has done each thing: one clock for ledger, heartbeat, report.

Sections nest, and time belongs to the innermost one, so that their sums never count a second twice. Outside of all of
them it is set-up's before the steps, closing's after them, and nobody's in between: that the ledger shows as
unattributed, and it is meant to stay small.
"""

from __future__ import annotations

import contextlib
import enum
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass


class Section(enum.Enum):
    """What a rank does; the value is its name in files."""

    SET_UP = "set_up"
    DATA = "data"
    SYNC = "sync"
    """The sums over ranks that begin and end a step's forward pass: waiting for those who are later."""
    FORWARD = "forward"
    BACKWARD = "backward"
    ALL_TO_ALL = "all_to_all"
    OPTIMIZER = "optimizer"
    RECORD = "record"
    CHECKPOINT = "checkpoint"
    EVALUATION = "evaluation"
    RESTORE = "restore"
    CLOSE = "close"


Listener = Callable[["Section | None"], None]
"""Is told the section that has just begun, or begun again, on every change; None outside of all."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """All of a clock at one moment."""

    age_s: float
    """Since the clock's beginning: the sum of `seconds`, and of what belongs to no section."""
    current: Section | None
    seconds: Mapping[Section, float]
    """Of every section, that of the open one up to now included."""


class Sections:
    """Times sections of one thread; `with sections(Section.DATA): ...`. Any thread may read it."""

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        began: float | None = None,
        outside: Section | None = None,
    ) -> None:
        """Start timing.

        Args:
            clock: seconds, never going back.
            began: reading of `clock` from which on time counts, such as the process's start; None: now.
            outside: whose time it is that belongs to no section, until `bare`.
        """
        self._clock = clock
        self._open: list[Section] = []
        self._outside = outside
        self._since = self._began = clock() if began is None else began
        self._seconds = dict.fromkeys(Section, 0.0)
        self._listeners: list[Listener] = []
        self.step = 0
        """Steps done, for those who listen; the loop that does them sets it."""
        # Held for arithmetic only, never while anything waits.
        self._lock = threading.Lock()

    @property
    def current(self) -> Section | None:
        """The innermost open section."""
        return self._open[-1] if self._open else self._outside

    def listen(self, listener: Listener) -> None:
        """Call `listener` on every change from now on; it must be fast and must not fail."""
        self._listeners.append(listener)

    @contextlib.contextmanager
    def bare(self, *, then: Section) -> Iterator[None]:
        """In the block, time outside of all sections is nobody's; after it, `then`'s."""
        self._cover(None)
        try:
            yield
        finally:
            self._cover(then)

    def read(self) -> Reading:
        """Age, current section and all sums at one moment."""
        with self._lock:
            now, current, seconds = self._clock(), self.current, dict(self._seconds)
            if current is not None:
                seconds[current] += now - self._since
        return Reading(age_s=now - self._began, current=current, seconds=seconds)

    def alive(self) -> None:
        """Something was done within a section that goes on, such as one batch of an evaluation."""
        self._tell()

    def seconds(self) -> dict[Section, float]:
        """Seconds spent in each section so far, those of the open one up to now included."""
        return dict(self.read().seconds)

    @contextlib.contextmanager
    def __call__(self, section: Section) -> Iterator[None]:
        """Time spent in the block, and not in a section within it, is `section`'s."""
        with self._lock:
            self._turn()
            self._open.append(section)
        self._tell()
        try:
            yield
        finally:
            with self._lock:
                self._turn()
                self._open.pop()
            self._tell()

    def _cover(self, section: Section | None) -> None:
        with self._lock:
            self._turn()
            self._outside = section
        self._tell()

    def _turn(self) -> None:
        now, current = self._clock(), self.current
        if current is not None:
            self._seconds[current] += now - self._since
        self._since = now

    def _tell(self) -> None:
        for listener in self._listeners:
            listener(self.current)


def process_began() -> float:
    """Reading of `time.monotonic` at which this process started, imports and all ahead; where /proc does not tell: now.

    Exact to a clock tick, a hundredth of a second.
    """
    now = time.monotonic()
    try:
        with open("/proc/self/stat", encoding="utf-8", errors="replace") as file:
            # The command's name may hold anything, parentheses too: fields are counted from its last one.
            ticks = int(file.read().rpartition(")")[2].split()[19])
        started = ticks / os.sysconf("SC_CLK_TCK")
        return now - max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
    except (OSError, AttributeError, IndexError, ValueError):
        return now
