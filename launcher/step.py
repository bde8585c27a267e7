"""The tasks of one generation of a job, from `srun` to its exit code; Slurm's warnings on their way to the ranks.

Ranks are asked to save by SIGUSR1, and by then ``deadline.json`` says when they will be killed. That comes when Slurm
announces an end, or before it does, when the run's own saves have turned out to take longer than ``--signal-lead``.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launcher import chain, slurm
from launcher.status import save_seconds
from swin_scale.errors import UserError
from swin_scale.run_dir import LOOKED, deadline_file, write_deadline

logger = logging.getLogger("launcher.batch")

POLL_S = 0.1
LOOK_S = 30.0
"""How often the time that is left is compared with the time that a save takes."""
HURRY_S = 3.0
"""For an answer of Slurm's that the ranks wait for."""
KILL_MARGIN_S = 2.0
"""Left of Slurm's KillWait for queueing the job again."""
KILL_WAIT_S = 30.0
"""Slurm's own default."""
DEFAULT_LEAD_S = 120
# Variables by which another launcher would tell the tasks to be somebody else.
_FOREIGN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One life of a job: Slurm gives a job that it queues again the same id, and counts."""

    job: str
    restart: int
    nodes: int
    tasks_per_node: int
    nodelist: str

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Generation:
        """Read sbatch's variables; raises UserError outside of a batch job."""
        try:
            return cls(
                job=environ["SLURM_JOB_ID"],
                restart=int(environ.get("SLURM_RESTART_COUNT") or 0),  # unset in a job's first life
                nodes=int(environ["SLURM_JOB_NUM_NODES"]),
                tasks_per_node=int(environ["SLURM_NTASKS_PER_NODE"]),
                nodelist=environ["SLURM_JOB_NODELIST"],
            )
        except (KeyError, ValueError) as error:
            raise UserError(f"{error} is not set as in a batch job; submit with `swin-scale launch slurm`") from error


