"""Indexing foreign sets in place, and refusing hostile tars without touching anything outside."""

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset

from data_prep import tars
from data_prep.index import index_shards
from data_prep.verify import verify_shards
from swin_scale.errors import DataError, UserError
from swin_scale.shards import Manifest, ShardSet
from tests.data_prep.conftest import CLASSES, contents, image_bytes


@pytest.mark.parametrize("workers", [1, 2])
def test_index_of_our_own_shards_is_what_write_gave(written, tmp_path, workers):
    for path in written.glob("*.tar"):
        shutil.copy(path, tmp_path)
    index_shards(tmp_path, classes=CLASSES, wnids=CLASSES, workers=workers)
    assert (tmp_path / "index.npy").read_bytes() == (written / "index.npy").read_bytes()
    ours, theirs = Manifest.load(tmp_path), Manifest.load(written)
    assert ours.shards == theirs.shards and ours.classes == theirs.classes


def test_reindexing_keeps_what_the_manifest_knew(written, tmp_path):
    shutil.copytree(written, tmp_path / "set")
    (tmp_path / "set" / "index.npy").unlink()
    index_shards(tmp_path / "set", workers=1)
    assert contents(tmp_path / "set") == contents(written)


@pytest.mark.parametrize("with_cls", [True, False])
def test_webdataset_written_sets_are_indexed(tmp_path, with_cls):
    """WebDataset's writer puts a pax header with a fractional mtime before every member."""
    for shard in range(2):
        with webdataset.TarWriter(str(tmp_path / f"train-{shard}.tar")) as sink:
            for number in range(5):
                sample = {"__key__": f"a/{shard}/n{number:05d}", "jpg": image_bytes(number), "json": {"label": number}}
                sink.write({**sample, "cls": number} if with_cls else sample)
    before = {path: path.read_bytes() for path in tmp_path.glob("*.tar")}
    assert b"mtime=" in before[tmp_path / "train-0.tar"]
    manifest = index_shards(tmp_path, workers=1)
    assert {path: path.read_bytes() for path in tmp_path.glob("*.tar")} == before
    assert manifest.classes == ("0", "1", "2", "3", "4") and manifest.permutation_seed is None
    shards = ShardSet.open(tmp_path)
    assert shards.index["label"].tolist() == [0, 1, 2, 3, 4] * 2
    for number, row in enumerate(shards.index):
        data = shards.path(row["shard"]).read_bytes()[row["offset"] :][: row["size"]]
        assert data == image_bytes(number % 5)
    assert verify_shards(tmp_path, workers=1).clean


def member(tar: tarfile.TarFile, name: str, data: bytes = b"0", **fields: object) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(data))


def good(tar: tarfile.TarFile, key: str = "a", label: bytes = b"0") -> None:
    member(tar, f"{key}.jpg", image_bytes(0))
    member(tar, f"{key}.cls", label)


def claim_size(size: int) -> Callable[[tarfile.TarFile], None]:
    def add(tar: tarfile.TarFile) -> None:
        info = tarfile.TarInfo("big.jpg")
        info.size = size
        tar.fileobj.write(info.tobuf(tarfile.GNU_FORMAT))

    return add


HOSTILE = {
    "parent": (lambda tar: member(tar, "../canary.jpg"), "'../canary.jpg' points outside"),
    "inner parent": (lambda tar: member(tar, "a/../../canary.jpg"), "points outside"),
    "absolute": (lambda tar: member(tar, "/canary.jpg"), "points outside"),
    "backslash": (lambda tar: member(tar, "..\\canary.jpg"), "points outside"),
    "long parent": (lambda tar: member(tar, "../" + "x" * 200 + ".jpg"), "points outside"),
    "symlink": (lambda tar: member(tar, "l.jpg", b"", type=tarfile.SYMTYPE, linkname="../canary"), "symbolic link"),
    "hard link": (lambda tar: member(tar, "l.jpg", b"", type=tarfile.LNKTYPE, linkname="../canary"), "hard link"),
    "device": (lambda tar: member(tar, "d.jpg", b"", type=tarfile.CHRTYPE), "device"),
    "pipe": (lambda tar: member(tar, "p.jpg", b"", type=tarfile.FIFOTYPE), "pipe"),
    "sparse": (lambda tar: member(tar, "s.jpg", b"", type=tarfile.GNUTYPE_SPARSE), "sparse"),
    "pax sparse": (lambda tar: member(tar, "s.jpg", pax_headers={"GNU.sparse.size": "10000000000"}), "sparse"),
    "pax size": (lambda tar: member(tar, "s.jpg", pax_headers={"size": "10000000000"}), "oversized"),
    "huge claim": (claim_size(10 << 30), "more than the limit"),
    "negative claim": (claim_size(-(1 << 40)), "claims -"),
    "claim past the end": (claim_size(100 << 20), "truncated"),
    "huge label": (lambda tar: member(tar, "a.cls", bytes(2 << 20)), "more than the limit"),
    "huge pax": (lambda tar: member(tar, "a.jpg", pax_headers={"comment": "x" * 100_000}), "more than the limit"),
    "duplicate key": (lambda tar: [good(tar, key) for key in ("b", "c", "b")], "'b' occurs twice"),
    "duplicate member": (lambda tar: [member(tar, "b.cls"), member(tar, "b.cls")], "two .cls"),
    "two images": (lambda tar: [good(tar, "b"), member(tar, "b.png")], "two images"),
    "no image": (lambda tar: member(tar, "b.cls"), "'b' has no image"),
    "label text": (lambda tar: good(tar, "b", b"cat"), "b'cat', not an integer"),
    "label below -1": (lambda tar: good(tar, "b", b"-2"), "the first has -2"),
    "label missing": (lambda tar: member(tar, "b.jpg", image_bytes(0)), "no label"),
    "garbage": (lambda tar: tar.fileobj.write(b"\x01garbage" * 64), "not a tar header"),
    "wrong checksum": (lambda tar: tar.fileobj.write(tarfile.TarInfo("a").tobuf()[:100] + bytes(412)), "header"),
}


