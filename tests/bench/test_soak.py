"""The parts of the soak that can be told right or wrong without a run: its plan, its eyes, its hands, its judgement."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from swin_scale.checkpoint import Checkpoint
from tests.checkpoint.helpers import cut, make_tensors, save

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import soak  # noqa: E402
import soak_faults  # noqa: E402
import soak_places  # noqa: E402


@pytest.fixture
def rng():
    return random.Random(3)


def test_a_plan_is_a_function_of_its_seed_and_leaves_room_between_faults():
    kinds = soak_places.Slurm.kinds
    faults = soak_faults.plan(kinds, 26, 2200, random.Random(5))
    assert faults == soak_faults.plan(kinds, 26, 2200, random.Random(5))
    assert [fault.kind for fault in faults] != [
        fault.kind for fault in soak_faults.plan(kinds, 26, 2200, random.Random(6))
    ]
    counts = Counter(fault.kind for fault in faults)
    assert counts.keys() == set(kinds) and min(counts.values()) >= 2 and counts.total() == 26
    steps = [fault.step for fault in faults]
    # A damaged newest checkpoint needs an older one, and the last fault steps to be followed by.
    assert steps[0] > 2 * soak.EVERY and steps[-1] + soak_faults.BEYOND < 2200
    assert min(later - earlier for earlier, later in itertools.pairwise(steps)) > soak.EVERY
    with pytest.raises(ValueError, match="at least 24"):
        soak_faults.plan(kinds, 23, 2200, random.Random(5))


def test_every_kind_of_fault_has_its_weight_and_its_method():
    for kind in soak_faults.WEIGHTS:
        assert callable(getattr(soak_faults.Injector, f"_{kind}"))
    assert set(soak_places.Local.kinds) < set(soak_places.Slurm.kinds) == set(soak_faults.WEIGHTS)


RANK = """
import os, subprocess, sys, time
sleeps = "print(flush=True); import time; time.sleep(60)  # swin_scale.data.worker"
for program in (["-c", sleeps], ["-m", "swin_scale.disk_writer"]):
    # Until it speaks: just after its start a process has no command line yet.
    subprocess.Popen([sys.executable, *program], stdout=subprocess.PIPE).stdout.readline()
if os.fork() == 0:
    time.sleep(60)
    os._exit(0)
