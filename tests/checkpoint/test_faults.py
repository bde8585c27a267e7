"""Kills between any two system calls, loads that crash, disks that are too small, what is kept by the hour."""

import errno
import itertools
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from swin_scale.checkpoint import (
    MAX_ATTEMPTS,
    Checkpoint,
    LoadAttempts,
    best_of,
    checkpoint_bytes,
    list_steps,
    newest_good,
    prune,
    recover,
    shortage,
)
from swin_scale.engine.saving import load_survived, loading
from swin_scale.engine.saving import newest_good as newest_good_of_all
from swin_scale.errors import CheckpointError, DataError
from tests.checkpoint.helpers import SHAPES, cut, make_tensors, parameters_of, save
from tests.spawn import spawn_dist

EVERY_CALL = """
import os, sys
from pathlib import Path
from swin_scale.checkpoint import begin, commit, prune, store, write_rank_file
from tests.checkpoint.helpers import cut, make_tensors, save

CALLS = ("open", "mkdir", "rename", "replace", "unlink", "rmdir", "fsync")

def die_at(n):
    count = [0]
    def counted(name, original):
        def call(*arguments, **options):
            count[0] += 1
            if count[0] == n:
                os._exit(9)
            return original(*arguments, **options)
        return call
    for name in CALLS:
        setattr(os, name, counted(name, getattr(os, name)))

for line in sys.stdin:
    root, step, keep, n = line.split()
    child = os.fork()
    if not child:
        die_at(int(n))
        save(Path(root), int(step), cut(make_tensors(seed=100 + int(step)), 2))
        prune(root, int(keep))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def kill_at_every_call(tmp_path, before, step, keep, first=1, stride=1):
    """Save `step` over the checkpoints `before` and prune, killed before the 1st, 2nd, ... call; what was seen."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    new, seen = make_tensors(seed=100 + step), []
    with subprocess.Popen([sys.executable, "-c", EVERY_CALL], **pipes) as nursery:
        for n in itertools.count(first, stride):
            root = tmp_path / str(n)
            for older in before:
                save(root, older, cut(make_tensors(seed=older), 2))
            nursery.stdin.write(f"{root} {step} {keep} {n}\n")
            code = int(nursery.stdout.readline())
            recover(root)  # as a resumed run does
            damaged = []
            with newest_good(root, lambda path, what, damaged=damaged: damaged.append(what)) as left:
                assert damaged == []
                expected = new if left.step == step and holds(left, new) else make_tensors(seed=max(before))
                assert holds(left, expected), (n, left.step)
                seen.append("new" if expected is new else "old")
            save(root, step + 1, cut(new, 1))
            prune(root, keep)
            kept = [f"step_{s:08d}" for s in sorted({*before, step, step + 1})][-keep:]
            if step not in before and seen[-1] == "old":
                kept = [f"step_{s:08d}" for s in sorted({*before, step + 1})][-keep:]
            assert sorted(os.listdir(root)) == ["latest", *kept], n
            shutil.rmtree(root)
            if code == 0:
                break
        nursery.stdin.close()
    assert seen == sorted(seen, reverse=True) and set(seen) == {"old", "new"}
    return seen


def holds(checkpoint, tensors):
    return all(
        torch.equal(tensor, tensors[kind][name])
        for kind in tensors
        for name, tensor in checkpoint.load_full(kind).items()
    )


@pytest.mark.fault(3, "killed before any system call of commit and deletion")
def test_a_kill_between_commit_and_deletion_keeps_old_or_new(tmp_path):
    assert len(kill_at_every_call(tmp_path, before=(1, 2), step=3, keep=2, stride=2)) >= 15


@pytest.mark.fault(3, "killed before any system call while the only checkpoint is replaced by one of the same step")
def test_a_replaced_checkpoint_is_never_lost(tmp_path):
    assert len(kill_at_every_call(tmp_path, before=(2,), step=2, keep=2, first=2, stride=2)) >= 14


@pytest.mark.proof
@pytest.mark.fault(3, "killed before any system call of commit and deletion")
def test_kills_at_every_call_proof(tmp_path):
    kills = 0
    for i, case in enumerate([((1, 2), 3, 2), ((2,), 2, 2), ((1, 2, 3, 4), 5, 2), ((1, 2, 3), 3, 1)]):
        kills += len(kill_at_every_call(tmp_path / str(i), *case)) - 1
    print(f"proof: {kills} kills, one before each system call of saving and pruning: old or new, never neither")  # noqa: T201


@pytest.mark.fault(3, "the rename of a replacement fails")
def test_a_replacement_that_fails_puts_the_old_one_back(tmp_path, monkeypatch):
    save(tmp_path, 1, cut(make_tensors(seed=1), 2))
    rename = os.rename

    def fail_for_new(source, target):
        if str(source).endswith(".tmp"):
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_for_new)
    with pytest.raises(CheckpointError, match="step_00000001 cannot be written: Input/output error"):
        save(tmp_path, 1, cut(make_tensors(seed=2), 2))
    assert holds(newest_good(tmp_path), make_tensors(seed=1))
    assert sorted(os.listdir(tmp_path)) == ["latest", "step_00000001"]