@pytest.mark.fault(21, "../, absolute, links, devices, pipes, sparse, 10 GB claims: refused when indexed")
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_tars_are_refused_and_nothing_is_written(tmp_path, name):
    add, message = HOSTILE[name]
    directory = tmp_path / "inner" / "set"
    directory.mkdir(parents=True)
    with tarfile.open(directory / "evil.tar", "w") as tar:
        good(tar)
        add(tar)
    for canary in (tmp_path / "canary", tmp_path / "inner" / "canary"):
        canary.write_text("alive")
    before = tree_of(tmp_path)
    with pytest.raises(DataError, match=r"evil\.tar") as caught:
        index_shards(directory, workers=1)
    assert message in str(caught.value)
    assert tree_of(tmp_path) == before


def tree_of(root: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


@pytest.mark.fault(21, "a million members")
def test_a_million_members_are_refused(tmp_path, monkeypatch):
    assert tars.MAX_MEMBERS < 1_000_000
    limit = 2000  # the real limit takes seconds to walk
    monkeypatch.setattr(tars, "MAX_MEMBERS", limit)
    header = tarfile.TarInfo("a.cls").tobuf(tarfile.USTAR_FORMAT)
    with open(tmp_path / "many.tar", "wb") as file:
        for _ in range(0, 2 * limit, 1000):
            file.write(header * 1000)
    with tars.TarReader(tmp_path / "many.tar") as tar, pytest.raises(DataError, match=f"more than {limit} members"):
        for _ in tar.members():
            pass


@pytest.mark.fault(18, "truncated tar, refused when indexed")
@pytest.mark.parametrize("keep", [0, 100, 512, 700, 5000])
def test_truncated_tars_are_refused(written, tmp_path, keep):
    data = (written / "shard-000000.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(data[:keep])
    with pytest.raises(DataError, match=r"cut\.tar.*truncated"):
        index_shards(tmp_path, workers=1)


@pytest.mark.fault(17, "wrong label: refused when indexed")
def test_labels_outside_the_classes_and_json_that_is_none(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        good(tar, "a", b"7")
    with pytest.raises(DataError, match="outside 2 classes; the first has 7"):
        index_shards(tmp_path, classes=["cat", "dog"], workers=1)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        member(tar, "a.jpg", image_bytes(0))
        member(tar, "a.json", b"[" * 100_000)
    with pytest.raises(DataError, match="json cannot be read"):
        index_shards(tmp_path, workers=1)


def test_unlabelled_sets_have_label_minus_one(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        member(tar, "a.jpg", image_bytes(0))
        member(tar, "a.json", json.dumps({"caption": "a cat"}).encode())
    assert index_shards(tmp_path, workers=1).classes == ()
    assert ShardSet.open(tmp_path).index["label"].tolist() == [-1]
    assert verify_shards(tmp_path, workers=1).clean


def test_nothing_to_index(tmp_path):
    with pytest.raises(UserError, match=r"no \.tar"):
        index_shards(tmp_path)
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    with pytest.raises(DataError, match=r"empty\.tar holds no sample"):
        index_shards(tmp_path, workers=1)
    (tmp_path / "empty.tar").unlink()
    os.mkfifo(tmp_path / "pipe.tar")
    with pytest.raises(DataError, match=r"pipe\.tar: not a regular file"):
        index_shards(tmp_path, workers=1)
    with pytest.raises(UserError, match="No such file"):
        index_shards(tmp_path / "missing")
