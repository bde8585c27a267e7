"""The process that watches one rank from outside, so that what stops the rank does not stop the one who says so.

``python -m launcher.watchdog SETTINGS``, started by the rank (`start`), without torch. About once a second it reads the
rank's beat from memory that both share, and every few seconds it tells the others in ``heartbeat/rank{r}.json``.

A rank hangs when one stretch of a section takes longer than ever before: five times the longest one seen, and never
less than ``engine.hang_timeout_s``; `Limits` has the rest. The first watchdog to find that out calls the others
(`launcher.crash`). They look at their ranks, one judges (`launcher.verdict`), the one of the rank to blame ends it, and
the other ranks see that a peer is lost. Those that do not, their watchdogs end too, so that the launcher can go on.

It goes with its rank: a rank that is gone without a goodbye was killed, which is told in the same way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher import crash
from launcher.processes import Process, state
from launcher.verdict import Sign, Verdict, died, judge, went_on
from swin_scale import heartbeat
from swin_scale.heartbeat import WARM_UP, Beat, Status, read_beat
from swin_scale.sections import Section

STACK_SIGNAL = int(getattr(signal, "SIGRTMIN", signal.SIGUSR2)) + 5 * hasattr(signal, "SIGRTMIN")
"""On which a rank writes its stacks: one that no scheduler and no library sends."""
SAFETY = 5.0
"""How much longer than ever before is too long."""
LONG_SECTIONS = frozenset({Section.SET_UP, Section.RESTORE, Section.CHECKPOINT, Section.EVALUATION, Section.CLOSE})
"""Not of every step, and some of them wait for storage."""
FIRST_SHARE = 0.9
"""Of ``engine.timeout_s``, for sections that are not known yet: before collectives give up, naming nobody."""
FIRST_TIMES = 3.0
"""The same for `LONG_SECTIONS`."""
FENCE_S = 5.0
BUSY_S = 10.0
"""A process that is ready to run gets a core within this time; on a busy machine too."""
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a watchdog is told when it starts."""

    run_dir: str
    life: str
    rank: int
    world: int
    local_rank: int
    pid: int
    hang_s: float
    """Least seconds without progress that count as hung."""
    timeout_s: float
    """``engine.timeout_s``."""
    heartbeat: int
    """Descriptor of the memory with the rank's beats."""
    stacks: int
    """Descriptor of the file that the rank writes stacks to on `STACK_SIGNAL`."""
    flights: int | None = None
    """Descriptor to write a path to: the rank writes its flight record of collectives there; None: it has none."""

    @property
    def poll_s(self) -> float:
        return min(1.0, self.hang_s / 20)

    @property
    def share_s(self) -> float:
        """Between looks at, and writes to, the run directory, which all ranks share."""
        return min(5.0 + self.world / 100, self.hang_s / 10)

    @property
    def collect_s(self) -> float:
        """A watchdog that says nothing for so long after an alarm is frozen with its machine."""
        return min(30.0, max(2 * self.share_s + crash.STACK_S + BUSY_S, self.hang_s / 8))

    @property
    def grace_s(self) -> float:
        """What the others have to end by themselves once the rank to blame is gone."""
        return min(20.0, BUSY_S + self.hang_s / 4)


def start(settings: Settings) -> None:
    """Start the watchdog of this process; it has left this process's family by the time this returns.

    Raises OSError or subprocess.SubprocessError when it could not start.
    """
    root = str(Path(__file__).resolve().parent.parent)
    handed = [settings.heartbeat, settings.stacks, *([] if settings.flights is None else [settings.flights])]
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    subprocess.run(
        # Without site: no installed package is needed, and what those run at start takes time.
        [sys.executable, "-S", "-m", "launcher.watchdog", json.dumps(dataclasses.asdict(settings))],
        env={**environment, "PYTHONPATH": root},
        cwd="/",
        pass_fds=handed,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # the launcher ends a rank's group with the rank, and Ctrl-C is not meant for us
        timeout=60,
        check=True,
    )


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How long a stretch of a section may take, in seconds."""

    hang_s: float
    timeout_s: float

    def of(self, beat: Beat) -> float:
        """Learned from `beat`'s earlier stretches, once there were enough of them."""
        if beat.stretches > WARM_UP:
            # Most saves are copies to memory, which say nothing of one that waits for the disk, such as the last.
            least = self.timeout_s if beat.section is Section.CHECKPOINT else 0.0
            return max(self.hang_s, least, SAFETY * beat.longest_s)
        return max(self.hang_s, self.timeout_s * (FIRST_TIMES if beat.section in LONG_SECTIONS else FIRST_SHARE))


