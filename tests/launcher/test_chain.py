"""What follows the end of a job, what a chain remembers, and what Slurm's words mean; no Slurm needed."""

import json

import pytest

from launcher import slurm
from launcher.batch import first_cause
from launcher.chain import decide, newest_step, read_chain, record, stalled_restarts
from swin_scale.errors import UserError
from swin_scale.run_dir import stop_file
from tests.launcher.srun import Tasks

ENDED = {"cause": "it broke", "warned": False, "stop_asked": False, "cancelled": False, "stalled": 0, "step": 40,
         "may_restart": True}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "action", "code", "words"),
    [
        ({"code": 0}, "done", 0, "done"),
        ({"code": 0, "stop_asked": True, "cancelled": True}, "done", 0, "done"),
        ({"code": 75}, "again", 75, "it broke"),
        ({"code": 6}, "again", 6, "it broke"),
        ({"code": 137}, "again", 6, "it broke"),
        ({"code": 143}, "again", 6, "it broke"),
        *[({"code": code}, "end", code, "once that is mended") for code in (1, 2, 3, 4, 5)],
        ({"code": 1, "warned": True}, "again", 1, "it broke"),  # killed by the warning before anybody listened
        ({"code": 75, "stop_asked": True}, "end", 0, "stopped as asked; submit the run again to go on from step 40"),
        ({"code": 138, "stop_asked": True}, "end", 0, "stopped as asked"),
        ({"code": 3, "stop_asked": True}, "end", 3, "mended"),
        ({"code": 143, "cancelled": True}, "end", 143, "cancelled"),
        ({"code": 75, "may_restart": False}, "end", 75, "submit the run again to go on from step 40"),
        ({"code": 75, "stalled": 2}, "again", 75, "it broke"),
        ({"code": 75, "stalled": 3}, "end", 75, "3 restarts in a row brought no checkpoint beyond step 40"),
        ({"code": 137, "stalled": 3}, "end", 6, "last cause: it broke"),
        ({"code": 0, "stalled": 9}, "done", 0, "done"),
    ],
)
@pytest.mark.fault(12, "restarts that bring no newer checkpoint")
def test_what_follows(changes, action, code, words):
    verdict = decide(**{**ENDED, **changes})
    assert (verdict.action, verdict.code) == (action, code)
    assert words in verdict.reason


def started(*steps):
    return [{"event": "started", "job": "1", "step": step} for step in steps]


SUBMITTED = {"event": "submitted", "job": "1"}
FOLLOWS = {"event": "submitted", "job": "2", "after": "1"}


@pytest.mark.parametrize(
    ("rows", "step", "count"),
    [
        ([SUBMITTED], 0, 0),
        ([SUBMITTED, *started(0)], 0, 0),
        ([SUBMITTED, *started(0, 0)], 0, 1),
        ([SUBMITTED, *started(0, 0)], 4, 0),  # this one brought a checkpoint
        ([SUBMITTED, *started(0, 4, 4, 4, 4)], 4, 3),
        ([SUBMITTED, *started(0, 0), FOLLOWS, *started(0, 0)], 0, 3),  # a chain of jobs counts as one
        ([*started(0, 0, 0), SUBMITTED, *started(0)], 0, 0),  # somebody looked at it
    ],
)
def test_restarts_without_progress(rows, step, count):
    assert stalled_restarts(rows, step) == count


