"""Which node is to blame for an interruption, and when the chain keeps away from it."""

import dataclasses
import os
import signal
from collections import Counter

import pytest

from launcher import slurm
from launcher.blame import blamed_by_srun, blamed_by_verdict, counts, to_avoid
from launcher.chain import read_chain, record
from launcher.status import survey, text_of
from launcher.verdict import Sign, died
from tests.launcher.srun import Tasks

# As Slurm 22.05 writes them.
KILLED = """srun: error: n2: task 1: Killed
srun: launch/slurm: _step_signal: Terminating StepId=6.0
slurmstepd-n1: error: *** STEP 6.0 ON n1 CANCELLED AT 2026-11-22T02:26:25 ***
srun: error: n1: task 0: Terminated
"""
VICTIM = """srun: error: n1: task 0: Exited with exit code 6
srun: launch/slurm: _step_signal: Terminating StepId=6.0
srun: error: n2: task 1: Killed
"""
LOST = """slurmstepd-n1: error: *** STEP 6.0 ON n1 CANCELLED AT 2026-11-22T02:26:25 DUE TO NODE FAILURE, SEE ...
srun: error: Node failure on n2
srun: error: n1: task 0: Terminated
"""


@pytest.mark.parametrize(
    ("said", "node", "why"),
    [
        (KILLED, "n2", "task 1: Killed"),
        ("srun: error: gpu-07.cluster: tasks 8-15: Segmentation fault (core dumped)\n", "gpu-07.cluster",
         "tasks 8-15: Segmentation fault (core dumped)"),
        (LOST, "n2", "lost by Slurm"),
        (VICTIM, None, None),  # what srun killed in the end tells nothing
        (KILLED[KILLED.index("slurmstepd") :], None, None),  # ended from outside
        ("srun: error: n[1-2]: tasks 0-1: Killed\n", None, None),
        ("srun: error: n1: task 0: Exited with exit code 3\n", None, None),
        ("", None, None),
    ],
)  # fmt: skip
def test_sruns_words(said, node, why):
    found = blamed_by_srun(f"2026-11-22 02:26:20 launcher.batch: job 6\n{said}")
    assert (None if found is None else (found.node, found.why)) == (None if node is None else (node, why))


@pytest.mark.fault(13, "verdict on a hung rank")
def test_the_verdict_on_a_hung_rank_names_its_node(tmp_path):
    path = tmp_path / "crash" / "20261122-0226" / "verdict.json"
    path.parent.mkdir(parents=True)
    layout = {"nodes": ["n1", "n3"], "tasks_per_node": 4}
    assert blamed_by_verdict(tmp_path, since=0.0, **layout) is None
    sign = Sign(rank=5, host="gpu7", pid=1, section="backward", step=3)
    path.write_bytes(died(sign).dump())
    os.utime(path, (1000, 1000))
    found = blamed_by_verdict(tmp_path, since=900.0, **layout)
    assert found.node == "n3" and found.why.startswith("rank 5 on gpu7 was killed")
    assert blamed_by_verdict(tmp_path, since=1001.0, **layout) is None  # of an earlier generation
    path.write_bytes(died(dataclasses.replace(sign, host="n1.cluster")).dump())
    assert blamed_by_verdict(tmp_path, since=0.0, **layout).node == "n1"  # placed in another order
    for body in ('{"rank": 8}', '{"rank": null}', "{", "[]", '{"rank": 1, "fatal": false}'):
        path.write_text(body)
        assert blamed_by_verdict(tmp_path, since=0.0, **layout) is None


def test_counts_begin_anew_when_somebody_submits():
    rows = [{"event": "blamed", "node": "n1"}, {"event": "submitted"}, {"event": "blamed", "node": "n2"},
            {"event": "submitted", "after": "1"}, {"event": "blamed", "node": "n2"}]  # fmt: skip
    assert counts(rows) == {"n2": 2}


