"""What `status`, `stop`, `cancel` and `logs` say of a run from its files alone, and with a Slurm that answers."""

import json
import os
import signal
import subprocess
import sys

import pytest

from launcher import chain, slurm
from launcher.revision import code_revision, describe
from launcher.status import duration, save_seconds, survey, text_of
from launcher.stop import cancel, stop
from swin_scale.cli import main
from swin_scale.errors import UserError
from swin_scale.run_dir import stop_file, write_stages


@pytest.fixture
def run_dir(tmp_path):
    """A run of 100 steps, at step 60, saved at 50; its last line is torn."""
    rows = [{"event": "start", "step": 0, "time": 1.0, "total_steps": 100, "checkpoint": None}]
    rows += [
        {"step": step, "epoch": 0, "loss": 2.0, "lr": 1e-3, "step_s": 0.5, "images_per_s": 48.0, "data_wait_s": 0.1}
        for step in range(1, 61)
    ]
    rows.insert(51, {"event": "checkpoint", "step": 50, "time": 1000.0, "path": "step_00000050", "seconds": 7.5})
    rows.append({"event": "low_space", "step": 60, "time": 1005.0, "problem": "3 GB left"})
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 61, "lo')
    (tmp_path / "checkpoints" / "step_00000050").mkdir(parents=True)
    (tmp_path / "config.yaml").write_text("")
    return tmp_path


def no_slurm(job):
    raise UserError("scontrol is not on PATH")


def test_files_alone_tell_progress(run_dir):
    facts = survey(run_dir, look_up=no_slurm)
    assert (facts["state"], facts["step"], facts["total_steps"], facts["checkpoint"]) == (
        "ended without a word", 60, 100, 50,
    )  # fmt: skip
    assert (facts["eta_s"], facts["loss"], facts["images_per_s"]) == (20.0, 2.0, 48.0)
    assert [event["event"] for event in facts["events"]] == ["start", "low_space"]
    text = text_of(facts, now=1060.0)
    assert "step    60 of 100 (60.0%), loss 2" in text
    assert "left    20 s at this speed" in text
    assert "saved   step 50, 1 min 0 s ago" in text
    assert "event   step 60: low_space problem 3 GB left" in text
    assert save_seconds(run_dir) == 7.5
    (run_dir / "exit.json").write_text(json.dumps({"code": 5, "cause": "DivergedError: step 61"}))
    assert survey(run_dir, look_up=no_slurm)["state"] == "ended with code 5: DivergedError: step 61"


def test_the_chain_with_slurms_word_on_what_has_not_ended(run_dir):
    chain.record(run_dir, "submitted", "7")
    chain.record(run_dir, "started", "7", restart=0, nodes="n[1-2]", step=0)
    chain.record(run_dir, "ended", "7", restart=0, code=75, cause="preempted", step=50, action="again")
    chain.record(run_dir, "started", "7", restart=1, nodes="n[1,3]", step=50)
    chain.record(run_dir, "submitted", "8", after="7")
    states = {"7": slurm.JobFacts(job="7", state="RUNNING"),
              "8": slurm.JobFacts(job="8", state="PENDING", reason="Dependency")}  # fmt: skip
    facts = survey(run_dir, look_up=states.get)
    assert facts["state"] == "running"
    text = text_of(facts)
    assert "job     7 RUNNING on n[1,3], started 2 times" in text
    assert "job     8 PENDING (Dependency)" in text
    unknown = survey(run_dir, look_up=no_slurm)
    assert [job["state"] for job in unknown["jobs"]] == ["unknown", "unknown"]
    chain.record(run_dir, "ended", "7", restart=1, code=0, cause="done", step=100, action="done")
    assert survey(run_dir, look_up=no_slurm)["jobs"][0]["state"] == "done"


def test_a_directory_without_a_run_is_refused(tmp_path, capsys):
    for verb in ("status", "stop", "cancel", "logs"):
        assert main([verb, str(tmp_path)]) == 2
        assert "holds no run" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_logs_of_a_job_or_of_a_rank(run_dir, capsys):
    assert main(["logs", str(run_dir)]) == 2
    assert "holds no logs yet" in capsys.readouterr().err
    (run_dir / "logs").mkdir()
    (run_dir / "logs" / "rank0.log").write_text("a\nb\nc\n")
    (run_dir / "logs" / "rank10.log").write_text("ten\n")
    for name, text in (("9", "old\n"), ("10", "new\n")):
        (run_dir / "logs" / f"slurm-{name}.out").write_text(text)
    assert main(["logs", str(run_dir)]) == 0
    assert capsys.readouterr().out == "new\n"
    assert main(["logs", str(run_dir), "--rank", "0", "-n", "2"]) == 0
    assert capsys.readouterr().out == "b\nc\n"
    assert main(["logs", str(run_dir), "--rank", "3"]) == 2
    assert "there are rank0, rank10" in capsys.readouterr().err


