"""Every damage that `verify` knows is repaired: afterwards the set is clean, and what is gone is named."""

import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data_prep import repair as repair_module
from data_prep.index import index_shards
from data_prep.repair import repair_shards
from data_prep.verify import verify_shards
from swin_scale.errors import DataError, UserError
from swin_scale.shards import INDEX_DTYPE, ShardSet, load_index, save_index
from tests.data_prep.conftest import CLASSES, contents, image_bytes
from tests.data_prep.test_index import good, member
from tests.data_prep.test_verify import SHARD, flip, key_of, rebuild, row_of

LABEL = 512 + 512  # from the end of an image to the label behind its header


@pytest.fixture
def shards(written, tmp_path) -> Path:
    shutil.copytree(written, tmp_path / "set")
    return tmp_path / "set"


def pictures(directory: Path) -> dict[str, tuple[bytes, int]]:
    """(image bytes, label) by key, through the index, and the tars must agree on the keys."""
    shards, found = ShardSet.open(directory), {}
    for shard in shards.manifest.shards:
        with tarfile.open(directory / shard.name) as tar:
            names = {m.offset_data: m.name for m in tar}
        data = (directory / shard.name).read_bytes()
        rows = shards.index[len(found) :][: shard.samples]
        for row in rows:
            key = names[int(row["offset"])].rpartition(".")[0]
            found[key] = data[row["offset"] :][: row["size"]], int(row["label"])
    return found


