import gc
import itertools
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
import torch

from swin_scale.config import Augment
from swin_scale.data import loader as loader_module
from swin_scale.data.order import batch_digest
from swin_scale.data.streams import SkipLedger, TrainStream
from swin_scale.errors import DataError, PeerLostError
from tests.data.conftest import encode, photo, write_shards
from tests.kills import alive

RECIPE = {"seed": 3, "global_batch": 12, "img_size": 32, "augment": Augment(crop="resized")}
FIELDS = ("images", "labels", "ids", "boxes", "noise_keys")


def same(a, b) -> bool:
    return a.step == b.step and a.epoch == b.epoch and all(torch.equal(getattr(a, f), getattr(b, f)) for f in FIELDS)


@pytest.fixture(scope="module")
def stream(shards, other_shards):
    return TrainStream([shards, other_shards], weights=[1.0, 1.5], **RECIPE)


@pytest.fixture(scope="module")
def expected(stream):
    """12 steps over two epochs, made in this process."""
    with stream.batches(stop_step=12) as batches:
        return list(batches)


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 6])
def test_any_number_of_workers_gives_the_same_batches(stream, expected, workers):
    with stream.batches(stop_step=12, workers=workers) as batches:
        ours = list(batches)
    assert len(ours) == 12 and all(map(same, ours, expected))


@pytest.mark.parametrize("world", [2, 3, 4, 6])
def test_any_number_of_ranks_gives_the_same_batches(stream, expected, world):
    ranks = [list(stream.batches(stop_step=8, rank=rank, world=world)) for rank in range(world)]
    for step, parts in enumerate(zip(*ranks)):
        for field in FIELDS:
            assert torch.equal(torch.cat([getattr(part, field) for part in parts]), getattr(expected[step], field))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [1, 7, 11])
def test_resuming_continues_the_same_run(stream, expected, start, workers):
    with stream.batches(start, stop_step=12, workers=workers) as batches:
        assert all(map(same, batches, expected[start:]))


def test_resuming_reads_nothing_of_what_was_seen(stream, monkeypatch):
    from swin_scale.data.reader import ImageReader

    read = []
    real = ImageReader.read
    monkeypatch.setattr(ImageReader, "read", lambda self, i: read.append(i) or real(self, i))
    batch = next(stream.batches(100_003))
    assert batch.step == 100_003 and read == [i for i in batch.ids.tolist() if i >= 0]


def test_epoch_end_is_filled_with_empty_slots(stream, expected):
    assert stream.samples == 53 + 26 and stream.steps_per_epoch == 7
    last = expected[6]
    assert last.epoch == 0 and expected[7].epoch == 1
    assert last.ids[7:].tolist() == [-1] * 5 and (last.labels[7:] == -1).all() and not last.images[7:].any()
    assert last.valid.sum() == 7 and last.images[:7].flatten(1).any(1).all()
    for batch in expected:
        labels = torch.where(batch.ids < 53, batch.ids, batch.ids - 53) % 5
        assert torch.equal(batch.labels[batch.valid], labels[batch.valid])


def test_batches_may_be_kept_and_their_memory_comes_back(stream, expected):
    with stream.batches(stop_step=12, workers=2) as batches:
        assert all(same(*pair) for pair in zip(list(batches), expected))
    with stream.batches(stop_step=60, workers=2) as batches:
        for batch in batches:
            view = batch.images[3:5]
            del batch
        gc.collect()
        assert len(batches._maker._memories) <= 10
    assert view.shape == (2, 3, 32, 32)


def bad_set(tmp_path, damage):
    images = [encode(photo(seed)) for seed in range(40)]
    clean = write_shards(tmp_path / "clean", images, [i % 5 for i in range(40)])
    for i, data in damage.items():
        images[i] = data
    return clean, write_shards(tmp_path / "bad", images, [i % 5 for i in range(40)])


