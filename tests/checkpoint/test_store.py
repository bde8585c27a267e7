import errno
import itertools
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swin_scale.checkpoint import (
    Checkpoint,
    Fragment,
    begin,
    list_steps,
    newest_good,
    prune,
    tensorfile,
    verify,
    write_rank_file,
)
from swin_scale.errors import CheckpointError
from tests.checkpoint.helpers import SHAPES, cut, make_tensors, parameters_of, save


def assert_holds(checkpoint, tensors):
    for kind, table in tensors.items():
        full = checkpoint.load_full(kind)
        assert full.keys() == table.keys()
        for name, tensor in table.items():
            assert torch.equal(full[name], tensor), (kind, name)


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_round_trip_whatever_wrote_it(tmp_path, ranks):
    tensors = make_tensors(kinds=("ema", "exp_avg_sq", "master", "exp_avg"))
    path = save(tmp_path, 1000, cut(tensors, ranks))
    assert path == tmp_path / "step_00001000"
    assert (tmp_path / "latest").read_text() == "step_00001000\n"
    assert sorted(os.listdir(tmp_path)) == ["latest", "step_00001000"]
    with Checkpoint.open(path) as checkpoint:
        assert checkpoint.kinds() == ("master", "ema", "exp_avg", "exp_avg_sq")
        assert (checkpoint.step, checkpoint.state["cursor"]) == (1000, [1, 2])
        assert checkpoint.config_text == "run: {seed: 1000}\n"
        assert checkpoint.model["name"] == "toy"
        assert_holds(checkpoint, tensors)


def test_stock_safetensors_reads_rank_files(tmp_path):
    tensors = make_tensors()
    path = save(tmp_path, 1, cut(tensors, 1))
    table = safetensors.torch.load_file(path / "rank00000.safetensors")
    for kind, wanted in tensors.items():
        for name, tensor in wanted.items():
            assert torch.equal(table[f"{kind}/{name}@0"], tensor.reshape(-1))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_partition_reassembles_and_any_range_reads(tmp_path, data):
    tensors = make_tensors(seed=data.draw(st.integers(0, 99)))
    ranks = data.draw(st.integers(1, 5))
    cuts = [[] for _ in range(ranks)]
    for kind, table in tensors.items():
        for name, tensor in table.items():
            bounds = sorted({0, tensor.numel(), *data.draw(st.lists(st.integers(0, tensor.numel()), max_size=4))})
            for low, high in itertools.pairwise(bounds):
                part = tensor.reshape(-1)[low:high]
                rank = data.draw(st.integers(0, ranks - 1))
                cuts[rank].append(Fragment(name=name, kind=kind, shape=SHAPES[name], start=low, data=part))
    with Checkpoint.open(save(tmp_path, 5, cuts)) as checkpoint:
        assert_holds(checkpoint, tensors)
        name = data.draw(st.sampled_from(sorted(tensors["exp_avg"])))
        flat = tensors["exp_avg"][name].reshape(-1)
        start = data.draw(st.integers(0, flat.numel()))
        length = data.draw(st.integers(0, flat.numel() - start))
        assert torch.equal(checkpoint.read("exp_avg", name, start, length), flat[start : start + length])
        out = torch.full((2 * length,), 7.0, dtype=torch.float64)[::2]
        assert checkpoint.read("exp_avg", name, start, length, out=out) is out
        assert torch.equal(out.float(), flat[start : start + length])


def test_gpu_like_memory_is_staged_and_low_precision_survives(tmp_path):
    base = torch.randn(60).bfloat16()
    fragment = Fragment(name="w", kind="master", shape=(30,), start=0, data=base[::2])
    begin(tmp_path, 1)
    shapes = {"w": (30,)}
    path = save(tmp_path, 1, [[fragment]], parameters=parameters_of(shapes))
    assert torch.equal(Checkpoint.open(path).read("master", "w"), base[::2])


def test_reading_something_that_is_not_there(tmp_path):
    checkpoint = Checkpoint.open(save(tmp_path, 1, cut(make_tensors(), 2)))
    for kind, name in (("ema", "scale"), ("master", "nothing"), ("exp_avg", "frozen")):
        with pytest.raises(CheckpointError, match=f"no {kind} of '{name}'"):
            checkpoint.read(kind, name)


