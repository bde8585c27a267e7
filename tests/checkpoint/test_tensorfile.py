import errno
import json
import os
import random
import subprocess
import sys

import pytest
import safetensors.torch
import torch

from swin_scale import hashed_file
from swin_scale.checkpoint import load_safetensors, save_safetensors, tensorfile
from swin_scale.checkpoint.tensorfile import DTYPES, MAX_HEADER_BYTES, read_header, write_tensor_file
from swin_scale.errors import CheckpointError


def sample_tensors():
    generator = torch.Generator().manual_seed(3)
    return {
        "a.weight": torch.randn(5, 7, generator=generator),
        "half": torch.randn(3, generator=generator).half(),
        "brain": torch.randn(9, generator=generator).bfloat16(),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.zeros(0, 4),
        "flags": torch.tensor([True, False, True]),
        "ids": torch.arange(4),
        "f8": torch.randn(3, generator=generator).to(torch.float8_e4m3fn),
    }


def same(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        other = second[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), name
        assert bytes(tensorfile.bytes_of(tensor.contiguous())) == bytes(tensorfile.bytes_of(other.contiguous())), name


def test_round_trip_and_stock_library_both_ways(tmp_path):
    tensors = sample_tensors()
    save_safetensors(tmp_path / "ours.safetensors", tensors, {"note": "é"})
    loaded, metadata = load_safetensors(tmp_path / "ours.safetensors")
    same(tensors, loaded)
    assert metadata == {"format": "pt", "note": "é"}
    same(tensors, safetensors.torch.load_file(tmp_path / "ours.safetensors"))
    safetensors.torch.save_file(tensors, tmp_path / "stock.safetensors", {"format": "pt"})
    same(tensors, load_safetensors(tmp_path / "stock.safetensors")[0])
    assert sorted(os.listdir(tmp_path)) == ["ours.safetensors", "stock.safetensors"]


def test_every_dtype_has_one_name_and_tensors_are_aligned(tmp_path):
    assert len(set(DTYPES.values())) == len(DTYPES)
    save_safetensors(tmp_path / "f", sample_tensors())
    header = read_header(tmp_path / "f")
    assert header.data_start % 8 == 0
    for entry in header.entries.values():
        assert entry.begin % DTYPES[entry.dtype].itemsize == 0, entry


@pytest.mark.parametrize("chunk_bytes", [8, 24, 1 << 20])
def test_strided_tensors_pass_through_a_small_staging_buffer(tmp_path, chunk_bytes):
    base = torch.arange(4 * 6 * 5, dtype=torch.float32).view(4, 6, 5)
    tensors = [("t", base.permute(2, 0, 1)), ("s", base.view(-1)[::3]), ("b", base.bool()[:, ::2])]
    written = write_tensor_file(tmp_path / "f", tensors, chunk_bytes=chunk_bytes)
    same({name: tensor.contiguous() for name, tensor in tensors}, safetensors.torch.load_file(tmp_path / "f"))
    assert tensorfile.hash_file(tmp_path / "f", chunk_bytes=11) == (written.bytes, written.xxh3_128)


def test_the_disk_begins_while_the_rest_is_written(tmp_path, monkeypatch):
    """Everything but the last bytes is handed over before the final sync, each byte once and none ahead of its time."""
    calls = []
    monkeypatch.setattr(hashed_file, "FLUSH_BYTES", 1000)
    monkeypatch.setattr(
        os, "posix_fadvise", lambda fd, start, length, _: calls.append((start, start + length, os.fstat(fd).st_size))
    )
    written = write_tensor_file(tmp_path / "f", [(str(i), torch.rand(100 + i)) for i in range(20)], chunk_bytes=256)
    starts, ends, sizes = zip(*calls)
    assert (0, *ends[:-1]) == starts and ends == sizes
    assert 0 <= written.bytes - ends[-1] < 1000


def test_unknown_dtype_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"w is torch\.complex64"):
        save_safetensors(tmp_path / "f", {"w": torch.zeros(2, dtype=torch.complex64)})


@pytest.mark.fault(6, "ENOSPC while one weight file is written")
def test_full_disk_names_the_file_and_leaves_the_old_one(tmp_path, monkeypatch):
    save_safetensors(tmp_path / "f", {"w": torch.ones(4)})

    def full(descriptor, view):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensorfile.os, "write", full)
    with pytest.raises(CheckpointError, match=r"f\.\d+\.tmp cannot be written: No space left"):
        save_safetensors(tmp_path / "f", {"w": torch.zeros(4)})
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["f"]
    assert load_safetensors(tmp_path / "f")[0]["w"].tolist() == [1, 1, 1, 1]


