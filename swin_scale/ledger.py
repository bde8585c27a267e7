"""The ledger of a run, written: what this life's time goes into, in rows that survive its end however that comes.

A row says everything about the life so far, so that the last one that was written is enough; a thread of rank 0 writes
one every fraction of a second at first, every minute after hours (`goodput.row_interval_s`). `goodput` says what the
rows mean, and adds them up.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from swin_scale.errors import SwinScaleError
from swin_scale.goodput import INTERRUPTED, LEDGER_NAME, Book, Goodput, read_book, row_interval_s
from swin_scale.log import JsonLines
from swin_scale.run_dir import stop_file
from swin_scale.run_lock import this_process
from swin_scale.sections import Sections

logger = logging.getLogger(__name__)


class Ledger:
    """The rows of one life, between `__enter__` and `__exit__`; on a rank that is not `enabled` it does nothing."""

    def __init__(
        self, run_dir: Path, sections: Sections, *, ranks: int, enabled: bool = True, whole: Path | None = None
    ) -> None:
        """Nothing is touched before `__enter__`.

        Args:
            run_dir: taken by this process.
            sections: timed from the process's start, or from the end of the stage before.
            ranks: processes of the run, GPUs where there are any.
            whole: directory of the run that this is a stage of, where a request to end is left.
        """
        self._run_dir, self._sections, self._ranks = run_dir, sections, ranks
        self._stop_file = stop_file(whole or run_dir)
        self._enabled = enabled
        self._book = Book()
        self._lines: JsonLines | None = None
        self._life = ""
        self._step: int | None = None
        self._figures: Goodput | None = None
        self._lock = threading.Lock()
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._keep_writing, name="ledger", daemon=True)

    @property
    def figures(self) -> Goodput | None:
        """Of the run so far, earlier lives included; None where this rank keeps no ledger."""
        return self._figures

    def at(self, step: int) -> None:
        """`step` steps are done; a number that falls says that the run was put back."""
        fell = self._step is None or step < self._step
        self._step = step
        if fell:
            self.write()

    def write(self, **fields: Any) -> None:
        """Write a row now, with `fields` of its own (see `goodput`)."""
        if self._lines is None:
            return
        with self._lock:
            reading = self._sections.read()
            row: dict[str, Any] = {
                "life": self._life,
                "age": round(reading.age_s, 3),
                "time": round(time.time(), 3),
                "in": reading.current and reading.current.value,
                "s": {section.value: round(spent, 3) for section, spent in reading.seconds.items() if spent},
                **fields,
            }
            if self._step is not None:
                row["step"] = self._step
            self._put(row)

    def saving(self) -> None:
        """A checkpoint of the steps so far is about to be written: what comes after them may have to be done again."""
        self.write(saving=True)

    def saved(self, stall_s: float) -> None:
        """The run goes on; a save had stopped it for `stall_s` seconds."""
        self.write(stall=round(stall_s, 3))

    def __enter__(self) -> Ledger:
        if self._enabled:
            try:
                self._book = read_book(self._run_dir)
            except OSError as error:  # no reason not to train
                logger.warning("what the ledger says of earlier lives cannot be read: %s", error)
            me = this_process()
            # The process, so that its stages are one life.
            self._life = hashlib.blake2b(f"{me.boot}/{me.host}/{me.pid}/{me.start}".encode(), digest_size=6).hexdigest()
            self._lines = JsonLines(self._run_dir / LEDGER_NAME)
            with self._lock:
                start = round(time.time() - self._sections.read().age_s, 3)
                self._put(
                    {"life": self._life, "start": start, "ranks": self._ranks, "job": me.job, "restart": me.restart}
                )
            self.write()
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._lines is None:
            return
        self._left.set()
        self._thread.join()
        code = error.exit_code if isinstance(error, SwinScaleError) else int(error is not None)
        stopped = {"stopped": True} if self._stop_file.exists() else {}
        self.write(end=INTERRUPTED if isinstance(error, KeyboardInterrupt) else code, **stopped)
        self._lines.close()
        self._lines = None
        if self._figures is not None:
            logger.info("%s", summary(self._figures))

    def _keep_writing(self) -> None:
        while not self._left.wait(row_interval_s(self._sections.read().age_s)):
            self.write()

    def _put(self, row: dict[str, Any]) -> None:
        assert self._lines is not None
        self._book.add(row)
        self._figures = self._book.figures()
        self._lines.write([row])


def summary(figures: Goodput) -> str:
    """One line for a log."""
    lost = f", {figures.lost_steps} steps done again" if figures.lost_steps else ""
    untold = figures.seconds["unattributed"] / figures.wall_s if figures.wall_s > 0 else 0.0
    return (
        f"goodput {figures.goodput:.1%} of {figures.wall_s:.0f} s in {figures.lives} "
        f"{'life' if figures.lives == 1 else 'lives'}: steps that count {figures.ettr:.1%}{lost}, "
        f"unattributed {untold:.2%}"
    )