def part(name, low, high, kind="master", dtype=torch.float32):
    data = torch.zeros(int(np.prod(SHAPES[name])), dtype=dtype)[low:high]
    return Fragment(name=name, kind=kind, shape=SHAPES[name], start=low, data=data)


WHOLE = [part(name, 0, None) for name in SHAPES if name != "norm.bias"]


@pytest.mark.parametrize(
    ("fragments", "what"),
    [
        ([], "norm.bias is missing altogether"),
        ([part("norm.bias", 0, 3), part("norm.bias", 4, 7)], r"norm.bias \(shape \[7\]\) lacks elements 3 to 3"),
        ([part("norm.bias", 0, 4), part("norm.bias", 2, 7)], "covers elements from 2 to 3 twice"),
        ([part("norm.bias", 0, 7), part("norm.bias", 3, 5)], "covers elements from 3 to 6 twice"),
        ([part("norm.bias", 0, 6)], "ends at element 6 of 7"),
        ([part("norm.bias", 1, 7)], "lacks elements 0 to 0"),
        ([part("norm.bias", 0, 3), part("norm.bias", 3, 7, dtype=torch.float16)], "several dtypes"),
        ([part("norm.bias", 0, 7), part("scale", 0, 1, "exp_avg")], "exp_avg of embed.weight is missing"),
    ],
)
def test_holes_and_overlaps_never_become_a_checkpoint(tmp_path, fragments, what):
    with pytest.raises(CheckpointError, match=what):
        save(tmp_path, 1, [[*WHOLE, *fragments]])
    assert os.listdir(tmp_path) == []


def test_only_moments_or_unknown_parameters_are_refused(tmp_path):
    moments = cut(make_tensors(kinds=("exp_avg",)), 1)
    with pytest.raises(CheckpointError, match="no master weights"):
        save(tmp_path, 1, moments)
    with pytest.raises(CheckpointError, match=r"'embed\.weight', which is not a parameter"):
        save(tmp_path, 1, moments, parameters={})


def test_a_save_of_the_same_step_replaces_the_older_one(tmp_path):
    save(tmp_path, 1, cut(make_tensors(seed=1), 3))
    newer = make_tensors(seed=2)
    save(tmp_path, 1, cut(newer, 2))
    assert_holds(newest_good(tmp_path), newer)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step_00000001"]


@pytest.mark.fault(6, "ENOSPC from write and from rename")
def test_full_disk_fails_cleanly_and_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1, cut(make_tensors(), 2))
    temporary = begin(tmp_path, 2)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensorfile.os, "write", full)
    with pytest.raises(CheckpointError, match=r"rank00001\.safetensors cannot be written: No space left"):
        write_rank_file(temporary, 1, cut(make_tensors(), 2)[1])
    monkeypatch.undo()
    assert os.listdir(temporary) == []
    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(CheckpointError, match="step_00000002 cannot be written: No space left"):
        save(tmp_path, 2, cut(make_tensors(), 2))
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path)) == ["latest", "step_00000001"]


FILES = [f"rank0000{rank}.safetensors" for rank in (0, 1)]
FILES += ["manifest.json", "state.json", "config.yaml", "fragments.npy"]


def damage(path, how, rng):
    data = bytearray(path.read_bytes())
    if how == "flip":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif how == "truncate":
        del data[rng.randrange(len(data)) :]
    elif how == "grow":
        data += b"\0"
    path.unlink()
    if how != "missing":
        path.write_bytes(data)


@pytest.mark.parametrize("how", ["flip", "truncate", "grow", "missing"])
@pytest.mark.parametrize("name", FILES)
@pytest.mark.fault(4, "every kind of file in turn: a flipped bit, cut short, grown, missing (one process)")
def test_damage_is_named_and_the_one_before_is_used(tmp_path, name, how):
    rng = random.Random(f"{name} {how}")
    tensors = make_tensors()
    save(tmp_path, 10, cut(tensors, 1))
    newest = save(tmp_path, 20, cut(make_tensors(seed=5), 2))
    damage(newest / name, how, rng)
    reports = []
    checkpoint = newest_good(tmp_path, lambda path, what: reports.append((path, what)))
    assert checkpoint.step == 10
    assert_holds(checkpoint, tensors)
    assert len(reports) == 1 and reports[0][0] == newest and name in reports[0][1]


