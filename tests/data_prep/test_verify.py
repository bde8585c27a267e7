"""Every planted fault is found, named and alone; a clean set has none."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data_prep.index import index_shards
from data_prep.sample import sample
from data_prep.verify import VerifyReport, verify_shards
from swin_scale.errors import DataError, UserError
from swin_scale.shards import INDEX_DTYPE, load_index, save_index

SHARD = "shard-000001.tar"


@pytest.fixture
def shards(written, tmp_path) -> Path:
    shutil.copytree(written, tmp_path / "set")
    return tmp_path / "set"


def flip(path: Path, offset: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def row_of(shards: Path, number: int) -> np.void:
    """Row `number` of SHARD."""
    return np.array(load_index(shards)[12 + number])


def key_of(shards: Path, number: int) -> str:
    with tarfile.open(shards / SHARD) as tar:
        return tar.getnames()[2 * number].rpartition(".")[0]


def found(report: VerifyReport) -> list[tuple[str, str | None, str]]:
    return [(problem.shard, problem.key, problem.what) for problem in report.problems]


@pytest.mark.parametrize("workers", [1, 2])
def test_clean_set(written, workers):
    report = verify_shards(written, workers=workers)
    assert report.clean and report.samples == 60 and report.shards == 5
    assert report.bytes == sum(path.stat().st_size for path in written.glob("*.tar"))


@pytest.mark.parametrize("bit", [0, 7])
@pytest.mark.parametrize("where", [0.1, 0.5, 0.9])
def test_a_flipped_bit_in_image_data_names_shard_and_key(shards, where, bit):
    row, key = row_of(shards, 4), key_of(shards, 4)
    flip(shards / SHARD, int(row["offset"]) + int(where * row["size"]), bit)
    problems = found(verify_shards(shards, decode=False, workers=1))
    assert [(shard, name) for shard, name, _ in problems] == [(SHARD, key), (SHARD, None)]
    assert problems[0][2].startswith("image digest is") and problems[1][2].startswith("xxh3_128 is")


@pytest.mark.fault(18, "tar with a bad header, found by verify")
def test_a_flipped_bit_in_a_header_costs_no_sample_behind_it(shards):
    row = row_of(shards, 4)
    flip(shards / SHARD, int(row["offset"]) - 512)
    problems = found(verify_shards(shards, workers=1))
    assert {shard for shard, _, _ in problems} == {SHARD}
    text = " ".join(what for _, _, what in problems)
    # The walk ends at the header, in the middle of what may be the third sample; the rows vouch for the other nine.
    assert "checksum does not match" in text and "3 samples can be walked" in text and "xxh3_128" in text
    assert "image digest" not in text and "lost" not in text


def test_a_flipped_bit_in_a_label(shards):
    row, key = row_of(shards, 4), key_of(shards, 4)
    flip(shards / SHARD, int(row["offset"]) + -(-int(row["size"]) // 512) * 512 + 512)
    problems = found(verify_shards(shards, workers=1))
    assert (problems[0][0], problems[0][1]) == (SHARD, key) and "label is" in problems[0][2]


def test_a_flipped_bit_in_padding_is_found_by_the_shard_digest(shards):
    flip(shards / SHARD, (shards / SHARD).stat().st_size - 1)
    (problem,) = found(verify_shards(shards, workers=1))
    assert problem[:2] == (SHARD, None) and "xxh3_128" in problem[2]


@pytest.mark.fault(18, "truncated tar, found by verify")
def test_truncation_names_what_is_lost(shards):
    row = row_of(shards, 10)
    data = (shards / SHARD).read_bytes()
    (shards / SHARD).write_bytes(data[: int(row["offset"]) + 10])
    problems = found(verify_shards(shards, workers=1))
    assert {shard for shard, _, _ in problems} == {SHARD}
    text = [what for _, _, what in problems]
    assert sum("the sample is lost" in what for what in text) == 2
    assert any("truncated" in what for what in text) and any("bytes, manifest.json says" in what for what in text)


@pytest.mark.fault(18, "a shard missing and one too many, found by verify")
def test_a_missing_and_a_stray_shard(shards):
    (shards / SHARD).rename(shards / "stray.tar")
    problems = found(verify_shards(shards, workers=1))
    assert [shard for shard, _, _ in problems] == ["stray.tar", SHARD]
    assert "cannot be opened" in problems[1][2]


def test_several_faults_are_all_reported(shards):
    for number in (0, 2, 4):
        path = shards / f"shard-{number:06d}.tar"
        flip(path, 700)
    (shards / SHARD).unlink()
    report = verify_shards(shards, workers=1)
    assert {problem.shard for problem in report.problems} == {f"shard-{number:06d}.tar" for number in (0, 1, 2, 4)}
    assert all(problem.fix and str(problem) for problem in report.problems)


def rebuild(shards: Path, name: str, change) -> None:
    """Write a shard anew with changed members, and index it, so that every digest is right."""
    with tarfile.open(shards / name) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]
    with tarfile.open(shards / name, "w") as tar:
        for member, data in change(members):
            info = tarfile.TarInfo(member)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_undecodable_image_with_the_right_digest(shards):
    key = key_of(shards, 3)
    rebuild(shards, SHARD, lambda members: [(n, d[:-200] if n == members[6][0] else d) for n, d in members])
    index_shards(shards, workers=1)
    (problem,) = found(verify_shards(shards, workers=1))
    assert problem[:2] == (SHARD, key) and "cannot be decoded" in problem[2]
    assert verify_shards(shards, decode=False, workers=1).clean


@pytest.mark.fault(18, "duplicate keys in two shards, found by verify")
def test_one_key_in_two_shards(shards):
    key = key_of(shards, 0)
    rebuild(shards, "shard-000003.tar", lambda m: [(f"{key}.png", m[0][1]), (f"{key}.cls", m[1][1]), *m[2:]])
    index_shards(shards, workers=1)
    (problem,) = found(verify_shards(shards, workers=1))
    assert problem == ("shard-000003.tar", key, f"key occurs in {SHARD} too")


@pytest.mark.fault(18, "duplicate keys in one shard, found by verify")
def test_one_key_twice_in_a_shard(shards):
    key = key_of(shards, 0)
    rebuild(shards, SHARD, lambda m: [*m[:-2], (f"{key}.png", m[-2][1]), (f"{key}.cls", m[-1][1])])
    problems = found(verify_shards(shards, workers=1))
    assert (SHARD, key, "key occurs 2 times in this shard") in problems


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("offset", 99, "has no row"),
        ("offset", 1 << 60, "the sample is lost"),
        ("size", 5, "bytes, index.npy says 5"),
        ("size", (1 << 32) - 1, "index.npy says 4294967295"),
        ("label", 3, "outside the 3 classes"),
        ("label", -7, "outside the 3 classes"),
        ("digest", 1, "image digest"),
        ("shard", 4, "row 12 belongs to shard 4"),
    ],
)
def test_index_rows_that_do_not_match(shards, column, value, message):
    index = np.array(load_index(shards))
    index[column][12] = value
    save_index(shards, index)
    problems = found(verify_shards(shards, workers=1))
    assert any(message in what for _, _, what in problems), problems
    assert {shard for shard, _, _ in problems} <= {SHARD, "index.npy"}


@pytest.mark.parametrize("damage", ["missing", "short", "garbage"])
def test_damaged_index_and_manifest_are_problems_too(shards, damage):
    if damage == "missing":
        (shards / "index.npy").unlink()
    elif damage == "short":
        save_index(shards, np.zeros(3, INDEX_DTYPE))
    else:
        (shards / "index.npy").write_bytes(b"garbage")
    (problem,) = found(verify_shards(shards, workers=1))
    assert problem[0] == "index.npy"
    body = json.loads((shards / "manifest.json").read_text())
    body["shards"][0]["name"] = "../shard-000000.tar"
    (shards / "manifest.json").write_text(json.dumps(body))
    (problem,) = found(verify_shards(shards, workers=1))
    assert problem[0] == "manifest.json" and "not a plain file name" in problem[2]
    with pytest.raises(UserError, match="not a directory"):
        verify_shards(shards / "manifest.json")


def test_sample_writes_intact_images_under_safe_names(shards, tmp_path):
    paths = sample(shards, 10, tmp_path / "look")
    assert len(paths) == 10 and sorted((tmp_path / "look").iterdir()) == sorted(paths)
    for path in paths:
        row = load_index(shards)[int(path.name[:8])]
        data = (shards / f"shard-{row['shard']:06d}.tar").read_bytes()
        assert path.read_bytes() == data[row["offset"] :][: row["size"]]
    flip(shards / SHARD, int(row_of(shards, 0)["offset"]))
    with pytest.raises(DataError, match="index row 12 is damaged"):
        sample(shards, 60, tmp_path / "all")
