"""Checkpoints of a running job: all ranks write, one commits; all ranks verify, and agree on which to resume from.

What ranks tell each other (file summaries, verdicts) goes through the store as JSON: a save makes no tensor collective.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swin_scale.checkpoint import (
    MAX_ATTEMPTS,
    Checkpoint,
    LoadAttempts,
    Manifest,
    RankFile,
    begin,
    best_of,
    commit,
    discard,
    list_steps,
    prune,
    recover,
    step_directory,
    temporary_directory,
    verify,
    write_rank_file,
)
from swin_scale.engine.dist import Dist
from swin_scale.engine.engine import Engine
from swin_scale.errors import CheckpointError, DataError, PreemptedError, UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a checkpoint holds beside fragments; the same on all ranks."""

    step: int
    state: Mapping[str, Any]
    config_text: str
    parameters: Mapping[str, Mapping[str, Any]]
    model: Mapping[str, Any]

    @classmethod
    def of(
        cls, engine: Engine, *, step: int, state: Mapping[str, Any], config_text: str, model: Mapping[str, Any]
    ) -> Contents:
        """As `engine` is now; `state` is what it does not know itself."""
        return cls(
            step=step,
            state={**engine.state(), **state},
            config_text=config_text,
            parameters=engine.parameters_table(),
            model=model,
        )


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Which checkpoints stay once a new one is committed: the newest `keep`, and the pinned ones."""

    keep: int
    every_hours: float | None = None
    best: int = 0
    """So many of those with the highest `figures`."""
    figures: Mapping[int, float] = field(default_factory=dict)
    """Of evaluated steps; higher is better."""


def save(
    root: Path,
    engine: Engine,
    dist: Dist,
    *,
    step: int,
    state: Mapping[str, Any],
    config_text: str,
    model: Mapping[str, Any],
    keep: int,
    keep_every_hours: float | None = None,
) -> Path:
    """Write and commit the checkpoint of `step`; all ranks call this together and get its directory.

    Raises as `save_now`.
    """
    contents = Contents.of(engine, step=step, state=state, config_text=config_text, model=model)
    return save_now(root, engine, dist, contents, Retention(keep=keep, every_hours=keep_every_hours))


def save_now(root: Path, engine: Engine, dist: Dist, contents: Contents, retention: Retention) -> Path:
    """Write and commit `contents` and all ranks' fragments, and wait for the disk; returns the checkpoint's directory.

    Raises CheckpointError on all ranks when any of them could not write; nothing is left behind and older checkpoints
    stay. Extra memory is one write buffer per rank.
    """
    temporary = open_save(root, dist, contents.step)
    written: list[RankFile] = []
    problem = attempt(lambda: written.append(write_rank_file(temporary, dist.rank, list(engine.local_fragments()))))
    report = {"problem": problem, "file": dataclasses.asdict(written[0]) if written else None}
    answers = dist.gather_json("checkpoint written", report)
    if dist.is_main:
        assert answers is not None
        problem = conclude(root, contents, answers, retention)
    problem = dist.broadcast_json("checkpoint committed", problem)
    if problem is not None:
        raise CheckpointError(problem)
    return step_directory(root, contents.step)


def open_save(root: Path, dist: Dist, step: int, obstacle: str | None = None) -> Path:
    """The empty directory in which all ranks write the checkpoint of `step`.

    Raises CheckpointError on all ranks when rank 0 cannot make it, or says that `obstacle` is in the way.
    """
    problem = (obstacle or attempt(lambda: begin(root, step))) if dist.is_main else None
    problem = dist.broadcast_json("checkpoint begun", problem)
    if problem is not None:
        raise CheckpointError(problem)
    return temporary_directory(root, step)


def conclude(root: Path, contents: Contents, answers: Sequence[Mapping[str, Any]], retention: Retention) -> str | None:
    """Commit what the ranks say that they wrote, and delete what is not kept (rank 0 only); why it was not committed.

    Args:
        answers: each rank's ``problem``, or its ``file`` (a `RankFile` as JSON).
    """
    temporary = temporary_directory(root, contents.step)
    problem: str | None = next((answer["problem"] for answer in answers if answer["problem"]), None)
    if problem is not None:
        discard(temporary)
        return problem
    problem = attempt(
        lambda: commit(
            temporary,
            step=contents.step,
            rank_files=[_rank_file(answer["file"]) for answer in answers],
            state=contents.state,
            config_text=contents.config_text,
            parameters=contents.parameters,
            model=contents.model,
        )
    )
    if problem is None:
        try:
            LoadAttempts(root).clear(step_directory(root, contents.step))
            best = best_of(list_steps(root), retention.figures, retention.best)
            # Files are verified when they are read; re-reading them here would cost a second write's time.
            prune(root, retention.keep, every_hours=retention.every_hours, best=best, verify=False)
        except OSError as error:  # it is committed; what is too many now goes after the next one
            logger.warning("step %d is saved, and older ones stay: %s", contents.step, error)
    return problem


def newest_good(root: Path, dist: Dist) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose files match their digests, opened on every rank, and what was wrong with newer ones.

    Ranks share the reading. One whose last `MAX_ATTEMPTS` loads ended the run (`loading`) is passed over.
    Raises CheckpointError when there are checkpoints and none is good.
    """
    attempts = LoadAttempts(root)
    if dist.is_main:
        recover(root)
    steps = dist.broadcast_json("checkpoint steps", list_steps(root) if dist.is_main else None)
    damage: list[str] = []
    for step in reversed(steps):
        directory = step_directory(root, step)
        crashes = dist.broadcast_json("load attempts", attempts.count(directory) if dist.is_main else None)
        if crashes >= MAX_ATTEMPTS:
            damage.append(f"{directory} ended the run {crashes} times in a row while it was loaded ({attempts.path})")
            logger.error("%s", damage[-1])
            continue
        problems = dist.gather_json("checkpoint verified", _verify_share(directory, dist.rank, dist.world))
        found = sorted({p for share in problems for p in share}) if problems is not None else None
        found = dist.broadcast_json("checkpoint verdict", found)
        if not found:
            return Checkpoint.open(directory, verify=False), damage
        damage += found
        if dist.is_main:
            logger.error("checkpoint of step %d is damaged: %s", step, "; ".join(found))
    if steps:
        raise CheckpointError(
            f"none of the {len(steps)} checkpoints below {root} is good: {'; '.join(damage)}; restore one, remove "
            f"{attempts.path.name} if loads ended for another reason, or remove them all to start from the beginning"
        )
    return None, damage