@pytest.mark.fault(4, "every 37th bit of the manifest flipped")
def test_every_flipped_bit_of_the_manifest_is_found(tmp_path):
    path = save(tmp_path, 10, cut(make_tensors(), 1)) / "manifest.json"
    good = path.read_bytes()
    for bit in range(0, len(good) * 8, 37):
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        assert newest_good(tmp_path) is None, bit


def test_ranks_share_the_verification(tmp_path):
    path = save(tmp_path, 10, cut(make_tensors(), 3))
    damage(path / "rank00001.safetensors", "flip", random.Random(0))
    damage(path / "rank00002.safetensors", "missing", random.Random(0))
    assert verify(path, ["rank00000.safetensors", "state.json"]) == []
    problems = verify(path)
    assert ["rank00001" in problems[0], "rank00002" in problems[1], len(problems)] == [True, True, 2]
    with pytest.raises(CheckpointError, match="no file 'rank9"):
        verify(path, ["rank9"])


def test_prune_keeps_the_newest_and_collects_leftovers(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, cut(make_tensors(), 1))
    begin(tmp_path, 3)
    in_progress = begin(tmp_path, 5)
    (tmp_path / ".step_00000001.old").mkdir()
    assert prune(tmp_path, 2) == [1, 2]
    assert sorted(os.listdir(tmp_path)) == [in_progress.name, "latest", "step_00000003", "step_00000004"]
    assert prune(tmp_path, 2) == []
    assert prune(tmp_path / "nowhere", 2) == []


@pytest.mark.fault(3, "all that are kept are damaged when the older ones are to be deleted")
def test_prune_never_deletes_the_newest_good_one(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, cut(make_tensors(), 1))
    for step in (3, 4):
        damage(tmp_path / f"step_{step:08d}" / "rank00000.safetensors", "flip", random.Random(step))
    assert prune(tmp_path, 2) == [1]
    assert list_steps(tmp_path) == [2, 3, 4]
    assert newest_good(tmp_path).step == 2


