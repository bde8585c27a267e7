"""Runs on a real Slurm, two nodes over gloo: submitted, interrupted in every way, and the same in the end."""

import json
import subprocess

import pytest

from launcher import slurm
from launcher.chain import read_chain
from launcher.render import TEMPLATE, render
from swin_scale.run_lock import owners
from tests import runs
from tests.launcher.test_render import shape
from tests.slurm.conftest import ASKED, KILL_WAIT_S, MAX_STEPS, NODES, WHY_NOT, blamed, ends, starts

pytestmark = pytest.mark.skipif(not ASKED, reason=WHY_NOT)


def submit(cluster, run_dir, digits, *flags, **options):
    return cluster.submit(run_dir, digits[0], *flags, train__max_steps=MAX_STEPS, train__log_every=1, **options)


@pytest.fixture(scope="module")
def limited(_cluster, digits, tmp_path_factory):
    """A run that its time limit interrupts once. Slurm's clock is slow: it goes on beside the other tests."""
    run_dir = tmp_path_factory.mktemp("limited") / "run"
    return run_dir, submit(
        _cluster, run_dir, digits, "--time", "2", "--signal-lead", "60", fault="first_life_takes:3.2"
    )


@pytest.mark.usefixtures("limited")
def test_two_nodes_train_as_two_processes_here_do(cluster, digits, whole, tmp_path):
    run_dir = tmp_path / "run"
    job = submit(cluster, run_dir, digits)
    assert cluster.wait_for_end(job).state == "COMPLETED", cluster.said()
    assert runs.trajectory(run_dir) == whole
    facts = json.loads(cluster.cli("status", run_dir, "--json").stdout)
    assert (facts["state"], facts["step"], facts["checkpoint"]) == ("done", MAX_STEPS, MAX_STEPS)
    assert [(entry["job"], entry["state"], entry["starts"]) for entry in facts["jobs"]] == [(job, "done", 1)]
    assert "done: 16 steps" in cluster.cli("logs", run_dir).stdout
    assert "rank1" in cluster.cli("logs", run_dir, "--rank", 1).stdout
    assert f"of {tmp_path}" not in cluster.cli("logs", run_dir, "--rank", 5).stdout
    revision = read_chain(run_dir)[0]["revision"]
    assert revision["version"] and "commit" in revision
    assert (run_dir / "submit.yaml").read_text().startswith("run:")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"nodes": 3, "tasks_per_node": 4, "gpus_per_node": "4", "time": "24:00:00", "mem": "0"},
        {"partition": "low", "account": "vision", "qos": "normal", "signal_lead_s": 300},
        {"restart": "chain", "nodes": 1, "tasks_per_node": 8, "gpus_per_node": "8", "cpus_per_task": None},
        {"exclude": "n3", "time": "1-0", "options": (("comment", "a second try"), ("exclusive", ""))},
        {"name": "it's 50% #1", "run_dir": "/data/my runs/50%", "restart": "never", "time": "90"},
    ],
)
def test_slurm_accepts_the_script(cluster, tmp_path, changes):
    script = tmp_path / "x.sbatch"
    changes = {"tasks_per_node": 1, "gpus_per_node": "1", **changes}
    script.write_text(render(shape(**{"workdir": str(tmp_path), **changes}), TEMPLATE.read_text()))
    done = subprocess.run(["sbatch", "--test-only", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "to start at" in done.stderr


def test_a_dry_run_prints_what_would_be_submitted(cluster, digits, tmp_path):
    _, _, _, _, *arguments = runs.command(tmp_path / "run", digits[0], nproc=1)
    done = cluster.cli("launch", "slurm", "--nodes", 2, "--dry-run", *arguments)
    assert subprocess.run(["sbatch", "--test-only"], input=done.stdout, capture_output=True, text=True).returncode == 0
    assert "global 24 = 2 ranks x 12" in done.stderr
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_is_refused_before_the_queue(cluster, digits, tmp_path):
    _, _, _, _, *arguments = runs.command(tmp_path / "run", digits[0], nproc=1)
    odd = cluster.cli("launch", "slurm", "--nodes", 5, *arguments)
    assert odd.returncode == 2 and "use 4 or 6 ranks" in odd.stderr
    nowhere = cluster.cli("launch", "slurm", "--nodes", 2, "--partition", "moon", *arguments)
    assert nowhere.returncode == 2 and "invalid partition" in nowhere.stderr.lower()


@pytest.mark.fault(10, "Slurm's warning, a requeue by hand, and `stop`, one after the other")
def test_a_run_that_is_interrupted_in_three_ways_ends_the_same(cluster, digits, whole, tmp_path):
    """Nothing that was done is done again: each way saves after the step it is in."""
    run_dir = tmp_path / "run"
    job = submit(cluster, run_dir, digits, fault="step_takes:1.0", checkpoint__every_steps=100)
    cluster.wait_for_life(run_dir, 1)
    subprocess.run(["scancel", "--batch", "--signal=USR1", job], check=True)
    cluster.wait_for_life(run_dir, 2)
    slurm.requeue(job)
    cluster.wait_for_life(run_dir, 3)
    assert cluster.cli("stop", run_dir).stdout.strip() == f"asked job {job} to save and end"
    assert cluster.wait_for_end(job).state == "COMPLETED", cluster.said()
    assert "stopped as asked" in cluster.cli("status", run_dir).stdout

    again = submit(cluster, run_dir, digits)
    assert cluster.wait_for_end(again).state == "COMPLETED", cluster.said()
    assert ends(run_dir) == [(75, "again"), (75, "again"), (75, "end"), (0, "done")]
    assert [row["step"] for row in runs.events(run_dir, "preempted")] == starts(run_dir)[1:]
    assert runs.trajectory(run_dir) == whole


def test_scancel_ends_the_chain(cluster, digits, tmp_path):
    run_dir = tmp_path / "run"
    job = submit(cluster, run_dir, digits, "--restart", "chain")
    cluster.wait(lambda: len(read_chain(run_dir)) == 3, 60, "job that follows")
    follower = [row["job"] for row in read_chain(run_dir) if row.get("after") == job]
    assert len(follower) == 1
    status = cluster.cli("status", run_dir).stdout
    assert f"run     {run_dir}: running" in status and f"job     {job} RUNNING on n[" in status
    assert f"job     {follower[0]} PENDING (Dependency)" in status
    refused = cluster.cli("launch", "slurm", "--nodes", 2, *runs.command(run_dir, digits[0], nproc=1)[4:])
    assert refused.returncode == 2 and f"job {job} has {run_dir}" in refused.stderr
    slurm.cancel([job])
    assert cluster.wait_for_end(job).state == "CANCELLED"
    assert cluster.wait_for_end(follower[0]).state == "CANCELLED"
    assert [action for _, action in ends(run_dir)] == ["end"]


@pytest.mark.fault(10, "time limit")
def test_a_time_limit_is_no_end(cluster, limited, whole):
    run_dir, job = limited
    assert cluster.wait_for_end(job, seconds=200).state == "COMPLETED", cluster.said()
    first, *_, last = ends(run_dir)  # on a slow machine the next job is interrupted too
    assert (first, last) == ((75, "again"), (0, "done"))
    assert runs.events(run_dir, "preempted")[0]["step"] == starts(run_dir)[1]
    warned = next(row for row in read_chain(run_dir) if row["event"] == "warned")
    assert 0 < warned["end"] - warned["time"] < 125  # what the ranks were told that they have
    assert runs.trajectory(run_dir) == whole


@pytest.mark.fault(10, "preemption by a job of a higher partition")
def test_a_preempted_run_waits_and_goes_on(cluster, digits, whole, tmp_path):
    run_dir = tmp_path / "run"
    job = submit(cluster, run_dir, digits, "--partition", "low", fault="first_life_takes:1.5")
    cluster.wait_for_life(run_dir, 1)
    urgent = ["sbatch", "--parsable", "--partition=high", f"--nodes={NODES}", "--exclusive", "--wrap=sleep 4"]
    subprocess.run([*urgent, f"--output={tmp_path}/urgent.out"], check=True, capture_output=True)
    assert cluster.wait_for_end(job).state == "COMPLETED", cluster.said()
    assert ends(run_dir) == [(75, "again"), (0, "done")]
    assert runs.trajectory(run_dir) == whole


@pytest.mark.fault(11, "a requeue by hand that leaves less time than a save takes")
def test_with_too_little_time_for_a_save_the_run_is_queued_again(cluster, digits, whole, tmp_path):
    """Its processes end by themselves before Slurm kills them, and the next start goes on from the save before."""
    run_dir = tmp_path / "run"
    slow = f"first_life_takes:2;slow_commits:{KILL_WAIT_S}"
    job = submit(cluster, run_dir, digits, fault=slow, checkpoint__every_steps=3)
    cluster.wait(lambda: runs.events(run_dir, "checkpoint"), 240, "checkpoint")
    slurm.requeue(job)
    assert cluster.wait_for_end(job).state == "COMPLETED", cluster.said()
    [lack] = runs.events(run_dir, "no_time_to_save")
    assert (lack["why"], lack["left_s"] < min(KILL_WAIT_S, lack["save_s"])) == ("SIGTERM", True)
    assert ends(run_dir) == [(75, "again"), (0, "done")]
    assert 0 < starts(run_dir)[1] < lack["step"]
    assert runs.trajectory(run_dir) == whole


@pytest.mark.fault(1, "power loss of a node in the middle of training; there is a spare one")
def test_a_lost_node_is_replaced_by_a_spare_one(cluster, digits, whole, tmp_path):
    run_dir = tmp_path / "run"
    job = submit(cluster, run_dir, digits, fault="first_life_takes:1.0")
    cluster.wait_for_step(run_dir, 5)
    cluster.wait(lambda: runs.steps(run_dir), 60, "checkpoint")  # written beside the steps that follow it
    saved = runs.steps(run_dir)[-1]
    cluster.sh("kill-node", "n2")
    assert cluster.wait_for_end(job).state == "COMPLETED", cluster.said()
    assert cluster.job(job).nodes == "n[1,3]"
    assert (starts(run_dir), blamed(run_dir)) == ([0, saved], ["n2"])
    assert runs.trajectory(run_dir) == whole


@pytest.mark.fault(26, "the daemon of a node dies, its processes train on")
def test_two_generations_never_write_one_run(cluster, digits, whole, tmp_path):
    """Slurm starts the job on another node, and nothing but the run directory tells the old processes so."""
    run_dir = tmp_path / "run"
    flags = ("--gpus-per-node", "2")
    job = submit(cluster, run_dir, digits, *flags, nodes=1, fault="first_life_takes:8.0")
    cluster.wait_for_step(run_dir, 1)
    old = owners(run_dir)
    cluster.sh("kill-slurmd", cluster.job(job).nodes)
    assert cluster.wait_for_end(job, 240).state == "COMPLETED", cluster.said()
    assert [owner.host for owner in old] != [cluster.job(job).nodes]
    assert cluster.job(job).restarts == 1  # the old generation did not requeue the new one
    assert "this run was started again elsewhere" in (run_dir / "logs" / "rank0.log").read_text()
    assert runs.trajectory(run_dir) == whole
