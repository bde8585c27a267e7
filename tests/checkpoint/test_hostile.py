"""Checkpoint directories made to harm: every digest is right, and what they say is a trap."""

import io
import json
import os
import pickle
import random
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import xxhash

from swin_scale.checkpoint import Checkpoint, newest_good
from swin_scale.checkpoint.manifest import FORMAT, FRAGMENT_DTYPE, MAX_JSON_BYTES
from swin_scale.errors import CheckpointError
from tests.checkpoint.helpers import cut, make_tensors, save
from tests.checkpoint.test_store import FILES

CANARY = os.path.join(os.path.dirname(__file__), "canary")
"""What every bomb below tries to make."""


class Bomb:
    def __reduce__(self):
        return os.mkdir, (CANARY,)


@pytest.fixture(autouse=True)
def no_canary():
    yield
    try:
        assert not os.path.exists(CANARY), "the bomb went off"
    finally:
        if os.path.exists(CANARY):
            os.rmdir(CANARY)


@pytest.fixture
def victim(tmp_path):
    return save(tmp_path, 7, cut(make_tensors(), 2))


def body_of(path):
    raw = (path / "manifest.json").read_bytes()
    return json.loads(raw)["body"]


def seal(path, body):
    """Write `body` as a manifest whose own digest is right."""
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f'{{"format": "{FORMAT}", "xxh3_128": "{xxhash.xxh3_128_hexdigest(text)}", "body": '.encode()
    (path / "manifest.json").write_bytes(head + text + b"}\n")


def replace(path, name, data):
    """Put `data` in place of a file, and its size and digest into the manifest."""
    (path / name).write_bytes(data)
    body = body_of(path)
    body["files"][name] = [len(data), xxhash.xxh3_128_hexdigest(data)]
    seal(path, body)


def test_sealing_makes_a_good_checkpoint(victim):
    replace(victim, "state.json", b'{"step": 7}')
    assert newest_good(victim.parent).state == {"step": 7}


def npy(array, **options):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, **options)
    return buffer.getvalue()


def npy_header(text, data=b""):
    padded = text.encode() + b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded + data


def archive():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("data.pkl", pickle.dumps(Bomb()))
    return buffer.getvalue()


DESCR = repr(np.lib.format.dtype_to_descr(FRAGMENT_DTYPE))
TABLES = {
    "pickle": pickle.dumps(Bomb()),
    "array of objects": npy(np.array([Bomb()], dtype=object), allow_pickle=True),
    "zip archive": archive(),
    "npz": archive().replace(b"data.pkl", b"data.npy"),
    "empty": b"",
    "shape of 2^62": npy_header(f"{{'descr': {DESCR}, 'fortran_order': False, 'shape': ({1 << 62},), }}"),
    "shape of 2^64": npy_header(f"{{'descr': {DESCR}, 'fortran_order': False, 'shape': ({1 << 64},), }}"),
    "negative shape": npy_header(f"{{'descr': {DESCR}, 'fortran_order': False, 'shape': (-1,), }}", bytes(36)),
    "NaN shape": npy_header(f"{{'descr': {DESCR}, 'fortran_order': False, 'shape': (nan,), }}"),
    "code for a header": npy_header(f"__import__('os').mkdir({CANARY!r})"),
    "nested header": npy_header("(" * 9000),
    "another dtype": npy(np.zeros(3)),
    "two dimensions": npy(np.zeros((2, 2), FRAGMENT_DTYPE)),
    "version 9": b"\x93NUMPY\x09\x00" + bytes(100),
}


@pytest.mark.fault(22, "fragments.npy: pickles, object arrays, archives, impossible shapes, code as a header")
@pytest.mark.parametrize("case", TABLES)
def test_fragment_tables_are_never_unpickled(victim, case):
    replace(victim, "fragments.npy", TABLES[case])
    with pytest.raises(CheckpointError, match=r"fragments\.npy"):
        Checkpoint.open(victim)


def rows(path):
    return np.load(path / "fragments.npy")