@pytest.mark.fault(17, "corrupt JPEG, HTML named .jpg, zero bytes: empty slots, nothing shifts")
@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_leave_holes_and_shift_nothing(tmp_path, workers):
    damage = {3: b"", 11: b"<html>", 12: encode(photo(12))[:-200], 39: b"\x89PNG\r\n\x1a\n" + bytes(40)}
    clean, bad = bad_set(tmp_path, damage)
    whole = list(TrainStream([clean], **RECIPE).batches(stop_step=6))
    with TrainStream([bad], **RECIPE).batches(stop_step=6, workers=workers) as batches:
        holed = list(batches)
    records = {}
    for a, b in zip(whole, holed):
        hole = torch.isin(a.ids, torch.tensor(list(damage)))
        assert torch.equal(b.ids, torch.where(hole, -(a.ids + 2), a.ids)) and torch.equal(b.valid, a.valid & ~hole)
        assert not b.images[hole].any() and (b.labels[hole] == -1).all()
        for field in FIELDS:
            assert torch.equal(getattr(a, field)[~hole], getattr(b, field)[~hole])
        records |= {record.id: record for record in b.skipped}
    assert set(records) == set(damage)
    assert records[11].key == "00000011" and records[11].shard == "train-000001.tar"
    assert "not a JPEG" in records[11].reason and records[3].reason == "zero bytes"
    assert records[12].source == str(bad.directory)


def test_a_worker_that_ended_while_it_was_sent_more_says_why(tmp_path):
    clean, _ = bad_set(tmp_path, {})
    stream = TrainStream([clean], **RECIPE)
    (clean.directory / "index.npy").unlink()
    with stream.batches(workers=1) as batches:
        assert batches._maker._workers[0].process.wait(60) == 0
        with pytest.raises(DataError, match=r"index\.npy does not exist"):
            next(batches)


@pytest.mark.fault(18, "a shard missing at run time")
def test_a_missing_shard_ends_the_run(tmp_path):
    clean, _ = bad_set(tmp_path, {})
    stream = TrainStream([clean], **RECIPE)
    clean.path(2).unlink()
    with stream.batches(workers=2) as batches, pytest.raises(DataError, match=r"train-000002\.tar.*No such file"):
        list(batches)


@pytest.mark.fault(17, "bad samples of two epochs, and a resume in the middle: the same ones, counted by shard")
def test_bad_samples_are_the_same_after_a_resume(tmp_path):
    """A cut file, one whose damage lies in its last rows, HTML, zero bytes: the same verdict for every crop of it."""
    damage = {3: b"", 11: b"<html>", 12: encode(photo(12))[:-200], 25: encode(photo(25))[:-2], 26: b"GIF89a"}
    _, bad = bad_set(tmp_path, damage)
    stream = TrainStream([bad], **RECIPE)
    whole = [batch.skipped for batch in stream.batches(stop_step=8)]
    for start in (1, 4, 7):
        with stream.batches(start, stop_step=8, workers=2) as batches:
            assert [batch.skipped for batch in batches] == whole[start:]
    assert Counter(record.id for skipped in whole for record in skipped) == dict.fromkeys(damage, 2)
    ledger = SkipLedger(tmp_path / "skipped.jsonl", max_rate=0.1, tolerated=4)

    def count() -> None:
        for step, skipped in enumerate(whole):
            ledger.add(step, step // 4, 12, skipped)

    with pytest.raises(DataError, match=r"max_bad_rate 0\.1.*Most, \d, are in .*/bad/train-00000[12]\.tar") as caught:
        count()
    assert caught.value.exit_code == 3 and ledger.bad == sum(ledger.by_shard.values()) > 4
    assert set(ledger.by_shard) <= {(str(bad.directory), f"train-00000{i}.tar") for i in range(3)}
    ledger.close()
    assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == ledger.bad


@pytest.mark.fault(19, "1 shard, and 3 uneven ones, for 4 ranks of 3 workers: split by sample")
@pytest.mark.parametrize("sizes", [[24], [1, 19, 4]])
def test_fewer_and_uneven_shards_are_split_by_sample(tmp_path, sizes):
    images = [encode(photo(seed)) for seed in range(24)]
    firsts = np.cumsum([0, *sizes])
    parts = [
        write_shards(tmp_path / str(i), images[a:b], [0] * (b - a), per_shard=24)
        for i, (a, b) in enumerate(itertools.pairwise(firsts))
    ]
    stream = TrainStream(parts, **RECIPE)
    with stream.batches(stop_step=4) as batches:
        alone = list(batches)
    digests = [batch_digest(batch.ids) for batch in alone]
    ranks = []
    for rank in range(4):
        # Loader processes take a second to start; one rank that has them shows what there is to see.
        with stream.batches(stop_step=4, rank=rank, world=4, workers=3 if rank == 1 else 0) as batches:
            ranks.append(list(batches))
    assert {len(batches) for batches in ranks} == {4}
    for whole, digest, parts in zip(alone, digests, zip(*ranks)):
        assert batch_digest(torch.cat([part.ids for part in parts])) == digest
        assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
    assert sorted(torch.cat([batch.ids for batch in alone[:2]]).tolist()) == list(range(24))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_dead_worker_is_an_error_not_a_hang(stream, number):
    with stream.batches(stop_step=50, workers=2) as batches:
        next(batches)
        os.kill(batches._maker._workers[1].process.pid, number)
        with pytest.raises(PeerLostError, match=f"was killed by {number.name}"):
            list(batches)
        with pytest.raises(StopIteration):
            next(batches)


def test_a_hung_worker_is_an_error(stream, monkeypatch):
    monkeypatch.setattr(loader_module, "CLOSE_GRACE_S", 0.1)
    with stream.batches(stop_step=50, workers=1) as batches:
        next(batches)
        batches._maker._timeout_s = 0.3
        os.kill(batches._maker._workers[0].process.pid, signal.SIGSTOP)
        with pytest.raises(PeerLostError, match="answered for"):
            list(batches)


def test_a_wait_can_be_looked_at_and_given_up(stream, expected, monkeypatch):
    monkeypatch.setattr(loader_module, "CLOSE_GRACE_S", 0.1)
    with stream.batches(stop_step=12, workers=1) as batches:
        assert batches.arrives(30)
        assert same(next(batches), expected[0])
        os.kill(batches._maker._workers[0].process.pid, signal.SIGSTOP)
        done = 1
        while batches.arrives(0.05):
            assert same(next(batches), expected[done])
            done += 1
        rest = list(batches.stand_ins())
        assert not list(batches)
    assert done < 12
    assert [batch.step for batch in rest] == list(range(done, 12))
    for empty, real in zip(rest, expected[done:]):
        assert not empty.valid.any()
        for name in ("images", "labels", "ids", "boxes", "noise_keys", "masks"):
            ours, theirs = getattr(empty, name), getattr(real, name)
            assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), name


