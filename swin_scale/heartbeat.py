"""A rank's sign of life, in two places: memory it shares with its watchdog, and a file of the run directory.

`Pulse` writes the first on every change of section, in about a microsecond and without a file system: an anonymous file
that both processes map. The watchdog (`launcher/watchdog.py`) reads it with `read_beat`, and every few seconds writes
what it saw, for everybody, to ``heartbeat/rank{r}.json``: one `Status`.

Times are of the monotonic clock, which all processes of a machine share, and which stands still while it is suspended.
"""

from __future__ import annotations

import dataclasses
import json
import mmap
import os
import struct
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from swin_scale.files import anonymous_file, write_atomic
from swin_scale.sections import Section, Sections

SIZE = mmap.PAGESIZE
"""Bytes of the shared memory."""
WARM_UP = 5
"""Stretches of a section that say nothing of how long it takes: kernels are compiled and caches filled."""
MAX_STATUS_BYTES = 1 << 16
# Section (0: none), since when, steps done, changes so far, stretches of this section, the longest one, ended.
_BODY = struct.Struct("=BdqQQd?")
_CHECK = struct.Struct("=I")
_SECTIONS: tuple[Section | None, ...] = (None, *Section)
_NUMBERS = {section: number for number, section in enumerate(_SECTIONS)}


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What a rank is doing. A stretch is the time from one change of section to the next."""

    section: Section | None
    """None between sections."""
    since: float
    """Monotonic seconds at which this stretch began."""
    step: int
    """Steps done."""
    count: int
    """Changes so far: ranks do the same in the same order, so the one with fewer is behind."""
    stretches: int
    """Of this section, ended before this one began."""
    longest_s: float
    """The longest of them, the first `WARM_UP` left out."""
    ended: bool
    """The rank has said goodbye: from here on it may end as it likes."""


class Pulse:
    """Writes this process's beats; made where `sections` are, and told by them."""

    def __init__(self, descriptor: int, sections: Sections, *, clock: Callable[[], float] = time.monotonic) -> None:
        """`descriptor`: of a file of at least `SIZE` bytes."""
        self._memory = mmap.mmap(descriptor, SIZE)
        self._sections, self._clock = sections, clock
        self._number = _NUMBERS[sections.current]
        self._since = clock()
        self._count = 0
        self._stretches = [0] * len(_SECTIONS)
        self._longest = [0.0] * len(_SECTIONS)
        self._ended = False
        self._write()
        sections.listen(self._turn)

    def goodbye(self) -> None:
        """Nothing that this process does from here on is watched."""
        self._ended = True
        self._write()

    def _turn(self, section: Section | None) -> None:
        now, last = self._clock(), self._number
        self._stretches[last] += 1
        if self._stretches[last] > WARM_UP and now - self._since > self._longest[last]:
            self._longest[last] = now - self._since
        self._number, self._since = _NUMBERS[section], now
        self._count += 1
        self._write()

    def _write(self) -> None:
        number = self._number
        body = _BODY.pack(
            number, self._since, self._sections.step, self._count, self._stretches[number], self._longest[number],
            self._ended,
        )  # fmt: skip
        # One copy; a reader that meets it half done sees that the sum does not fit.
        self._memory[: _BODY.size + _CHECK.size] = body + _CHECK.pack(zlib.crc32(body))


def heartbeat_memory() -> int:
    """Descriptor of new memory for a `Pulse` and its readers."""
    descriptor = anonymous_file("swin_scale.heartbeat")
    os.ftruncate(descriptor, SIZE)
    return descriptor


def read_beat(memory: mmap.mmap) -> Beat | None:
    """The newest beat; None when none could be read: the process was stopped while it wrote, or has not yet begun."""
    for _ in range(10):
        raw = memory[: _BODY.size + _CHECK.size]
        body = raw[: _BODY.size]
        if (zlib.crc32(body),) == _CHECK.unpack(raw[_BODY.size :]):
            number, since, step, count, stretches, longest, ended = _BODY.unpack(body)
            if number >= len(_SECTIONS):
                return None
            return Beat(
                section=_SECTIONS[number],
                since=since,
                step=step,
                count=count,
                stretches=stretches,
                longest_s=longest,
                ended=ended,
            )
    return None


@dataclass(frozen=True, kw_only=True)
class Status:
    """What ``heartbeat/rank{r}.json`` says of a rank."""

    life: str
    """Of the run: every start of its ranks is another one."""
    rank: int
    host: str
    pid: int
    step: int
    """Steps done."""
    section: str | None
    since: float
    """Seconds since 1970 at which this stretch of the section began, by the clock of `host`."""
    time: float
    """Seconds since 1970 at which this was written; older than `STALE_S` means that nobody writes it any more."""
    ended: bool
    """The rank has said goodbye, or is gone."""


STALE_S = 60.0


def directory(run_dir: Path) -> Path:
    return run_dir / "heartbeat"


def life_file(run_dir: Path) -> Path:
    """Names the life of the run whose processes may write into its directory."""
    return directory(run_dir) / "life"


def begin_life(run_dir: Path, life: str) -> None:
    """Rank 0 alone, before the others start: signs of earlier lives go. Raises OSError."""
    directory(run_dir).mkdir(exist_ok=True)
    for leftover in directory(run_dir).iterdir():
        leftover.unlink(missing_ok=True)
    write_atomic(life_file(run_dir), life.encode())


def write_status(run_dir: Path, status: Status) -> None:
    """Replace the rank's file; raises OSError."""
    text = json.dumps(dataclasses.asdict(status))
    write_atomic(directory(run_dir) / f"rank{status.rank}.json", text.encode(), durable=False)


def read_statuses(run_dir: Path, life: str | None = None) -> dict[int, Status]:
    """What the ranks' files say, by rank; of one `life`, by default the present one. Unreadable ones are left out."""
    if life is None:
        try:
            life = life_file(run_dir).read_text(encoding="utf-8")
        except (OSError, UnicodeError):
            return {}
    found = [status for path in directory(run_dir).glob("rank*.json") if (status := _read_status(path)) is not None]
    return {status.rank: status for status in sorted(found, key=lambda status: status.rank) if status.life == life}


def _read_status(path: Path) -> Status | None:
    try:
        if path.stat().st_size > MAX_STATUS_BYTES:
            return None
        status = Status(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    kinds = {"life": str, "rank": int, "host": str, "pid": int, "step": int, "ended": bool}
    sound = all(type(getattr(status, name)) is kind for name, kind in kinds.items())
    numbers = all(isinstance(value, int | float) for value in (status.since, status.time))
    return status if sound and numbers and isinstance(status.section, str | None) else None
