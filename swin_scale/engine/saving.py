"""Checkpoints of a running job: all ranks write, one commits; all ranks verify, and agree on which to resume from.

What ranks tell each other (file summaries, verdicts) goes through the store as JSON: a save makes no tensor collective.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from swin_scale.checkpoint import (
    MAX_ATTEMPTS,
    Checkpoint,
    LoadAttempts,
    Manifest,
    RankFile,
    begin,
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
from swin_scale.errors import CheckpointError, DataError, UserError

logger = logging.getLogger(__name__)


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

    Raises CheckpointError on all ranks when any of them could not write; nothing is left behind and older checkpoints
    stay. Extra memory is one write buffer per rank.
    """
    temporary = temporary_directory(root, step)
    problem = _attempt(lambda: begin(root, step)) if dist.is_main else None
    problem = dist.broadcast_json("checkpoint begun", problem)
    if problem is None:
        written: dict[str, Any] = {}

        def write() -> None:
            written.update(dataclasses.asdict(write_rank_file(temporary, dist.rank, list(engine.local_fragments()))))

        failure = _attempt(write)
        answers = dist.gather_json("checkpoint written", {"problem": failure, "file": written})
        if dist.is_main:
            assert answers is not None
            problem = next((answer["problem"] for answer in answers if answer["problem"]), None)
            if problem is None:
                files = [_rank_file(answer["file"]) for answer in answers]
                problem = _attempt(
                    lambda: commit(
                        temporary,
                        step=step,
                        rank_files=files,
                        state={**engine.state(), **state},
                        config_text=config_text,
                        parameters=engine.parameters_table(),
                        model=model,
                    )
                )
            else:
                discard(temporary)
        problem = dist.broadcast_json("checkpoint committed", problem)
    if problem is not None:
        raise CheckpointError(problem)
    if dist.is_main:
        LoadAttempts(root).clear(step_directory(root, step))
        # Files are verified when they are read; re-reading them here would cost a second write's time.
        prune(root, keep, every_hours=keep_every_hours, verify=False)
    return step_directory(root, step)


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

    What ends the block with a cause of its own (wrong input, data, an interrupt) does not.
    """
    if dist.is_main:
        LoadAttempts(root).begin(step_directory(root, step))
    dist.barrier("load counted")
    try:
        yield
    except (UserError, DataError, KeyboardInterrupt):
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


def _attempt(action: Any) -> str | None:
    """Run `action`; the message of its CheckpointError, to be told to the other ranks."""
    try:
        action()
    except CheckpointError as error:
        return str(error)
    return None


def _rank_file(summary: Mapping[str, Any]) -> RankFile:
    rows = tuple((r[0], r[1], r[2], r[3], r[4], r[5]) for r in summary["fragments"])
    return RankFile(name=summary["name"], bytes=summary["bytes"], xxh3_128=summary["xxh3_128"], fragments=rows)