def test_logs_follow_what_is_written(run_dir):
    (run_dir / "logs").mkdir()
    path = run_dir / "logs" / "rank0.log"
    path.write_text("first\n")
    argv = [sys.executable, "-u", "-m", "swin_scale", "logs", str(run_dir), "-f"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "first\n"
        with open(path, "a") as file:
            file.write("second\n")
        assert process.stdout.readline() == "second\n"
        # Not SIGINT, which the jobs of a shell in the background inherit as ignored.
        process.terminate()
        assert process.wait(timeout=50) == -signal.SIGTERM


HOLD = """
import signal, sys, time
from pathlib import Path
from swin_scale.run_lock import claim
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
with claim(Path(sys.argv[1])):
    print("mine", flush=True)
    time.sleep(60)
"""


def test_stop_asks_the_process_of_a_local_run(run_dir):
    assert stop(run_dir) == f"nothing runs in {run_dir}"
    assert not stop_file(run_dir).exists()
    with subprocess.Popen([sys.executable, "-c", HOLD, str(run_dir)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "mine\n"
        assert survey(run_dir)["state"] == "running"
        assert stop(run_dir) == f"asked process {process.pid} to save and end"
        assert process.wait(timeout=50) == 75
    assert survey(run_dir)["stop_asked"]
    with pytest.raises(UserError, match="was not submitted to Slurm"):
        cancel(run_dir)


@pytest.mark.parametrize(
    ("state", "said", "done"),
    [("RUNNING", "asked job 7 to save and end", ["USR1", "7"]),
     ("PENDING", "cancelled job 7, which had not started", ["7"]),
     ("COMPLETED", "nothing runs in", [])],
)  # fmt: skip
def test_stop_of_a_job_that_runs_waits_or_ended(run_dir, monkeypatch, state, said, done):
    chain.record(run_dir, "submitted", "7")
    calls = []
    monkeypatch.setattr(slurm, "look_up", lambda job: slurm.JobFacts(job=job, state=state))
    monkeypatch.setattr(slurm, "cancel", calls.extend)
    monkeypatch.setattr(slurm, "signal_tasks", lambda job, name: calls.extend([name, job]))
    assert stop(run_dir).startswith(said)
    assert calls == done
    assert stop_file(run_dir).exists() is bool(done)


def test_stop_of_a_run_that_goes_on_without_its_chain(run_dir, monkeypatch):
    """It was submitted once, and started by hand since."""
    chain.record(run_dir, "submitted", "7")
    monkeypatch.setattr(slurm, "look_up", lambda job: slurm.JobFacts(job=job, state="COMPLETED"))
    with subprocess.Popen([sys.executable, "-c", HOLD, str(run_dir)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "mine\n"
        assert stop(run_dir) == f"asked process {process.pid} to save and end"
        assert process.wait(timeout=50) == 75 and stop_file(run_dir).exists()


def test_cancel_ends_what_waits_before_what_runs(run_dir, monkeypatch):
    chain.record(run_dir, "submitted", "7")
    chain.record(run_dir, "submitted", "8", after="7")
    states, calls = {"7": "RUNNING", "8": "PENDING"}, []
    monkeypatch.setattr(slurm, "look_up", lambda job: slurm.JobFacts(job=job, state=states[job]))
    monkeypatch.setattr(slurm, "cancel", calls.extend)
    assert cancel(run_dir) == "cancelled job 8, 7"
    assert calls == ["8", "7"]


def test_durations():
    assert [duration(s) for s in (-3, 59.6, 61, 7300, 100000)] == [
        "0 s", "1 min 0 s", "1 min 1 s", "2 h 1 min", "1 d 3 h",
    ]  # fmt: skip


def test_code_revision_sees_changes(tmp_path):
    def git(*arguments):
        subprocess.run(["git", "-C", tmp_path, *arguments], check=True, capture_output=True, env=who)

    who = {
        **os.environ,
        **{f"GIT_{role}_{what}": "a@b.c" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
    }
    assert code_revision(tmp_path)["commit"] is None
    git("init")
    (tmp_path / "a.py").write_text("1")
    git("add", "a.py")
    git("commit", "-m", "first")
    clean = code_revision(tmp_path)
    assert clean["commit"] and clean["dirty"] is None
    assert describe(clean).endswith(clean["commit"][:12])
    (tmp_path / "a.py").write_text("2")
    changed = code_revision(tmp_path)
    (tmp_path / "b.py").write_text("new")
    added = code_revision(tmp_path)
    assert len({clean["dirty"], changed["dirty"], added["dirty"]}) == 3
    assert "with changes" in describe(added)


def test_a_run_in_stages_is_looked_at_where_it_is(run_dir, tmp_path):
    """Steps of its stages add up, so that a chain of jobs sees them advance."""
    whole = tmp_path / "whole"
    for number, name in enumerate(("0_small", "1_large", "2_larger")):
        stage = whole / name
        (stage / "checkpoints" / f"step_{10 - number:08d}").mkdir(parents=True)
        if number < 2:
            (stage / "metrics.jsonl").write_text((run_dir / "metrics.jsonl").read_text())
    write_stages(whole, ["0_small", "1_large", "2_larger"])
    facts = survey(whole, look_up=no_slurm)
    assert (facts["stage"], facts["step"], facts["checkpoint"]) == ("1_large", 60, 9)
    assert "step    60 of 100 (60.0%) of stage 1_large" in text_of(facts)
    assert chain.newest_step(whole) == 10 + 9 + 8
