"""Kill -9 in the middle of real runs, and see that what is left of them ends by itself."""

from __future__ import annotations

import contextlib
import glob
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests import runs, warm

SLOW_DISK = Path(__file__).parent / "slow_disk"
_SLOW_PROGRAM = f"import runpy; runpy.run_path({str(SLOW_DISK / 'sitecustomize.py')!r})\n{warm.CLI}"
START_S = 120.0
"""For a run to begin and come to its moment, on a machine that has much else to do."""
END_S = 90.0
"""For what a kill leaves behind to end: above `engine.timeout_s` of these runs, which bounds waiting for a peer."""
STEPS = (3, 25)
"""A kill comes so many steps after its run began to train."""


@dataclass(frozen=True)
class Kill:
    """A moment and a victim, both drawn at random within what is said here."""

    when: Literal["saving", "steps"]
    """While a checkpoint is half written, or some steps after the run began to train."""
    victim: Literal["everyone", "launcher", "rank", "worker"] = "everyone"
    """All processes of the run at once, or one of that kind."""
    cold: bool = False
    """The run was started through the launcher, as a user does, which is then one of its processes."""


@dataclass(frozen=True)
class _Run:
    """A run on its way: its launcher, or the ranks that a test started without one."""

    launcher: int | None
    ranks: tuple[int, ...] = ()

    def processes(self) -> dict[int, str]:
        """The living processes by id, and the part each has in the run; "other" has none whose loss would end it."""
        if self.launcher is None:
            found = dict.fromkeys(self.ranks, "rank")
        else:
            found = {self.launcher: "launcher"}
        for root in list(found):
            found |= {pid: _part(pid) for pid in children(root)}
        return {pid: part for pid, part in found.items() if alive(pid)}

    def ended(self) -> bool:
        """Whether any of those that it was started as has."""
        return not all(map(alive, self.ranks if self.launcher is None else (self.launcher,)))


def kill_run(run_dir: Path, train: Path, rng: random.Random, kill: Kill, **options: object) -> None:
    """Start a run of two processes with `options` (see `runs.command`), kill it, and wait until nothing of it is left.

    Fails when the run ends by itself before, or when something of it still lives `END_S` after the kill.
    """
    begin = _launched if kill.cold else _forked
    moment = _Moment(run_dir, kill.when, rng)
    with begin(run_dir, train, slow=kill.when == "saving", **options) as run:
        deadline = time.monotonic() + START_S
        while not moment.has_come():
            assert not run.ended(), f"the run ended before {kill}"
            assert time.monotonic() < deadline, f"no moment for {kill} in {START_S:.0f} s: {run.processes()}"
            time.sleep(0.01)
        processes = run.processes()
        # Side processes, which watch or write for a rank, die with all of them, but are no victims alone.
        chosen = sorted(pid for pid, part in processes.items() if kill.victim in ("everyone", part))
        assert chosen, f"nothing to kill: {kill} of {processes}"
        if kill.victim == "everyone":
            _kill(chosen)
        else:
            os.kill(rng.choice(chosen), signal.SIGKILL)
        deadline = time.monotonic() + END_S
        while left := {pid: part for pid, part in processes.items() if alive(pid)}:
            assert time.monotonic() < deadline, f"{END_S:.0f} s after {kill} these still run: {left} of {processes}"
            time.sleep(0.01)


@contextlib.contextmanager
def _launched(run_dir: Path, train: Path, *, slow: bool, **options: object) -> Iterator[_Run]:
    with open(run_dir.parent / f"{run_dir.name}.log", "ab") as log:
        process = subprocess.Popen(
            runs.command(run_dir, train, **options),
            env={**runs.environment(), **_slow_disk(slow)},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    run = _Run(process.pid)
    try:
        yield run
    finally:
        _kill(run.processes())
        process.wait()


@contextlib.contextmanager
def _forked(run_dir: Path, train: Path, *, slow: bool, nproc: int = 2, **options: object) -> Iterator[_Run]:
    arguments, ranks = runs.ranks_of(run_dir, train, nproc=nproc, **options)
    # Its writers of checkpoints are processes of their own.
    ranks = [{**environment, **_slow_disk(slow)} for environment in ranks]
    with warm.Ranks(arguments, ranks, program=_SLOW_PROGRAM if slow else warm.CLI) as started:
        yield _Run(None, tuple(started.pids))


def _slow_disk(slow: bool) -> dict[str, str]:
    return {"PYTHONPATH": str(SLOW_DISK)} if slow else {}


def _kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # its own end, which that of another brought about
            os.kill(pid, signal.SIGKILL)


class _Moment:
    """When to kill a run that is about to start in a directory where others may have left something."""

    def __init__(self, run_dir: Path, when: str, rng: random.Random) -> None:
        self._checkpoints, self._metrics = run_dir / "checkpoints", run_dir / "metrics.jsonl"
        self._when, self._rng = when, rng
        self._steps = rng.randint(*STEPS)
        self._size = self._metrics.stat().st_size if self._metrics.exists() else 0
        self._left_before = self._unfinished()

    def has_come(self) -> bool:
        """Whether now is the time; may sleep for a fraction of a second before it says so."""
        if self._when == "steps":
            come = self._rows() >= self._steps
            time.sleep(self._rng.uniform(0, 0.1) if come else 0)
            return come
        if self._unfinished() <= self._left_before:
            return False
        time.sleep(self._rng.uniform(0, 0.25))
        return not self._unfinished() <= self._left_before

    def _unfinished(self) -> set[tuple[str, int]]:
        """Files of checkpoints that are not committed, told from those of the same name that were there before."""
        found: set[tuple[str, int]] = set()
        with contextlib.suppress(FileNotFoundError):  # committed or removed while we look
            found.update((str(path), path.stat().st_ctime_ns) for path in self._checkpoints.glob(".step_*.tmp/*"))
        return found

    def _rows(self) -> int:
        """Steps recorded since."""
        if not self._metrics.exists():
            return 0
        with open(self._metrics, "rb") as file:
            file.seek(self._size)
            return file.read().count(b'"batch_digest"')


def children(pid: int, *, own: bool = False) -> list[int]:
    """Processes below `pid`, at any depth, or only its `own` ones."""
    found = []
    for task in glob.iglob(f"/proc/{pid}/task/*/children"):  # finds nothing where the process ends meanwhile
        with contextlib.suppress(OSError):
            for child in map(int, Path(task).read_text().split()):
                found += [child, *([] if own else children(child))]
    return found


def alive(pid: int) -> bool:
    """Whether it still runs: a zombie only waits to be read."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def _part(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return "other"
    if words[1:3] == [b"-m", b"swin_scale"]:
        return "rank"
    return "worker" if any(b"swin_scale.data.worker" in word for word in words) else "other"
