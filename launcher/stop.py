"""Ending a run from outside: asked to save first, or at once."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from launcher import chain, slurm
from launcher.status import live_jobs, require_run
from swin_scale.errors import UserError
from swin_scale.run_dir import stop_file
from swin_scale.run_lock import judge, owners, this_process


def stop(run_dir: Path) -> str:
    """Ask a run to save and end, and its chain to go no further; returns what was done. Raises UserError.

    A job that waits is cancelled, since it has nothing to save. Tasks of a running one, or the process of a local run
    on this machine, get SIGUSR1; ranks also look for the stop file, which reaches them on any machine.
    """
    require_run(run_dir)
    file = _leave_stop_file(run_dir)
    done = []
    if chain.read_chain(run_dir):
        for job in live_jobs(run_dir):
            if job.is_queued:
                slurm.cancel([job.job])
                done.append(f"cancelled job {job.job}, which had not started")
            else:
                slurm.signal_tasks(job.job, "USR1")
                done.append(f"asked job {job.job} to save and end")
    if not done:  # started by hand, after a chain of jobs perhaps
        me = this_process()
        for owner in owners(run_dir):
            over = slurm.is_ended(owner.job) if owner.job else None
            verdict = judge(owner, me, lock_is_ours=None, job_is_over=over)
            if owner.host == me.host and verdict == "alive":
                os.kill(owner.pid, signal.SIGUSR1)
                done.append(f"asked process {owner.pid} to save and end")
            elif verdict == "unknown":
                done.append(f"left {file} for process {owner.pid} on {owner.host}, which looks for it")
    if not done:
        file.unlink(missing_ok=True)
        return f"nothing runs in {run_dir}"
    return "; ".join(done)


def cancel(run_dir: Path) -> str:
    """End all jobs of a run's chain, those that wait first, so that none follows. Raises UserError or SlurmError."""
    require_run(run_dir)
    if not chain.read_chain(run_dir):
        raise UserError(f"{run_dir} was not submitted to Slurm; end a local run with `swin-scale stop` or Ctrl-C")
    _leave_stop_file(run_dir)  # or a job that was about to end would be queued again
    jobs = sorted(live_jobs(run_dir), key=lambda job: not job.is_queued)
    for job in jobs:
        slurm.cancel([job.job])
    return f"cancelled job {', '.join(job.job for job in jobs)}" if jobs else f"nothing runs in {run_dir}"


def _leave_stop_file(run_dir: Path) -> Path:
    file = stop_file(run_dir)
    try:
        file.touch()
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror}; make {run_dir} writable") from error
    return file