def test_rows_survive_a_torn_line_and_steps_are_those_committed(tmp_path):
    assert (read_chain(tmp_path), newest_step(tmp_path)) == ([], 0)
    record(tmp_path, "submitted", "7", nodes=2)
    with open(tmp_path / "jobs.jsonl", "a") as file:
        file.write('{"event": "star')
    record(tmp_path, "started", "7", restart=0, step=0)
    assert [row["event"] for row in read_chain(tmp_path)] == ["submitted", "started"]
    for name in ("step_00000004", "step_00000012", ".step_00000020.tmp", "latest", "step_x"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert newest_step(tmp_path) == 12


RECORD = {"code": 5, "rank": 3, "cause": "DivergedError: loss", "time": 2.0}


@pytest.mark.parametrize(
    ("code", "before", "after", "expected"),
    [
        (0, RECORD, {**RECORD, "code": 0, "cause": "done"}, (0, "done")),
        (0, RECORD, RECORD, (6, "srun ended without an error, and rank 0 without a word")),  # its node was lost
        (0, None, None, (6, "srun ended without an error, and rank 0 without a word")),
        (139, RECORD, {**RECORD, "code": 0, "cause": "done"}, (0, "done")),  # another rank crashed on its way out
        (143, None, RECORD, (5, "DivergedError: loss")),  # srun's code is that of a task it ended itself
        (143, RECORD, RECORD, (143, "a task was ended by SIGTERM before any rank could say why")),
        (143, {**RECORD, "time": 1.0}, RECORD, (5, "DivergedError: loss")),
        (1, None, None, (1, "a task ended with exit code 1 and no record; see its log")),
        (143, None, {"code": "5"}, (143, "a task was ended by SIGTERM before any rank could say why")),
        (75, None, None, (75, "preempted and saved")),
    ],
)
def test_the_first_cause_outlives_sruns_exit_code(code, before, after, expected):
    assert first_cause(code, before, after) == expected


# Recorded on Slurm 22.05, cut.
JOB = (
    "JobId=5 JobName=a Reason=b JobState={state} Reason={reason} Dependency=(null) Requeue=1 Restarts={restarts} "
    "BatchFlag=1 ExitCode=0:0 RunTime=00:00:02 TimeLimit=00:01:00 StartTime=2026-11-22T02:25:25 "
    "EndTime=2026-11-22T02:26:25 NodeList=n[1-2] BatchHost=n1"
)


@pytest.mark.parametrize(
    ("state", "reason", "cancelled"),
    [("COMPLETING", "None", True), ("COMPLETING", "TimeLimit", False), ("CANCELLED", "None", True),
     ("RUNNING", "None", False), ("PENDING", "BeginTime", False)],
)  # fmt: skip
def test_what_scontrol_says_of_a_job(state, reason, cancelled):
    facts = slurm.parse_job(JOB.format(state=state, reason=reason, restarts=2))
    assert (facts.job, facts.state, facts.restarts, facts.nodes) == ("5", state, 2, "n[1-2]")
    assert facts.was_cancelled is cancelled
    assert facts.is_queued is (state == "PENDING")
    with pytest.raises(slurm.SlurmError, match="names no job"):
        slurm.parse_job("slurm_load_jobs error")


def test_a_surrounding_jobs_options_are_not_passed_on():
    environ = {"SLURM_CONF": "c", "SLURM_JOB_ID": "1", "SBATCH_PARTITION": "p", "PATH": "x", "SLURM_CPUS_PER_TASK": "3"}
    assert slurm.submission_environment(environ) == {"SLURM_CONF": "c", "PATH": "x"}


def test_no_answer_is_told_from_a_refusal():
    assert slurm.is_controller_away(
        "scontrol: slurm_suspend error: Unable to contact slurm controller (connect failure)"
    )
    assert not slurm.is_controller_away("scontrol requeue 7: Requested operation is presently disabled for job 7")


def test_without_slurm_the_message_says_where_to_go(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="sbatch is not on PATH; run this where Slurm is installed"):
        slurm.submit(tmp_path / "x.sbatch")
    assert slurm.is_ended("7") is None


def last(run_dir):
    return read_chain(run_dir)[-1]


def test_supervisor_passes_options_on_and_hides_foreign_ranks(tmp_path, monkeypatch):
    tasks = Tasks(tmp_path, monkeypatch, 'echo "$RANK|$*" > "$RUN/said"; DONE')
    assert tasks.supervise(tmp_path) == 0
    said = (tmp_path / "said").read_text().strip()
    assert said == "|--nodes=2 --ntasks-per-node=1 --kill-on-bad-exit=1 train x.yaml"
    assert (last(tmp_path)["action"], tasks.requeued) == ("done", [])


@pytest.mark.fault(12, "restarts that bring no newer checkpoint")
def test_supervisor_requeues_until_nothing_advances(tmp_path, monkeypatch):
    tasks = Tasks(tmp_path, monkeypatch, "exit 137")
    codes = [tasks.supervise(tmp_path, generation=n) for n in range(5)]
    assert tasks.requeued == ["7"] * 3
    assert codes == [6, 6, 6, 6, 0]  # the fifth, which nobody asked for, does not even start
    assert "no checkpoint beyond step 0" in last(tmp_path)["cause"]
    assert [row["action"] for row in read_chain(tmp_path) if row["event"] == "ended"] == ["again"] * 3 + ["end"] * 2


def test_supervisor_does_not_requeue_what_will_fail_again(tmp_path, monkeypatch):
    body = f"""echo '{json.dumps({"code": 2, "cause": "UserError: data.train"})}' > "$RUN/exit.json"; exit 143"""
    tasks = Tasks(tmp_path, monkeypatch, body)
    assert tasks.supervise(tmp_path) == 2
    assert (tasks.requeued, last(tmp_path)["cause"][:21]) == ([], "UserError: data.train")


@pytest.mark.fault(26, "the job's next generation exists already")
def test_an_old_generation_leaves_the_new_one_alone(tmp_path, monkeypatch):
    tasks = Tasks(tmp_path, monkeypatch, "exit 6")
    tasks.facts = slurm.JobFacts(job="7", state="RUNNING", restarts=1)
    assert tasks.supervise(tmp_path) == 6
    assert tasks.requeued == []


def test_a_requeue_that_was_heard_but_not_answered_is_one(tmp_path, monkeypatch):
    """Its own SIGTERM ends the command that asked; asked again, Slurm says that the job is pending."""
    tasks = Tasks(tmp_path, monkeypatch, "exit 6")
    submitted = []
    monkeypatch.setattr(slurm, "submit", lambda script, after, exclude: submitted.append(after) or "8")

    def requeue(job):
        tasks.facts = slurm.JobFacts(job=job, state="PENDING", restarts=1)
        raise slurm.SlurmError("scontrol requeue 7: Job is pending execution")

    monkeypatch.setattr(slurm, "requeue", requeue)
    assert tasks.supervise(tmp_path) == 6
    assert submitted == []


def test_a_chained_job_that_slurm_did_not_take_is_submitted_again_at_the_end(tmp_path, monkeypatch):
    tasks = Tasks(tmp_path, monkeypatch, "exit 6")
    asked = []

    def submit(script, after, exclude):
        asked.append(after)
        if len(asked) == 1:
            raise UserError("sbatch: Socket timed out")
        return "8"

    monkeypatch.setattr(slurm, "submit", submit)
    assert tasks.supervise(tmp_path, restart="chain") == 6
    assert asked == ["7", "7"]
    assert [row["job"] for row in read_chain(tmp_path) if row["event"] == "submitted"] == ["8"]


def test_a_stop_before_the_start_ends_the_chain(tmp_path, monkeypatch):
    tasks = Tasks(tmp_path, monkeypatch, 'touch "$RUN/ran"')
    stop_file(tmp_path).touch()
    assert tasks.supervise(tmp_path) == 0
    assert not (tmp_path / "ran").exists()
    assert (last(tmp_path)["action"], tasks.requeued) == ("end", [])


def test_a_chained_job_is_submitted_before_the_tasks_and_cancelled_when_it_is_not_needed(tmp_path, monkeypatch):
    tasks = Tasks(tmp_path, monkeypatch, '[ -e "$RUN/fine" ] || exit 6; DONE')
    cancelled, submitted = [], []
    monkeypatch.setattr(slurm, "submit", lambda script, after, exclude: submitted.append(after) or "8")
    monkeypatch.setattr(slurm, "cancel", cancelled.extend)
    assert tasks.supervise(tmp_path, restart="chain") == 6  # not 0: the dependency asks for that
    assert (submitted, cancelled, tasks.requeued) == (["7"], [], [])
    (tmp_path / "fine").touch()
    assert tasks.supervise(tmp_path, restart="chain") == 0
    assert cancelled == ["8"]
