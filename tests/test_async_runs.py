"""Whole runs that save in the background: what is saved, what a disk or a writer that fails costs, the best kept."""

import json

import pytest

from swin_scale.checkpoint import Checkpoint
from swin_scale.log import read_events, read_jsonl
from tests import runs

SINGLE = {"nproc": 1, "data__workers": 0}


@pytest.fixture(scope="module")
def plain(digits, tmp_path_factory):
    """12 steps on two ranks whose saves wait for the disk."""
    run_dir = tmp_path_factory.mktemp("plain") / "run"
    result = runs.run(run_dir, digits[0], checkpoint__mode="sync")
    assert result.returncode == 0, result.stderr
    return run_dir


def contents(run_dir, step):
    """Every file of a checkpoint but those that say when, and with which settings, it was written."""
    directory = run_dir / "checkpoints" / f"step_{step:08d}"
    state = json.loads((directory / "state.json").read_text())
    state.pop("elapsed_s")
    files = {p.name: p.read_bytes() for p in directory.iterdir() if p.suffix in (".safetensors", ".npy")}
    return {**files, "state.json": state}


def saves(run_dir):
    """(event, step) of what became of every save, in the order in which the run heard of it."""
    kinds = ("checkpoint", "save_failed", "save_skipped", "sync_saves")
    return [(e["event"], e["step"]) for e in read_events(run_dir / "metrics.jsonl") if e["event"] in kinds]


@pytest.mark.fault(7, "run: the process that writes for one rank of two stopped from step 4 to 9")
def test_a_stalled_disk_costs_a_bounded_wait_and_a_save(digits, plain, tmp_path):
    run_dir = tmp_path / "run"
    result = runs.run(run_dir, digits[0], fault="stop_writer:4:10", checkpoint__wait_s=0.3, train__max_steps=12)
    assert result.returncode == 0, result.stderr
    assert saves(run_dir) == [("save_skipped", 8), ("checkpoint", 4), ("checkpoint", 12)]
    [skipped] = runs.events(run_dir, "save_skipped")
    assert "step 4 is still being written" in skipped["problem"]
    slow, last = runs.events(run_dir, "checkpoint")
    # The wait is a part of the writing, which went on until step 10 was reached: however slow the machine is.
    assert slow["write_seconds"] > skipped["seconds"] >= 0.3
    assert slow["write_seconds"] > slow["seconds"] > 0 and last["path"] == "step_00000012"
    assert runs.trajectory(run_dir) == runs.trajectory(plain)
    assert runs.steps(run_dir) == [4, 12] and list((run_dir / "checkpoints").glob(".*")) == []
    assert all(contents(run_dir, step) == contents(plain, step) for step in (4, 12))


@pytest.mark.proof
@pytest.mark.fault(7, "run: the process that writes for one rank of two killed in the middle of a save")
def test_a_killed_writer_costs_a_save(digits, plain, tmp_path):
    run_dir = tmp_path / "run"
    result = runs.run(run_dir, digits[0], fault="kill_writer:4:6", train__max_steps=12)
    assert result.returncode == 0, result.stderr
    assert saves(run_dir) == [("save_failed", 4), ("checkpoint", 8), ("checkpoint", 12)]
    [failed] = runs.events(run_dir, "save_failed")
    assert "was killed by SIGKILL" in failed["problem"]
    assert runs.trajectory(run_dir) == runs.trajectory(plain)
    assert contents(run_dir, 12) == contents(plain, 12)


@pytest.mark.proof
@pytest.mark.parametrize(("fault", "code"), [("stop_writer:12:1000", 0), ("dead_disk:12", 4)])
@pytest.mark.fault(7, "run: in the last save the writer stands still, or every one that is started")
def test_a_last_save_is_tried_by_a_new_writer_and_ends_in_one_message(digits, tmp_path, fault, code):
    run_dir = tmp_path / "run"
    settings = {"checkpoint__write_timeout_s": 1.5, "checkpoint__every_steps": 6, **SINGLE}
    result = runs.run(run_dir, digits[0], fault=fault, train__max_steps=12, **settings)
    assert result.returncode == code, result.stderr
    [failed] = runs.events(run_dir, "save_failed")
    assert failed["step"] == 12
    assert "step 12 was not written by all ranks within 1.5 s (checkpoint.write_timeout_s)" in failed["problem"]
    assert "Traceback" not in result.stderr and runs.steps(run_dir) == ([6] if code else [6, 12])


