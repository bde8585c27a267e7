"""Saves in the background on real gloo processes: the bytes of a plain save, one writer, one outcome for all ranks."""

import ctypes
import itertools
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from swin_scale.checkpoint import Checkpoint, Fragment, list_steps, newest_good, rank_layout, write_rank_file
from swin_scale.engine import staging
from swin_scale.engine.background import BackgroundSaves
from swin_scale.engine.saving import Contents, Retention, save_now
from swin_scale.errors import CheckpointError
from tests.checkpoint.helpers import cut, make_tensors, parameters_of
from tests.spawn import spawn_dist
from tests.writers import writers

KEEP = Retention(keep=3)
KINDS = ("master", "exp_avg", "ema")


class State:
    """Stands in for an engine."""

    def __init__(self, dist):
        self.fragments = cut(make_tensors(kinds=KINDS), dist.world)[dist.rank]

    def local_fragments(self):
        return iter(self.fragments)


def contents(step):
    return Contents(step=step, state={"step": step}, config_text="run: {}\n", parameters=parameters_of(), model={})


def files(root, step):
    return {path.name: path.read_bytes() for path in (root / f"step_{step:08d}").iterdir()}


def opened(dist, root, state, timeout_s=30.0):
    root.mkdir(parents=True, exist_ok=True)
    return BackgroundSaves(root, state, dist, timeout_s=timeout_s)


def save_both_ways(dist, root):
    state = State(dist)
    save_now(root / "plain", state, dist, contents(3), KEEP)
    saves = opened(dist, root / "background", state)
    saves.begin(contents(3), KEEP)
    for fragment in state.fragments:
        fragment.data.fill_(9.0)  # training goes on: what was copied is what counts
    outcome = saves.settle()
    saves.close()
    assert outcome.problem is None and outcome.step == 3 and outcome.write_seconds > 0 and saves.step is None
    return files(root / "plain", 3) == files(root / "background", 3)


@pytest.mark.parametrize("world", [1, 2])
def test_what_is_committed_is_what_a_plain_save_writes(tmp_path, world):
    (tmp_path / "plain").mkdir()
    assert spawn_dist(world, save_both_ways, tmp_path) == [True] * world
    with newest_good(tmp_path / "background") as checkpoint:
        loaded = checkpoint.load_full("ema")
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in make_tensors(kinds=KINDS)["ema"].items())
    assert sorted(os.listdir(tmp_path / "background")) == ["latest", "step_00000003"]


def test_a_move_past_the_cache_moves_the_same_bytes():
    """Wherever it begins and however long it is; what is beside it stays."""
    move = staging._mover()
    if move is ctypes.memmove:
        pytest.skip("swin_scale.engine._stream was not built: installing needs a C compiler for it")
    source = torch.randint(1, 256, (400,), dtype=torch.uint8)
    for offset, start, size in itertools.product(range(17), (0, 1, 16), (0, 1, 15, 16, 63, 64, 65, 200, 333)):
        target = torch.zeros(400, dtype=torch.uint8)
        move(target.data_ptr() + offset, source.data_ptr() + start, size)
        wanted = torch.zeros(400, dtype=torch.uint8)
        wanted[offset : offset + size] = source[start : start + size]
        assert torch.equal(target, wanted), (offset, start, size)


@pytest.mark.parametrize("moves", ["past the cache", "C's"])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_copy_holds_the_bytes_of_the_file(tmp_path, threads, moves, monkeypatch):
    """By several threads, in pieces that cut tensors anywhere, strided ones among them."""
    if moves == "C's":
        monkeypatch.setattr(staging, "_mover", lambda: ctypes.memmove)
    monkeypatch.setattr(staging, "PIECE_BYTES", 1000)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    base = torch.randn(5000)
    fragments = [
        Fragment(name="a", kind="master", shape=(2500,), start=0, data=base[::2]),
        Fragment(name="b", kind="master", shape=(5000,), start=0, data=base),
        Fragment(name="c", kind="exp_avg", shape=(77,), start=3, data=base[7:70].half()),
        Fragment(name="d", kind="ema", shape=(300,), start=0, data=base[:300].double()),
    ]
    written = write_rank_file(tmp_path, 4, fragments)
    layout = rank_layout(4, fragments)
    buffer = staging.Staging(layout.bytes, torch.device("cpu"))
    buffer.prepare()
    (tmp_path / "background").mkdir()
    for _ in range(2):
        buffer.copy(layout)
        buffer.write(tmp_path / "background", layout)
        while (answer := buffer.poll()) is None:
            time.sleep(0.005)
        assert answer.problem is None and answer.file == written
        copied = tmp_path / "background" / written.name
        assert copied.read_bytes() == (tmp_path / written.name).read_bytes()
        copied.unlink()
    buffer.close()


