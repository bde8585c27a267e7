"""The faults of `soak.py`: which come when (`plan`), whom they strike (`find`), and how each is done (`Injector`).

All of them come from outside. Processes are found through /proc by a variable of their environment, which every process
of the run inherits, on this machine as under Slurm; nothing in the package knows of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from swin_scale.checkpoint import list_steps, step_directory
from tests.disks import fill

MARK = "SWIN_SCALE_SOAK"
"""Variable that holds the run directory in all of a run's processes."""
WEIGHTS = {
    "kill_rank": 4,
    "kill_worker": 2,
    "kill_helper": 1,
    "kill_twice": 2,
    "stop_rank": 2,
    "stop_worker": 1,
    "flip_bit": 2,
    "truncate": 2,
    "full_disk": 2,
    "warning": 2,
    "requeue": 2,
    "lose_node": 1,
}
"""Fault -> how often it is drawn once each kind has come twice."""
TIMES = 2
"""Least number of faults of each kind."""
BEYOND = 10
"""Rows past the one of a fault after which the run counts as going on."""
RANKS = 2
OUTAGE_S = 90.0
"""After which a lost node comes back, spare or none."""
TAIL_BYTES = 1 << 16
WRITER, WATCHDOG = "swin_scale.disk_writer", "launcher.watchdog"
"""Modules that ranks run beside themselves: one writes checkpoints, one looks after its rank."""


class Ended(Exception):
    """The run ended, or took too long, while something else was waited for."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault to come."""

    kind: str
    step: int
    """It strikes once the run has recorded this step."""


@dataclass(frozen=True, kw_only=True)
class Process:
    """A process of the run."""

    pid: int
    rank: int
    role: str
    """``rank``, ``worker`` (of a rank's loader), or the module of a rank's helper."""
    node: str
    """Slurm's name of the node it runs on; empty without Slurm."""

    def __str__(self) -> str:
        whose = {"rank": "", "worker": "loader worker of "}.get(self.role, f"{self.role} of ")
        return f"{whose}rank {self.rank}{f' on {self.node}' * bool(self.node)}"

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)


class Place(Protocol):
    """Where the run is, and what only that place can do to it."""

    def ended(self) -> bool:
        """Whether the run is over for good; looks after it where nobody else does."""

    def warn(self) -> str:
        """Announce the end, as Slurm does before the time limit; says whom it was told."""

    def requeue(self) -> str:
        """Put the running job back into the queue."""

    def lose_node(self, rng: random.Random) -> str:
        """Cut the power of one of the run's nodes; its name."""

    def return_node(self, name: str) -> None:
        """The power is back."""


def plan(kinds: Sequence[str], count: int, steps: int, rng: random.Random) -> list[Fault]:
    """`count` faults in a random order, each of `kinds` at least twice, spread over the middle of `steps` steps.

    Each has a slot of its own and strikes at a random step in the first half of it, so that the run can go on before
    the next one: a chain that makes no progress three times in a row ends, as it should.
    """
    least = TIMES * len(kinds)
    if count < least:
        raise ValueError(f"{count} faults cannot be {TIMES} of each of {len(kinds)} kinds; ask for at least {least}")
    chosen = list(kinds) * TIMES + rng.choices(kinds, [WEIGHTS[kind] for kind in kinds], k=count - least)
    rng.shuffle(chosen)
    first, last = steps // 20, steps - steps // 20
    slot = (last - first) / count
    return [
        Fault(kind=kind, step=round(first + slot * (number + rng.uniform(0, 0.5))))
        for number, kind in enumerate(chosen)
    ]