@pytest.mark.fault(22, "fragment rows that overlap, leave their file, or name what is not there")
@pytest.mark.parametrize(
    ("column", "value", "what"),
    [
        ("offset", 1 << 61, "ends at byte"),
        ("offset", 1 << 63, "beyond any file"),
        ("length", 1 << 63, "beyond any file"),
        ("start", (1 << 64) - 1, "beyond any file"),
        ("file", 9, "file 9 of 2"),
        ("kind", 7, "kind 7 of 2"),
        ("name", 1000, "name 1000 of 5"),
        ("dtype", 999, "dtype 999 of 15"),
        ("offset", "that of the next", "overlaps the one before"),
    ],
)
def test_fragment_rows_are_checked(victim, column, value, what):
    table = rows(victim)
    table[column][0] = table[column][1] if isinstance(value, str) else value
    replace(victim, "fragments.npy", npy(table))
    with pytest.raises(CheckpointError, match=what):
        Checkpoint.open(victim)


STATES = {
    "duplicate keys": (b'{"step": 7, "step": 8}', "'step' occurs twice"),
    "NaN": (b'{"step": NaN}', "NaN is not JSON"),
    "infinity": (b'{"step": -Infinity}', "Infinity is not JSON"),
    "a pickle": (pickle.dumps(Bomb()), "state.json is damaged"),
    "nested": (b"[" * 100_000, "state.json is damaged"),
    "a list": (b"[]", "holds list, not a table"),
    "a number of 10,000 digits": (b'{"step": ' + b"9" * 10_000 + b"}", "state.json is damaged"),
    "not UTF-8": (b'{"\xff": 1}', "state.json is damaged"),
}


@pytest.mark.fault(22, "state.json: duplicate keys, NaN, pickles, depth, long numbers")
@pytest.mark.parametrize("case", STATES)
def test_state_is_strict(victim, case):
    data, message = STATES[case]
    replace(victim, "state.json", data)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(victim)


def test_config_must_be_text(victim):
    replace(victim, "config.yaml", b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"config\.yaml is damaged"):
        Checkpoint.open(victim)


def escape(name):
    def change(body):
        body["rank_files"] = [name, *body["rank_files"][1:]]
        body["files"][name] = body["files"].pop("rank00000.safetensors")

    return change


def shape(value):
    def change(body):
        body["parameters"]["scale"]["shape"] = value

    return change


MANIFESTS = {
    "above": (escape("../../etc/passwd"), "not one of its files"),
    "absolute": (escape("/etc/passwd"), "not one of its files"),
    "here": (escape("."), "not one of its files"),
    "empty name": (escape(""), "not one of its files"),
    "NUL": (escape("a\0b"), "not one of its files"),
    "unlisted": (lambda body: body["rank_files"].append("more"), "not one of its files"),
    "NaN shape": (shape([float("nan")]), "NaN is not JSON"),
    "text shape": (shape("9"), "has shape"),
    "negative shape": (shape([-1]), "has shape"),
    "shape of 2^64": (shape([1 << 64]), "has shape"),
    "shape of 2^80": (shape([1 << 40, 1 << 40]), "has shape"),
    "thousand dimensions": (shape([2] * 1000), "has shape"),
    "row is a list": (lambda body: body["parameters"].update(scale=[]), "damaged"),
    "step is a list": (lambda body: body.update(step=[]), "damaged"),
    "files is a number": (lambda body: body.update(files=3), "damaged"),
    "size is text": (lambda body: body["files"].update({"state.json": ["x", "y"]}), "damaged"),
    "another dtype table": (lambda body: body.update(dtypes=["F32"]), "dtype table"),
    "no parameters": (lambda body: body.pop("parameters"), "damaged"),
}


@pytest.mark.fault(22, "manifest: names that leave the directory, impossible shapes, wrong types")
@pytest.mark.parametrize("case", MANIFESTS)
def test_manifest_is_strict(victim, case):
    change, message = MANIFESTS[case]
    body = body_of(victim)
    change(body)
    seal(victim, body)
    with pytest.raises(CheckpointError, match=rf"manifest\.json.*{message}"):
        Checkpoint.open(victim)


@pytest.mark.fault(22, "manifest: duplicate keys under a right digest")
def test_manifest_with_duplicate_keys(victim):
    text = json.dumps(body_of(victim)).replace('{"step"', '{"step": 9, "step"', 1).encode()
    seal(victim, text)
    with pytest.raises(CheckpointError, match="'step' occurs twice"):
        Checkpoint.open(victim)


