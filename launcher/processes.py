"""Other processes of this machine: whether they live, what they wait for, and their end.

Facts come from /proc; where there is none (macOS) only life and death are known.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

MAX_THREADS = 64
"""Threads of a process that are listed."""


def output_of(argv: Sequence[str], timeout_s: float) -> str:
    """What a command prints, on both streams; raises OSError, and TimeoutError for one that takes longer.

    That one is killed and not waited for, as `subprocess.run` would: nobody can end what waits for a dead driver.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as out:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            raise TimeoutError(f"{' '.join(argv)} gave no answer within {timeout_s:g} s") from None
        out.seek(0)
        return out.read()


class Process:
    """A process that may be gone, never mistaken for one that got its number later."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._start = start_time(pid)
        self._descriptor: int | None = None
        with contextlib.suppress(OSError):
            self._descriptor = os.pidfd_open(pid) if hasattr(os, "pidfd_open") else None

    def is_alive(self) -> bool:
        if self._start is not None:
            return start_time(self.pid) == self._start
        if Path("/proc/self").exists():
            return False  # it was gone before it was looked at
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def wait(self, seconds: float) -> bool:
        """Whether it ended within `seconds`."""
        if self._descriptor is None:
            time.sleep(seconds)
        else:
            select.select([self._descriptor], [], [], seconds)
        return not self.is_alive()

    def signal(self, number: int) -> None:
        """Send it a signal, if it lives."""
        if self.is_alive():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once, and its descendants, stopped ones too."""
        descendants = [Process(pid) for pid in children(self.pid)]
        for process in (self, *descendants):
            process.signal(signal.SIGKILL)


def start_time(pid: int) -> int | None:
    """Start of a living process in clock ticks since boot; None when there is none (a zombie is dead)."""
    fields = _stat(pid)
    return int(fields[19]) if len(fields) > 19 and fields[0] not in "ZX" else None


def state(pid: int) -> str:
    """The letter by which ps(1) shows what a process does: T is stopped, D waits for a device; empty: it is gone."""
    fields = _stat(pid)
    return fields[0] if fields else ""


def children(pid: int) -> list[int]:
    """Processes below `pid`, at any depth."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        fields = _stat(int(entry.name))
        if len(fields) > 1:
            parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found: list[int] = []
    waiting = [pid]
    while waiting:
        below = parents.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def holding(pid: int, number: int) -> frozenset[str]:
    """Threads of a process that have a signal pending or blocked, as one has that is in its handler."""
    found = set()
    for thread in _threads(pid):
        for line in _text(f"/proc/{pid}/task/{thread}/status").splitlines():
            if line.startswith(("SigPnd:", "ShdPnd:", "SigBlk:")) and int(line.split()[1], 16) >> (number - 1) & 1:
                found.add(thread)
    return frozenset(found)


def describe(pid: int) -> str:
    """What /proc says of a process, a line each: command, state, memory, threads, and where the kernel holds them."""
    command = _text(f"/proc/{pid}/cmdline").replace("\0", " ").strip()
    lines = [f"process {pid}: {command[:300] or 'gone, or not to be seen'}"]
    wanted = ("State:", "PPid:", "VmRSS:", "Threads:", "SigPnd:", "ShdPnd:", "SigBlk:", "SigIgn:", "SigCgt:")
    status = _text(f"/proc/{pid}/status").splitlines()
    lines += [f"  {' '.join(line.split())}" for line in status if line.startswith(wanted)]
    threads = _threads(pid)
    for thread in threads[:MAX_THREADS]:
        about = f"/proc/{pid}/task/{thread}"
        fields = _text(f"{about}/stat").rpartition(")")[2].split()
        name, place = _text(f"{about}/comm"), _text(f"{about}/wchan")
        lines.append(f"  thread {thread} {name}: state {fields[0] if fields else '?'}, waits in {place or '?'}")
        kernel = _text(f"{about}/stack")  # for root alone
        lines += [f"    {line}" for line in kernel.splitlines()[:12]]
    if len(threads) > MAX_THREADS:
        lines.append(f"  and {len(threads) - MAX_THREADS} more threads")
    return "\n".join(lines)


def _threads(pid: int) -> list[str]:
    try:
        return sorted(os.listdir(f"/proc/{pid}/task"), key=int)
    except OSError:  # gone, perhaps while they were listed
        return []


def _stat(pid: int) -> list[str]:
    # The command's name may hold anything, parentheses too: fields are counted from its last one.
    return _text(f"/proc/{pid}/stat").rpartition(")")[2].split()


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