def test_a_run_does_not_wait_for_nodes_that_it_keeps_away_from():
    blamed = Counter(n1=3, n2=2, n3=1)
    assert to_avoid(blamed, limit=2, usable=["n1", "n2", "n3", "n4"], needed=2) == ["n1", "n2"]
    assert to_avoid(blamed, limit=2, usable=["n1", "n2", "n3"], needed=2) == ["n1"]  # the worst one
    assert to_avoid(blamed, limit=2, usable=["n2", "n3"], needed=2) == ["n1"]  # it is down already
    assert to_avoid(blamed, limit=0, usable=["n1", "n2", "n3"], needed=1) == []


SAY_KILLED = f"cat >&2 <<'X'\n{KILLED}X\nexit 137"


@pytest.mark.fault(26, "a node that interrupts a run again and again")
def test_a_node_that_interrupts_twice_is_not_used_again(tmp_path, monkeypatch):
    tasks = Tasks(tmp_path, monkeypatch, SAY_KILLED)
    record(tmp_path, "submitted", "7")
    tasks.supervise(tmp_path)
    assert (tasks.requeued, tasks.kept_away) == (["7"], [])
    tasks.facts = slurm.JobFacts(job="7", state="RUNNING", restarts=1, partition="gpu", excluded="n9")
    tasks.usable = ["n1", "n2", "n3", "n9"]
    tasks.supervise(tmp_path, generation=1)
    assert tasks.kept_away == [("7", ["n9", "n2"])]  # what the user asked for stays
    facts = survey(tmp_path, look_up=lambda job: tasks.facts)
    assert (facts["blamed"], facts["excluded"]) == ({"n2": 2}, ["n2"])
    assert "node    n2 interrupted the run 2 times; jobs keep away from it" in text_of(facts)


def test_the_chained_job_is_the_one_that_keeps_away(tmp_path, monkeypatch):
    tasks = Tasks(tmp_path, monkeypatch, SAY_KILLED)
    tasks.facts = slurm.JobFacts(job="7", state="RUNNING", partition="gpu", excluded="n3")
    tasks.usable = ["n1", "n2", "n3", "n4"]
    submitted = []
    monkeypatch.setattr(slurm, "submit", lambda script, **options: submitted.append(options) or "8")
    tasks.supervise(tmp_path, restart="chain", bad_node_limit=1)
    assert submitted == [{"after": "7", "exclude": "n3"}]
    assert tasks.kept_away == [("8", ["n3", "n2"])]
    assert [row["nodes"] for row in read_chain(tmp_path) if row["event"] == "excluded"] == [["n2"]]


@pytest.mark.parametrize(
    ("changes", "blamed"),
    [
        ({}, ["n2"]),
        ({"signals": [signal.SIGTERM]}, []),  # ended from outside
        ({"signals": [signal.SIGUSR1]}, []),
        ({"restart": "never"}, []),
    ],
)
def test_nobody_is_blamed_for_what_came_from_outside(tmp_path, monkeypatch, changes, blamed):
    tasks = Tasks(tmp_path, monkeypatch, f"sleep 1\n{SAY_KILLED}", trap="trap '' USR1")
    tasks.supervise(tmp_path, **changes)
    assert [row["node"] for row in read_chain(tmp_path) if row["event"] == "blamed"] == blamed


def test_a_generation_that_left_no_word_was_lost_with_its_node(tmp_path, monkeypatch):
    tasks = Tasks(tmp_path, monkeypatch, "DONE")
    record(tmp_path, "submitted", "7")
    record(tmp_path, "started", "7", restart=0, nodes="n[1-2]", step=0)
    tasks.lost = ["n1"]
    assert tasks.supervise(tmp_path, generation=1) == 0
    assert [row["event"] for row in read_chain(tmp_path)] == ["submitted", "started", "blamed", "started", "ended"]
    assert counts(read_chain(tmp_path)) == {"n1": 1}
