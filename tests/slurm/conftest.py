"""A real Slurm of three nodes on this machine, for the length of the tests that need it (`make test-slurm`)."""

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from launcher import slurm
from launcher.chain import jobs_of, read_chain
from swin_scale.log import read_jsonl, read_metrics
from tests import runs

SCRIPT = Path(__file__).with_name("cluster.sh")
SLOW_DISK = Path(__file__).parent.parent / "slow_disk"
ASKED = bool(os.environ.get("REQUIRE_SLURM"))
"""By `make test-slurm`, where a missing Slurm is a failure."""
WHY_NOT = (
    "run by `make test-slurm`, one after the other"
    if shutil.which("slurmctld")
    else "slurmctld is not installed; `make test-slurm` installs it"
)
NODES = 3
KILL_WAIT_S = 12
"""From SIGTERM to SIGKILL: enough for a step and a save of a nano model on a machine that does other things too."""
MAX_STEPS = 16


def starts(run_dir):
    """The checkpoint's step that each start began from."""
    return [row["step"] for row in read_chain(run_dir) if row["event"] == "started"]


def ends(run_dir):
    """Exit code of the tasks of each start, and what followed."""
    return [(row["code"], row["action"]) for row in read_chain(run_dir) if row["event"] == "ended"]


def blamed(run_dir):
    """The nodes that interrupted the run, in order."""
    return [row["node"] for row in read_chain(run_dir) if row["event"] == "blamed"]


def trained_lives(run_dir):
    """How many starts of the run have done a step."""
    kinds = [row.get("event", "step") for row in read_jsonl(run_dir / "metrics.jsonl")]
    return sum(pair == ("start", "step") for pair in itertools.pairwise(k for k in kinds if k in ("start", "step")))


class Cluster:
    """What the tests do to the cluster, and through it."""

    def __init__(self, directory, outputs):
        self.directory, self.outputs = directory, outputs
        settings = {"DIR": directory, "NODES": NODES, "CPUS": 8, "KILLWAIT": KILL_WAIT_S}
        self.environ = {**os.environ, **{f"CLUSTER_{name}": str(value) for name, value in settings.items()}}

    def sh(self, *arguments):
        """One command of cluster.sh."""
        argv = [str(SCRIPT), *arguments]
        done = subprocess.run(argv, env=self.environ, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def cli(self, *arguments, fault="", slow_disk=0.0):
        """`swin-scale` as on a login node; its completed process."""
        argv = [sys.executable, "-m", "swin_scale", *map(str, arguments)]
        env = runs.environment(fault)
        if slow_disk:
            env.update(PYTHONPATH=str(SLOW_DISK), SLOW_DISK_S=str(slow_disk))
        return subprocess.run(argv, env=env, capture_output=True, text=True, timeout=120)

    def submit(self, run_dir, train, *flags, nodes=2, fault="", slow_disk=0.0, **settings):
        """A nano run through `launch slurm`; its job.

        `fault`: see tests/injected; `slow_disk`: seconds that an fsync takes in the job's first life, else.
        """
        _, _, _, _, *arguments = runs.command(run_dir, train, nproc=1, **settings)
        return self.launch(*arguments, *flags, nodes=nodes, fault=fault, slow_disk=slow_disk)

    def launch(self, *arguments, nodes=2, **options):
        """As `submit`, any config."""
        sizes = ["--nodes", nodes, "--gpus-per-node", 1, "--mem", "1000"]
        done = self.cli("launch", "slurm", *sizes, *arguments, **options)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def task(self, job, rank):
        """Process id of a rank, in whatever namespace it is."""
        wanted = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={rank}".encode(), b"SLURM_STEP_ID=0"}
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (process / "cmdline").read_bytes().split(b"\0")
                variables = (process / "environ").read_bytes().split(b"\0")
                if words[1:4] == [b"-m", b"swin_scale", b"train"] and wanted <= set(variables):
                    found.append(int(process.name))
        assert found, f"job {job} has no rank {rank}"
        return min(found)  # the others were forked by it

    def job(self, job):
        facts = slurm.look_up(job)
        assert facts is not None, f"Slurm forgot job {job}"
        return facts

    def wait(self, condition, seconds, what):
        """Wait until ``condition()`` holds, and return its value."""
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < deadline, f"no {what} within {seconds} s; {self.said()}"
            time.sleep(0.1)
        return value

    def wait_for_step(self, run_dir, step, seconds=240):
        self.wait(lambda: max(read_metrics(run_dir / "metrics.jsonl"), default=0) >= step, seconds, f"step {step}")

    def wait_for_end(self, job, seconds=300):
        """The job's last facts."""
        return self.wait(lambda: (facts := self.job(job)).is_over and facts, seconds, f"end of job {job}")

    def wait_for_life(self, run_dir, number, seconds=240):
        """Until the run's start number `number` has done a step."""
        self.wait(lambda: trained_lives(run_dir) >= number, seconds, f"step in start {number}")

    def said(self):
        outputs = sorted(self.outputs.rglob("slurm-*.out"), key=lambda path: path.stat().st_mtime)
        return outputs[-1].read_text()[-3000:] if outputs else "no output"


@pytest.fixture(scope="session")
def _cluster(tmp_path_factory):
    # Not below pytest's own directory, which only its owner may enter: munge refuses such a place for its socket.
    directory = Path(tempfile.mkdtemp(prefix="slurm-"))
    directory.chmod(0o755)
    cluster = Cluster(directory, tmp_path_factory.getbasetemp())
    cluster.sh("start")
    os.environ["SLURM_CONF"] = str(directory / "slurm.conf")
    try:
        yield cluster
    finally:
        del os.environ["SLURM_CONF"]
        cluster.sh("stop")
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def cluster(_cluster, tmp_path):
    """The cluster with all nodes up; jobs that a test leaves are ended with it."""
    _cluster.sh("start")
    yield _cluster
    for run_dir in {path.parent for path in tmp_path.rglob("jobs.jsonl")}:
        left = [job for job in jobs_of(read_chain(run_dir)) if not _cluster.job(job).is_over]
        if left:
            slurm.cancel(left)


@pytest.fixture(scope="session")
def whole(digits, tmp_path_factory):
    """What every interrupted run must come to: two processes on this machine, in one go."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    done = runs.run(run_dir, digits[0], nproc=2, train__max_steps=MAX_STEPS)
    assert done.returncode == 0, done.stderr
    return runs.trajectory(run_dir)