def raw(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def one(**changes):
    return {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


def two(begin):
    return {"dtype": "F32", "shape": [2], "data_offsets": [begin, begin + 8]}


HOSTILE = {
    "empty": (b"", "header states"),
    "short": (b"\x05\0\0", "header states"),
    "length 2^63": (raw(one(), length=1 << 63), "header states"),
    "header longer than the file": (raw(one(), length=10_000), "header states"),
    "not JSON": (raw(b"{nonsense"), "damaged"),
    "not UTF-8": (raw(b'{"\xff": 1}'), "damaged.*utf-8"),
    "nested": (raw(b"[" * 100_000), "damaged"),
    "a list": (raw([]), "not a table"),
    "NaN": (raw(b'{"w": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}'), "NaN"),
    "duplicate": (raw(b'{"w": 1, "w": 2}'), "'w' occurs twice"),
    "metadata": (raw({"__metadata__": {"a": 1}}), "not a table of text"),
    "no dtype": (raw({"w": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)), "not described"),
    "dtype": (raw(one(dtype="F33"), bytes(8)), "dtype 'F33'"),
    "dtype list": (raw(one(dtype=["F32"]), bytes(8)), "has dtype"),
    "negative": (raw(one(shape=[-2]), bytes(8)), "has shape"),
    "float size": (raw(one(shape=[2.0]), bytes(8)), "has shape"),
    "bool size": (raw(one(shape=[True]), bytes(8)), "has shape"),
    "huge shape": (raw(one(shape=[1 << 62, 1 << 62]), bytes(8)), "does not take 8 bytes"),
    "shape 2^63": (raw(one(shape=[1 << 63]), bytes(8)), "has shape"),
    "backwards": (raw(one(data_offsets=[8, 0]), bytes(8)), "lies at bytes"),
    "outside": (raw(one(data_offsets=[0, 16], shape=[4]), bytes(8)), "lies at bytes"),
    "overlap": (raw({"a": two(0), "b": two(4)}, bytes(12)), "overlaps"),
    "hole": (raw({"a": two(0), "b": two(12)}, bytes(20)), "hole"),
    "trailing": (raw(one(), bytes(9)), "end at byte"),
}


@pytest.mark.fault(22, "hostile safetensors headers: 2^63, overlaps, holes, NaN, duplicate keys")
@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_refused_by_name(tmp_path, case):
    content, what = HOSTILE[case]
    (tmp_path / "evil.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"evil\.safetensors.*{what}"):
        load_safetensors(tmp_path / "evil.safetensors")


def check_mutations(tmp_path, count, seed):
    """Damage a good header in `count` ways: a CheckpointError, or a file that is still well-formed."""
    rng = random.Random(seed)
    save_safetensors(tmp_path / "good", sample_tensors())
    good = (tmp_path / "good").read_bytes()
    header_end = 8 + int.from_bytes(good[:8], "little")
    path = tmp_path / "mutant"
    refused = intact = 0
    for _ in range(count):
        data = bytearray(good)
        for _ in range(rng.choice((1, 1, 2, 8))):
            where = rng.randrange(min(header_end, len(data)))
            match rng.randrange(4):
                case 0:
                    data[where] ^= 1 << rng.randrange(8)
                case 1:
                    del data[rng.randrange(1, len(data) + 1) :]
                case 2:
                    data[where:where] = rng.choice((b"9" * 25, b'"', b"[[", b"-", b"NaN", b"\xff", b"{}", b","))
                case 3:
                    data[where % 8 % len(data)] = rng.randrange(256)
        path.write_bytes(data)
        try:
            load_safetensors(path)
        except CheckpointError as error:
            refused += "mutant" in str(error)
        else:
            intact += 1
    assert refused + intact == count and refused > 0.9 * count
    return refused


@pytest.mark.fault(22, "mutated safetensors headers")
def test_mutated_headers_never_crash(tmp_path):
    check_mutations(tmp_path, 300, seed=0)


@pytest.mark.proof
@pytest.mark.fault(22, "mutated safetensors headers")
def test_mutated_headers_never_crash_proof(tmp_path):
    refused = check_mutations(tmp_path, 2000, seed=1)
    print(f"proof: of 2000 mutated safetensors headers {refused} refused by name, the others well-formed: no crash")  # noqa: T201


BOMB = """
import resource, sys
from swin_scale.checkpoint import load_safetensors
from swin_scale.errors import CheckpointError

def address_space():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()

*paths, ceiling = sys.argv[1:]
load_safetensors(paths.pop(0))  # what an honest load imports is not counted
limit = address_space() + int(ceiling)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for path in paths:
    try:
        load_safetensors(path)
    except CheckpointError as error:
        print(path, str(error)[:200])
"""
"""Every private page needs address space, so the limit is one of private memory; files that are mapped count too."""


@pytest.mark.fault(22, "header bombs, under a ceiling of private memory")
def test_bomb_headers_stay_under_a_memory_ceiling(tmp_path):
    length, lists, shape, huge = (tmp_path / name for name in ("length", "lists", "shape", "huge"))
    length.write_bytes((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{")  # a sparse file that really is that long
    os.truncate(length, 1 << 40)
    shape.write_bytes(raw({"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 40]}}))
    os.truncate(shape, 1 << 41)
    huge.write_bytes(raw({"w": {"dtype": "U8", "shape": [1 << 42], "data_offsets": [0, 1 << 42]}}))
    os.truncate(huge, huge.stat().st_size + (1 << 42))
    costliest = b"[]," * ((MAX_HEADER_BYTES - 16) // 3)  # memory of the parsed JSON per byte
    lists.write_bytes(raw(b'{"w": [' + costliest + b"[]]}"))
    save_safetensors(tmp_path / "good", sample_tensors())
    for paths, mib in (((length, shape, huge), 48), ((lists,), 400)):
        names = [str(path) for path in (tmp_path / "good", *paths)]
        argv = [sys.executable, "-c", BOMB, *names, str(mib << 20)]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
        refused = [os.path.basename(line.split()[0]) for line in done.stdout.splitlines()]
        assert refused == [path.name for path in paths], (done.stdout, done.stderr)