@pytest.mark.fault(7, "deleting an old checkpoint fails")
def test_what_cannot_be_deleted_or_pointed_to_costs_no_save(tmp_path, monkeypatch):
    for step in (1, 2):
        save(tmp_path, step, cut(make_tensors(), 1))

    def read_only(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("swin_scale.checkpoint.store.os.rename", read_only)
    assert prune(tmp_path, 1) == []
    monkeypatch.undo()
    monkeypatch.setattr("swin_scale.checkpoint.store.write_atomic", write_only("manifest.json"))
    save(tmp_path, 3, cut(make_tensors(), 1))
    assert list_steps(tmp_path) == [1, 2, 3]
    assert (tmp_path / "latest").read_text() == "step_00000002\n"


def write_only(name):
    def write(path, data):
        if path.name != name:
            raise OSError(errno.ENOSPC, "No space left on device")
        path.write_bytes(data)

    return write


LIMITED = """
import resource, signal, sys
from pathlib import Path
from swin_scale.checkpoint import begin, write_rank_file
from swin_scale.errors import CheckpointError
from tests.checkpoint.helpers import cut, make_tensors
temporary = begin(Path(sys.argv[1]), 2)
resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))
try:
    write_rank_file(temporary, 0, cut(make_tensors(), 1)[0])
except CheckpointError as error:
    print(error)
"""


@pytest.mark.fault(6, "file size limit of the process (RLIMIT_FSIZE)")
def test_a_file_size_limit_fails_cleanly(tmp_path):
    save(tmp_path, 1, cut(make_tensors(), 2))
    done = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, timeout=240)
    assert "rank00000.safetensors cannot be written: File too large" in done.stdout, done.stderr
    assert os.listdir(tmp_path / ".step_00000002.tmp") == []
    assert newest_good(tmp_path).step == 1


@pytest.mark.fault(6, "a real file system of 64 KiB, or of 20 inodes")
@pytest.mark.parametrize("options", ["size=64k", "size=4m,nr_inodes=20"])
def test_a_full_file_system_keeps_the_older_ones(small_disk, options):
    root = small_disk(options)
    tensors = make_tensors()
    with pytest.raises(CheckpointError, match="No space left on device"):
        [save(root, step, cut(tensors, 2)) for step in itertools.count(1)]
    fits = max(list_steps(root))
    assert 1 <= fits <= 8
    assert sorted(os.listdir(root)) == ["latest", *(f"step_{s:08d}" for s in range(1, fits + 1))]
    assert all(holds(Checkpoint.open(root / f"step_{s:08d}"), tensors) for s in range(1, fits + 1))
    prune(root, 1)
    save(root, fits + 1, cut(tensors, 2))


def test_predicted_size_is_the_written_one(tmp_path):
    shapes = {f"layers.{i}.weight": (128, 96) for i in range(8)} | {"frozen": (64, 64)}
    generator = torch.Generator().manual_seed(0)
    tensors = {
        kind: {n: torch.randn(s, generator=generator) for n, s in shapes.items() if n != "frozen" or kind in EVERY}
        for kind in ("master", "ema", "exp_avg", "exp_avg_sq")
    }
    path = save(tmp_path, 1, cut(tensors, 2), parameters=parameters_of(shapes))
    written = sum(file.stat().st_size for file in path.iterdir())
    assert checkpoint_bytes(parameters_of(shapes), moments=2, ema=True) == pytest.approx(written, rel=0.02)
    assert checkpoint_bytes(parameters_of(SHAPES), moments=0, ema=False) > 4 * (18 + 7 + 1 + 55 + 4)


EVERY = ("master", "ema")


@pytest.mark.fault(6, "preflight on file systems that are too small")
def test_preflight_does_the_arithmetic(small_disk):
    root = small_disk("size=1m,nr_inodes=40")
    assert shortage(root, size=100_000, files=6, checkpoints=4) is None
    assert "4 checkpoints of 0.3 MiB need 1.1 MiB" in shortage(root, size=300_000, files=6, checkpoints=4)
    assert "need 80 inodes, but" in shortage(root, size=1000, files=19, checkpoints=4)


def test_every_hours_pins_the_first_past_each_multiple(tmp_path):
    """Saves each 20 minutes, pins each hour: 60, 120, 180 minutes stay, whatever is pruned when, and for good."""
    for step in range(1, 11):
        save(tmp_path, step, cut(make_tensors(), 1), state={"elapsed_s": 1200.0 * step})
        prune(tmp_path, 2, every_hours=1.0)
    assert list_steps(tmp_path) == [3, 6, 9, 10]
    save(tmp_path, 11, cut(make_tensors(), 1), state={"step": 11})
    save(tmp_path, 12, cut(make_tensors(), 1), state={"elapsed_s": [1]})
    assert prune(tmp_path, 1, every_hours=1.0) == [10, 11]
    assert prune(tmp_path, 1, every_hours=2.0) == [3, 9]
    assert prune(tmp_path, 1) == [6]


