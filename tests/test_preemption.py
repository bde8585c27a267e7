"""Runs that are asked to end, at every kind of moment: saved, exit 75, and the next one goes on as if nothing was."""

import os
import random
import signal
import time

import pytest

from swin_scale.checkpoint import LoadAttempts
from swin_scale.end_signals import END_SIGNALS
from tests import kills, runs

OPTIONS = {
    "train__global_batch": 8, "train__eval_batch": 4, "train__eval_every_epochs": 1, "optim__ema_decay": 0.9,
}  # fmt: skip
"""Of a run over 50 images: seven steps to the epoch and its evaluation, four to a save."""
DURING = {
    "data": "data wait", "join": None, "build": None, "load": None, "commit": "step",
    **{name: name for name in ("step", "evaluation", "checkpoint")},
}  # fmt: skip
"""What a run says it was doing; set-up has no diary yet, and what is written in the background stops no step."""


def evaluations(run_dir):
    return [(e["step"], e["weights"], e["top1"], e["loss"]) for e in runs.events(run_dir, "eval")]


def ask(run_dir, rng, phase, number, directory, *arguments, **options):
    """One life of a run that rank `signalled` alone is asked to end, in the midst of a phase of rank `slow`."""
    directory.mkdir(parents=True)
    slow, signalled = 0 if phase == "commit" else rng.randrange(2), rng.randrange(2)
    before = runs.steps(run_dir)
    fault = f"asked:{phase}:{directory}:{slow}:{signalled}:{int(number)}:{rng.uniform(0, 0.2):.3f}"
    result = runs.run(run_dir, *arguments, fault=fault, **options)
    assert (directory / "sent").exists(), result.stderr
    assert result.returncode == 75, result.stderr
    record = runs.exit_record(run_dir)
    assert record["code"] == 75
    attempts = LoadAttempts(run_dir / "checkpoints")
    assert not any(attempts.count(run_dir / f"checkpoints/step_{step:08d}") for step in before)
    assert f"{signal.Signals(number).name} on 1 ranks" in record["cause"]
    if DURING[phase] is None:
        assert runs.steps(run_dir) == before
        return
    event = runs.events(run_dir, "preempted")[-1]
    assert event["saved"] is True
    assert event["step"] == runs.steps(run_dir)[-1]
    # Fast steps are not each followed by a look for requests: a save or an evaluation between two of them is the first.
    sooner = {"checkpoint": event["step"] % 4 == 0, "evaluation": event["step"] % 7 == 0}.get(event["during"], False)
    assert event["during"] == DURING[phase] or (DURING[phase] == "step" and sooner), event


def check_chain(shards, tmp_path, rng, phases, steps):
    options = {**OPTIONS, "data__val": f"[{shards}]", "train__max_steps": steps, "schedule__total_steps": steps}
    whole = runs.run(tmp_path / "whole", shards, **options)
    assert whole.returncode == 0, whole.stderr
    run_dir = tmp_path / "run"
    for i, phase in enumerate(phases):
        ask(run_dir, rng, phase, END_SIGNALS[i % 3], tmp_path / f"asked{i}", shards, **options)
    last = runs.run(run_dir, shards, **options)
    assert last.returncode == 0, last.stderr
    assert runs.trajectory(run_dir) == runs.trajectory(tmp_path / "whole")
    assert len(runs.trajectory(run_dir)) == steps
    assert evaluations(run_dir) == evaluations(tmp_path / "whole")
    saved = [event["step"] for event in runs.events(run_dir, "checkpoint")]
    assert len(saved) == len(set(saved)), f"saved twice: {saved}"
    assert runs.events(run_dir, "fell_back") == []
    for file in ("rank00000.safetensors", "rank00001.safetensors"):
        name = f"checkpoints/step_{steps:08d}/{file}"
        assert (run_dir / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.fault(10, "run: a signal to one rank while one waits for data that never comes, in evaluation, at a load")
def test_a_signal_to_one_rank_costs_nothing(digits, tmp_path):
    check_chain(digits[1], tmp_path, random.Random(10), ["data", "evaluation", "load"], steps=14)


@pytest.mark.proof
@pytest.mark.long
@pytest.mark.fault(10, "run: five signals each to one rank of two in step, data wait, evaluation, warm-up, checkpoint")
def test_signals_at_any_moment_cost_nothing(digits, tmp_path):
    rng = random.Random(2026)
    phases = [
        *["step"] * 5, *["data"] * 5, *["evaluation"] * 5, "join", "build", "build", "load", "load",
        *["checkpoint"] * 3, *["commit"] * 2,
    ]  # fmt: skip
    rng.shuffle(phases)
    # A run that has saved can be loaded.
    phases.insert(0, phases.pop(phases.index("step")))
    steps = 98
    check_chain(digits[1], tmp_path, rng, phases, steps)
    kinds = "5 of 5 each in step, data wait, evaluation, checkpoint, and in warm-up, where there is nothing to save"
    print(f"proof: a signal to one rank of two, saved {kinds}: {steps} steps and all evaluations equal")  # noqa: T201


@pytest.mark.fault(11, "run: 0.5 s left where a save takes longer")
def test_with_too_little_time_nothing_is_begun(digits, tmp_path):
    run_dir = tmp_path / "run"
    settings = {"nproc": 1, "data__workers": 0, "train__max_steps": 9, "checkpoint__every_steps": 6}
    for left, steps in ((0.5, []), (30.0, [4])):  # not saved before, a save of it may take a second
        # Steps that take so long end with a look for requests, each of them.
        result = runs.run(run_dir, digits[0], fault=f"late:4:{run_dir}:{left};step_takes:0.6", **settings)
        assert result.returncode == 75, result.stderr
        assert runs.steps(run_dir) == steps
    [event] = runs.events(run_dir, "no_time_to_save")
    assert event["step"] == 4
    assert event["left_s"] <= 0.5 < event["save_s"]
    assert [event["saved"] for event in runs.events(run_dir, "preempted")] == [False, True]
    assert runs.run(run_dir, digits[0], **settings).returncode == 0
    assert len(runs.trajectory(run_dir)) == 9


@pytest.mark.proof
@pytest.mark.fault(10, "run: SIGTERM to one rank as soon as its process exists")
def test_a_signal_before_python_listens_waits(digits, tmp_path):
    """By default it would be the end of that rank, and of the others after their time-out."""
    process = runs.start(tmp_path / "run", digits[1])
    # Not theirs: a rank that has just started forks a guard, by way of a process that is gone in a moment.
    while len(ranks := kills.children(process.pid, own=True)) < 2:
        assert process.poll() is None
        time.sleep(0.001)
    os.kill(ranks[1], signal.SIGTERM)
    assert process.wait(120) == 75
    assert "SIGTERM on 1 ranks" in runs.exit_record(tmp_path / "run")["cause"]
    assert runs.steps(tmp_path / "run") == []
