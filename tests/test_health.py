"""Whole runs whose machine is not well: what is said before the first step, who is slow, and whose weights differ."""

import re

import pytest

from swin_scale.checkpoint import list_steps
from tests import runs
from tests.test_doctor import damaged


@pytest.mark.parametrize(
    ("fault", "rank", "section"),
    [
        pytest.param("slow_forward:1:0.3", 1, "forward", id="forward"),
        pytest.param("slow_data:0:0.3", 0, "data", id="data", marks=pytest.mark.proof),
    ],
)
@pytest.mark.fault(14, "run: a rank that sleeps")
def test_a_slow_rank_is_reported(digits, tmp_path, fault, rank, section):
    run_dir = tmp_path / "run"
    result = runs.run(run_dir, digits[0], fault=fault, health__stragglers_every=4, train__max_steps=12)
    assert result.returncode == 0, result.stderr
    reports = runs.events(run_dir, "stragglers")
    assert [row["step"] for row in reports] == [4, 8, 12]
    [slow] = [row for row in runs.events(run_dir, "slow_rank") if row["rank"] == rank]
    assert slow["section"] == section and slow["step"] == 8 and slow["ratio"] > 1.5 and slow["lost"] > 0.2
    [(host, means)] = reports[1]["hosts"].items()
    assert slow["host"] == host and {"data", "sync", "forward", "backward", "optimizer"} <= means.keys()
    assert reports[1]["sections"][section]["slowest"] == rank
    assert result.stderr.count(f"rank {rank} on {host} is slow in {section}") == 1


@pytest.mark.proof
@pytest.mark.fault(14, "run: 1,000 clean steps on shared cores")
def test_nobody_is_accused_in_a_thousand_clean_steps(digits, tmp_path):
    run_dir = tmp_path / "run"
    options = {
        "train__max_steps": 1000,
        "train__global_batch": 4,
        "train__log_every": 50,
        "schedule__total_steps": 1000,
    }
    result = runs.run(run_dir, digits[0], checkpoint__every_steps="null", timeout=600, **options)
    assert result.returncode == 0, result.stderr
    reports = runs.events(run_dir, "stragglers")
    assert len(reports) == 10 and runs.events(run_dir, "slow_rank") == []
    worst = max(row["sections"]["forward"]["max"] / row["sections"]["forward"]["min"] for row in reports)
    print(f"proof: fault 14: 1000 clean steps, 0 alarms, forward of the slower rank at most {worst:.2f} times")  # noqa: T201


@pytest.mark.fault(16, "run: a bit flipped in the last rank's weights before a save")
def test_damaged_weights_are_not_saved_and_a_restart_goes_on(digits, tmp_path):
    run_dir = tmp_path / "run"
    options = {"train__max_steps": 10}
    result = runs.run(run_dir, digits[0], fault="flipped_bit:8", **options)
    assert result.returncode == 6, result.stderr
    assert list_steps(run_dir / "checkpoints") == [4]
    [event] = runs.events(run_dir, "replicas_differ")
    assert event["step"] == 8 and event["parameters"] == ["head.weight"] and event["ranks"] == [0, 1]
    record = runs.exit_record(run_dir)
    assert record["code"] == 6 and "head.weight" in record["cause"] and "step 8" in record["cause"]
    again = runs.run(run_dir, digits[0], **options)
    assert again.returncode == 0, again.stderr
    assert runs.events(run_dir, "start")[-1]["checkpoint"] == "step_00000004"
    assert runs.steps(run_dir)[-1] == 10
    log = (run_dir / "logs/rank0.log").read_text()
    assert len(re.findall(r"doctor: 7 checks, 0 warnings, in [\d.]+ s", log)) == 2


@pytest.mark.proof
@pytest.mark.fault(16, "run: a bit flipped in the last of three ranks' weights, between two saves")
def test_the_odd_one_of_three_is_named(digits, tmp_path):
    run_dir = tmp_path / "run"
    result = runs.run(
        run_dir, digits[0], nproc=3, fault="flipped_bit:6", train__max_steps=10, health__replicas_every=3,
        engine__zero_stage=0,
    )  # fmt: skip
    assert result.returncode == 6, result.stderr
    [event] = runs.events(run_dir, "replicas_differ")
    assert event["step"] == 6 and event["ranks"] == [2] and event["certain"]
    assert re.search(r"rank 2 on \S+ differ from all others in head\.weight", result.stderr)


@pytest.mark.fault(17, "run: most images damaged, found before the first step")
def test_doctor_looks_before_the_first_step(digits, tmp_path):
    run_dir = tmp_path / "run"
    shards = damaged(digits[0], tmp_path / "damaged", 290)
    result = runs.run(run_dir, shards, train__max_steps=4)
    assert result.returncode == 3, result.stderr
    assert "data.train: 300 samples in 1 sets; 8 read and decoded" in result.stderr and "shards verify" in result.stderr
    assert runs.trajectory(run_dir) == []