@pytest.mark.fault(22, "links and pipes instead of files")
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("what", ["link", "pipe"])
def test_links_and_pipes_are_refused_and_never_waited_for(victim, tmp_path, name, what):
    path = victim / name
    path.rename(tmp_path / "moved")
    if what == "link":
        path.symlink_to(tmp_path / "moved")
    else:
        os.mkfifo(path)
    with pytest.raises(CheckpointError, match=rf"{name} is not a plain file"):
        Checkpoint.open(victim)


CEILING = """
import resource, sys
from swin_scale.checkpoint import Checkpoint
from swin_scale.errors import CheckpointError

def address_space():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()

good, ceiling, *paths = sys.argv[1:]
Checkpoint.open(good, verify=False).close()  # what an honest load imports is not counted
limit = address_space() + (int(ceiling) << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for path in paths:
    try:
        Checkpoint.open(path, verify=False)
    except CheckpointError as error:
        print(str(error)[:300].replace(chr(10), " "))
"""


@pytest.mark.fault(22, "manifest and state bombs, under a ceiling of private memory")
def test_bombs_stay_under_a_memory_ceiling(tmp_path, victim):
    """The costliest JSON per byte, a sparse terabyte, a table of 2^62 rows: refused with 512 MiB of address space."""
    bombs = [save(tmp_path / str(i), 7, cut(make_tensors(), 1)) for i in range(4)]
    costliest = b"[" + b"[]," * ((MAX_JSON_BYTES - 200) // 3) + b"[]]"
    seal(bombs[0], costliest)
    replace(bombs[1], "state.json", costliest)
    os.truncate(bombs[2] / "manifest.json", 1 << 40)
    replace(bombs[3], "fragments.npy", TABLES["shape of 2^62"])
    argv = [sys.executable, "-c", CEILING, str(victim), "512", *map(str, bombs)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    assert [name in line for name, line in zip(
        ("manifest.json", "state.json", "manifest.json", "fragments.npy"), done.stdout.splitlines(), strict=True
    )] == [True] * 4, done.stdout + done.stderr  # fmt: skip


def check_mutants(victim, count, seed):
    """Damage manifest, state or table in `count` ways under right digests: CheckpointError, or still well-formed."""
    rng = random.Random(seed)
    good = {name: (victim / name).read_bytes() for name in ("fragments.npy", "state.json", "manifest.json")}
    body = json.dumps(body_of(victim)).encode()
    refused = intact = 0
    for _ in range(count):
        for name, data in good.items():
            (victim / name).write_bytes(data)
        name = rng.choice(list(good))
        data = bytearray(body if name == "manifest.json" else good[name])
        for _ in range(rng.choice((1, 1, 2, 8))):
            where = rng.randrange(len(data))
            match rng.randrange(4):
                case 0:
                    data[where] ^= 1 << rng.randrange(8)
                case 1:
                    del data[max(1, where) :]
                case 2:
                    data[where:where] = rng.choice(
                        (b"9" * 25, b'"', b"[[", b"-", b"NaN", b"\xff", b"{}", b",", b"1e999")
                    )
                case 3:
                    del data[where : where + rng.randrange(8)]
                    data = data or bytearray(b" ")
        seal(victim, bytes(data)) if name == "manifest.json" else replace(victim, name, bytes(data))
        try:
            Checkpoint.open(victim, verify=False).close()
        except CheckpointError as error:
            refused += "step_00000007" in str(error)
        else:
            intact += 1
    assert refused + intact == count and refused > count // 2
    return refused


@pytest.mark.fault(22, "mutated manifests, states and fragment tables under right digests")
def test_mutants_never_crash(victim):
    check_mutants(victim, 200, seed=0)


@pytest.mark.proof
@pytest.mark.fault(22, "mutated manifests, states and fragment tables under right digests")
def test_mutants_never_crash_proof(victim):
    refused = check_mutants(victim, 2000, seed=1)
    print(f"proof: of 2000 mutated checkpoint directories {refused} refused by name, the others well-formed: no crash")  # noqa: T201
