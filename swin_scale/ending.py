"""How a run ends that is asked to: its state saved if there is time, what it says, and what is left for the next start.

Under Slurm the launcher tells by a file when the processes will be killed (`run_dir.write_deadline`). A save that
cannot be done by then would be lost, and its time with it; the run says so, ends at once, and is queued again.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Collection
from pathlib import Path
from typing import Any, NoReturn, Protocol

from swin_scale.checkpoint import Checkpoint
from swin_scale.engine.dist import Dist
from swin_scale.engine.engine import Engine
from swin_scale.engine.preempt import EndRequests
from swin_scale.engine.record import StepLog
from swin_scale.errors import PreemptedError
from swin_scale.interval import RECENT_SAVES, save_took_s
from swin_scale.job import Job
from swin_scale.log import iter_jsonl
from swin_scale.room import predicted_bytes
from swin_scale.run_dir import read_deadline
from swin_scale.saver import Saver

logger = logging.getLogger(__name__)

CAUTIOUS_BYTES_S = 250e6
"""What a node writes for sure, a quarter of what plans count on: for a run that has not saved yet."""
TOLD_WITHIN_S = 1.0
"""The launcher is signalled with the ranks, and has to write down the deadline first."""
POLL_S = 0.05
SPARE_S = 2.0
"""Of the time left, for what follows the last wait."""


class Save(Protocol):
    """Saves a step for good."""

    def __call__(self, saver: Saver, step: int) -> None: ...


class Ending:
    """The way out of a run that is asked to end. Every method is called by all ranks together."""

    def __init__(
        self,
        job: Job,
        dist: Dist,
        engine: Engine,
        log: StepLog,
        requests: EndRequests,
        saver: Saver,
        resumed: Checkpoint | None,
        *,
        save: Save,
    ) -> None:
        """Look back at what earlier processes of the run did, if it was resumed."""
        self.saver = saver
        self._dist, self._log, self._requests, self._save = dist, log, requests, save
        size, nodes = predicted_bytes(job, engine), max(1, dist.world // dist.local_world)
        self._predicted_s = 1.0 + size / (nodes * CAUTIOUS_BYTES_S)
        metrics = Path(job.config.run.dir) / "metrics.jsonl"
        # The start of a run counts as evaluated: nobody asks what it is good for.
        past = look_back(metrics, resumed.step) if dist.is_main and resumed is not None else (None, [])
        self._evaluated, self._took_s = dist.broadcast_json("past", past)

    def evaluated_before(self, kinds: Collection[str]) -> bool:
        """Whether these weights (``master``, ``ema``) of the step that the run goes on from were evaluated."""
        return self._evaluated is None or set(kinds) <= set(self._evaluated)

    def check(self, step: int, *, during: str) -> None:
        """`end` if any rank was asked to."""
        reason = self._requests.agreed()
        if reason is not None:
            self.end(step, reason, during=during)

    def end(self, step: int, reason: str, *, during: str) -> NoReturn:
        """Save what `step` steps came to, if that is not done and there is time to do it, and raise PreemptedError.

        Args:
            reason: who asked, the same on all ranks.
            during: what the run was doing.
        """
        # The start is a function of the config: a run that has done no step has nothing to save.
        lack = None if step in (0, self.saver.saved_step) else self._save_in_time(step)
        if lack is not None:
            self._log.event("no_time_to_save", step, **lack)
        self._log.event("preempted", step, reason=reason, during=during, saved=lack is None)
        if step == 0:
            raise PreemptedError(f"asked to end by {reason} before the first step: the same command starts again")
        if lack is None:
            raise PreemptedError(
                f"asked to end by {reason}; step {step} is saved, and the same command goes on from there"
            )
        raise PreemptedError(
            f"asked to end by {reason}, with {lack['left_s']:.1f} s left ({lack['why']}) where a save takes "
            f"{lack['save_s']:.1f} s: step {step} is not saved, and the same command goes on from the newest "
            "checkpoint; save more often (checkpoint.every_minutes) or ask for an earlier warning (--signal-lead)"
        )

    def _save_in_time(self, step: int) -> dict[str, Any] | None:
        """Save `step`, after what is being written; None once it is saved, else the `_room` there was for it."""
        saver, room = self.saver, self._room()
        if room is not None and saver.writing_step is not None:
            # This step has all the time there is; an earlier one has to leave enough for a save.
            rest = SPARE_S if saver.writing_step == step else room["save_s"]
            saver.settle(max(0.0, room["left_s"] - rest))
            room = self._room()
        if saver.saved_step == step:
            return None
        if room is None or (saver.writing_step is None and room["left_s"] >= room["save_s"]):
            self._save(saver, step)
            return None
        saver.settle(max(0.0, room["left_s"] - SPARE_S))  # an earlier step may be nearly written
        saver.out_of_time = True
        return room

    def _room(self) -> dict[str, Any] | None:
        """Seconds left until the processes are killed (``left_s``), why they will be, and what a save takes
        (``save_s``), by rank 0's clock and disk; None while nobody has said that they will be."""
        room = None
        if self._dist.is_main and (told := self._told()) is not None:
            recent = [*self._took_s, *self.saver.took_s][-RECENT_SAVES:]  # one that a bad hour held up is forgotten
            save_s = max(recent, default=self._predicted_s)
            room = {"left_s": round(told[0] - time.time(), 3), "save_s": round(save_s, 3), "why": told[1]}
        agreed: dict[str, Any] | None = self._dist.broadcast_json("time to save", room)
        return agreed

    def _told(self) -> tuple[float, str] | None:
        """The deadline that the launcher has told, or tells just now."""
        patience = time.monotonic() + (TOLD_WITHIN_S if "SLURM_STEP_ID" in os.environ else 0.0)
        while (told := read_deadline(self._requests.directory)) is None and time.monotonic() < patience:
            time.sleep(POLL_S)
        return told


def look_back(metrics: Path, step: int) -> tuple[list[str], list[float]]:
    """What ``metrics.jsonl`` says: weights of `step` that were evaluated since it was done last; seconds that recent
    saves took, until they were committed.
    """
    evaluated: set[str] = set()
    took_s: deque[float] = deque(maxlen=RECENT_SAVES)
    done = b'"step": %d,' % step
    for row in iter_jsonl(metrics, wanted=lambda line: b'"event": "' in line or done in line):
        if row.get("event") == "checkpoint":
            took_s.append(save_took_s(row))
        elif row.get("step") == step and "event" not in row:
            evaluated.clear()
        elif row.get("step") == step and row["event"] == "eval":
            evaluated.add(str(row.get("weights")))
    return sorted(evaluated), list(took_s)