FAILS_ONCE = """
import sys
from swin_scale import cli, saver
from swin_scale.errors import CheckpointError

write, saver.SHORTEST_S, failed = saver.save_now, 0.0, []

def save_now(*arguments):
    if not failed:
        failed.append(True)
        raise CheckpointError("no room")
    write(*arguments)

saver.save_now = save_now
sys.exit(cli.main())
"""


def test_a_save_that_failed_is_made_up_for_before_the_next_is_due(digits, tmp_path):
    run_dir = tmp_path / "run"
    settings = {"checkpoint__mode": "sync", "checkpoint__every_minutes": 60, **SINGLE}
    result = runs.run(run_dir, digits[0], program=FAILS_ONCE, train__max_steps=12, **settings)
    assert result.returncode == 0, result.stderr
    assert saves(run_dir) == [("save_failed", 4), ("checkpoint", 6), ("checkpoint", 8), ("checkpoint", 12)]


@pytest.mark.fault(15, "run: NaN in a loss while the save before it is still being committed")
def test_going_back_waits_for_what_is_being_written(digits, tmp_path):
    run_dir = tmp_path / "run"
    fault = "slow_disk:0.1;nan_loss:5"
    result = runs.run(run_dir, digits[0], fault=fault, train__max_steps=6, guard__max_rollbacks=1, **SINGLE)
    assert result.returncode in (0, 5), result.stderr
    [back, *_] = runs.events(run_dir, "rolled_back")
    assert (back["step"], back["to_step"]) == (5, 4)
    told = [(e["event"], e["step"]) for e in read_events(run_dir / "metrics.jsonl")]
    assert told.index(("checkpoint", 4)) < told.index(("rolled_back", 5))


@pytest.mark.proof
def test_without_memory_for_a_copy_saves_wait_for_the_disk(digits, plain, tmp_path):
    run_dir = tmp_path / "run"
    result = runs.run(run_dir, digits[0], fault="no_memory", train__max_steps=12)
    assert result.returncode == 0, result.stderr
    assert saves(run_dir)[0] == ("sync_saves", 0)
    [told] = runs.events(run_dir, "sync_saves")
    assert "staging buffers of" in told["problem"] and "of memory that are free" in told["problem"]
    assert contents(run_dir, 12) == contents(plain, 12)


@pytest.mark.proof
def test_the_best_stay(digits, tmp_path):
    """Evaluations at the ends of epochs, saves of their own at other steps; the two best are there in the end."""
    run_dir = tmp_path / "run"
    settings = {
        "data__val": f"[{digits[1]}]", "train__eval_every_epochs": 1, "train__max_steps": 60,
        "checkpoint__every_steps": 10, "checkpoint__keep": 2, "checkpoint__keep_best": 2, "optim__lr": 3e-3, **SINGLE,
    }  # fmt: skip
    for stop in (30, 60):
        result = runs.run(run_dir, digits[0], **{**settings, "train__max_steps": stop})
        assert result.returncode == 0, result.stderr
    found = {event["step"]: event["top1"] for event in runs.events(run_dir, "eval")}
    assert set(found) == {13, 26, 30, 39, 52, 60}
    best = sorted(sorted(found), key=lambda step: -found[step])[:2]
    # The last evaluation follows the last save, which nothing prunes after it.
    kept = set(runs.steps(run_dir))
    assert {50, 60} <= kept or {52, 60} <= kept
    assert set(best) <= kept and len(kept) <= 5
    for step in best:
        with Checkpoint.open(run_dir / f"checkpoints/step_{step:08d}") as checkpoint:
            assert checkpoint.step == step


def test_the_best_need_evaluations(digits, tmp_path):
    result = runs.run(tmp_path / "run", digits[0], checkpoint__keep_best=1, **SINGLE)
    assert result.returncode == 2 and "checkpoint.keep_best is 1, and data.val is empty" in result.stderr
    assert read_jsonl(tmp_path / "run" / "metrics.jsonl") == []
