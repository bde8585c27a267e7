"""A rank's side of its watchdog (`launcher/watchdog.py`): beats, stacks on a signal, NCCL's record of collectives."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import signal
import subprocess
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType

from launcher import crash, watchdog
from swin_scale.config import EngineConfig
from swin_scale.engine.dist import Dist
from swin_scale.errors import PeerLostError
from swin_scale.files import anonymous_file, write_atomic
from swin_scale.heartbeat import Pulse, begin_life, heartbeat_memory
from swin_scale.sections import Sections

logger = logging.getLogger(__name__)

WORD_S = 6.0
"""How long a rank that lost a peer waits to hear which one, before it says itself that it was another."""
VERDICT_S = 45.0
"""The same once the watchdogs have been called."""
FLIGHTS = "2000"
"""Collectives that NCCL's flight recorder keeps."""


class Watch:
    """Within it, from `start` on, this process is watched. Enter it before the ranks join, so that it ends the last."""

    def __init__(self, run_dir: Path, config: EngineConfig, sections: Sections) -> None:
        self._run_dir, self._config, self._sections = run_dir, config, sections
        self._life: str | None = None
        self._stack = contextlib.ExitStack()

    def start(self, dist: Dist) -> None:
        """Start the watchdogs; all ranks call this together. A rank that has none trains on, and says so."""
        life = None
        if dist.is_main and self._config.hang_timeout_s > 0:
            life = uuid.uuid4().hex
            try:
                begin_life(self._run_dir, life)
            except OSError as error:
                logger.warning("no watchdog: heartbeat/ of the run cannot be written (%s)", error.strerror)
                life = None
        self._life = dist.broadcast_json("life", life)
        if self._life is None:
            return
        try:
            self._start(dist, self._life)
        except (OSError, subprocess.SubprocessError) as error:
            logger.warning("rank %d has no watchdog: %s", dist.rank, error)

    def _start(self, dist: Dist, life: str) -> None:
        beats, stacks = heartbeat_memory(), anonymous_file("swin_scale.stacks")
        for descriptor in (beats, stacks):
            self._stack.callback(os.close, descriptor)
        pulse = Pulse(beats, self._sections)
        self._stack.callback(pulse.goodbye)
        # What `unregister` goes back to: a question that comes after the goodbye ends nobody.
        signal.signal(watchdog.STACK_SIGNAL, signal.SIG_IGN)
        faulthandler.register(watchdog.STACK_SIGNAL, file=stacks, all_threads=True, chain=False)
        self._stack.callback(faulthandler.unregister, watchdog.STACK_SIGNAL)
        asked = told = None
        if dist.backend == "nccl" and dist.world > 1:
            asked, told = os.pipe()
            threading.Thread(target=_dump_flights, args=(asked,), name="flights", daemon=True).start()
        watchdog.start(
            watchdog.Settings(
                run_dir=str(self._run_dir.absolute()),
                life=life,
                rank=dist.rank,
                world=dist.world,
                local_rank=dist.local_rank,
                pid=os.getpid(),
                hang_s=self._config.hang_timeout_s,
                timeout_s=self._config.timeout_s,
                heartbeat=beats,
                stacks=stacks,
                flights=told,
            )
        )
        if told is not None:
            os.close(told)  # the thread ends with the watchdog, which has the other copy

    def __enter__(self) -> Watch:
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", FLIGHTS)  # read when a process group is made
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if isinstance(error, PeerLostError) and self._life is not None:
            word = self._word(self._life)
            if word is not None:
                logger.error("%s", word)
        self._stack.close()

    def _word(self, life: str) -> str | None:
        """What the watchdogs say of the peer that was lost; None when they say nothing, or another cause is known.

        Waiting for it leaves the first word in ``exit.json`` to them: that names the peer.
        """
        began = time.monotonic()
        while True:
            # Looked for before the alarm: a cause that comes with one must not be taken for another.
            known = (self._run_dir / "exit.json").exists()
            bundle = crash.find_alarm(self._run_dir, life)
            verdict = None if bundle is None else crash.read_verdict(bundle)
            if verdict is not None:
                return f"{verdict.text}; see {bundle}"
            if bundle is None and known:
                return None
            if time.monotonic() - began > (WORD_S if bundle is None else VERDICT_S):
                return None
            time.sleep(0.05)


def _dump_flights(descriptor: int) -> None:
    """Write NCCL's record of collectives to every path that comes in by line, until the other end is closed."""
    with open(descriptor, encoding="utf-8") as lines:
        for line in lines:
            path = Path(line.rstrip("\n"))
            try:
                from torch._C import _distributed_c10d as c10d

                text = c10d._dump_nccl_trace_json(includeCollectives=True, onlyActive=False)  # type: ignore[attr-defined]
                write_atomic(path, text.encode() if isinstance(text, str) else text, durable=False)
            except (ImportError, AttributeError, OSError, RuntimeError, TypeError) as error:
                with contextlib.suppress(OSError):
                    path.write_text(f'{{"error": "{type(error).__name__}"}}\n', encoding="utf-8")
