import pytest

from swin_scale.data.webstream import open_stream
from swin_scale.errors import DataError
from tests.data.conftest import encode, photo


def test_webdataset_reads_the_same_samples(shards):
    rows = list(open_stream(shards.directory))
    assert [key for key, _, _ in rows] == [f"{i:08d}" for i in range(53)]
    assert all(data == encode(photo(i)) and label == i % 5 for i, (_, data, label) in enumerate(rows))


@pytest.mark.fault(24, "pipe: as the name of a file")
def test_names_are_never_commands(tmp_path, monkeypatch, shards):
    (tmp_path / "pipe:touch canary;.tar").write_bytes(shards.path(0).read_bytes())
    monkeypatch.chdir(tmp_path)
    assert len(list(open_stream("."))) == 10
    assert not (tmp_path / "canary").exists()


def test_damage_is_a_data_error(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"not a tar" * 1000)
    with pytest.raises(DataError, match=r"a\.tar"):
        list(open_stream(tmp_path))
