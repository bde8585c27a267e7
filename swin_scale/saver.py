"""When a run saves, by steps and by minutes, and what it says of it."""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from swin_scale.checkpoint import Checkpoint, step_directory
from swin_scale.engine.background import COMMIT_GRACE_S, BackgroundSaves, Outcome
from swin_scale.engine.dist import Dist
from swin_scale.engine.engine import Engine
from swin_scale.engine.record import StepLog
from swin_scale.engine.replicas import ReplicasDifferError
from swin_scale.engine.restore import Restorer
from swin_scale.engine.saving import Contents, Retention, save_now
from swin_scale.errors import CheckpointError, DivergedError, PreemptedError
from swin_scale.interval import RECENT_SAVES, SHORTEST_S, expected_mtbf_s, save_interval_s, save_took_s
from swin_scale.job import Job
from swin_scale.ledger import Ledger
from swin_scale.log import read_events
from swin_scale.resume import cursor
from swin_scale.scores import Scores
from swin_scale.sections import Section, Sections

logger = logging.getLogger(__name__)

SLICE_S = 20.0
"""How long a wait goes on in one piece; the same for all ranks."""
LAST_PAUSES_S = (5.0, 25.0)
"""Before a last save that failed is tried again: without it a chain of jobs ends, and full disks do get room again."""
LAST_WAIT_S = 5.0
"""For a save in the background when a run ends without another one: it diverged, or has no time left."""