def test_workers_ignore_the_signals_of_schedulers(stream, expected):
    with stream.batches(stop_step=12, workers=2) as batches:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
            for worker in batches._maker._workers:
                os.kill(worker.process.pid, number)
        assert all(map(same, batches, expected))


PARENT = """
import sys
from swin_scale.config import Augment
from swin_scale.data.streams import TrainStream
from swin_scale.shards import ShardSet

stream = TrainStream([ShardSet.open(sys.argv[1])], seed=3, global_batch=12, img_size=32, augment=Augment())
batches = stream.batches(workers=2)
next(batches)
print(*(worker.process.pid for worker in batches._maker._workers), flush=True)
{}
"""


@pytest.mark.parametrize(
    "end",
    [
        "import time; time.sleep(60)",
        pytest.param("sys.exit(0)", marks=pytest.mark.proof),
        pytest.param("raise OSError", marks=pytest.mark.proof),
        pytest.param("import os; os.abort()", marks=pytest.mark.proof),
    ],
)
def test_workers_end_with_the_training_process(shards, end):
    command = [sys.executable, "-c", PARENT.format(end), str(shards.directory)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    if "sleep" in end:
        parent.kill()
    parent.wait(60)
    deadline = time.monotonic() + 20
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(alive, pids))


def test_workers_import_no_torch():
    probe = "import sys, swin_scale.data.worker; print('torch' in sys.modules, 'webdataset' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["False", "False"]


def test_many_chunks_per_batch_do_not_block(tmp_path, monkeypatch):
    """More messages than a socket holds, were they all sent at once."""
    monkeypatch.setattr(loader_module, "MIN_CHUNK", 1)
    monkeypatch.setattr(loader_module, "MAX_CHUNK", 1)
    images = [encode(photo(seed, 8, 8)) for seed in range(64)]
    small = write_shards(tmp_path, images, [0] * 64, per_shard=64)
    recipe = {"seed": 0, "img_size": 4, "augment": Augment(auto_augment="none", color_jitter=0)}
    stream = TrainStream([small], weights=[15.0], global_batch=320, **recipe)
    with stream.batches(stop_step=3, workers=1, prefetch=3) as batches:
        ids = torch.cat([batch.ids for batch in batches]).numpy()
    assert len(ids) == 3 * 320 and np.bincount(ids).tolist() == [15] * 64