def test_an_interrupted_copy_leaves_nobody_writing(monkeypatch):
    """The buffer is given back next."""
    interrupted = threading.Event()

    def move(*_):
        if threading.current_thread() is threading.main_thread():
            interrupted.set()
            raise KeyboardInterrupt
        assert interrupted.wait(30)
        time.sleep(0.05)

    monkeypatch.setattr(staging, "_mover", lambda: move)
    with pytest.raises(KeyboardInterrupt):
        staging._move([(0, 0, 1)] * 8, threads=4)
    assert not [thread for thread in threading.enumerate() if thread.name == "staging"]


def test_a_failure_to_pin_is_not_left_for_the_next_launch(monkeypatch, caplog):
    """CUDA keeps it as the thread's last error; the first launch afterwards raises it and takes it away."""
    launched = []

    def launch(*size, device):
        launched.append(device)
        raise torch.AcceleratorError("CUDA error: out of memory")

    runtime = SimpleNamespace(cudaHostRegister=lambda address, size, flags: codes.pop())
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    buffer, codes = torch.zeros(8, dtype=torch.uint8), [2, 0]
    monkeypatch.setattr(torch, "ones", launch)
    assert staging._pin(buffer) and not launched
    assert not staging._pin(buffer) and launched == ["cuda"]
    assert "cannot be pinned (CUDA error 2)" in caplog.text


def learn_while_steps_differ(dist, root):
    """(step, outcome) at which this rank learns of it; the writer of the last rank is held up meanwhile."""
    saves = opened(dist, root, State(dist))
    [writer] = writers()
    if dist.rank == dist.world - 1:
        os.kill(writer, signal.SIGSTOP)
    saves.begin(contents(1), KEEP)
    step, outcome = 0, None
    while outcome is None:  # however long the disk takes
        step += 1
        time.sleep(0.002 * (1 + dist.rank))
        if step == 12 and dist.rank == dist.world - 1:
            os.kill(writer, signal.SIGCONT)
        outcome = saves.poll(agree=step % 4 == 0)
    saves.close()
    return step, outcome.step, outcome.problem


def test_all_ranks_learn_of_it_after_the_same_step(tmp_path):
    first, second = spawn_dist(2, learn_while_steps_differ, tmp_path)
    assert first == second and first[1:] == (1, None)
    assert first[0] >= 12 and first[0] % 4 == 0


def be_stalled(dist, root):
    """Twice a wait that ends, then a save that takes too long, then one by a new writer."""
    saves = opened(dist, root, State(dist))
    [writer] = writers()
    if dist.rank == dist.world - 1:
        os.kill(writer, signal.SIGSTOP)
    saves.begin(contents(1), KEEP)
    began = time.monotonic()
    seen = [saves.settle(0.2), saves.settle(0.2)]
    waited, writing, processes = time.monotonic() - began, saves.step, len(writers())
    # Not its limit from the start: a machine that stood still for that long would have the waits end in an outcome.
    saves._save.limit = time.monotonic() + 0.5
    outcome = saves.settle()
    took = time.monotonic() - began
    left = sorted(os.listdir(root))
    saves.begin(contents(2), KEEP)
    again = saves.settle()
    mine = writers()
    saves.close()
    return seen, waited, writing, processes, outcome, took, left, again.problem, mine != [writer], len(mine), writers()