class Saver:
    """When to save, by steps and by minutes, and the save itself."""

    def __init__(
        self,
        job: Job,
        dist: Dist,
        engine: Engine,
        log: StepLog,
        restorer: Restorer,
        resumed: Checkpoint | None,
        ledger: Ledger,
        sections: Sections,
    ) -> None:
        """`ledger`: rank 0's knows what a save has cost this run, and how often it failed."""
        self._ledger, self._sections = ledger, sections
        self._job, self._dist, self._engine, self._log, self._restorer = job, dist, engine, log, restorer
        self.root = Path(job.config.run.dir) / "checkpoints"
        self._last = time.monotonic()
        self._failing = False
        """What was last written came to nothing: by minutes, the next save is due soon, not after a whole interval."""
        self._start = self._last - float(resumed.state.get("elapsed_s", 0.0) if resumed else 0.0)
        self.saved_step = resumed.step if resumed else -1
        self.took_s: deque[float] = deque(maxlen=RECENT_SAVES)
        """Seconds of this process's recent saves, until they were committed."""
        self._told = 0.0
        """The interval of the last event, in seconds."""
        self._config = job.config.checkpoint
        step = resumed.step if resumed else 0
        rows = read_events(self.root.parent / "metrics.jsonl") if dist.is_main and self._config.keep_best else []
        evaluations = [row for row in rows if row["event"] == "eval"]
        self._scores = Scores(dist.broadcast_json("evaluations", evaluations))
        self._scores.forget_after(step)
        self._stall = {"seconds": 0.0, "waited_seconds": 0.0}
        """What the save that is being written has cost the step."""
        self._background = self._in_background(step)
        self.out_of_time = False
        """Set when the processes are about to be killed: nothing is waited for any more."""

    def time_is_up(self) -> bool:
        """By this rank's clock; `StepLog.flush` takes rank 0's word for all."""
        minutes = self._job.config.checkpoint.every_minutes
        if minutes is None:
            return False
        interval = self._plan()[0] if minutes == "auto" else 60 * minutes
        interval = min(interval, SHORTEST_S) if self._failing else interval
        return time.monotonic() - self._last >= interval

    def step_is_due(self, step: int) -> bool:
        every = self._job.config.checkpoint.every_steps
        return every is not None and step % every == 0

    def _plan(self) -> tuple[float, dict[str, float | None]]:
        """The automatic interval in seconds, by Young and Daly, and what this rank's ledger knows that it follows."""
        figures = self._ledger.figures
        stall = figures.recent_stall_s if figures is not None else None
        known = (figures.failures, figures.uptime_s) if figures is not None else (0, 0.0)
        mtbf = expected_mtbf_s(self._dist.world, *known)
        return save_interval_s(stall, mtbf), {"stall_s": stall, "mtbf_h": round(mtbf / 3600, 2)}

    def tell_plan(self, step: int) -> None:
        """An event where the automatic interval has changed by a tenth; all ranks call this together."""
        if self._job.config.checkpoint.every_minutes != "auto":
            return
        interval, why = self._dist.broadcast_json("save interval", self._plan())
        if abs(interval - self._told) > 0.1 * self._told:
            self._told = interval
            self._log.event("save_interval", step, minutes=round(interval / 60, 2), **why)

    def save(self, step: int, *, final: bool = False) -> None:
        """Save all ranks' state. A failed save is an event and training goes on, unless it is the last one.

        In the background (`checkpoint.mode`) this returns when the state is copied, and `poll` or `settle` says what
        became of it; the last one is waited for. ``elapsed_s`` is the time spent training, by a clock that never
        jumps, summed over restarts.
        """
        # Rows first: every step up to a committed checkpoint has its row, whatever happens next.
        self._log.flush()
        began = self._last = time.monotonic()
        self.settle(None if final else self._config.wait_s)
        if self.saved_step == step:
            return  # it was the one that had to be waited for
        waited = time.monotonic() - began
        if self.writing_step is not None:
            problem = f"step {self.writing_step} is still being written after {waited:.1f} s of waiting"
            logger.warning("step %d is not saved: %s (checkpoint.wait_s)", step, problem)
            self._log.event("save_skipped", step, problem=problem, seconds=round(waited, 3))
            return
        elapsed = round(time.monotonic() - self._start, 3)
        contents = Contents.of(
            self._engine,
            step=step,
            state={**self._restorer.state(), **cursor(self._job, step), "elapsed_s": elapsed},
            config_text=self._job.config_text,
            model=self._job.model,
        )
        try:
            if self._background is not None:
                self._background.begin(contents, self._retention())
                self._stall = {"seconds": round(time.monotonic() - began, 3), "waited_seconds": round(waited, 3)}
                if not final or not self._has_failed(self._settled()):
                    return
            self._save_now(contents, LAST_PAUSES_S if final else ())
        except CheckpointError as error:
            if final:
                raise
            self._failed(step, str(error))
            return
        self._saved(step, time.monotonic() - began)

    def _save_now(self, contents: Contents, pauses: Sequence[float]) -> None:
        """Without the background, and again after each of `pauses` seconds while it fails; raises CheckpointError."""
        for pause in pauses:
            try:
                save_now(self.root, self._engine, self._dist, contents, self._retention())
                return
            except CheckpointError as error:  # the same on all ranks
                logger.warning("%s; the last save is tried again in %g s", error, pause)
                time.sleep(pause)
        save_now(self.root, self._engine, self._dist, contents, self._retention())

    def _has_failed(self, outcome: Outcome | None) -> bool:
        """Whether a last save failed and may be tried again without the background."""
        assert outcome is not None
        if outcome.given_up:
            raise CheckpointError(outcome.problem)
        if outcome.problem is not None:
            logger.warning("%s; step %d is saved once more, by the ranks themselves", outcome.problem, outcome.step)
            return True
        self._conclude(outcome)
        return False

    @property
    def writing_step(self) -> int | None:
        """The step whose state is being written in the background; None when nothing is."""
        return None if self._background is None else self._background.step

    def poll(self, step: int) -> None:
        """After every step, by all ranks together: look after what is written in the background."""
        if self._background is not None:
            self._conclude(self._background.poll(agree=step % self._job.config.train.log_every == 0))

    def settle(self, wait_s: float | None = None) -> None:
        """Wait for what is written in the background, at most `wait_s`; None: as long as it may take.

        All ranks call this together.
        """
        if self._background is not None:
            self._conclude(self._settled(wait_s))

    def _settled(self, wait_s: float | None = None) -> Outcome | None:
        """As `BackgroundSaves.settle`, in slices, each a section: a wait that is bounded looks like no hang."""
        assert self._background is not None
        for slice_s in _slices(wait_s):
            if self._background.step is None:
                break
            with self._sections(Section.CHECKPOINT):
                outcome = self._background.settle(slice_s)
            if outcome is not None:
                return outcome
        return None

    def put_back(self, step: int) -> None:
        """The run goes on from what was saved after `step` steps; 0: from its start."""
        self.saved_step = step or -1
        self._scores.forget_after(step)

    def rate(self, step: int, weights: str, figures: Mapping[str, Any]) -> None:
        """An evaluation, which `checkpoint.keep_best` goes by."""
        self._scores.rate(step, weights, figures)

    def best_is_due(self, step: int) -> bool:
        """Whether what was just evaluated is among the best, and not saved; the same on all ranks."""
        known = step in (self.saved_step, self.writing_step)
        return not known and self._scores.is_among_best(step, self._config.keep_best)

    def _retention(self) -> Retention:
        config = self._config
        return Retention(
            keep=config.keep,
            every_hours=config.keep_every_hours,
            best=config.keep_best,
            figures=self._scores.figures() if config.keep_best else {},
        )

    def _conclude(self, outcome: Outcome | None) -> None:
        if outcome is None:
            return
        if outcome.problem is not None:
            self._failed(outcome.step, outcome.problem)
            return
        self._saved(outcome.step, **self._stall, write_seconds=round(outcome.write_seconds, 3))

    def _saved(self, step: int, seconds: float, **figures: float) -> None:
        self.saved_step, self._failing = step, False
        self._restorer.forget_start()
        self.took_s.append(save_took_s({"seconds": seconds, **figures}))
        path = step_directory(self.root, step)
        self._log.event("checkpoint", step, path=path.name, seconds=round(seconds, 3), **figures)

    def _failed(self, step: int, problem: str) -> None:
        logger.error("step %d was not saved: %s; training goes on", step, problem)
        self._failing = True
        self._log.event("save_failed", step, problem=problem)

    def _in_background(self, step: int) -> BackgroundSaves | None:
        """None where saves wait for the disk, by the config or for lack of memory."""
        if self._config.mode == "sync":
            return None
        try:
            return BackgroundSaves(self.root, self._engine, self._dist, timeout_s=self._config.write_timeout_s)
        except CheckpointError as error:
            logger.warning("saves wait for the disk, as with checkpoint.mode=sync: %s", error)
            self._log.event("sync_saves", step, problem=str(error))
            return None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._background is None:
            return
        try:
            # All ranks end together then, and what they have copied is sound.
            if isinstance(error, DivergedError | PreemptedError | ReplicasDifferError) and not self.out_of_time:
                self.settle(LAST_WAIT_S)
        finally:
            self._background.close(0.0 if self.out_of_time else COMMIT_GRACE_S)


def _slices(wait_s: float | None) -> Iterator[float]:
    """Parts of at most `SLICE_S` that make up `wait_s`; without end for None."""
    if wait_s is None:
        yield from itertools.repeat(SLICE_S)
    else:
        whole, rest = divmod(wait_s, SLICE_S)
        yield from (*itertools.repeat(SLICE_S, int(whole)), rest)