def default_lead(save_s: float | None, limit_s: float | None) -> int:
    """Seconds before the time limit: three times the slowest save seen and a minute, but no more than half the time."""
    from launcher.render import MAX_LEAD_S, MIN_LEAD_S

    lead = max(DEFAULT_LEAD_S, 60 + math.ceil(3 * (save_s or 0.0)))
    if limit_s is not None:
        lead = min(lead, max(MIN_LEAD_S, int(limit_s) // 2))
    return min(lead, MAX_LEAD_S)


def needed_lead(save_s: float | None) -> float:
    """Seconds before the end at which ranks must be asked at the latest: a step may come first, and a save be slow."""
    return 0.0 if save_s is None else 20 + 1.5 * save_s


@dataclass
class Step:
    """The running tasks, and what Slurm said of their job meanwhile."""

    run_dir: Path
    command: Sequence[str]
    """What each task runs."""
    generation: Generation
    environ: Mapping[str, str]
    received: list[int]
    """Signals, in order, that a handler adds to."""
    warned: bool = False
    """The end was announced, and the ranks were asked to save."""
    _kill_wait: float = KILL_WAIT_S
    _seen: tuple[int, float | None] = field(default=(-1, None))
    """Newest checkpoint, and the slowest save up to it."""

    def run(self) -> int:
        """One task per GPU; srun's exit code, which is 128 + n when signal n ended it."""
        me = self.generation
        deadline_file(self.run_dir).unlink(missing_ok=True)  # of an earlier generation
        limit = self._limit()
        logger.info("job %s, start %d, on %s: %s", me.job, me.restart, me.nodelist, " ".join(self.command))
        # In a group of its own: what the shell's group gets is meant for this process.
        tasks = subprocess.Popen([*self._srun(), *self.command], env=self._environment(), start_new_session=True)
        handled, last_call, look = 0, float("inf"), time.monotonic() + LOOK_S
        while tasks.poll() is None and time.monotonic() < last_call:
            for number in self.received[handled:]:
                handled += 1
                if number == signal.SIGUSR1:
                    self._warn(tasks, "Slurm announced the end of this job", limit)
                elif last_call == float("inf"):
                    last_call = time.monotonic() + self._time_left()
            if limit is not None and not self.warned and time.monotonic() >= look:
                look = time.monotonic() + LOOK_S
                limit = self._look_ahead(limit, tasks)
            time.sleep(POLL_S)
        code = tasks.poll()
        if code is None:
            logger.error("the tasks did not end in time; what they were saving is lost, older checkpoints stay")
            return 128 + signal.SIGKILL
        return 128 - code if code < 0 else code

    def _srun(self) -> list[str]:
        argv = [
            "srun",
            f"--nodes={self.generation.nodes}",
            # Without it tasks may be spread unevenly, three on one node and one on another.
            f"--ntasks-per-node={self.generation.tasks_per_node}",
            # A task that fails must end the others, or they wait for it until engine.timeout_s.
            "--kill-on-bad-exit=1",
        ]
        if "SLURM_CPUS_PER_TASK" in self.environ:  # from 22.05 on, srun does not take it from the job
            argv.append(f"--cpus-per-task={self.environ['SLURM_CPUS_PER_TASK']}")
        return argv

    def _environment(self) -> dict[str, str]:
        env = {name: value for name, value in self.environ.items() if name not in _FOREIGN}
        address = master_address(self.generation.nodelist)
        if address is not None:
            env["MASTER_ADDR"] = address
        env[LOOKED] = "1"
        return env

    def _limit(self) -> float | None:
        """When Slurm means to end this job, in seconds since 1970; None where nothing says so."""
        try:
            self._kill_wait = slurm.kill_wait_s()
        except (slurm.SlurmError, UserError) as error:
            logger.warning("%s", error)
        facts = self._facts()
        return facts.end_time if facts is not None else None

    def _look_ahead(self, limit: float, tasks: subprocess.Popen[bytes]) -> float | None:
        """Ask the ranks to save when the time left will soon be less than a save takes; the limit, as it is now."""
        step = chain.newest_step(self.run_dir)
        if step != self._seen[0]:
            self._seen = step, save_seconds(self.run_dir)
        lead = needed_lead(self._seen[1])
        if limit - time.time() > lead + LOOK_S:
            return limit
        facts = self._facts()  # it may have been moved
        limit = limit if facts is None or facts.end_time is None else facts.end_time
        if lead and limit - time.time() <= lead + LOOK_S:
            left_s = limit - time.time()
            self._warn(tasks, f"a save takes {self._seen[1]:.0f} s, and this job has {left_s:.0f} s left", limit)
        return limit

    def _time_left(self) -> float:
        """Seconds that the tasks may take from SIGTERM on: where Slurm ends the job, this process is killed too."""
        self._tell_deadline(time.time(), "SIGTERM")
        facts = self._facts(HURRY_S)
        if facts is None:
            return float("inf")
        queued_again = facts.is_queued or facts.restarts > self.generation.restart
        ends = queued_again or facts.reason == "TimeLimit" or facts.state == "COMPLETING"
        return max(1.0, self._kill_wait - KILL_MARGIN_S) if ends else float("inf")

    def _warn(self, tasks: subprocess.Popen[bytes], why: str, limit: float | None) -> None:
        """The end is near: srun hands the signal to every task, which finds the time it has left in a file.

        `limit`: the job's end as it was known. A preempted job ends sooner; a controller that is too busy to say so is
        not waited for.
        """
        logger.warning("%s; asking the ranks to save", why)
        me = self.generation
        facts = self._facts(HURRY_S)
        end = facts.end_time if facts is not None and facts.end_time is not None else limit
        if end is not None:
            self._tell_deadline(max(end, time.time()), why)
        tasks.send_signal(signal.SIGUSR1)
        if not self.warned:
            chain.record(self.run_dir, "warned", me.job, restart=me.restart, end=end)
        self.warned = True

    def _tell_deadline(self, end: float, why: str) -> None:
        """Ranks get SIGTERM at `end`, which asks once more, and SIGKILL after `KillWait`."""
        try:
            write_deadline(self.run_dir, end + self._kill_wait - KILL_MARGIN_S, why)
        except OSError as error:
            logger.warning("%s cannot be written: %s", deadline_file(self.run_dir), error.strerror)

    def _facts(self, timeout_s: float = slurm.TIMEOUT_S) -> slurm.JobFacts | None:
        for attempt in range(2):
            try:
                return slurm.look_up(self.generation.job, timeout_s)
            except (slurm.SlurmError, UserError) as error:  # SIGTERM may have met the one that asks
                logger.log(logging.WARNING if attempt else logging.DEBUG, "%s", error)
        return None


def output_file(run_dir: Path, job: str) -> Path:
    """What the batch script, srun and rank 0 wrote, in all generations of a job."""
    return run_dir / "logs" / f"slurm-{job}.out"


def output_size(run_dir: Path, job: str) -> int:
    """Bytes of `output_file` up to now."""
    try:
        return os.stat(output_file(run_dir, job)).st_size
    except OSError:
        return 0


def master_address(nodelist: str) -> str | None:
    """Address of rank 0's node when its name does not resolve; None where the name will do."""
    try:
        first = slurm.host_names(nodelist)[0]
        try:
            socket.getaddrinfo(first, None)
        except socket.gaierror:
            return slurm.node_address(first)
    except (slurm.SlurmError, UserError, IndexError) as error:
        logger.warning("cannot tell whether %s resolves: %s", nodelist, error)
    return None