class Patience:
    """How long a count has stood still, by time in which this process was awake to see it.

    A job that the scheduler suspends, or a machine that is moved, stops rank and watchdog alike: that is no hang.
    """

    def __init__(self, most_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`most_s`: the most that may pass between two looks; the rest is sleep."""
        self._most_s, self._clock = most_s, clock
        self._count = -1
        self._last, self._waited = clock(), 0.0

    def waited(self, count: int) -> float:
        now = self._clock()
        passed, self._last = min(now - self._last, self._most_s), now
        self._waited = 0.0 if count != self._count else self._waited + passed
        self._count = count
        return self._waited


class Watchdog:
    """Watches until the rank ends."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._run_dir = Path(settings.run_dir)
        self._memory = mmap.mmap(settings.heartbeat, heartbeat.SIZE, prot=mmap.PROT_READ)
        self._process = Process(settings.pid)
        self._limits = Limits(hang_s=settings.hang_s, timeout_s=settings.timeout_s)
        self._patience = Patience(5 * settings.poll_s)
        self._host = socket.gethostname()
        beat = read_beat(self._memory)
        assert beat is not None, "started before the first beat"
        self._beat = beat
        self._attended: set[Path] = set()

    def run(self) -> None:
        """Until the rank ended, said goodbye, was replaced by another life, or the run had to be ended."""
        shared = float("-inf")
        while True:
            gone = self._process.wait(self._settings.poll_s)
            beat = self._look()
            if gone or beat.ended:
                return self._leave(gone and not beat.ended)
            late = self._patience.waited(beat.count) > self._limits.of(beat)
            now = time.monotonic()
            if not late and now - shared < self._settings.share_s:
                continue
            shared = now
            try:
                if not self._go_on(late):
                    return None
            except OSError:
                # A full or absent disk may be so for a while only; collectives have a time limit of their own.
                continue

    def _go_on(self, late: bool) -> bool:
        """Tell the others, and hear of them; whether to go on watching."""
        if not self._is_ours():
            return False
        self._share()
        bundle = self._alarm()
        mine = late and bundle is None and crash.raise_alarm(self._run_dir, self._settings.life)
        bundle = bundle or self._alarm()
        return bundle is None or self._attend(bundle, mine=mine)

    def _look(self) -> Beat:
        self._beat = read_beat(self._memory) or self._beat
        return self._beat

    def _alarm(self) -> Path | None:
        bundle = crash.find_alarm(self._run_dir, self._settings.life)
        return None if bundle in self._attended else bundle

    def _is_ours(self) -> bool:
        """Whether the run directory is still this life's: a later one may have begun elsewhere."""
        try:
            return heartbeat.life_file(self._run_dir).read_text(encoding="utf-8") == self._settings.life
        except FileNotFoundError:
            return False

    def _share(self, *, ended: bool = False) -> None:
        beat, now = self._beat, time.time()
        heartbeat.write_status(
            self._run_dir,
            Status(
                life=self._settings.life,
                rank=self._settings.rank,
                host=self._host,
                pid=self._settings.pid,
                step=beat.step,
                section=beat.section and beat.section.value,
                since=now - (time.monotonic() - beat.since),
                time=now,
                ended=ended,
            ),
        )

    def _leave(self, killed: bool) -> None:
        """The rank is gone, or said so: tell the others, if they do not know yet that it was `killed`."""
        if not self._is_ours():
            return
        self._share(ended=True)
        bundle, mine = self._alarm(), False
        if bundle is None and killed:
            # With a cause recorded the run is ending anyhow, and whoever ends it may kill those that are slow.
            if not (self._run_dir / "exit.json").exists():
                mine = crash.raise_alarm(self._run_dir, self._settings.life)
            bundle = self._alarm()  # a cause may be that of an alarm, raised since
        if bundle is not None:
            self._attend(bundle, mine=mine)

    # -- after an alarm ------------------------------------------------------------------------------------------------

    def _attend(self, bundle: Path, *, mine: bool) -> bool:
        """Say what is to be said of the rank, and do as is decided; returns whether to go on watching."""
        self._attended.add(bundle)
        sign, stacks = self._testify(bundle)
        with contextlib.suppress(OSError):
            if mine and not (sign.state or sign.ended):  # the others hear of it at once, and may soon be gone too
                crash.decide(self._run_dir, bundle, died(sign))
            self._report(bundle, sign, stacks)
        verdict = self._verdict(bundle, sign, mine=mine)
        if self._settings.rank == 0:
            crash.write_event(self._run_dir, bundle, verdict)
        if not verdict.fatal:
            if mine:
                crash.withdraw_alarm(self._run_dir)
            return True
        if self._settings.rank not in verdict.ranks and verdict.reachable:
            self._wait_for_end(self._settings.grace_s)
        if not self._look().ended:  # else it is on its way out, and its launcher waits for it
            self._process.kill()
        return False

    def _verdict(self, bundle: Path, sign: Sign, *, mine: bool) -> Verdict:
        """What is decided. Who called the others judges; of the others one, where that one vanished."""
        settings, called = self._settings, time.monotonic()
        turn = settings.collect_s + (0.0 if mine else FENCE_S + settings.rank / 10)
        while (verdict := crash.read_verdict(bundle)) is None:
            passed = time.monotonic() - called
            if passed > settings.collect_s + 10 * FENCE_S:
                return Verdict(text="no watchdog came to a verdict", reachable=False)
            with contextlib.suppress(OSError):
                if mine and self._went_on(sign):
                    crash.decide(self._run_dir, bundle, went_on(self._sign(sign.waiting)))
                elif mine or passed > turn:
                    signs = crash.read_signs(bundle, fresh=passed > turn)
                    seen = crash.last_seen(self._run_dir, settings.life)
                    left = {rank for rank, last in seen.items() if last.ended and rank not in signs}
                    if len(signs) + len(left) >= settings.world or passed > turn:
                        crash.decide(self._run_dir, bundle, judge(signs, seen, settings.world))
            time.sleep(min(0.2, settings.poll_s))
        return verdict

    def _went_on(self, sign: Sign) -> bool:
        """Whether the rank has moved since it was said to hang."""
        beat = self._look()
        return self._process.is_alive() and (beat.count != sign.count or beat.ended)

    def _testify(self, bundle: Path) -> tuple[Sign, str]:
        """This rank's sign, which is written, and its stacks."""
        if self._look().ended:
            stacks, waiting = "none: it has said goodbye", False
        else:
            stacks, waiting = crash.stacks(self._process, STACK_SIGNAL, self._settings.stacks)
        sign = self._sign(waiting)
        with contextlib.suppress(OSError):
            crash.write_sign(bundle, sign)
        return sign, stacks

    def _report(self, bundle: Path, sign: Sign, stacks: str) -> None:
        settings = self._settings
        limit = self._limits.of(self._beat)
        who = f"rank {sign.rank} of {settings.world} on {sign.host}, process {sign.pid}"
        parts = {
            "where": f"{who}\n{sign.place}, for {sign.quiet_s:.1f} s; it may take {limit:.0f} s at most\n"
            f"{sign.count} changes of section so far",
            "stacks of all threads": stacks,
            "last collectives": self._flights(bundle),
            "processes": crash.processes(settings.pid),
        }
        crash.write_report(bundle, settings.rank, parts)
        if settings.local_rank == 0:
            crash.write_report(bundle, settings.rank, {**parts, "GPUs of this machine": crash.gpus()})

    def _sign(self, waiting: bool) -> Sign:
        beat = self._look()
        alive = self._process.is_alive()
        quiet = time.monotonic() - beat.since
        return Sign(
            rank=self._settings.rank,
            host=self._host,
            pid=self._settings.pid,
            section=beat.section and beat.section.value,
            step=beat.step,
            count=beat.count,
            quiet_s=round(quiet, 3),
            late=quiet > self._limits.of(beat),
            state=state(self._settings.pid) if alive else "",
            waiting=waiting,
            stopped=crash.stopped_children(self._settings.pid) if alive else (),
            ended=beat.ended,
        )

    def _flights(self, bundle: Path) -> str:
        if self._settings.flights is None:
            return "none: only NCCL keeps a flight record of collectives, and this run is on gloo, or has one rank"
        path = bundle / f"rank{self._settings.rank}.flights.json"
        os.write(self._settings.flights, f"{path}\n".encode())
        deadline = time.monotonic() + crash.STACK_S
        while not path.exists():
            if time.monotonic() > deadline:
                return f"none within {crash.STACK_S:.0f} s: the process cannot run, or holds the GIL"
            time.sleep(0.05)
        return f"in {path.name}"

    def _wait_for_end(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self._process.wait(self._settings.poll_s):
            pass


def main(argv: Sequence[str] | None = None) -> int:
    """Leave the family of the process that started this one, and watch it."""
    [text] = sys.argv[1:] if argv is None else argv
    settings = Settings(**json.loads(text))
    watchdog = Watchdog(settings)
    # A rank must not meet its watchdog when it waits for its children.
    if os.fork():
        return 0
    for number in _IGNORED:  # sent to all processes of a job; the rank decides what to do
        signal.signal(number, signal.SIG_IGN)
    try:
        watchdog.run()
    except OSError:
        # The run directory is gone, or its disk is full: nothing can be told, and the collectives have a time limit.
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
