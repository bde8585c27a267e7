"""Start a training command on several processes of this machine, and see them end together.

Each process leads a process group of its own, so that ending a rank ends its loader workers. Rank 0 owns the terminal;
the others' output is kept, and its end is shown when one of them is the first to fail.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from swin_scale.end_signals import END_SIGNALS
from swin_scale.errors import EXIT_PREEMPTED, PeerLostError, UserError

logger = logging.getLogger(__name__)

FORWARDED = (signal.SIGINT, *END_SIGNALS)
POLL_S = 0.05
SAVE_GRACE_S = 60.0
"""Time for the others after a rank ended preempted and saved: they are saving too."""
TAIL_LINES = 20
# What a rank's own error says is more specific than that it, or another one, vanished.
_SPECIFIC = (2, 3, 4, 5, EXIT_PREEMPTED)


@dataclass(frozen=True, kw_only=True)
class Exit:
    """The end of one rank."""

    rank: int
    code: int
    """Exit code, or minus the signal that killed it."""
    tick: int
    """Look-out of the launcher that noticed it; ranks noticed by the same one ended in unknown order."""
    asked: bool = False
    """The launcher had told it to end."""


def launch_local(
    nproc: int,
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    log_dir: Path | None = None,
    module: str = "swin_scale",
    grace_s: float = 10.0,
    listens: bool = False,
) -> int:
    """Run ``python -m module *argv`` as `nproc` ranks and return the exit code of the first cause.

    SIGINT and `END_SIGNALS` are forwarded to all ranks; a second SIGINT ends them. When a rank fails, the others get
    `grace_s` seconds to end by themselves, then SIGTERM, and SIGKILL `grace_s` later. All of them, with their workers,
    also end when this process is killed.

    Args:
        nproc: processes to start, one per GPU where there are GPUs.
        argv: arguments of the module, such as ``["train", "config.yaml"]``.
        env: the environment to extend; default: this process's.
        log_dir: where ``rank{r}.out`` receives what ranks above 0 print; default: only kept to show its end on failure.
        module: what to run; tests use their own.
        grace_s: see above.
        listens: the module installs `EndSignals`. Until it does, what asks it to end waits, where it would be its end.

    Returns:
        0, or the first cause: a rank's own exit code; 6 when a rank was killed by a signal; 128 + n when that was a
        forwarded signal n.

    Raises:
        UserError: `nproc` is below 1.
    """
    if nproc < 1:
        raise UserError(f"--nproc is {nproc}; start at least one process")
    environ = dict(os.environ if env is None else env)
    shared = shared_environment(environ, nproc)
    # Held open and never written to: the guards of all ranks read its end of file when this process is gone.
    guard, held = os.pipe()
    ranks: list[_Rank] = []
    received: list[int] = []
    try:
        with _recorded_signals(received):
            for number in range(nproc):
                variables = {**shared, "RANK": str(number), "LOCAL_RANK": str(number)}
                ranks.append(_Rank(number, [module, *argv], variables, guard, log_dir, END_SIGNALS if listens else ()))
            exits = _watch(ranks, received, grace_s)
        return _report(exits, ranks, set(received))
    finally:
        for rank in ranks:
            rank.end()
        os.close(guard)
        os.close(held)


def shared_environment(environ: Mapping[str, str], nproc: int) -> dict[str, str]:
    """`environ` with the torchrun variables that all ranks share; keeps OMP_NUM_THREADS and GLOO_SOCKET_IFNAME."""
    shared = {name: value for name, value in environ.items() if not name.startswith("TORCHELASTIC_")}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shared.setdefault("OMP_NUM_THREADS", str(max(1, cores // nproc)))
    if sys.platform == "linux":
        # Else gloo looks up the host's name, which on laptops and in containers may lead nowhere.
        shared.setdefault("GLOO_SOCKET_IFNAME", "lo")
    shared.update(
        WORLD_SIZE=str(nproc), LOCAL_WORLD_SIZE=str(nproc), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port())
    )
    return shared


def free_port() -> int:
    """A TCP port nobody listens on, below the range (32768 up) from which outgoing connections take theirs."""
    for port in random.SystemRandom().sample(range(12000, 32000), 200):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise UserError("found no free TCP port from 12000 to 32000 on 127.0.0.1; end what occupies them")


def first_cause(exits: Sequence[Exit]) -> Exit | None:
    """The end that made the others end: the earliest failure, the more specific one of those noticed together.

    A rank that ended with code 6 only says that it lost another one, so any other failure explains more. None when all
    ranks ended well or were told to end.
    """
    failures = [exit for exit in exits if exit.code != 0 and not exit.asked]
    own = [exit for exit in failures if exit.code != PeerLostError.exit_code] or failures
    return min(own, key=lambda exit: (exit.tick, exit.code not in _SPECIFIC, exit.code < 0, exit.rank), default=None)


class _Rank:
    """One started process, leader of its process group."""

    def __init__(
        self,
        rank: int,
        arguments: list[str],
        env: Mapping[str, str],
        guard: int,
        log_dir: Path | None,
        waiting: Sequence[signal.Signals],
    ) -> None:
        """`waiting`: signals that are blocked in the process, across exec, until it unblocks them."""
        self.rank = rank
        self.output: IO[bytes] | None = None
        if rank > 0 and log_dir is not None:
            log_dir.mkdir(parents=True, exist_ok=True)
            self.output = open(log_dir / f"rank{rank}.out", "ab+")  # noqa: SIM115 - closed in end()
        elif rank > 0:
            self.output = tempfile.TemporaryFile()  # noqa: SIM115 - closed in end()
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, waiting)
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-IS", str(Path(__file__).with_name("child.py")), str(guard), *arguments],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=self.output,
                stderr=self.output,
                pass_fds=(guard,),
                start_new_session=True,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def poll(self) -> int | None:
        """Exit code once the process ended; its workers are ended before its id can be used again."""
        if self.process.returncode is None and self._has_ended():
            self._kill_group()
            self.process.wait()
        return self.process.returncode

    def signal(self, number: int) -> None:
        if self.process.returncode is None and not self._has_ended():
            os.kill(self.process.pid, number)

    def kill(self) -> None:
        if self.process.returncode is None:
            self._kill_group()

    def end(self) -> None:
        """Leave nothing behind."""
        self.kill()
        self.process.wait()
        if self.output is not None:
            self.output.close()

    def tail(self) -> str:
        """The last lines it printed."""
        if self.output is None:
            return ""
        self.output.seek(max(0, self.output.seek(0, os.SEEK_END) - 20_000))
        lines = self.output.read().decode(errors="replace").splitlines()
        return "\n".join(lines[-TAIL_LINES:])

    def _has_ended(self) -> bool:
        if not hasattr(os, "waitid"):  # macOS before Python 3.13
            return self.process.poll() is not None
        return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody left; macOS: only the dead are left
            os.killpg(self.process.pid, signal.SIGKILL)


@contextlib.contextmanager
def _recorded_signals(received: list[int]) -> Iterator[None]:
    """Append the signals to forward to `received` instead of acting on them."""
    before = {number: signal.signal(number, lambda seen, _: received.append(seen)) for number in FORWARDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(ranks: Sequence[_Rank], received: Sequence[int], grace_s: float) -> list[Exit]:
    """Forward signals and wait until all ranks ended, ending the rest when one fails."""
    exits: list[Exit] = []
    forwarded = tick = 0
    terminate_at = kill_at = float("inf")
    while len(exits) < len(ranks):
        now, tick = time.monotonic(), tick + 1
        ended = {exit.rank for exit in exits}
        for rank in ranks:
            code = rank.poll() if rank.rank not in ended else None
            if code is not None:
                exits.append(Exit(rank=rank.rank, code=code, tick=tick, asked=kill_at < float("inf")))
                if code != 0:
                    terminate_at = min(terminate_at, now + (SAVE_GRACE_S if code == EXIT_PREEMPTED else grace_s))
        for number in received[forwarded:]:
            for rank in ranks:
                rank.signal(number)
            forwarded += 1
        if list(received).count(signal.SIGINT) > 1:
            terminate_at = min(terminate_at, now)
        if now >= terminate_at and kill_at == float("inf"):
            kill_at = now + grace_s
            for rank in ranks:
                rank.signal(signal.SIGTERM)
        if now >= kill_at:
            for rank in ranks:
                rank.kill()
        time.sleep(POLL_S)
    return exits


def _report(exits: Sequence[Exit], ranks: Sequence[_Rank], forwarded: set[int]) -> int:
    """Name the first cause and return the exit code it stands for."""
    cause = first_cause(exits)
    if cause is None:
        return 128 + signal.SIGINT if any(exit.code for exit in exits) else 0
    tail = ranks[cause.rank].tail()
    if tail:
        logger.error("last lines of rank %d:\n%s", cause.rank, tail)
    if cause.code > 0:
        logger.error("rank %d ended first, with exit code %d", cause.rank, cause.code)
        return cause.code
    number = -cause.code
    if number in forwarded:
        return 128 + number
    logger.error(
        "rank %d was killed by %s%s; run the same command again to resume",
        cause.rank,
        signal.Signals(number).name if number in list(signal.Signals) else f"signal {number}",
        " (by hand, or for lack of memory: see dmesg)" if number == signal.SIGKILL else "",
    )
    return PeerLostError.exit_code
