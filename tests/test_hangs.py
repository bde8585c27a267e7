"""Whole runs in which one rank hangs or is killed: who is named, what is kept, and the same command goes on."""

import json
import os
import time

import pytest

from launcher.watchdog import STACK_SIGNAL
from swin_scale.config import EngineConfig
from swin_scale.engine.watch import Watch
from swin_scale.log import read_metrics
from swin_scale.sections import Section, Sections
from tests import runs
from tests.launcher.watched import watchdogs
from tests.spawn import spawn_dist

HANG_S = 5.0
STEP = 10
"""Of 20; the checkpoint of step 8 is there by then, and sections are known."""
DENSE = {"engine__hang_timeout_s": HANG_S, "engine__timeout_s": 120, "train__max_steps": 20, "data__prefetch": 1}
EXPERTS = {
    **DENSE, "model__name": "swin_moe_nano_patch4_window4_32", "moe__ep_size": 2, "engine__zero_stage": 1,
    "moe__gate_noise": 0, "moe__drop": 0,
}  # fmt: skip
HOST = os.uname().nodename


def bundle_of(run_dir):
    [bundle] = (run_dir / "crash").iterdir()
    return bundle


@pytest.fixture(scope="module")
def undisturbed(digits, tmp_path_factory):
    """settings -> the trajectory of a run that nothing disturbed."""
    found = {}

    def trajectory(settings):
        key = settings.get("model__name")
        if key not in found:
            run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
            assert runs.run(run_dir, digits[0], **settings).returncode == 0
            assert not (run_dir / "crash").exists()
            found[key] = runs.trajectory(run_dir)
        return found[key]

    return trajectory


@pytest.mark.parametrize(
    ("how", "settings", "section", "says"),
    [
        pytest.param(
            # That takes no waiting, so that no other rank may seem to hang on a busy machine.
            "killed", {**DENSE, "engine__hang_timeout_s": 60}, "forward", " was killed",
            marks=pytest.mark.fault(1, "kill -9 of one rank mid-step"),
        ),
        pytest.param(
            "stopped", DENSE, "forward", ": stopped (SIGSTOP, or a debugger); rank 0 waited in section",
            marks=[pytest.mark.proof, pytest.mark.fault(13, "one of two ranks is stopped in a step, real launcher")],
        ),
        pytest.param(
            "gil", DENSE, "forward", "; rank 0 waited in section sync after step 9",
            marks=[pytest.mark.proof, pytest.mark.fault(13, "one of two ranks sleeps with the interpreter's lock")],
        ),
        pytest.param(
            "collective", DENSE, "optimizer", "; rank 0 waited in section ",
            marks=[pytest.mark.proof, pytest.mark.fault(13, "one of two ranks is in a collective that never comes")],
        ),
        pytest.param(
            "worker", DENSE, "data", ": waiting for a loader worker that is stopped",
            marks=[pytest.mark.proof, pytest.mark.fault(13, "the loader worker of one of two ranks is stopped")],
        ),
        pytest.param(
            "expert", EXPERTS, "forward", "; rank 0 waited in section all_to_all after step 9",
            marks=[pytest.mark.proof, pytest.mark.fault(13, "one of two ranks does not come to an all-to-all")],
        ),
    ],
)  # fmt: skip
def test_a_rank_that_hangs_is_named_and_the_run_goes_on(digits, undisturbed, tmp_path, how, settings, section, says):
    run_dir = tmp_path / "run"
    began = time.monotonic()
    result = runs.run(run_dir, digits[0], fault=f"hang:{how}:{STEP}", cold=how == "stopped", **settings)
    assert result.returncode == 6, result.stderr
    bundle = bundle_of(run_dir)
    line = (bundle / "verdict.txt").read_text().rstrip("\n")
    assert line.startswith(f"rank 1 on {HOST} ") and f" in section {section} after step " in line and says in line
    assert 9 <= json.loads((bundle / "verdict.json").read_text())["step"] <= 14  # workers are ahead of the steps
    record = runs.exit_record(run_dir)
    assert (record["code"], record["rank"]) == (6, 1) and line in record["cause"]
    assert line in result.stderr, "nobody was told"
    deadline = time.monotonic() + 60
    while watchdogs(run_dir):  # they may outlive the run, and still have to write what follows
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert [event["problem"] for event in runs.events(run_dir, "hang")] == [line]
    assert len((bundle / "metrics.jsonl").read_bytes().splitlines()) >= 8 and (bundle / "config.yaml").exists()
    if how != "killed":
        waiting, hung = ((bundle / f"rank{rank}.txt").read_text() for rank in range(2))
        assert "torch/distributed/" in waiting or "moe/comm.py" in waiting
        assert ("none within" in hung) == (how == "stopped")
        if how in ("gil", "collective", "expert"):
            assert "tests/injected/injections.py" in hung
        if how == "worker":
            assert "swin_scale.data.worker" in hung and "State: T (stopped)" in hung
    print(f"proof: hang {how}: {time.monotonic() - began:.0f} s with the start; {line}")  # noqa: T201

    again = runs.run(run_dir, digits[0], **settings)
    assert again.returncode == 0, again.stderr
    assert runs.trajectory(run_dir) == undisturbed(settings)
    assert bundle_of(run_dir) == bundle and runs.exit_record(run_dir)["code"] == 0


@pytest.mark.proof
@pytest.mark.fault(14, "nothing: 1,000 steps with evaluations and saves, by a watchdog of 5 s")
def test_1000_clean_steps_of_a_real_run_give_no_alarm(digits, tmp_path):
    run_dir = tmp_path / "run"
    settings = {
        "engine__hang_timeout_s": HANG_S, "data__val": f"[{digits[1]}]", "train__eval_every_epochs": 10,
        "train__max_steps": 1000, "train__epochs": 100, "train__global_batch": 8, "train__log_every": 20,
        "checkpoint__every_steps": 100, "schedule__total_steps": 1000,
    }  # fmt: skip
    result = runs.run(run_dir, digits[0], nproc=1, timeout=900, **settings)
    assert result.returncode == 0, result.stderr
    assert len(read_metrics(run_dir / "metrics.jsonl")) == 1000 and runs.events(run_dir, "eval")
    assert not (run_dir / "crash").exists()
    statuses = json.loads((run_dir / "heartbeat" / "rank0.json").read_text())
    assert statuses["ended"] and statuses["step"] == 1000
    print("proof: 1,000 clean steps with a watchdog of 5 s: no alarm")  # noqa: T201


def test_no_watchdog_where_none_is_wanted(digits, tmp_path):
    run_dir = tmp_path / "run"
    result = runs.run(run_dir, digits[0], nproc=1, train__max_steps=1, engine__hang_timeout_s=0)
    assert result.returncode == 0 and not (run_dir / "heartbeat").exists()


def be_asked_late(dist, run_dir):
    with Watch(run_dir, EngineConfig(), Sections(outside=Section.SET_UP)) as watch:
        watch.start(dist)
    os.kill(os.getpid(), STACK_SIGNAL)
    time.sleep(0.1)
    return "lives"


def test_a_question_that_comes_after_the_goodbye_ends_nobody(tmp_path):
    """A watchdog may learn of another rank's death when its own is on its way out, with its report still to write."""
    assert spawn_dist(1, be_asked_late, tmp_path) == ["lives"]
