"""A real Slurm whose nodes lose power in the middle of a save, or freeze, and whose controller goes away."""

import json
import os
import signal
import subprocess

import pytest

from launcher import slurm
from launcher.chain import read_chain
from tests import runs
from tests.slurm.conftest import ASKED, MAX_STEPS, WHY_NOT, blamed, ends, starts
from tests.test_staged import STEPS, train, write

pytestmark = pytest.mark.skipif(not ASKED, reason=WHY_NOT)

SETTINGS = {"train__max_steps": MAX_STEPS, "train__log_every": 1}
EXPERTS = {
    **SETTINGS,
    "model__name": "swin_moe_nano_patch4_window4_32",
    "moe__capacity_factor": 0,
    "moe__gate_noise": 0,
    "moe__drop": 0,
    "moe__ep_size": 2,
}
"""Each node has half of the experts, and every token may have to cross over."""


def half_written(run_dir):
    return any((run_dir / "checkpoints").glob(".step_*.tmp/*"))


def followers(run_dir):
    return [row["job"] for row in read_chain(run_dir) if row.get("after")]


@pytest.mark.fault(2, "power loss of the first node of a job, in the middle of a save")
def test_a_node_lost_in_the_middle_of_a_save_takes_no_checkpoint_with_it(cluster, digits, whole, tmp_path):
    run_dir = tmp_path / "run"
    job = cluster.submit(run_dir, digits[0], slow_disk=0.5, **SETTINGS)
    cluster.wait(lambda: runs.steps(run_dir) == [4] and half_written(run_dir), 240, "half-written second checkpoint")
    first = slurm.host_names(cluster.job(job).nodes)[0]
    cluster.sh("kill-node", first)
    assert half_written(run_dir) and runs.steps(run_dir) == [4]
    assert cluster.wait_for_end(job).state == "COMPLETED", cluster.said()
    assert (starts(run_dir), blamed(run_dir)) == ([0, 4], [first])
    assert runs.trajectory(run_dir) == whole
    assert runs.steps(run_dir)[-1] == MAX_STEPS and not half_written(run_dir)


@pytest.mark.fault(13, "SIGSTOP of a rank, then of all processes of its node; from then on the run keeps away from it")
def test_a_node_that_hangs_twice_is_not_used_again(cluster, digits, whole, tmp_path):
    run_dir = tmp_path / "run"
    options = {"checkpoint__every_steps": 2, "engine__timeout_s": 30, "engine__hang_timeout_s": 6}
    job = cluster.submit(run_dir, digits[0], fault="step_takes:0.7", **SETTINGS, **options)
    cluster.wait_for_step(run_dir, 7)  # the watchdog has learned by then how long steps take
    bad = slurm.host_names(cluster.job(job).nodes)[1]
    os.kill(cluster.task(job, 1), signal.SIGSTOP)
    cluster.wait_for_life(run_dir, 2)
    assert slurm.host_names(cluster.job(job).nodes)[1] == bad  # once is not enough
    cluster.sh("freeze-node", bad)
    try:
        assert cluster.wait_for_end(job).state == "COMPLETED", cluster.said()
    finally:
        cluster.sh("thaw-node", bad)
    assert [action for _, action in ends(run_dir)] == ["again", "again", "done"]
    assert blamed(run_dir) == [bad, bad]
    assert cluster.job(job).excluded == bad
    assert f"node    {bad} interrupted the run 2 times; jobs keep away from it" in cluster.cli("status", run_dir).stdout
    first = min((run_dir / "crash").glob("*/verdict.json"))
    verdict = json.loads(first.read_bytes())
    assert (verdict["rank"], verdict["host"]) == (1, bad) and "stopped" in verdict["verdict"]
    assert runs.trajectory(run_dir) == whole


@pytest.mark.fault(1, "kill -9 of a rank while the controller is away; experts are spread over the nodes")
def test_experts_across_nodes_outlive_an_outage_of_the_controller(cluster, digits, tmp_path):
    """The run trains on, and when it is interrupted it is queued again once somebody answers."""
    steady, run_dir = tmp_path / "steady", tmp_path / "run"
    assert runs.run(steady, digits[0], **EXPERTS).returncode == 0
    job = cluster.submit(run_dir, digits[0], fault="first_life_takes:1.0", **EXPERTS)
    cluster.wait_for_step(run_dir, 2)
    cluster.sh("stop-controller")
    try:
        cluster.wait_for_step(run_dir, 5)
        os.kill(cluster.task(job, 1), signal.SIGKILL)
        # Not longer: a step that ends while nobody listens tells it again after a minute only.
        cluster.wait((run_dir / "exit.json").exists, 60, "end of the tasks")
    finally:
        cluster.sh("start-controller")
    assert cluster.wait_for_end(job).state == "COMPLETED", cluster.said()
    assert ends(run_dir) == [(6, "again"), (0, "done")]
    assert runs.trajectory(run_dir) == runs.trajectory(steady)
    assert len(runs.trajectory(run_dir)) == MAX_STEPS


def test_a_chain_of_jobs_takes_a_run_through_its_stages(cluster, digits, tmp_path):
    """Where a job may not be queued again, another one follows; when all is done, the next is cancelled."""
    train(write(tmp_path / "steady", digits))
    job = cluster.launch(write(tmp_path / "chain", digits), "--restart", "chain", fault="step_takes:0.5")
    run_dir, (first, second) = tmp_path / "chain" / "run", STEPS
    cluster.wait_for_step(run_dir / first, 3)
    subprocess.run(["scancel", "--batch", "--signal=USR1", job], check=True)
    assert cluster.wait_for_end(job).state == "FAILED"
    follower, last = cluster.wait(lambda: len(jobs := followers(run_dir)) == 2 and jobs, 60, "second job to follow")
    assert cluster.wait_for_end(follower).state == "COMPLETED", cluster.said()
    assert cluster.wait_for_end(last, 30).state == "CANCELLED"
    assert ends(run_dir) == [(75, "again"), (0, "done")]
    for stage in (first, second):
        trajectory = runs.trajectory(run_dir / stage)
        assert trajectory == runs.trajectory(tmp_path / "steady" / "run" / stage)
        assert len(trajectory) == STEPS[stage]
