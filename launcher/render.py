"""The text that sbatch reads: a pure function from what was asked for and ``slurm/train.sbatch`` to a script."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from typing import Literal

from launcher.blame import DEFAULT_LIMIT
from swin_scale.errors import UserError
from swin_scale.files import shipped

TEMPLATE = shipped("slurm") / "train.sbatch"
Requeue = Literal["requeue", "chain", "never"]
REQUEUE: tuple[Requeue, ...] = ("requeue", "chain", "never")
MIN_LEAD_S = 60
"""A warning earlier than Slurm's own clock can tell apart is none: it looks at time limits twice a minute."""
MAX_LEAD_S = 65535

_TIME = re.compile(r"\d+(-\d+(:\d+){0,2}|(:\d+){0,2})|UNLIMITED", re.IGNORECASE)
_GPUS = re.compile(r"(?:[\w.-]+:)?(?P<count>\d+)")
_OPTION = re.compile(r"[a-z][a-z-]*")
# What the script is built on: set twice, Slurm would take the later one.
_OWNED = {
    "nodes": "--nodes", "ntasks-per-node": "--tasks-per-node", "ntasks": "--nodes and --tasks-per-node",
    "gpus-per-node": "--gpus-per-node", "gres": "--gpus-per-node", "time": "--time", "partition": "--partition",
    "account": "--account", "qos": "--qos", "constraint": "--constraint", "exclude": "--exclude", "mem": "--mem",
    "cpus-per-task": "--cpus-per-task", "signal": "--signal-lead", "requeue": "--restart", "no-requeue": "--restart",
    "chdir": "nothing: the job runs where it is submitted", "output": "nothing: it is below the run directory",
    "error": "nothing: it is below the run directory", "open-mode": "nothing: output is appended",
    "job-name": "--job-name", "array": "nothing: one job is one run", "dependency": "--after",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class BatchJob:
    """One submission. What is None is left to the cluster's defaults."""

    name: str
    run_dir: str
    """Absolute, and the same directory on every node."""
    config: str
    """The frozen config the tasks read; absolute."""
    workdir: str
    """Where relative paths of the config start."""
    python: str
    """Interpreter that has the package, on every node."""
    nodes: int
    tasks_per_node: int
    gpus_per_node: str | None
    """``8`` or ``a100:8``; None asks for no GPUs."""
    time: str | None = None
    """As sbatch takes it: minutes, h:m:s or days-h."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    mem: str | None = None
    cpus_per_task: int | None = None
    signal_lead_s: int = 120
    """Seconds before the time limit at which the ranks are asked to save; Slurm may be a minute early, never late."""
    restart: Requeue = "requeue"
    """After an interruption: the job is queued `requeue` again, followed by a `chain`ed one, or `never` goes on."""
    after: str | None = None
    """Another submission's job, which must end first."""
    bad_node_limit: int = DEFAULT_LIMIT
    """Interruptions by one node, from which on the run keeps away from it; 0: never."""
    allow_change: bool = False
    """Handed to `train`."""
    options: tuple[tuple[str, str], ...] = ()
    """More options of sbatch, by long name."""

    @property
    def ranks(self) -> int:
        return self.nodes * self.tasks_per_node


def render(job: BatchJob, template: str) -> str:
    """The batch script of `job`; raises UserError naming the option that cannot be."""
    check(job)
    lines = "\n".join(f"#SBATCH --{name}" + (f"={_quoted(name, value)}" if value else "") for name, value in _rows(job))
    command = [job.python, "-m", "launcher.batch", job.run_dir, job.config, "--restart", job.restart]
    command += ["--allow-change"] * job.allow_change
    command += [f"--exclude-after={job.bad_node_limit}"] * (job.bad_node_limit != DEFAULT_LIMIT)
    text = template.replace("@OPTIONS@", lines).replace("@SUPERVISOR@", shlex.join(command))
    assert lines in text and job.restart in text, "the template lost a placeholder"
    return text


def gpu_count(gpus_per_node: str | None) -> int:
    """GPUs of one node; raises UserError for what is neither ``8`` nor ``a100:8``."""
    if gpus_per_node is None:
        return 0
    match = _GPUS.fullmatch(gpus_per_node)
    if match is None:
        raise UserError(f"--gpus-per-node is {gpus_per_node!r}; write a number, or a type and a number such as a100:8")
    return int(match["count"])


def check(job: BatchJob) -> None:
    """Refuse what no cluster can run, or what would not be one task per GPU; raises UserError."""
    for flag, value in (("--nodes", job.nodes), ("--tasks-per-node", job.tasks_per_node)):
        if value < 1:
            raise UserError(f"{flag} is {value}; ask for at least 1")
    if job.bad_node_limit < 0:
        raise UserError(f"--exclude-after is {job.bad_node_limit}; give a number of interruptions, or 0 for never")
    if job.cpus_per_task is not None and job.cpus_per_task < 1:
        raise UserError(f"--cpus-per-task is {job.cpus_per_task}; ask for at least 1")
    gpus = gpu_count(job.gpus_per_node)
    if gpus and gpus != job.tasks_per_node:
        raise UserError(
            f"--tasks-per-node is {job.tasks_per_node} and --gpus-per-node {job.gpus_per_node}; one task runs on one "
            "GPU, so leave --tasks-per-node out"
        )
    if job.time is not None and not _TIME.fullmatch(job.time):
        raise UserError(f"--time is {job.time!r}; write minutes, h:m:s, days-h or days-h:m:s, such as 24:00:00")
    if not MIN_LEAD_S <= job.signal_lead_s <= MAX_LEAD_S:
        raise UserError(f"--signal-lead is {job.signal_lead_s} s; choose {MIN_LEAD_S} to {MAX_LEAD_S}")
    limit = time_limit_s(job.time)
    if limit is not None and job.signal_lead_s >= limit:
        raise UserError(
            f"--signal-lead of {job.signal_lead_s} s leaves nothing of --time {job.time} to train in; ask for more time"
        )
    for name, _ in job.options:
        if not _OPTION.fullmatch(name):
            raise UserError(f"--sbatch {name!r} is not the long name of an option of sbatch, such as reservation=R")
        if name in _OWNED:
            raise UserError(f"--sbatch {name} is set by the launcher; use {_OWNED[name]}")


def time_limit_s(time: str | None) -> int | None:
    """Seconds of a time limit as sbatch reads it; None without one."""
    if time is None or time.upper() == "UNLIMITED":
        return None
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, [*parts, 0][:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _rows(job: BatchJob) -> list[tuple[str, str | None]]:
    rows: list[tuple[str, str | None]] = [
        ("job-name", job.name),
        ("partition", job.partition),
        ("account", job.account),
        ("qos", job.qos),
        ("constraint", job.constraint),
        ("exclude", job.exclude),
        ("nodes", str(job.nodes)),
        ("ntasks-per-node", str(job.tasks_per_node)),
        ("gpus-per-node", job.gpus_per_node),
        ("cpus-per-task", None if job.cpus_per_task is None else str(job.cpus_per_task)),
        ("mem", job.mem),
        ("time", job.time),
        # To the batch script alone, which knows whether somebody asked to stop; it passes the signal on.
        ("signal", f"B:USR1@{job.signal_lead_s}"),
        ("dependency", None if job.after is None else f"afterany:{job.after}"),
        ("chdir", job.workdir),
        # Slurm reads % as the start of a pattern.
        ("output", f"{job.run_dir.replace('%', '%%')}/logs/slurm-%j.out"),
        ("open-mode", "append"),
        *job.options,
    ]
    given: list[tuple[str, str | None]] = [(name, value) for name, value in rows if value is not None]
    return [*given, ("requeue" if job.restart == "requeue" else "no-requeue", None)]


def _quoted(name: str, value: str) -> str:
    """`value` as sbatch reads it from a script: quotes hold blanks and #, which would end it."""
    if not value.isprintable() or '"' in value or "\\" in value:
        raise UserError(f"--{name} is {value!r}; sbatch scripts cannot hold line ends, double quotes or backslashes")
    return f'"{value}"' if re.search(r"[\s#']", value) else value
