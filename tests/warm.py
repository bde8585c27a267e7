"""Training processes forked from a server that has torch, DeepSpeed and this package imported already.

A short run spends four fifths of its time on imports. From the command line on, such a process does what ``python -m
swin_scale`` does; the launcher, and kills of processes that a user would have started, have tests of their own.
"""

import contextlib
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path

from launcher.local import Exit, first_cause
from swin_scale.errors import PeerLostError
from tests.spawn import CONTEXT

CLI = "import sys; from swin_scale.cli import main; sys.exit(main())"
INJECTED = Path(__file__).parent / "injected"
GRACE_S = 10.0
"""The launcher's: what others have to end by themselves when one failed."""


class Ranks:
    """The forked processes of one run; the context ends what is left of them."""

    def __init__(self, arguments: Sequence[str], ranks: Sequence[Mapping[str, str]], *, program: str = CLI) -> None:
        """Start `program` once for each environment of `ranks`, with `arguments` as its ``sys.argv[1:]``."""
        self._arguments = list(arguments)
        self._directory = tempfile.TemporaryDirectory()
        self._logs = [Path(self._directory.name) / str(rank) for rank in range(len(ranks))]
        self._processes = [
            CONTEXT.Process(target=_work, args=(program, self._arguments, dict(environment), str(log)))
            for environment, log in zip(ranks, self._logs)
        ]
        for process in self._processes:
            process.start()

    @property
    def pids(self) -> list[int]:
        """Process ids in rank order."""
        return [process.pid for process in self._processes]

    def wait(self, timeout: float, grace_s: float = GRACE_S) -> subprocess.CompletedProcess[str]:
        """Wait for the end of all; see `run`. Once one failed, the others are killed `grace_s` seconds later."""
        exits = _watch(self._processes, time.monotonic() + timeout, grace_s)
        if len(exits) < len(self._processes):
            raise subprocess.TimeoutExpired(self._arguments, timeout, stderr=_text(self._logs[0], "err"))
        cause = first_cause(exits)
        code = 0 if cause is None else cause.code
        if code < 0 and len(exits) > 1:
            code = PeerLostError.exit_code
        others = _text(self._logs[cause.rank], "err") if cause and cause.rank else ""
        output, error = _text(self._logs[0], "out"), _text(self._logs[0], "err") + others
        return subprocess.CompletedProcess(self._arguments, code, output, error)

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()  # should it lead no group yet
            process.join()
        self._directory.cleanup()


def run(
    arguments: Sequence[str], ranks: Sequence[Mapping[str, str]], *, program: str = CLI, timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """Run `program` once for each environment of `ranks`, with `arguments` as its ``sys.argv[1:]``, to the end.

    The exit code is the one that the launcher would give (one process: its own, or minus the signal that killed it);
    ``stderr`` is rank 0's, and that of the rank whose failure was the first.
    """
    with Ranks(arguments, ranks, program=program) as started:
        return started.wait(timeout)


def _watch(processes: Sequence, deadline: float, grace_s: float) -> list[Exit]:
    """Wait for all; once one failed, end the others after `grace_s`."""
    exits: list[Exit] = []
    asked = False
    while len(exits) < len(processes) and time.monotonic() < deadline:
        seen = {exit.rank for exit in exits}
        waiting = {process.sentinel: rank for rank, process in enumerate(processes) if rank not in seen}
        failed = any(exit.code for exit in exits)
        ended = wait(list(waiting), timeout=min(grace_s if failed else 60, max(deadline - time.monotonic(), 0)))
        if not ended and failed:
            asked = True
            for rank in waiting.values():
                processes[rank].kill()
        for sentinel in ended:
            rank = waiting[sentinel]
            processes[rank].join()
            exits.append(Exit(rank=rank, code=processes[rank].exitcode, tick=len(seen), asked=asked))
    return exits


def _text(log: Path, what: str) -> str:
    return log.with_suffix(f".{what}").read_text(errors="replace")


def _work(program: str, arguments: list[str], environment: dict[str, str], log: str) -> None:
    os.setsid()
    for number, what in ((1, "out"), (2, "err")):
        descriptor = os.open(f"{log}.{what}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(environment)
    if environment.get("FAULT"):
        sys.path.insert(0, str(INJECTED))
        runpy.run_path(str(INJECTED / "sitecustomize.py"))
    sys.argv = ["swin_scale", *arguments]
    exec(program, {"__name__": "__main__"})  # noqa: S102 - a test's own text
