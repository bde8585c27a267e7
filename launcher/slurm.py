"""Slurm's commands as functions: submit, look at, signal, requeue and cancel jobs. Every call has a time limit."""

from __future__ import annotations

import datetime
import logging
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from swin_scale.errors import SwinScaleError, UserError

logger = logging.getLogger(__name__)

T = TypeVar("T")
TIMEOUT_S = 60.0
RETRY_S = 5.0
RETRIES = 120
"""The controller may be away for a while: ten minutes, and then it requeues what it finds dead itself."""
OVER = frozenset(
    {
        "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED",
        "REVOKED", "TIMEOUT",
    }
)  # fmt: skip
"""States a job does not leave by itself (COMPLETING is none of them: its processes are still being ended)."""
QUEUED = frozenset(
    {"CONFIGURING", "PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
)
# Options of sbatch and srun also come from these variables, past what the script says; only SLURM_CONF says where
# the cluster is.
_INHERITED = re.compile(r"(SBATCH|SLURM|SLURMD|SRUN)_(?!CONF$)\w+")


_KILLED = "ended by signal"
_LOST = re.compile(r"DOWN|FAIL|NOT_RESPONDING|\*")


class SlurmError(SwinScaleError):
    """A Slurm command refused, or did not answer."""

    exit_code = 1


@dataclass(frozen=True, kw_only=True)
class JobFacts:
    """What Slurm says about a job."""

    job: str
    state: str
    """Base state, such as RUNNING."""
    reason: str = ""
    restarts: int = 0
    nodes: str = ""
    start: str = ""
    end: str = ""
    """Of a running job: its time limit, or the end of the grace before it is preempted."""
    partition: str = ""
    excluded: str = ""
    """Nodes that it keeps away from, as a node list."""

    @property
    def end_time(self) -> float | None:
        """`end` in seconds since 1970; None where Slurm sets no limit."""
        try:
            return datetime.datetime.fromisoformat(self.end).timestamp()  # Slurm tells local time
        except ValueError:
            return None

    @property
    def is_over(self) -> bool:
        return self.state in OVER

    @property
    def was_cancelled(self) -> bool:
        """By somebody; while its processes are ended, Slurm tells that only by naming no other reason."""
        return self.state == "CANCELLED" or (self.state == "COMPLETING" and not self.reason)

    @property
    def is_queued(self) -> bool:
        return self.state in QUEUED


def submission_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` without the options that a surrounding job would pass on."""
    return {name: value for name, value in environ.items() if not _INHERITED.fullmatch(name)}


def submit(script: Path, *, after: str | None = None, exclude: str = "") -> str:
    """Submit a batch script and return its job id.

    Args:
        after: start it only once that job ended badly, whatever the way.
        exclude: nodes to keep away from, in place of those that the script names.

    Raises UserError with sbatch's words when the cluster refuses, or when there is no Slurm.
    """
    options = [] if after is None else [f"--dependency=afternotok:{after}", "--kill-on-invalid-dep=yes"]
    options += [f"--exclude={exclude}"] if exclude else []
    try:
        answer = _call(["sbatch", "--parsable", *options, str(script)], env=submission_environment(os.environ))
    except SlurmError as error:
        raise UserError(f"{error}; change the option it names and submit again") from error
    return answer.strip().partition(";")[0]


def look_up(job: str, timeout_s: float = TIMEOUT_S) -> JobFacts | None:
    """A job's facts, from the controller or, once that forgot it, from accounting; None when neither knows it.

    Raises SlurmError when the controller does not answer in time.
    """
    try:
        return parse_job(_call(["scontrol", "show", "job", "-o", job], timeout_s=timeout_s))
    except SlurmError as error:
        if "invalid job id" not in str(error).lower():
            raise
    try:
        row = _call(["sacct", "-n", "-P", "-X", "-j", job, "-o", "State,NodeList,Start,End"]).splitlines()
    except (SlurmError, UserError):
        return None  # many clusters keep no accounts
    if not row:
        return None
    state, nodes, start, end = (row[-1].split("|") + [""] * 4)[:4]
    return JobFacts(job=job, state=state.split()[0], nodes=nodes, start=start, end=end)


def parse_job(text: str) -> JobFacts:
    """The line of ``scontrol show job -o``, fields ``Name=value`` of which only free text holds blanks."""
    names = "JobId|JobState|Reason|Restarts|NodeList|StartTime|EndTime|Partition|ExcNodeList"
    fields = dict(re.findall(rf"(?:^|\s)({names})=(\S*)", text))
    if "JobId" not in fields or "JobState" not in fields:
        raise SlurmError(f"scontrol answered {text[:200]!r}, which names no job")
    return JobFacts(
        job=fields["JobId"],
        state=fields["JobState"],
        reason=fields.get("Reason", "").replace("None", ""),
        restarts=int(fields.get("Restarts") or 0),
        nodes=fields.get("NodeList", "").replace("(null)", ""),
        start=fields.get("StartTime", ""),
        end=fields.get("EndTime", ""),
        partition=fields.get("Partition", ""),
        excluded=fields.get("ExcNodeList", "").replace("(null)", ""),
    )


def is_ended(job: str) -> bool | None:
    """Whether Slurm says that a job is over; None when it knows nothing of it, or cannot be asked."""
    try:
        facts = look_up(job)
    except (SlurmError, UserError):
        return None
    return facts.is_over if facts is not None else None


def requeue(job: str) -> None:
    """Put a job back into the queue; it gets SIGTERM if it runs. Raises SlurmError."""
    _call(["scontrol", "requeue", job])


def signal_tasks(job: str, name: str) -> None:
    """Send a signal to the tasks of a job's steps, not to its batch script. Raises SlurmError."""
    _call(["scancel", f"--signal={name}", job])


def cancel(jobs: Sequence[str]) -> None:
    """End jobs, queued or running. Raises SlurmError."""
    _call(["scancel", *jobs])


def keep_away(job: str, nodes: Iterable[str]) -> None:
    """Set the nodes that a job which waits will not run on. Raises SlurmError, for a job that runs too."""
    _call(["scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(nodes)}"])


def nodes_of(partition: str) -> list[str]:
    """The nodes of a partition, or of several with commas between, that run jobs or could. Raises SlurmError."""
    states = "idle,alloc,mix,comp"
    rows = _call(["sinfo", "--noheader", "--Node", f"--partition={partition}", f"--states={states}", "--format=%N"])
    return sorted(set(rows.split()))


def lost_nodes(nodes: str) -> list[str]:
    """Those of a node list that Slurm does not reach, or holds for dead. Raises SlurmError."""
    rows = _call(["scontrol", "show", "node", nodes, "-o"]).splitlines()
    found = [re.search(r"NodeName=(\S+).* State=(\S+)", row) for row in rows]
    return [row[1] for row in found if row is not None and _LOST.search(row[2])]


def kill_wait_s() -> float:
    """Seconds between SIGTERM and SIGKILL on this cluster. Raises SlurmError."""
    found = re.search(r"KillWait\s*=\s*(\d+)", _call(["scontrol", "show", "config"]))
    return float(found[1]) if found else 30.0


def host_names(nodes: str) -> list[str]:
    """The names in a node list such as ``n[1-3,7]``. Raises SlurmError."""
    return _call(["scontrol", "show", "hostnames", nodes]).split()


def node_address(name: str) -> str | None:
    """The address by which Slurm reaches a node; None when it says none."""
    found = re.search(r"(?:^|\s)NodeAddr=(\S+)", _call(["scontrol", "show", "node", name, "-o"]))
    return found[1] if found else None


def patiently(call: Callable[[], T]) -> T:
    """What ``call()`` returns, asked again while the controller is away; raises its last SlurmError after minutes."""
    for attempt in range(RETRIES):
        try:
            return call()
        except SlurmError as error:
            # A job that is queued again gets SIGTERM, all of its processes: the command that asks is one of them.
            if not (is_controller_away(str(error)) or _KILLED in str(error)):
                raise
            logger.warning("%s; asking again", error)
        time.sleep(RETRY_S if attempt else 1.0)
    return call()


def is_controller_away(message: str) -> bool:
    """Whether a Slurm command failed for lack of an answer, not for want of permission."""
    signs = ("unable to contact", "socket timed out", "connection refused", "gave no answer", "communication")
    return any(sign in message.lower() for sign in signs)


def _call(argv: Sequence[str], *, env: Mapping[str, str] | None = None, timeout_s: float = TIMEOUT_S) -> str:
    env = {**(os.environ if env is None else env), "SLURM_TIME_FORMAT": "standard"}
    try:
        done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=timeout_s, check=False)
    except FileNotFoundError as error:
        raise UserError(f"{argv[0]} is not on PATH; run this where Slurm is installed, such as a login node") from error
    except subprocess.TimeoutExpired as error:
        raise SlurmError(f"{' '.join(argv[:3])} gave no answer within {timeout_s:g} s") from error
    if done.returncode != 0:
        how = f"{_KILLED} {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        said = " ".join((done.stderr or done.stdout).split()) or how
        raise SlurmError(f"{' '.join(argv[:3])}: {said}")
    return done.stdout