def test_the_best_stay_whatever_else_goes(tmp_path):
    """Of those that are there; what was evaluated and never saved takes nobody's place."""
    figures = {2: 50.0, 3: 70.0, 4: 70.0, 5: 99.0}
    for step in (1, 2, 3, 4, 6, 7):
        save(tmp_path, step, cut(make_tensors(), 1))
    assert best_of(list_steps(tmp_path), figures, 2) == {3, 4}
    assert prune(tmp_path, 2, best=best_of(list_steps(tmp_path), figures, 1)) == [1, 2, 4]
    assert best_of([3], figures, 0) == set() and list_steps(tmp_path) == [3, 6, 7]


@pytest.mark.fault(26, "clock a year back between two saves")
def test_pins_count_training_time_not_the_date(tmp_path, monkeypatch):
    for step, now in enumerate((2e9, 2e9 - 4e7, 2e9 + 4e7), 1):
        monkeypatch.setattr("time.time", lambda now=now: now)
        save(tmp_path, step, cut(make_tensors(), 1), state={"elapsed_s": 600.0 * step})
        prune(tmp_path, 2, every_hours=1.0)
    assert list_steps(tmp_path) == [2, 3]


@pytest.mark.fault(5, "three loads that end the process")
def test_attempts_count_one_content_and_are_forgotten(tmp_path):
    path = save(tmp_path, 1, cut(make_tensors(), 1))
    attempts = LoadAttempts(tmp_path)
    for count in range(MAX_ATTEMPTS):
        assert attempts.count(path) == count
        attempts.begin(path)
    assert LoadAttempts(tmp_path).count(path) == MAX_ATTEMPTS
    save(tmp_path, 1, cut(make_tensors(seed=9), 1))  # another content under the same name
    assert attempts.count(path) == 0
    attempts.begin(path)
    attempts.clear(path)
    assert attempts.count(path) == 0
    assert json.loads(attempts.path.read_text()) == {}


@pytest.mark.parametrize("text", ["", "[]", "{", '{"step_00000001": 3}', '{"step_00000001": ["x", "y"]}', "\xff"])
def test_a_damaged_count_counts_nothing(tmp_path, text):
    path = save(tmp_path, 1, cut(make_tensors(), 1))
    attempts = LoadAttempts(tmp_path)
    attempts.path.write_text(text)
    assert attempts.count(path) == 0
    attempts.begin(path)
    assert attempts.count(path) == 1


def agree(dist, root):
    """What every rank takes up, and what it hears about the newer ones."""
    try:
        checkpoint, damage = newest_good_of_all(root, dist)
    except CheckpointError as error:
        return "none", str(error)
    return (checkpoint.step if checkpoint else None), damage


@pytest.mark.fault(5, "crashing, then damaged, then no checkpoint left: two ranks")
def test_all_ranks_step_back_together(tmp_path):
    paths = [save(tmp_path, step, cut(make_tensors(seed=step), 2)) for step in (1, 2, 3)]
    attempts = LoadAttempts(tmp_path)
    for _ in range(MAX_ATTEMPTS):
        attempts.begin(paths[2])
    ranks = spawn_dist(2, agree, tmp_path)
    assert ranks[0] == ranks[1] and ranks[0][0] == 2
    assert "step_00000003 ended the run 3 times in a row while it was loaded" in ranks[0][1][0]
    (paths[1] / "state.json").unlink()
    ranks = spawn_dist(2, agree, tmp_path)
    assert ranks[0] == ranks[1] and ranks[0][0] == 1 and "state.json cannot be read" in ranks[0][1][1]
    for _ in range(MAX_ATTEMPTS):
        attempts.begin(paths[0])
    ranks = spawn_dist(2, agree, tmp_path)
    assert ranks[0] == ranks[1] and ranks[0][0] == "none"
    assert "none of the 3 checkpoints" in ranks[0][1] and "remove load_attempts.json" in ranks[0][1]


def ends_with(dist, root, error):
    try:
        with loading(root, dist, 1):
            if error is not None:
                raise error
            load_survived(root, dist, 1)
    except type(error):
        pass
    return LoadAttempts(root).count(root / "step_00000001")


@pytest.mark.parametrize(("error", "count"), [(None, 0), (DataError("x"), 0), (CheckpointError("x"), 1)])
def test_only_ends_that_may_be_its_fault_count(tmp_path, error, count):
    save(tmp_path, 1, cut(make_tensors(), 1))
    assert spawn_dist(1, ends_with, tmp_path, error) == [count]
