"""Saves in the background: the step waits for a copy in memory, and training goes on while it is written.

Each rank copies its fragments into its staging buffer and has a process of its own write them. When all ranks' files
are on the disk, a thread of rank 0 commits the checkpoint and deletes old ones. One save at a time: the next one begins
when the ranks agree that this one is over.

What the ranks tell each other goes through the store: their files as soon as each is written, and the outcome, which is
rank 0's word, where all of them ask together. So no step waits for a disk, and all ranks learn of it after the same
step.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from swin_scale.checkpoint import Fragment, discard, rank_layout, temporary_directory
from swin_scale.engine.dist import Dist
from swin_scale.engine.saving import Contents, Retention, attempt, conclude, open_save
from swin_scale.engine.staging import Staging, no_room
from swin_scale.errors import CheckpointError

logger = logging.getLogger(__name__)

COMMIT_GRACE_S = 30.0
"""How long the end of the process waits for a commit that has begun; one that is cut short costs that checkpoint."""
PAUSE_S = 0.02
"""Longest pause between two looks at a save that is waited for."""


class Fragmented(Protocol):
    """What is saved: an `Engine`."""

    def local_fragments(self) -> Iterator[Fragment]:
        """What this rank saves; the same names, ranges and dtypes each time."""
        ...


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The end of a save; the same on all ranks."""

    step: int
    problem: str | None = None
    """Why it failed; None: it is committed."""
    write_seconds: float = 0.0
    """What the slowest rank's file took, and the commit."""
    given_up: bool = False
    """It took longer than it may."""


class _Commit(threading.Thread):
    """Rank 0's last part of a save. A daemon: a file system that does not answer must not keep the process."""

    def __init__(
        self, root: Path, contents: Contents, answers: Sequence[Mapping[str, Any]], retention: Retention
    ) -> None:
        super().__init__(name="checkpoint-commit", daemon=True)
        self.step = contents.step
        self._root, self._contents, self._answers, self._retention = root, contents, answers, retention
        self.outcome: Outcome | None = None

    def run(self) -> None:
        began = time.monotonic()
        problem = conclude(self._root, self._contents, self._answers, self._retention)
        seconds = max(answer["seconds"] for answer in self._answers) + time.monotonic() - began
        self.outcome = Outcome(step=self._contents.step, problem=problem, write_seconds=seconds)


@dataclass(kw_only=True)
class _Save:
    """The one that is being written."""

    contents: Contents
    retention: Retention
    key: str
    """Of the store; one key below it for each rank's answer."""
    limit: float
    """Of `time.monotonic`: when it is given up."""
    told: bool = False
    """This rank has told how its file is."""
    told_locally: list[str] = field(default_factory=list)
    """The only rank's answer, where there is no store."""
    commit: _Commit | None = None