@pytest.mark.fault(7, "the process that writes for one rank of two stopped: a disk that does not answer")
def test_a_stalled_writer_is_waited_for_within_bounds_and_then_given_up(tmp_path):
    ranks = spawn_dist(2, be_stalled, tmp_path)
    for rank, (seen, waited, writing, processes, outcome, took, left, again, new, count, after) in enumerate(ranks):
        assert seen == [None, None] and 0.35 < waited < 30 and (writing, processes) == (1, 1)
        assert outcome.given_up and outcome.step == 1 and took < 30
        assert "step 1 was not written by all ranks within 30 s (checkpoint.write_timeout_s)" in outcome.problem
        assert again is None and (rank or left == []), "rank 1 looks while rank 0 goes on"
        assert new == (rank == 1), "only the writer that did not answer was ended"
        assert count == 1 and after == []
    assert list_steps(tmp_path) == [2]


def be_killed(dist, root):
    saves = opened(dist, root, State(dist))
    [writer] = writers()
    last = dist.rank == dist.world - 1
    if last:
        os.kill(writer, signal.SIGSTOP)
    saves.begin(contents(1), KEEP)
    if last:
        os.kill(writer, signal.SIGKILL)
    outcome = saves.settle()
    saves.begin(contents(2), KEEP)
    if last:
        os.kill(writers()[0], signal.SIGKILL)  # between saves: nobody notices
        time.sleep(0.05)
    second = saves.settle()
    saves.begin(contents(3), KEEP)
    third = saves.settle()
    saves.close()
    return outcome.problem, second.step, third.problem


@pytest.mark.fault(7, "the process that writes for one rank of two killed while it writes, and while it waits")
def test_a_killed_writer_costs_one_save(tmp_path):
    first, second = spawn_dist(2, be_killed, tmp_path)
    assert first == second
    problem, _, third = first
    assert "rank00001.safetensors: process" in problem and "was killed by SIGKILL (by hand, or for lack" in problem
    assert third is None and list_steps(tmp_path)[-1] == 3
    assert not list(tmp_path.glob(".*"))


def be_refused(dist, root):
    """The last rank's file cannot be made."""
    saves = opened(dist, root, State(dist))
    [writer] = writers()
    os.kill(writer, signal.SIGSTOP)
    saves.begin(contents(1), KEEP)
    if dist.is_main:
        (root / ".step_00000001.tmp" / "rank00001.safetensors").write_bytes(b"another's")
    dist.barrier("there")
    os.kill(writer, signal.SIGCONT)
    outcome = saves.settle()
    saves.close()
    return outcome.problem


def test_nothing_is_written_over_a_file_that_is_there(tmp_path):
    first, second = spawn_dist(2, be_refused, tmp_path)
    assert first == second and "rank00001.safetensors cannot be written: File exists" in first
    assert os.listdir(tmp_path) == []


def have_no_room(dist, root):
    if dist.rank == 1:
        staging.free_memory = lambda: 100
    root.mkdir(exist_ok=True)
    with pytest.raises(
        CheckpointError, match=r"2 staging buffers of 0.00 GB are more than 80% of the 0.00 GB"
    ) as caught:
        BackgroundSaves(root, State(dist), dist, timeout_s=1.0)
    return str(caught.value), writers()


def test_ranks_agree_where_one_has_no_memory_for_it(tmp_path):
    first, second = spawn_dist(2, have_no_room, tmp_path / "root")
    assert first == second and first[1] == []


def leave(dist, root):
    saves = opened(dist, root, State(dist))
    os.kill(writers()[0], signal.SIGSTOP)
    saves.begin(contents(1), KEEP)
    saves.close()
    return writers(), len(list(Path("/proc/self/fd").iterdir()))


def test_closing_ends_the_writer_whatever_it_does(tmp_path):
    [(left, _)] = spawn_dist(1, leave, tmp_path)
    assert left == [] and list_steps(tmp_path) == []
    with pytest.raises(CheckpointError):
        Checkpoint.open(tmp_path / "step_00000001")


def repeat(dist, root):
    """Descriptors that are open after each of some buffers."""
    counts = []
    for step in range(1, 4):
        saves = opened(dist, root, State(dist))
        saves.begin(contents(step), KEEP)
        assert saves.settle().problem is None
        saves.close()
        counts.append(len(list(Path("/proc/self/fd").iterdir())))
    return counts


def test_memory_and_descriptors_are_given_back(tmp_path):
    [counts] = spawn_dist(1, repeat, tmp_path)
    assert len(set(counts)) == 1