def find(run_dir: Path) -> list[Process]:
    """Ranks, loader workers and helpers of the run in `run_dir` that live now."""
    mark = f"{MARK}={run_dir}".encode()
    ranks: dict[int, tuple[int, str]] = {}
    parents: dict[int, int] = {}
    others: dict[int, str] = {}
    found: list[Process] = []
    for directory in Path("/proc").iterdir():
        if not directory.name.isdecimal():
            continue
        try:
            variables = (directory / "environ").read_bytes().split(b"\0")
            argv = (directory / "cmdline").read_bytes().split(b"\0")
            parent = int((directory / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
        except (OSError, IndexError, ValueError):
            continue  # it ended meanwhile, or is another user's
        if argv[1:4] == [b"-S", b"-m", WATCHDOG.encode()]:  # it has left the rank's family, and its environment
            told = json.loads(argv[4])
            if told["run_dir"] == str(run_dir):
                found.append(Process(pid=int(directory.name), rank=told["rank"], role=WATCHDOG, node=""))
        if mark not in variables:
            continue
        pid, environ = int(directory.name), dict(variable.partition(b"=")[::2] for variable in variables)
        number = environ.get(b"RANK", environ.get(b"SLURM_PROCID") if b"SLURM_STEP_ID" in environ else None)
        if argv[1:4] == [b"-m", b"swin_scale", b"train"] and number is not None:
            ranks[pid] = int(number), environ.get(b"SLURMD_NODENAME", b"").decode()
            parents[pid] = parent
        elif argv[1:2] == [b"-c"] and b"swin_scale.data.worker" in argv[2]:
            others[pid], parents[pid] = "worker", parent
        elif WRITER.encode() in argv[2:4]:
            others[pid], parents[pid] = WRITER, parent
    # What a rank forks looks as it does.
    leaders = {pid: facts for pid, facts in ranks.items() if parents[pid] not in ranks}
    found += [Process(pid=pid, rank=rank, role="rank", node=node) for pid, (rank, node) in leaders.items()]
    for pid, role in others.items():
        if parents[pid] in leaders:
            rank, node = leaders[parents[pid]]
            found.append(Process(pid=pid, rank=rank, role=role, node=node))
    return sorted(found, key=lambda one: (one.role, one.rank, one.pid))


def position(run_dir: Path) -> int:
    """The step of the last row of ``metrics.jsonl``; 0 where there is none."""
    try:
        with open(run_dir / "metrics.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if "event" not in row:
                return int(row["step"])
    return 0


def damage(path: Path, how: str, rng: random.Random) -> str:
    """Flip one bit of a file, or cut it short; says where."""
    size = path.stat().st_size
    at = rng.randrange(size)
    with open(path, "r+b") as file:
        if how == "truncate":
            file.truncate(at)
            return f"{path.parent.name}/{path.name} cut at byte {at} of {size}"
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ (1 << rng.randrange(8))]))
    return f"{path.parent.name}/{path.name}, one bit of byte {at} of {size}"


