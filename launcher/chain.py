"""The chain of jobs that one run is: ``jobs.jsonl`` in its directory, and the decision what follows an end.

Rows, each with `time` (seconds since 1970) and `job`:

- ``submitted``: what was asked for, the code's revision, who submitted;
- ``started``: `restart` (how often Slurm queued the job again), `nodes`, `step` of the newest checkpoint;
- ``warned``: the end was near, and the ranks were asked to save; `end` of the job as Slurm told it then;
- ``blamed``: the `node` that interrupted the tasks, and `why` it is held to (see `blame`);
- ``excluded``: from here on `job`, which waits, keeps away from `nodes`;
- ``ended``: exit `code`, its `cause`, the newest checkpoint's `step`, and the `action` that follows.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from swin_scale.errors import EXIT_PREEMPTED, PeerLostError
from swin_scale.log import JsonLines, Row, read_jsonl
from swin_scale.run_dir import read_stages

MAX_STALLED = 3
"""Restarts in a row that do not bring a newer checkpoint."""
Action = Literal["done", "again", "end"]
_STEP = re.compile(r"step_(\d+)")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What follows the end of a job's tasks."""

    action: Action
    code: int
    """Exit code of the batch script."""
    reason: str


def jobs_file(run_dir: Path) -> Path:
    return run_dir / "jobs.jsonl"


def read_chain(run_dir: Path) -> list[Row]:
    """All rows, in the order in which they happened; empty for a run that Slurm never had."""
    return [row for row in read_jsonl(jobs_file(run_dir)) if isinstance(row.get("job"), str) and "event" in row]


def record(run_dir: Path, event: str, job: str, **fields: Any) -> None:
    """Append one row."""
    with JsonLines(jobs_file(run_dir)) as lines:
        lines.write([{"event": event, "job": job, "time": round(time.time(), 3), **fields}])


def newest_step(run_dir: Path) -> int:
    """Step of the newest committed checkpoint, 0 without one; a commit is one rename, so the name says all.

    Of a run in stages: the sum over its stages, which grows as it advances.
    """
    stages = read_stages(run_dir)
    if stages:
        return sum(map(newest_step, stages))
    try:
        names = [path.name for path in (run_dir / "checkpoints").iterdir()]
    except OSError:
        return 0
    return max((int(match[1]) for name in names if (match := _STEP.fullmatch(name))), default=0)


def stalled_restarts(chain: Sequence[Row], step: int) -> int:
    """Restarts, up to the newest start, that all began at the checkpoint `step`, which is still the newest one.

    A submission by hand begins to count anew: somebody looked at the run.
    """
    count = 0
    for row in reversed(chain):
        if row["event"] == "submitted" and row.get("after") is None:
            break
        if row["event"] == "started":
            if row.get("step") != step:
                break
            count += 1
    return max(0, count - 1)


def decide(
    *,
    code: int,
    cause: str,
    warned: bool,
    stop_asked: bool,
    cancelled: bool,
    stalled: int,
    step: int,
    may_restart: bool,
) -> Verdict:
    """What follows when the tasks ended with `code`: the first cause's own, or 128 and more when a signal killed it.

    `warned`: Slurm had announced the end. `stalled`: see `stalled_restarts`.
    """
    interrupted = warned or code in (EXIT_PREEMPTED, PeerLostError.exit_code) or code >= 128
    if code == 0:
        return Verdict(action="done", code=0, reason="done")
    if cancelled:
        return Verdict(action="end", code=code, reason="cancelled; submit the run again to go on")
    if stop_asked and interrupted:
        return Verdict(action="end", code=0, reason=f"stopped as asked; submit the run again to go on from step {step}")
    if not interrupted:
        return Verdict(action="end", code=code, reason=f"{cause}; submit the run again once that is mended")
    ours = code if code < 128 else PeerLostError.exit_code
    if not may_restart:
        return Verdict(action="end", code=ours, reason=f"{cause}; submit the run again to go on from step {step}")
    if stalled >= MAX_STALLED:
        return Verdict(action="end", code=ours, reason=no_progress(stalled, step, cause))
    return Verdict(action="again", code=ours, reason=cause)


def no_progress(stalled: int, step: int, cause: str) -> str:
    """Why a chain ends that could go on for ever."""
    return (
        f"{stalled} restarts in a row brought no checkpoint beyond step {step} (last cause: {cause}); read the logs, "
        "save more often (checkpoint.every_minutes) or give more time before a signal (--signal-lead), and submit the "
        "run again"
    )


def last_cause(chain: Sequence[Row]) -> str:
    """What the newest ended job died of."""
    return next((str(row.get("cause")) for row in reversed(chain) if row["event"] == "ended"), "unknown")


def jobs_of(chain: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every job of the chain, oldest first."""
    return list(dict.fromkeys(str(row["job"]) for row in chain))
