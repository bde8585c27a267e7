"""One generation's tasks with a stand-in for srun: who they are, when they are asked to save, how long they have."""

import datetime
import json
import signal
import socket
import time

import pytest

from launcher import slurm, step
from launcher.chain import read_chain, record
from launcher.step import Generation, default_lead, master_address, needed_lead
from swin_scale.errors import UserError
from swin_scale.run_dir import deadline_file, read_deadline, write_deadline
from tests.launcher.srun import KILL_WAIT_S, Tasks

SAVES = """trap 'echo asked > "$RUN/asked"; cp "$RUN/deadline.json" "$RUN/told"; exit 75' USR1"""
"""Saves and ends when asked to."""
A_MINUTE = "for i in $(seq 600); do sleep 0.1; done; DONE"


def in_seconds(seconds):
    """Slurm's word for a moment, in whole seconds."""
    return datetime.datetime.fromtimestamp(time.time() + seconds).isoformat(timespec="seconds")


def test_generations_are_counted_from_the_first_life_on():
    environ = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "8",
               "SLURM_JOB_NODELIST": "n[1-2]"}  # fmt: skip
    assert Generation.from_environment(environ).restart == 0
    assert Generation.from_environment({**environ, "SLURM_RESTART_COUNT": "3"}).restart == 3
    with pytest.raises(UserError, match="submit with `swin-scale launch slurm`"):
        Generation.from_environment({})


@pytest.mark.fault(26, "node name that does not resolve")
def test_a_node_name_that_does_not_resolve_is_replaced_by_its_address(monkeypatch):
    monkeypatch.setattr(slurm, "host_names", lambda nodes: ["n1", "n2"])
    monkeypatch.setattr(slurm, "node_address", lambda name: {"n1": "10.0.0.1"}[name])
    monkeypatch.setattr(step.socket, "getaddrinfo", lambda *_: [])
    assert master_address("n[1-2]") is None

    def unknown(*_):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(step.socket, "getaddrinfo", unknown)
    assert master_address("n[1-2]") == "10.0.0.1"


def test_the_warning_comes_in_time_for_the_slowest_save_seen():
    assert default_lead(None, None) == 120
    assert default_lead(3.0, 86400) == 120
    assert default_lead(200.0, 86400) == 660
    assert default_lead(200.0, 600) == 300  # not more than half of the time
    assert default_lead(1e9, None) == 65535
    assert needed_lead(None) == 0.0
    assert needed_lead(200.0) == 320.0


@pytest.mark.parametrize(
    ("save_s", "left_s", "asked"),
    [(40.0, 60, True), (40.0, 3600, False), (None, 60, False)],
    ids=["too little is left", "there is time", "nothing was saved yet"],
)
@pytest.mark.fault(11, "saves take longer than Slurm's warning leaves for them")
def test_ranks_are_asked_before_slurm_warns_when_a_save_would_not_fit(tmp_path, monkeypatch, save_s, left_s, asked):
    monkeypatch.setattr(step, "LOOK_S", 0.2)
    tasks = Tasks(tmp_path, monkeypatch, A_MINUTE if asked else A_MINUTE.replace("600", "10"), trap=SAVES)
    tasks.facts = slurm.JobFacts(job="7", state="RUNNING", end=in_seconds(left_s))
    (tmp_path / "checkpoints" / "step_00000004").mkdir(parents=True)
    rows = [] if save_s is None else [json.dumps({"event": "checkpoint", "step": 4, "seconds": save_s}) + "\n"]
    (tmp_path / "metrics.jsonl").write_text("".join(rows))
    code = tasks.supervise(tmp_path)
    assert (code, (tmp_path / "asked").exists()) == ((75, True) if asked else (0, False))
    assert [row["event"] for row in read_chain(tmp_path)] == ["started", *["warned"] * asked, "ended"]
    if asked:
        assert tasks.requeued == ["7"]
        when, why = json.loads((tmp_path / "told").read_text()).values()
        assert when == tasks.facts.end_time + KILL_WAIT_S - step.KILL_MARGIN_S
        assert why.startswith("a save takes 40 s, and this job has")


def test_with_the_warning_ranks_learn_how_long_they_have(tmp_path, monkeypatch):
    """Up to the job's end, and until Slurm kills."""
    tasks = Tasks(tmp_path, monkeypatch, A_MINUTE, trap=SAVES)
    write_deadline(tmp_path, 1.0, "an earlier life")
    tasks.facts = slurm.JobFacts(job="7", state="RUNNING", end=in_seconds(90))
    assert tasks.supervise(tmp_path, signals=[signal.SIGUSR1]) == 75
    when, why = json.loads((tmp_path / "told").read_text()).values()
    assert when == tasks.facts.end_time + KILL_WAIT_S - step.KILL_MARGIN_S
    assert why == "Slurm announced the end of this job"


