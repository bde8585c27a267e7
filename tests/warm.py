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


def run(
    arguments: Sequence[str], ranks: Sequence[Mapping[str, str]], *, program: str = CLI, timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """Run `program` once for each environment of `ranks`, with `arguments` as its ``sys.argv[1:]``, to the end.

    The exit code is the one that the launcher would give (one process: its own, or minus the signal that killed it);
    ``stderr`` is rank 0's, and that of the rank whose failure was the first.
    """
    with tempfile.TemporaryDirectory() as directory:
        logs = [Path(directory) / str(rank) for rank in range(len(ranks))]
        processes = [
            CONTEXT.Process(target=_work, args=(program, list(arguments), dict(environment), str(log)))
            for environment, log in zip(ranks, logs)
        ]
        for process in processes:
            process.start()
        try:
            exits = _watch(processes, time.monotonic() + timeout)
        finally:
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.join()
        if len(exits) < len(processes):
            raise subprocess.TimeoutExpired(list(arguments), timeout, stderr=_text(logs[0], "err"))
        cause = first_cause(exits)
        code = 0 if cause is None else cause.code
        if code < 0 and len(ranks) > 1:
            code = PeerLostError.exit_code
        others = _text(logs[cause.rank], "err") if cause and cause.rank else ""
        return subprocess.CompletedProcess(list(arguments), code, _text(logs[0], "out"), _text(logs[0], "err") + others)


def _watch(processes: Sequence, deadline: float) -> list[Exit]:
    """Wait for all; once one failed, end the others after `GRACE_S`."""
    exits: list[Exit] = []
    asked = False
    while len(exits) < len(processes) and time.monotonic() < deadline:
        seen = {exit.rank for exit in exits}
        waiting = {process.sentinel: rank for rank, process in enumerate(processes) if rank not in seen}
        failed = any(exit.code for exit in exits)
        ended = wait(list(waiting), timeout=min(GRACE_S if failed else 60, max(deadline - time.monotonic(), 0)))
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