print("ready", flush=True)
time.sleep(60)
"""


def test_ranks_and_workers_are_found_and_no_others(tmp_path):
    """Of this run, under Slurm and without; not what a rank forked, nor the shell of the job, nor another run."""
    package = tmp_path / "swin_scale"
    package.mkdir()
    (package / "__main__.py").write_text(RANK)
    (package / "disk_writer.py").write_text("print(flush=True); import time; time.sleep(60)")
    (tmp_path / "launcher").mkdir()
    (tmp_path / "launcher" / "watchdog.py").write_text("print('ready', flush=True); import time; time.sleep(60)")
    run_dir = tmp_path / "run"
    told = json.dumps({"run_dir": str(run_dir), "rank": 1})
    task = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURMD_NODENAME": "n2"}
    shell = {"SLURM_PROCID": "0", "SLURMD_NODENAME": "n1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "swin_scale", "train"], cwd=tmp_path, stdout=subprocess.PIPE, start_new_session=True,
            env={**os.environ, soak_faults.MARK: str(mark), **variables},
        )
        for mark, variables in ((run_dir, {"RANK": "0"}), (run_dir, task), (run_dir, shell), ("other", {"RANK": "2"}))
    ]  # fmt: skip
    watchdog = [sys.executable, "-S", "-m", "launcher.watchdog", told]
    started.append(subprocess.Popen(watchdog, cwd=tmp_path, stdout=subprocess.PIPE, start_new_session=True))
    try:
        for process in started:
            assert process.stdout.readline() == b"ready\n"
        found = soak_faults.find(run_dir)
        assert [(one.role, one.rank, one.node) for one in found] == [
            ("launcher.watchdog", 1, ""), ("rank", 0, ""), ("rank", 1, "n2"),
            ("swin_scale.disk_writer", 0, ""), ("swin_scale.disk_writer", 1, "n2"),
            ("worker", 0, ""), ("worker", 1, "n2"),
        ]  # fmt: skip
        assert [one.pid for one in found[1:3]] == [process.pid for process in started[:2]]
        said = [str(one) for one in found[2:6]]
        assert said[0] == "rank 1 on n2" and said[1] == "swin_scale.disk_writer of rank 0"
        assert said[3] == "loader worker of rank 0"
        found[1].signal(signal.SIGKILL)
        assert started[0].wait(10) == -signal.SIGKILL
    finally:
        for process in started:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()


def test_where_a_run_stands_is_its_last_whole_row(tmp_path):
    assert soak_faults.position(tmp_path) == 0
    rows = [{"step": 7, "loss": 1.0}, {"event": "checkpoint", "step": 9}]
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 1')
    assert soak_faults.position(tmp_path) == 7


def test_damage_is_one_bit_or_a_cut(tmp_path, rng):
    path = tmp_path / "file"
    before = rng.randbytes(1000)
    path.write_bytes(before)
    soak_faults.damage(path, "flip", rng)
    after = path.read_bytes()
    assert len(after) == 1000 and sum((a ^ b).bit_count() for a, b in zip(before, after, strict=True)) == 1
    soak_faults.damage(path, "truncate", rng)
    assert path.read_bytes() == after[: path.stat().st_size] and path.stat().st_size < 1000


class OverAt:
    """A place whose run is over after so many looks."""

    def __init__(self, looks):
        self.looks = looks

    def ended(self):
        self.looks -= 1
        return self.looks < 0


def test_waiting_ends_with_the_run_or_with_the_time(tmp_path, rng):
    fault = soak_faults.Fault(kind="kill_rank", step=5)
    options = {"run_dir": tmp_path, "rng": rng, "filler": tmp_path / "filler", "began": 0.0, "poll_s": 0.001}
    for looks, seconds, why in ((3, 60, "the run ended"), (10**6, 0.05, "the time for the whole soak")):
        deadline = time.monotonic() + seconds
        injector = soak_faults.Injector(place=OverAt(looks), deadline=deadline, **options)
        with pytest.raises(soak_faults.Ended, match=why):
            injector.inject(fault)
        assert injector.done == []


def test_one_bit_of_one_moment_is_seen(tmp_path):
    tensors = make_tensors(kinds=("master", "exp_avg"))
    pair = [Checkpoint.open(save(tmp_path / name, 8, cut(tensors, ranks))) for name, ranks in (("a", 1), ("b", 2))]
    same = soak.compare_checkpoints(*pair)
    assert same["checkpoint"] and same["state"] and same["numbers_compared"] > 0
    name = next(iter(tensors["exp_avg"]))
    flat = tensors["exp_avg"][name].view(-1).view(torch.int32)
    flat[0] ^= 1
    odd = soak.compare_checkpoints(pair[0], Checkpoint.open(save(tmp_path / "c", 8, cut(tensors, 1))))
    assert not odd["checkpoint"] and odd["different"] == [f"exp_avg of {name}"]
    assert not soak.same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert soak.same_bits(torch.tensor([torch.nan]), torch.tensor([torch.nan]))


def test_what_followed_is_told_by_the_lives_and_the_events(tmp_path):
    lives = [
        {"time": 100.0, "step": 0, "end_time": 131.0, "code": 6, "cause": "rank 1 is gone"},
        {"time": 140.0, "step": 66},
    ]
    fault = {"kind": "flip_bit", "time": 130.0, "step": 71, "back_s": 25.0}
    said = f"{tmp_path}/checkpoints/step_00000066 is damaged"
    events = [
        {"event": "start", "step": 44, "time": 142.0},
        {"event": "fell_back", "step": 44, "time": 142.0, "problem": said},
        {"event": "save_failed", "step": 88, "time": 170.0, "problem": "No space left on device"},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in events))
    assert soak.followed(tmp_path, fault, lives) == {
        "lives": 1, "code": 6, "cause": "rank 1 is gone", "resumed_from": 44, "steps_lost": 27,
        "fell_back": ["checkpoints/step_00000066 is damaged"],
    }  # fmt: skip
    full = {"kind": "full_disk", "time": 165.0, "step": 80, "back_s": 9.0}
    assert soak.followed(tmp_path, full, lives) == {"lives": 0, "save_failed": ["No space left on device"]}


def test_the_verdict_needs_everything():
    good = {
        "undisturbed": {"finished": True},
        "soak": {"finished": True, "ledger": {"unattributed_share": 0.004}},
        "planned": 1,
        "faults": [{}],
        "equal": dict.fromkeys(("trajectory", "evaluations", "checkpoint", "state"), True),
    }
    assert soak.verdict(good)
    for change in (
        {"soak": {"finished": False, "ledger": {"unattributed_share": 0.0}}},
        {"soak": {"finished": True, "ledger": {"unattributed_share": 0.011}}},
        {"soak": {"finished": True, "ledger": {}}},
        {"faults": []},
        {"equal": {**good["equal"], "checkpoint": False}},
        {"equal": {**good["equal"], "trajectory": False}},
    ):
        assert not soak.verdict({**good, **change})