def test_with_sigterm_alone_ranks_have_until_slurm_kills(tmp_path, monkeypatch):
    told = 'while [ ! -e "$RUN/deadline.json" ]; do sleep 0.1; done; exit 75'
    tasks = Tasks(tmp_path, monkeypatch, told)
    began = time.time()
    assert tasks.run(tmp_path, signals=[signal.SIGTERM]) == 75
    when, why = read_deadline(tmp_path)
    assert began <= when - (KILL_WAIT_S - step.KILL_MARGIN_S) + 0.001 <= time.time() + 0.002  # written in milliseconds
    assert why == "SIGTERM"


def test_a_controller_that_does_not_answer_keeps_no_warning_from_the_ranks(tmp_path, monkeypatch):
    """They are told of the limit that was known before, if it was."""
    tasks = Tasks(tmp_path, monkeypatch, A_MINUTE, trap=SAVES)
    tasks.facts = slurm.JobFacts(job="7", state="RUNNING", end=in_seconds(90))
    asked = []

    def look_up(job, timeout_s=60.0):
        asked.append(timeout_s)
        if len(asked) > 1:
            raise slurm.SlurmError(f"scontrol gave no answer within {timeout_s:g} s")
        return tasks.facts

    monkeypatch.setattr(slurm, "look_up", look_up)
    assert tasks.run(tmp_path, signals=[signal.SIGUSR1]) == 75
    assert asked == [60.0, step.HURRY_S, step.HURRY_S]
    when, _ = json.loads((tmp_path / "told").read_text()).values()
    assert when == tasks.facts.end_time + KILL_WAIT_S - step.KILL_MARGIN_S


def test_a_job_without_a_limit_has_no_deadline(tmp_path, monkeypatch):
    tasks = Tasks(tmp_path, monkeypatch, A_MINUTE, trap=SAVES.replace('cp "$RUN/deadline.json" "$RUN/told"; ', ""))
    write_deadline(tmp_path, 1.0, "an earlier life")
    tasks.facts = slurm.JobFacts(job="7", state="RUNNING", end="Unknown")
    assert tasks.supervise(tmp_path, signals=[signal.SIGUSR1]) == 75
    assert not deadline_file(tmp_path).exists() and read_deadline(tmp_path) is None
    deadline_file(tmp_path).write_text('{"time": "soon"')
    assert read_deadline(tmp_path) is None


@pytest.mark.parametrize(
    ("facts", "waits"),
    [
        ({"state": "RUNNING"}, True),  # from somebody who ends nothing
        ({"state": "RUNNING", "reason": "TimeLimit"}, False),
        ({"state": "PENDING", "restarts": 1}, False),  # its node was lost, or it was queued again by hand
        ({"state": "COMPLETING"}, False),
    ],
)
def test_the_last_word_comes_before_slurm_kills(tmp_path, monkeypatch, facts, waits):
    """Once Slurm ends a job, tasks that do not end are waited for no longer than until it kills."""
    # What is not waited for outlives the wait however slow this machine is, and is let go in the end.
    body = "sleep 3; DONE" if waits else A_MINUTE.replace("sleep", '[ -e "$RUN/over" ] && exit; sleep')
    tasks = Tasks(tmp_path, monkeypatch, body)
    monkeypatch.setattr(slurm, "kill_wait_s", lambda: step.KILL_MARGIN_S)  # no time, but a second at least
    tasks.facts = slurm.JobFacts(job="7", **facts)
    code = tasks.supervise(tmp_path, signals=[signal.SIGTERM])
    (tmp_path / "over").touch()
    assert read_chain(tmp_path)[-1]["event"] == "ended"
    assert (code == 0) is waits


def test_a_command_that_sigterm_met_is_given_again(monkeypatch, tmp_path):
    script = tmp_path / "scontrol"
    script.write_text('#!/bin/bash\ncd "${0%/*}"; [ -e once ] || { touch once; kill -TERM $$; }\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(slurm.time, "sleep", lambda seconds: None)
    slurm.patiently(lambda: slurm.requeue("7"))
    (tmp_path / "once").unlink()
    with pytest.raises(slurm.SlurmError, match="ended by signal 15"):
        slurm.requeue("7")


def test_a_controller_that_is_away_is_asked_again(tmp_path, monkeypatch):
    """At the end of a job it is: the job is queued again once it is back. What it refuses is not tried again."""
    tasks = Tasks(tmp_path, monkeypatch, "exit 6")
    answers = ["Unable to contact slurm controller (connect failure)"] * 2
    calls, waited = [], []

    def requeue(job):
        calls.append(job)
        if answers:
            raise slurm.SlurmError(answers.pop())

    monkeypatch.setattr(slurm, "requeue", requeue)
    monkeypatch.setattr(slurm.time, "sleep", waited.append)
    assert tasks.supervise(tmp_path) == 6
    assert calls == ["7"] * 3
    assert waited[-2:] == [1.0, slurm.RETRY_S]

    followers = []
    monkeypatch.setattr(slurm, "submit", lambda script, **options: followers.append(options) or "8")
    answers[:] = ["Requested operation is presently disabled for job 7"]
    record(tmp_path, "submitted", "7")
    assert tasks.supervise(tmp_path) == 6
    assert (len(calls), followers) == (4, [{"after": "7", "exclude": ""}])