def lines_of_lost(directory: Path) -> list[dict]:
    path = directory / "lost.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def padded(size: int) -> int:
    return -(-size // 512) * 512


def cut(shards: Path) -> None:
    row = row_of(shards, 10)
    os.truncate(shards / SHARD, int(row["offset"]) + 10)


def flip_label(shards: Path) -> None:
    row = row_of(shards, 4)
    flip(shards / SHARD, int(row["offset"]) + padded(int(row["size"])) + 512)


def stray(shards: Path) -> None:
    (shards / SHARD).rename(shards / "stray.tar")


def change_index(column: str, value: int):
    def change(shards: Path) -> None:
        index = np.array(load_index(shards))
        index[column][12] = value
        save_index(shards, index)

    return change


# name: (what is done to the set, the numbers of the samples of SHARD that are lost)
DAMAGE = {
    "image bit": (lambda s: flip(s / SHARD, int(row_of(s, 4)["offset"]) + 300), [4]),
    "image header": (lambda s: flip(s / SHARD, int(row_of(s, 4)["offset"]) - 512), []),
    "label header": (
        lambda s: flip(s / SHARD, int(row_of(s, 4)["offset"]) + padded(int(row_of(s, 4)["size"]))),
        [],
    ),
    "label bit": (flip_label, []),
    "padding": (lambda s: flip(s / SHARD, (s / SHARD).stat().st_size - 1), []),
    "zeroed header": (lambda s: overwrite(s / SHARD, int(row_of(s, 6)["offset"]) - 512, bytes(512)), []),
    "truncated": (cut, [10, 11]),
    "truncated to nothing": (lambda s: os.truncate(s / SHARD, 100), list(range(12))),
    "renamed shard": (stray, []),
    "stray copy": (lambda s: shutil.copy(s / SHARD, s / "stray.tar"), []),
    "index missing": (lambda s: (s / "index.npy").unlink(), []),
    "index short": (lambda s: save_index(s, np.zeros(3, INDEX_DTYPE)), []),
    "index garbage": (lambda s: (s / "index.npy").write_bytes(b"garbage"), []),
    "manifest garbage": (lambda s: (s / "manifest.json").write_bytes(b"{"), []),
    "index offset": (change_index("offset", 99), []),
    "index offset far": (change_index("offset", (1 << 64) - 1), []),
    "index size": (change_index("size", 5), []),
    "index label": (change_index("label", 3), []),
    "index digest": (change_index("digest", 1), []),
    "index shard": (change_index("shard", 4), []),
}


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.mark.fault(18, "every damage that verify finds, repaired")
@pytest.mark.parametrize("name", DAMAGE)
def test_repaired_sets_are_clean_and_lack_only_what_is_named(shards, name):
    damage, numbers = DAMAGE[name]
    before, lost = pictures(shards), [key_of(shards, number) for number in numbers]
    digests = [f"{row_of(shards, number)['digest']:016x}" for number in numbers]
    damage(shards)
    assert not verify_shards(shards, workers=1).clean
    damaged = contents(shards)
    preview = repair_shards(shards, dry_run=True, workers=1)
    assert contents(shards) == damaged
    report = repair_shards(shards, classes=CLASSES, wnids=CLASSES, workers=1)
    assert (report.samples, report.rewritten) == (preview.samples, preview.rewritten)
    assert verify_shards(shards, workers=1).problems == ()
    after = pictures(shards)
    assert after == {key: value for key, value in before.items() if key not in lost}
    if name == "stray copy":
        lost, digests = [note.key for note in report.lost], [""] * 12
        assert {(note.shard, note.what) for note in report.lost} == {("stray.tar", "another sample has its key")}
    # By its key, or where the tar ends before the header that held it, by digest and label.
    assert len(report.lost) == len(lost) == len(lines_of_lost(shards))
    for key, digest, note in zip(lost, digests, report.lost):
        assert note.key == key or (note.key is None and digest in note.what)
    for tar in report.rewritten:
        assert (shards / f"{tar}.damaged").read_bytes() == damaged[tar]
    whole = contents(shards)
    again = repair_shards(shards, workers=1)
    assert not again.rewritten and not again.lost and contents(shards) == whole


@pytest.mark.fault(18, "a shard that is gone: its samples are named by digest and label")
def test_a_missing_shard(shards):
    rows = [row_of(shards, number) for number in range(12)]
    (shards / SHARD).unlink()
    report = repair_shards(shards, workers=1)
    assert verify_shards(shards, workers=1).clean and report.samples == 48
    assert all(f"{row['digest']:016x} of label {row['label']}" in str(report.lost) for row in rows)


@pytest.mark.parametrize("with_index", [True, False])
@pytest.mark.fault(18, "undecodable image, one key twice in a shard and in two shards, repaired")
def test_bad_content_with_right_digests(shards, with_index):
    before, bad, first = pictures(shards), key_of(shards, 3), key_of(shards, 0)
    other = "shard-000003.tar"
    rebuild(shards, SHARD, lambda ms: [(n, d[:-200] if n == ms[6][0] else d) for n, d in ms])
    rebuild(shards, other, lambda m: [(f"{first}.png", m[0][1]), (f"{first}.cls", m[1][1]), *m[2:]])
    index_shards(shards, workers=1)
    rebuild(shards, "shard-000004.tar", lambda m: [*m[:-2], (m[0][0], m[-2][1]), (m[1][0], m[-1][1])])
    if not with_index:
        (shards / "index.npy").unlink()
    report = repair_shards(shards, workers=1)
    assert verify_shards(shards, workers=1).problems == ()
    after = pictures(shards)
    assert report.samples == len(after) == 57 and after.items() <= before.items()
    assert {bad, first} < {note.key for note in report.lost} and first in after and bad not in after


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.fault(21, "hostile members in a tar: removed by repair, and nothing is written elsewhere")
def test_hostile_members_are_left_out(tmp_path, workers):
    directory = tmp_path / "inner" / "set"
    directory.mkdir(parents=True)
    with tarfile.open(directory / "a.tar", "w") as tar:
        good(tar, "a", b"0")
        member(tar, "../canary.jpg", image_bytes(9))
        good(tar, "x" * 150, b"1")
        member(tar, "l.jpg", b"", type=tarfile.SYMTYPE, linkname="../canary")
        member(tar, "d.cls")
        good(tar, "b", b"cat")
    shutil.copy(directory / "a.tar", tmp_path / "a.tar")
    report = repair_shards(directory, workers=workers)
    assert verify_shards(directory, workers=1).problems == ()
    assert sorted(pictures(directory)) == ["a", "x" * 150]
    assert {note.key for note in report.lost} == {None, "b", "d"}
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {
        *("a.tar", "a.tar.damaged", "index.npy", "manifest.json", "lost.jsonl", ".lock")
    }


class Killed(BaseException):
    """As a kill: nothing of ours catches it."""


@pytest.mark.parametrize("moment", range(1, 12))
@pytest.mark.fault(18, "repair killed at every rename and every file it writes")
def test_a_killed_repair_goes_on(shards, tmp_path, monkeypatch, moment):
    for shard in (SHARD, "shard-000003.tar"):
        data = (shards / shard).read_bytes()
        (shards / shard).write_bytes(data[:5000] + bytes([data[5000] ^ 255]) + data[5001:-9000])
    shutil.copytree(shards, tmp_path / "other")
    whole = repair_shards(tmp_path / "other", workers=1)
    left = [moment]

    def dying(call):
        def wrapper(*arguments, **options):
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            return call(*arguments, **options)

        return wrapper

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", dying(os.rename))
        patch.setattr(os, "replace", dying(os.replace))
        patch.setattr(shutil, "rmtree", dying(shutil.rmtree))
        try:
            repair_shards(shards, workers=1)
        except Killed:
            assert left[0] == 0
    report = repair_shards(shards, workers=1)
    assert report.samples == whole.samples
    assert verify_shards(shards, workers=1).problems == ()
    assert contents(shards) == contents(tmp_path / "other")


def test_nothing_to_save(tmp_path):
    with pytest.raises(UserError, match=r"holds no \.tar file"):
        repair_shards(tmp_path)
    (tmp_path / "a.tar").write_bytes(b"not a tar" * 1000)
    with pytest.raises(DataError, match="no sample in 1 tars can be used"):
        repair_shards(tmp_path, workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


def test_a_storage_that_fails_is_no_verdict_on_the_content(shards, monkeypatch):
    from data_prep import tars

    def fail(self, size):
        raise DataError(f"{self.path} cannot be read") from OSError(5, "Input/output error")

    monkeypatch.setattr(tars.TarReader, "_read", fail)
    before = contents(shards)
    with pytest.raises(DataError, match="cannot be read"):
        repair_shards(shards, workers=1)
    assert contents(shards) == before


@pytest.mark.fault(6, "disk full while a shard is repaired")
def test_a_full_disk_keeps_the_original(shards, monkeypatch):
    cut(shards)
    before = contents(shards)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(repair_module.ShardWriter, "add", full)
        with pytest.raises(DataError, match=r"shard-000001\.tar: No space left.*the original is kept"):
            repair_shards(shards, workers=1)
    assert contents_of_files(shards) == before
    repair_shards(shards, workers=1)
    assert verify_shards(shards, workers=1).clean


def contents_of_files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def test_unlabelled_sets_stay_unlabelled(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(3):
            member(tar, f"{number}.jpg", image_bytes(number))
    index_shards(tmp_path, workers=1)
    os.truncate(tmp_path / "a.tar", int(load_index(tmp_path)["offset"][2]) + 1)
    assert repair_shards(tmp_path, workers=1).samples == 2
    assert verify_shards(tmp_path, workers=1).clean and load_index(tmp_path)["label"].tolist() == [-1, -1]