@dataclass(kw_only=True)
class Injector:
    """Brings faults over a run and waits until it goes on. Times are seconds since `began`, by `time.monotonic`."""

    place: Place
    run_dir: Path
    rng: random.Random
    filler: Path
    """On the file system of the run directory."""
    began: float
    deadline: float
    poll_s: float = 0.1
    done: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """What was done, in order."""

    def inject(self, fault: Fault) -> None:
        """Wait for its step, do it, and wait until the run is past it. Raises Ended."""
        self._wait(lambda: position(self.run_dir) >= fault.step)
        self._two_ranks()
        time.sleep(self.rng.uniform(0, 0.3))  # any moment of a step, a save or an evaluation
        row: dict[str, Any] = {"kind": fault.kind, "at_s": 0.0, "time": 0.0, "step": 0, "checkpoint": 0, "what": ""}
        self.done.append(row)
        began = time.monotonic()
        row.update(at_s=round(began - self.began, 1), time=round(time.time(), 3))
        row.update(step=position(self.run_dir), checkpoint=max(list_steps(self.run_dir / "checkpoints"), default=0))
        row["what"] = getattr(self, f"_{fault.kind}")()
        self._wait(lambda: position(self.run_dir) > row["step"] + BEYOND)
        row["back_s"] = round(time.monotonic() - began, 1)

    def wait_for_end(self) -> None:
        """Until the run is over. Raises Ended when it takes too long."""
        while not self.place.ended():
            self._in_time()
            time.sleep(self.poll_s)

    # -- one method for each kind: do it, and say what was done --------------------------------------------------------

    def _kill_rank(self) -> str:
        return self._strike("rank", signal.SIGKILL)

    def _kill_worker(self) -> str:
        return self._strike("worker", signal.SIGKILL)

    def _kill_helper(self) -> str:
        helpers = [process for process in find(self.run_dir) if process.role not in ("rank", "worker")]
        if not helpers:
            return "no helper runs"
        victim = self.rng.choice(helpers)
        victim.signal(signal.SIGKILL)
        return f"SIGKILL to {victim}"

    def _kill_twice(self) -> str:
        """A rank in the middle of training, and one of the next life at a random moment of its start."""
        first = self._strike("rank", signal.SIGKILL)
        before = {process.pid for process in find(self.run_dir)}
        self._wait(lambda: not before & {process.pid for process in find(self.run_dir)})
        self._two_ranks()
        time.sleep(self.rng.uniform(0, 4))
        return f"{first}, then {self._strike('rank', signal.SIGKILL)} while it started"

    def _stop_rank(self) -> str:
        return self._strike("rank", signal.SIGSTOP)

    def _stop_worker(self) -> str:
        return self._strike("worker", signal.SIGSTOP)

    def _flip_bit(self) -> str:
        return self._spoil("flip")

    def _truncate(self) -> str:
        return self._spoil("truncate")

    def _spoil(self, how: str) -> str:
        """The newest checkpoint, and a kill, so that it is the one to go on from."""
        root = self.run_dir / "checkpoints"
        self._wait(lambda: len(list_steps(root)) > 1)  # to fall back on
        directory = step_directory(root, list_steps(root)[-1])
        what = damage(self.rng.choice(sorted(directory.iterdir())), how, self.rng)
        return f"{what}; {self._strike('rank', signal.SIGKILL)}"

    def _full_disk(self) -> str:
        """For the time of two or three saves."""
        hold = self.rng.uniform(2, 3) * min(20.0, max(1.0, save_gap(self.run_dir / "checkpoints")))
        fill(self.filler)
        try:
            time.sleep(hold)
        finally:
            self.filler.unlink()
        return f"no room for {hold:.1f} s"

    def _warning(self) -> str:
        return self.place.warn()

    def _requeue(self) -> str:
        return self.place.requeue()

    def _lose_node(self) -> str:
        """The run finds another one, or waits; then the power is back."""
        name, lost = self.place.lose_node(self.rng), time.monotonic()

        def elsewhere() -> bool:
            nodes = {process.node for process in self._ranks()}
            return len(nodes) == RANKS and name not in nodes

        self._wait(lambda: elsewhere() or time.monotonic() - lost > OUTAGE_S)
        found = "a spare one took over" if elsewhere() else "none took over"
        time.sleep(self.rng.uniform(0, 5))
        self.place.return_node(name)
        return f"node {name}, for {time.monotonic() - lost:.0f} s; {found}"

    def _strike(self, role: str, number: signal.Signals) -> str:
        self._wait(lambda: any(one.role == role for one in find(self.run_dir)))
        victim = self.rng.choice([one for one in find(self.run_dir) if one.role == role])
        victim.signal(number)
        return f"{number.name} to {victim}"

    # -- waiting ----------------------------------------------------------------------------------------------------

    def _ranks(self) -> list[Process]:
        return [process for process in find(self.run_dir) if process.role == "rank"]

    def _two_ranks(self) -> None:
        self._wait(lambda: len(self._ranks()) == RANKS)

    def _wait(self, condition: Callable[[], bool]) -> None:
        while not condition():
            if self.place.ended():
                raise Ended("the run ended")
            self._in_time()
            time.sleep(self.poll_s)

    def _in_time(self) -> None:
        if time.monotonic() > self.deadline:
            raise Ended("the time for the whole soak is over")


def save_gap(root: Path) -> float:
    """Seconds between the newest checkpoints; 0 with less than two."""
    times = []
    for step in list_steps(root):
        with contextlib.suppress(OSError):  # removed meanwhile
            times.append((step_directory(root, step) / "manifest.json").stat().st_mtime)
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    return min(gaps, default=0.0)
