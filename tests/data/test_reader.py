import os
import tarfile

import numpy as np
import pytest

from swin_scale.data import reader as reader_module
from swin_scale.data.reader import BadSample, ImageReader, check_index, open_shard_sets
from swin_scale.errors import DataError, UserError
from swin_scale.shards import ShardSet
from tests.data.conftest import encode, photo, write_shards


def test_reads_what_the_tars_hold(shards, other_shards):
    reader = ImageReader([shards, other_shards], block=4)
    everything = np.arange(len(shards) + len(other_shards))
    reader.read_ahead(everything)
    for sample_id in everything.tolist():
        source, row = reader.locate(sample_id)
        seed = row if source == 0 else 100 + row
        encoded = reader.read(sample_id)
        assert encoded.data == encode(photo(seed)) and encoded.label == row % 5
    assert reader.describe(54) == (str(other_shards.directory), "train-000000.tar", "00000001")
    reader.close()


def test_open_files_are_bounded(shards, monkeypatch):
    monkeypatch.setattr(reader_module, "MAX_OPEN_FILES", 2)
    reader = ImageReader([shards])
    for sample_id in (0, 10, 20, 0, 30, 52):
        reader.read(sample_id)
        assert len(reader._open) <= 2
    reader.close()
    assert not reader._open


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize(
    "key", ["n01440764_10026", "n01440764/n01440764_1", "d" * 60 + "/" + "k" * 60, "k" * 180, "ключ"]
)
def test_key_from_the_header(tmp_path, format, key):
    if format == tarfile.USTAR_FORMAT and len(key) > 150:
        pytest.skip("ustar cannot hold it")
    one = write_shards(tmp_path, [encode(photo(0)), encode(photo(1))], [0, 0], keys=["first", key], format=format)
    assert ImageReader([one]).read_key(1) == key
    assert ImageReader([one]).read_key(0) == "first"


def test_key_falls_back_to_the_row(shards):
    index = shards.index.copy()
    index["size"][3] += 1
    assert (
        ImageReader([ShardSet(directory=shards.directory, manifest=shards.manifest, index=index)]).read_key(3)
        == "row 3"
    )


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [("size", 0, "zero bytes"), ("size", 2**31, "more than"), ("digest", 1, "digest")],
)
def test_content_errors_cost_one_sample(shards, field, value, reason):
    index = shards.index.copy()
    index[field][7] = value
    reader = ImageReader([ShardSet(directory=shards.directory, manifest=shards.manifest, index=index)])
    with pytest.raises(BadSample, match=reason):
        reader.read(7)
    assert reader.read(8).label == 3


@pytest.mark.fault(18, "a tar cut, and one removed, under a reader: exit 3 naming it")
def test_missing_and_short_files_end_the_run(tmp_path):
    one = write_shards(tmp_path, [encode(photo(i)) for i in range(4)], [0] * 4, per_shard=2)
    reader = ImageReader([one], retry_delays_s=(0.0, 0.0))
    os.truncate(one.path(0), 1000)
    with pytest.raises(DataError, match=r"train-000000\.tar ends before byte"):
        reader.read(1)
    one.path(1).unlink()
    with pytest.raises(DataError, match=r"train-000001\.tar, byte \d+: No such file.*3 attempts"):
        reader.read(2)


@pytest.mark.fault(18, "I/O errors that pass are retried")
def test_passing_io_errors_are_retried(shards, monkeypatch):
    real, failures = os.pread, [OSError(5, "Input/output error"), OSError(116, "Stale file handle")]

    def flaky(*arguments):
        if failures:
            raise failures.pop()
        return real(*arguments)

    monkeypatch.setattr(os, "pread", flaky)
    reader = ImageReader([shards], retry_delays_s=(0.0, 0.0))
    assert reader.read(5).data == encode(photo(5))
    assert not failures and len(reader._open) == 1


@pytest.mark.fault(24, "URLs in data.train")
@pytest.mark.parametrize("path", ["pipe:cat /etc/passwd", "http://host/a", "s3://bucket", "file:/data", "PIPE:true"])
def test_urls_are_refused(path):
    with pytest.raises(UserError, match=r"data\.train.*is a URL"):
        open_shard_sets([path])


def test_label_spaces_must_agree(tmp_path, shards, other_shards):
    assert len(open_shard_sets([shards.directory, other_shards.directory])) == 2
    more = write_shards(tmp_path, [encode(photo(0))], [0], classes=7)
    with pytest.raises(DataError, match=r"different classes \(5 and 7\)"):
        open_shard_sets([shards.directory, more.directory])
    with pytest.raises(UserError, match=r"data\.val is empty"):
        open_shard_sets([], key="data.val")


@pytest.mark.fault(17, "missing and wrong labels: refused at start")
@pytest.mark.parametrize(("label", "message"), [(-1, "1 samples have no label"), (5, "label 5 is out of range")])
def test_labels_are_checked(shards, label, message):
    index = shards.index.copy()
    index["label"][9] = label
    with pytest.raises(DataError, match=message):
        check_index(ShardSet(directory=shards.directory, manifest=shards.manifest, index=index))


def test_rows_out_of_shard_order_are_refused(shards):
    with pytest.raises(DataError, match=r"10 samples of train-000000\.tar"):
        check_index(ShardSet(directory=shards.directory, manifest=shards.manifest, index=shards.index[::-1].copy()))


@pytest.mark.parametrize(("field", "value"), [("shard", 99), ("offset", 2**63), ("offset", 2**20)])
def test_rows_that_point_nowhere_end_the_run(shards, field, value):
    index = shards.index.copy()
    index[field][7] = value
    reader = ImageReader([ShardSet(directory=shards.directory, manifest=shards.manifest, index=index)], block=4)
    reader.read_ahead(np.arange(10))
    with pytest.raises(DataError, match="row 7 of the index points outside its shard"):
        reader.read(7)


@pytest.mark.fault(18, "a damaged tar header under a reader: costs nothing, the index leads to the bytes")
def test_damaged_headers_cost_the_reader_nothing(tmp_path):
    one = write_shards(tmp_path, [encode(photo(i)) for i in range(3)], [0] * 3)
    data = bytearray(one.path(0).read_bytes())
    for offset in one.index["offset"].tolist():
        data[offset - 512 : offset] = os.urandom(512)
    one.path(0).write_bytes(data)
    reader = ImageReader([one])
    assert [reader.read(i).data for i in range(3)] == [encode(photo(i)) for i in range(3)]
    assert [reader.read_key(i) for i in range(3)] == ["row 0", "row 1", "row 2"]


@pytest.mark.fault(18, "I/O errors that stay: exit 3 naming the shard")
def test_lasting_io_errors_end_the_run(shards, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(DataError, match=r"train-000000\.tar, byte \d+: Input/output error \(3 attempts\)") as caught:
        ImageReader([shards], retry_delays_s=(0.0, 0.0)).read(5)
    assert caught.value.exit_code == 3
