"""Which node interrupted a run, by the best evidence there is, and which of them its next job keeps away from.

A node that kills or hangs a run is often let back into the cluster, and does it again. Rows ``blamed`` of
``jobs.jsonl`` say when, which and why; ``excluded``, from when on the chain's jobs kept away from which. The evidence,
the surest first: the watchdog's verdict; nodes that Slurm has lost; srun's word on which task a signal ended first.
What ends a run by itself, an exit code of our own, blames nobody.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from swin_scale.log import Row
from swin_scale.run_dir import read_stages

DEFAULT_LIMIT = 2
"""Interruptions by one node, from which on it is not used again."""
_LOST = re.compile(r"^srun: error: Node failure on (?P<node>[\w.-]+)", re.MULTILINE)
_ENDED = re.compile(r"^srun: error: (?P<node>[\w.-]+): (?P<why>tasks? \S+: (?P<how>.+))$", re.MULTILINE)
# From here on srun, or Slurm, ends the tasks that are left.
_ENDING = re.compile(r"^(?:srun: .*Terminating|srun: Job step aborted|slurmstepd\S*: error: \*\*\*)", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Blame:
    """A node, and what it did."""

    node: str
    why: str


def blamed_by_verdict(run_dir: Path, *, since: float, nodes: Sequence[str], tasks_per_node: int) -> Blame | None:
    """The node of the rank that the newest verdict below ``crash/`` blames, if that was written after `since`.

    Args:
        since: seconds since 1970.
        nodes: those of the job, in Slurm's order, each with `tasks_per_node` ranks.
    """
    places = [run_dir, *read_stages(run_dir)]
    found = [(file.stat().st_mtime, file) for place in places for file in (place / "crash").glob("*/verdict.json")]
    fresh = [file for written, file in sorted(found) if written >= since]
    try:
        verdict = json.loads(fresh[-1].read_bytes()) if fresh else {}
        rank, why = int(verdict["rank"]), str(verdict.get("verdict", "hung"))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not verdict.get("fatal", True):
        return None
    # By name where ranks were placed in another order; hosts may call themselves by longer names than Slurm does.
    host = str(verdict.get("host") or "").partition(".")[0]
    named = next((node for node in nodes if node.partition(".")[0] == host), None)
    place = rank // tasks_per_node
    node = named or (nodes[place] if 0 <= place < len(nodes) else None)
    return Blame(node=node, why=why) if node else None


def blamed_by_srun(said: str) -> Blame | None:
    """The node of the task that a signal ended first, or that srun lost; None where several went at once, or none."""
    lost = _LOST.search(said)
    if lost is not None:
        return Blame(node=lost["node"], why="lost by Slurm")
    ending = _ENDING.search(said)
    first = _ENDED.search(said if ending is None else said[: ending.start()])
    # An exit code is a program's own word: that of a rank whose peer vanished, for instance.
    if first is None or first["how"].startswith("Exited"):
        return None
    return Blame(node=first["node"], why=first["why"])


def counts(chain: Sequence[Row]) -> Counter[str]:
    """How often each node is to blame since the run was last submitted by hand: somebody has looked at it then."""
    found: Counter[str] = Counter()
    for row in chain:
        if row["event"] == "submitted" and row.get("after") is None:
            found.clear()
        elif row["event"] == "blamed":
            found[str(row.get("node"))] += 1
    return found


def to_avoid(blamed: Counter[str], *, limit: int, usable: Collection[str], needed: int) -> list[str]:
    """Nodes to keep away from: those to blame `limit` times, the worst first, as long as `needed` others are left.

    `usable`: those that the job may run on, so that it does not wait for ever.
    """
    worst = [node for node, count in blamed.most_common() if 0 < limit <= count]
    left, avoided = set(usable), []
    for node in worst:
        if node not in left:
            avoided.append(node)
        elif len(left) > needed:
            left.remove(node)
            avoided.append(node)
    return avoided