@contextlib.contextmanager
def loading(root: Path, dist: Dist, step: int) -> Iterator[None]:
    """The checkpoint of `step` is about to be loaded: the process's end counts against it until `load_survived`.

    What ends the block with a cause of its own (wrong input, data, a request to end, an interrupt) does not.
    """
    if dist.is_main:
        LoadAttempts(root).begin(step_directory(root, step))
    dist.barrier("load counted")
    try:
        yield
    except (UserError, DataError, PreemptedError, KeyboardInterrupt):
        LoadAttempts(root).clear(step_directory(root, step))
        raise


def load_survived(root: Path, dist: Dist, step: int) -> None:
    """A step was done since the checkpoint of `step` was loaded: it does not end the run."""
    if dist.is_main:
        LoadAttempts(root).clear(step_directory(root, step))


def _verify_share(directory: Path, rank: int, world: int) -> list[str]:
    try:
        names = sorted(Manifest.load(directory).files)
        problems = verify(directory, names[rank::world])
        if rank == 0 and not problems:
            Checkpoint.open(directory, verify=False).close()
    except CheckpointError as error:
        return [str(error)]
    return problems


def attempt(action: Callable[[], object]) -> str | None:
    """Run `action`; the message of its CheckpointError, or of an OSError, to be told to the other ranks."""
    try:
        action()
    except CheckpointError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename or 'the run directory'}: {error.strerror or error}"
    return None


def _rank_file(summary: Mapping[str, Any]) -> RankFile:
    rows = tuple((r[0], r[1], r[2], r[3], r[4], r[5]) for r in summary["fragments"])
    return RankFile(name=summary["name"], bytes=summary["bytes"], xxh3_128=summary["xxh3_128"], fragments=rows)