@pytest.mark.fault(3, "killed in the middle of a deletion")
def test_a_kill_during_deletion_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    for step in (1, 2):
        save(tmp_path, step, cut(make_tensors(), 1))

    def killed(path, **_):
        if path.exists():
            raise KeyboardInterrupt

    monkeypatch.setattr("swin_scale.checkpoint.store.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        prune(tmp_path, 1)
    monkeypatch.undo()
    assert list_steps(tmp_path) == [2]
    assert newest_good(tmp_path).step == 2
    prune(tmp_path, 1)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step_00000002"]


NURSERY = """
import os, sys
from pathlib import Path
import torch
from swin_scale.checkpoint import Fragment, begin, commit, newest_good, prune, write_rank_file

def write_until_killed(root, numel=1 << 18):
    good = newest_good(root)
    step, half = good.step if good else 0, numel // 2
    while True:
        step += 1
        data = torch.full((numel,), float(step))
        temporary = begin(root, step)
        files = [
            write_rank_file(temporary, rank, [
                Fragment(name="w", kind=kind, shape=(numel,), start=rank * half, data=data[rank * half :][:half])
                for kind in ("master", "exp_avg")
            ])
            for rank in (0, 1)
        ]
        commit(temporary, step=step, rank_files=files, state={"step": step}, config_text="a: 1",
               parameters={"w": {"shape": [numel], "dtype": "F32"}}, model={})
        prune(root, 2)

torch.set_num_threads(1)
for line in sys.stdin:
    child = os.fork()
    if not child:
        write_until_killed(Path(line.strip()))
    print(child, flush=True)
    os.waitpid(child, 0)
    print("dead", flush=True)
"""


def kill_at_random_moments(root, count, seed):
    """A writer saves, commits and prunes as fast as it can; after each kill -9 the newest checkpoint is whole."""
    rng = random.Random(seed)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    last = 0
    with subprocess.Popen([sys.executable, "-c", NURSERY], **pipes) as nursery:
        for left in reversed(range(count)):
            nursery.stdin.write(f"{root}\n")
            child = int(nursery.stdout.readline())
            deadline = time.monotonic() + 60
            while not left and not list_steps(root):  # a save takes as long as the disk needs
                assert time.monotonic() < deadline, "nothing was saved"
                time.sleep(0.001)
            time.sleep(0.03 + rng.random() * 0.1)
            os.kill(child, signal.SIGKILL)
            assert nursery.stdout.readline() == "dead\n"
            damaged = []
            checkpoint = newest_good(root, lambda path, what, damaged=damaged: damaged.append(what))
            assert damaged == []
            if checkpoint is None:
                assert last == 0
                continue
            assert checkpoint.step >= last
            last = checkpoint.step
            for kind in ("master", "exp_avg"):
                assert (checkpoint.read(kind, "w") == last).all()
            checkpoint.close()
        nursery.stdin.close()
    assert last > 0


@pytest.mark.fault(2, "a writer killed with -9 at random moments")
def test_kill_9_leaves_a_whole_checkpoint(tmp_path):
    kill_at_random_moments(tmp_path, 10, seed=0)


@pytest.mark.proof
@pytest.mark.fault(2, "a writer killed with -9 at random moments")
def test_kill_9_leaves_a_whole_checkpoint_proof(tmp_path):
    kill_at_random_moments(tmp_path, 100, seed=1)


def test_state_must_be_plain_json(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        save(tmp_path, 1, cut(make_tensors(), 1), state={"loss": float("nan")})


def test_the_table_of_a_large_run_stays_small(tmp_path):
    """200 parameters x 3 kinds cut over 64 ranks: the fragment table takes 36 bytes a row and opens in no time."""
    ranks, shapes = 64, {f"layers.2.blocks.{i}.attn.proj.weight": (128,) for i in range(200)}
    cuts = [
        [
            Fragment(name=name, kind=kind, shape=shape, start=2 * rank, data=torch.zeros(2))
            for kind in ("master", "exp_avg", "exp_avg_sq")
            for name, shape in shapes.items()
        ]
        for rank in range(ranks)
    ]
    path = save(tmp_path, 1, cuts, parameters=parameters_of(shapes))
    rows = 3 * len(shapes) * ranks
    assert (path / "fragments.npy").stat().st_size <= 36 * rows + 512
    assert (path / "manifest.json").stat().st_size < 60_000
    started = time.process_time()  # of this process: what else the machine does is not its work
    with Checkpoint.open(path, verify=False) as checkpoint:
        assert time.process_time() - started < 1
        assert checkpoint.read("exp_avg", next(iter(shapes))).numel() == 128


MEMORY = """
import resource, sys
from pathlib import Path
import torch
from swin_scale.checkpoint import Checkpoint, Fragment, begin, commit, write_rank_file

def fragments(numel, count, step):
    bases = [torch.ones(numel * step) for _ in range(count)]
    return [Fragment(name=f"w{i}", kind="master", shape=(numel,), start=0, data=b[::step]) for i, b in enumerate(bases)]

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

def save(root, numel, count, step):
    held = fragments(numel, count, step)
    before = peak()
    temporary = begin(root, 1)
    file = write_rank_file(temporary, 0, held)
    parameters = {f"w{i}": {"shape": [numel]} for i in range(count)}
    path = commit(temporary, step=1, rank_files=[file], state={}, config_text="", parameters=parameters, model={})
    return path, (peak() - before) >> 10

root = Path(sys.argv[1])
save(root, 1 << 10, 2, 1)
contiguous = save(root, 1 << 22, 12, 1)[1]
path, strided = save(root, 1 << 22, 12, 2)
before = peak()
with Checkpoint.open(path) as checkpoint:
    out = torch.empty(1 << 21)
    before = peak()
    for i in range(12):
        checkpoint.read("master", f"w{i}", 1 << 20, 1 << 21, out=out)
print(contiguous, strided, (peak() - before) >> 10)
"""


def test_saving_and_reading_need_no_more_than_a_chunk(tmp_path):
    """192 MiB saved from contiguous and from strided memory, ranges read back: peak memory grows by a few MiB."""
    done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, timeout=120)
    grown = [int(mib) for mib in done.stdout.split()]
    assert len(grown) == 3, done.stderr
    assert max(grown) <= 12, grown