class BackgroundSaves:
    """The saves of one run. Every method is called by all ranks together, unless it says otherwise."""

    def __init__(self, root: Path, engine: Fragmented, dist: Dist, *, timeout_s: float) -> None:
        """Allocate this rank's buffer and start its writer; a save that takes longer than `timeout_s` has failed.

        Raises CheckpointError on all ranks where one of them has no room for it.
        """
        self._root, self._engine, self._dist, self._timeout_s = root, engine, dist, timeout_s
        self._staging: Staging | None = None
        self._save: _Save | None = None
        self._stuck: _Commit | None = None
        problems = dist.gather_json("staging", attempt(self._allocate))
        problem = dist.broadcast_json("staging", next(filter(None, problems), None) if problems else None)
        if problem is not None:
            self.close()
            raise CheckpointError(problem)

    @property
    def step(self) -> int | None:
        """Of the save that is being written; None when there is none."""
        return None if self._save is None else self._save.contents.step

    def begin(self, contents: Contents, retention: Retention) -> None:
        """Copy this rank's fragments and have them written; no other save may be under way.

        Raises CheckpointError on all ranks where rank 0 cannot begin. What goes wrong later is in the `Outcome`.
        """
        assert self._save is None
        obstacle = None
        if self._stuck is not None and self._stuck.is_alive():
            obstacle = f"the commit of step {self._stuck.step}, which was given up, still waits for the disk"
        temporary = open_save(self._root, self._dist, contents.step, obstacle)
        key = self._dist.key("checkpoint written")
        self._save = _Save(contents=contents, retention=retention, key=key, limit=time.monotonic() + self._timeout_s)
        problem = attempt(lambda: self._stage(temporary))
        if problem is not None:
            self._tell(self._save, {"problem": problem})

    def poll(self, *, agree: bool) -> Outcome | None:
        """Look after the save under way, without waiting for it; its outcome, once the ranks know it.

        Args:
            agree: whether to ask rank 0 for the outcome; the same on all ranks. Else nothing is returned.
        """
        save = self._save
        if save is None:
            return None
        outcome = self._advance(save)
        return self._agree(save, outcome, self._dist.timeout_s) if agree else None

    def settle(self, wait_s: float | None = None) -> Outcome | None:
        """Wait up to `wait_s` (None: until it has taken its whole time) for the save under way; its outcome.

        None when there was nothing to wait for, or it still is under way (`step` tells).
        """
        save = self._save
        if save is None:
            return None
        deadline = save.limit if wait_s is None else min(save.limit, time.monotonic() + wait_s)
        pause = 0.0005
        over = False
        while (outcome := self._advance(save)) is None and not over:
            if save.told and not self._dist.is_main:
                break  # the rest is rank 0's
            time.sleep(pause)
            pause = min(2 * pause, PAUSE_S)
            over = time.monotonic() > deadline
        return self._agree(save, outcome, max(0.0, deadline - time.monotonic()) + self._dist.timeout_s)

    def close(self, grace_s: float = COMMIT_GRACE_S) -> None:
        """End the writer, and with it what it was writing; this rank alone. A commit that has begun has `grace_s`."""
        save, self._save = self._save, None
        if save is not None and save.commit is not None:
            save.commit.join(grace_s)
        if self._staging is not None:
            self._staging.close()
            self._staging = None

    def _allocate(self) -> None:
        layout = rank_layout(self._dist.rank, list(self._engine.local_fragments()))
        problem = no_room(layout.bytes, self._dist.local_world)
        if problem is not None:
            raise CheckpointError(problem)
        try:
            self._staging = Staging(layout.bytes, self._dist.device)
        except OSError as error:
            raise CheckpointError(f"no staging buffer of {layout.bytes / 1e9:.2f} GB: {error.strerror}") from error
        self._staging.prepare()

    def _stage(self, temporary: Path) -> None:
        assert self._staging is not None
        layout = rank_layout(self._dist.rank, list(self._engine.local_fragments()))
        if layout.bytes > self._staging.size:
            raise CheckpointError(
                f"{layout.name}: its {layout.bytes} bytes have outgrown the {self._staging.size} staged"
            )
        self._staging.prepare()
        self._staging.copy(layout)
        self._staging.write(temporary, layout)

    def _tell(self, save: _Save, answer: Mapping[str, Any]) -> None:
        """How this rank's file is, for rank 0."""
        text = json.dumps({"problem": None, "file": None, "seconds": 0.0, **answer})
        save.told = True
        if self._dist.world == 1:
            save.told_locally.append(text)
        else:
            self._dist.store.set(f"{save.key}/{self._dist.rank}", text)

    def _answers(self, save: _Save) -> list[dict[str, Any]] | None:
        """Every rank's, once all are there (rank 0 only)."""
        texts: Sequence[str | bytes] = save.told_locally
        if self._dist.world > 1:
            keys = [f"{save.key}/{rank}" for rank in range(self._dist.world)]
            if not save.told or not self._dist.store.check(keys):
                return None
            texts = self._dist.store.multi_get(keys)
            for key in keys:
                self._dist.store.delete_key(key)
        return [json.loads(text) for text in texts] or None

    def _advance(self, save: _Save) -> Outcome | None:
        """Do what is due on this rank, without waiting; the outcome, where this is rank 0 and it is known."""
        assert self._staging is not None
        if not save.told and (answer := self._staging.poll()) is not None:
            self._tell(save, dataclasses.asdict(answer))
        if not self._dist.is_main:
            return None
        if save.commit is None and (answers := self._answers(save)) is not None:
            save.commit = _Commit(self._root, save.contents, answers, save.retention)
            save.commit.start()
        if save.commit is not None and not save.commit.is_alive():
            assert save.commit.outcome is not None, "the thread that commits failed; its traceback is in the log"
            return save.commit.outcome
        if time.monotonic() > save.limit:
            what = "committed" if save.commit is not None else "written by all ranks"
            return Outcome(
                step=save.contents.step,
                given_up=True,
                problem=f"step {save.contents.step} was not {what} within {self._timeout_s:g} s "
                "(checkpoint.write_timeout_s); look at the file system, or raise it",
            )
        return None

    def _agree(self, save: _Save, outcome: Outcome | None, timeout_s: float) -> Outcome | None:
        """Rank 0's word on every rank; once there is one, nothing is under way any more."""
        said = self._dist.broadcast_json("checkpoint outcome", outcome and dataclasses.asdict(outcome), timeout_s)
        if said is None:
            return None
        agreed, self._save = Outcome(**said), None
        if agreed.given_up:
            self._give_up(save)
        return agreed

    def _give_up(self, save: _Save) -> None:
        """End every writer that has not answered, and remove what there is."""
        assert self._staging is not None
        if self._staging.writing and (problem := attempt(self._staging.drop)) is not None:
            logger.error("%s", problem)
        self._dist.barrier("writers ended")
        if save.commit is not None:
            self._stuck = save.commit
        elif self._dist.is_main:
            discard(temporary_directory(self._root, save.contents.step))
