"""Putting a running job where one of its checkpoints was: at a resume, and when the loss guard sends it back.

Engine, diary and guard keep the state of a run between them; what of it is not a fragment is one JSON object here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from swin_scale.checkpoint import Checkpoint
from swin_scale.data import Batch
from swin_scale.engine.dist import Dist
from swin_scale.engine.engine import Engine, MicroBatch, StepResult
from swin_scale.engine.evidence import save_batch
from swin_scale.engine.guard import Guard, Trouble
from swin_scale.engine.pieces import Start
from swin_scale.engine.record import StepLog
from swin_scale.engine.saving import newest_good
from swin_scale.errors import CheckpointError, SwinScaleError
from swin_scale.shards import ShardSet

LISTED = 16
"""Blamed samples that a ``guard`` event lists; ``batch.json`` has all."""


class Restorer:
    """What a run can be put back to, and its guard. Every method is called by all ranks together."""

    def __init__(
        self, run_dir: Path, dist: Dist, engine: Engine, log: StepLog, guard: Guard, sources: Sequence[ShardSet]
    ) -> None:
        """`sources`: of the training stream."""
        self.guard = guard
        self._run_dir, self._root = run_dir, run_dir / "checkpoints"
        self._dist, self._engine, self._log, self._sources = dist, engine, log, sources
        self._start: tuple[Start, dict[str, Any]] | None = None

    def state(self) -> dict[str, Any]:
        """The same on all ranks."""
        return {**self._log.state(), "guard": self.guard.state()}

    def remember_start(self) -> None:
        """Before the first step of a run without a checkpoint: the weights it began with, in host memory."""
        self._start = self._engine.start(), self.state()

    def forget_start(self) -> None:
        """There is a checkpoint now."""
        self._start = None

    def load(self, checkpoint: Checkpoint) -> None:
        """Take up everything that `checkpoint` holds; raises CheckpointError."""
        try:
            with checkpoint:
                self._engine.load(checkpoint, checkpoint.state)
            self._log.restore(checkpoint.state)
            self.guard.restore(checkpoint.state.get("guard"))
            float(checkpoint.state.get("elapsed_s", 0.0))  # for `Saver`
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, SwinScaleError):
                raise
            # Every digest is right, so whoever wrote it meant something else than this version reads.
            raise CheckpointError(f"{checkpoint.path} cannot be resumed: {type(error).__name__}: {error}") from error

    def go_back(self, trouble: Trouble, batch: Batch, result: StepResult, micro_batches: Iterable[MicroBatch]) -> int:
        """Find who is to blame for `trouble`, save the batch, leave out who is blamed, and put the run back.

        Args:
            batch: this rank's part of the step's batch.
            micro_batches: that part once more, to be looked at where it is needed.

        Returns the step to go on from. Raises DivergedError when the run has gone back often enough.
        """
        again = partial(self._engine.sample_losses, batch.step, micro_batches)
        blame = self.guard.attribute(trouble, batch, result, self._engine, again)
        evidence, samples = save_batch(self._run_dir, trouble, blame, batch, self._sources, self._dist)
        facts = {"trouble": str(trouble), "blamed": blame.who, "why": blame.why, "ranks": dict(blame.ranks)}
        self._log.event("guard", trouble.step, **facts, samples=samples[:LISTED], evidence=evidence)
        self.guard.trip(trouble, blame, str(self._run_dir / evidence))
        step = self._put_back()
        self._log.event("rolled_back", trouble.step, to_step=step)
        return step

    def _put_back(self) -> int:
        """To the newest good checkpoint, or to the start if there is none yet; returns the number of steps done there.

        The guard keeps what it has left out since. Raises CheckpointError when no checkpoint can be read.
        """
        checkpoint, damage = newest_good(self._root, self._dist)
        if checkpoint is not None:
            self.load(checkpoint)
            step, state = checkpoint.step, checkpoint.state
        elif self._start is not None:
            start, state = self._start
            self._engine.rewind(start)
            self.guard.restore(state["guard"])
            step = 0
        else:
            raise CheckpointError(f"the checkpoints below {self._root} are gone, and with them what to go back to")
        self._log.go_back(state, step)
        for what in damage:
            self._log.event("fell_back", step, problem=what)
        return step
