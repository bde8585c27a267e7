"""Pickles as data: what training code writes is read, what would run code is refused and has not run."""

import argparse
import collections
import io
import os
import pickle
import random
import resource
import struct
import subprocess
import zipfile

import pytest
import torch
from yacs.config import CfgNode

from swin_scale.convert import read_state_dict
from swin_scale.convert.pickles import Placeholder, read_pickle
from swin_scale.errors import CheckpointError


def weights():
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(4, 6, generator=generator)
    return collections.OrderedDict(
        {
            "a": base,
            "transposed": base.t(),
            "slice": base[1:3, ::2],
            "tied": base,
            "half": torch.randn(5, generator=generator).half(),
            "brain": torch.randn(5, generator=generator).bfloat16(),
            "count": torch.tensor(7),
            "mask": torch.tensor([True, False]),
            "empty": torch.zeros(0, 3),
            "parameter": torch.nn.Parameter(torch.randn(2, generator=generator)),
        }
    )


def same(first, second):
    assert list(first) == list(second)
    for name, tensor in first.items():
        assert second[name].dtype == tensor.dtype and torch.equal(second[name], tensor), name
        assert second[name].is_contiguous() and not second[name].requires_grad


def official_like():
    """The shape of an official training checkpoint: optimizer, and a config object that is pickled as it is."""
    config = CfgNode({"MODEL": {"NAME": "x", "DEPTHS": [2, 2]}, "AMP": True})
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return {
        "model": weights(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": {"t": 0.5, "values": [1, 2], "flags": {1, 2}},
        "epoch": 3,
        "config": config,
        "args": argparse.Namespace(lr=1e-3, path="x"),
        "counts": collections.defaultdict(list, {1: [2]}),
    }


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_official_checkpoints_with_a_config_object(tmp_path, zipped, protocol):
    path = tmp_path / "ckpt_epoch_3.pth"
    torch.save(official_like(), path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    state, source = read_state_dict(path)
    same(weights(), state)
    assert source.format == "torch"
    assert {"optimizer", "config", "epoch"} <= set(source.beside)
    assert {"yacs.config.CfgNode", "argparse.Namespace"} <= set(source.mentioned)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("content", [weights(), {"state_dict": weights(), "meta": 1}])
def test_plain_state_dicts(tmp_path, content, zipped):
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    same(weights(), read_state_dict(tmp_path / "w.pth")[0])


def test_float8_and_other_new_dtypes(tmp_path):
    table = {"f8": torch.randn(6).to(torch.float8_e4m3fn), "u16": torch.arange(4).to(torch.uint16)}
    torch.save(table, tmp_path / "w.pth")
    state, _ = read_state_dict(tmp_path / "w.pth")
    for name, tensor in table.items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name].float(), tensor.float())


def test_no_class_is_built(tmp_path):
    data = pickle.dumps({"config": CfgNode({"A": CfgNode({"B": 1})})}, protocol=2)
    content, mentioned = read_pickle(io.BytesIO(data), tmp_path)
    config = content["config"]
    assert type(config) is Placeholder and type(config.items["A"]) is Placeholder
    assert config.items["A"].items == {"B": 1}
    assert mentioned == {"yacs.config.CfgNode", "__builtin__.set"}


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def nested(evil):
    return {"model": weights(), "optimizer": {"state": [{"deep": (1, [evil])}]}}


def in_config(evil):
    config = CfgNode()
    dict.__setitem__(config, "A", [evil])  # its constructor would copy, and so run, what is inside
    return {"model": weights(), "config": config}


def in_weights(evil):
    return {"model": {"a": evil}}


def as_tensor(evil):
    return evil


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("where", [nested, in_config, in_weights, as_tensor])
@pytest.mark.parametrize(
    ("function", "args", "name"),
    [
        (os.system, ("touch {canary}",), r"(posix|nt)\.system"),
        (eval, ("open('{canary}', 'w')",), r"builtin(s|__)\.eval"),
        (open, ("{canary}", "w"), r"(io|_io|__builtin__)\.open"),
        (subprocess.Popen, (["touch", "{canary}"],), r"(subprocess|commands)\.Popen"),
        (getattr, ("x", "upper"), r"builtin(s|__)\.getattr"),
        (torch.save, ({}, "{canary}"), r"torch\.serialization\.save"),
        (torch.hub.load_state_dict_from_url, ("file://{canary}",), r"torch\.hub\.load_state_dict_from_url"),
    ],
)
def test_calls_are_refused_by_name_and_nothing_runs(tmp_path, zipped, where, function, args, name):
    canary = tmp_path / "canary"
    filled = [[part.format(canary=canary) for part in a] if isinstance(a, list) else a for a in args]
    filled = [a.format(canary=canary) if isinstance(a, str) else a for a in filled]
    path = tmp_path / "evil.pth"
    torch.save(where(Call(function, *filled)), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=rf"evil\.pth .*{name}.*nothing was run"):
        read_state_dict(path)
    assert not canary.exists()


def raw_zip(path, data, *, compression=zipfile.ZIP_STORED, extra=()):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data)
        for name, content in extra:
            archive.writestr(f"archive/{name}", content)


HAND_WRITTEN = {
    "old-style instance": b"(S'x'\nios\nsystem\n.",
    "global with build": b"cposix\nsystem\n}S'a'\nI1\nsb.",
    "state on a harmless global": b"ccollections\nOrderedDict\n}S'__class__'\nI1\nsb.",
    "extension registry": b"\x82\x01.",
    "persistent id of a file": b"S'a'\nQ.",
    "empty": b"",
    "no stop": b"\x80\x02}",
    "pop of nothing": b"0.",
    "unknown memo": b"h\x05.",
    "huge string": b"X" + struct.pack("<I", 1 << 31) + b"abc.",
    "table keys that are tables": b"}}I1\ns.",
    "tensor of a table": b"ctorch._utils\n_rebuild_tensor_v2\n(}I0\n))tR.",
    "tensor with too few arguments": b"ctorch._utils\n_rebuild_tensor_v2\n(}tR.",
    "tensor as a class": b"ctorch._utils\n_rebuild_tensor_v2\n)\x81.",
    "not a pickle": b"\xfe\xff\xfd.",
}


@pytest.mark.parametrize("case", HAND_WRITTEN)
def test_hand_written_pickles_are_refused(tmp_path, case):
    raw_zip(tmp_path / "evil.pth", HAND_WRITTEN[case])
    with pytest.raises(CheckpointError, match=r"evil\.pth"):
        read_state_dict(tmp_path / "evil.pth")


def tensor_pickle(numel, offset, shape, stride):
    """data.pkl of {"w": tensor} with any sizes."""

    class Tensor:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (Key(), offset, shape, stride, False, None)

    class Key:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, item):
            return ("storage", torch.FloatStorage, "0", "cpu", numel) if isinstance(item, Key) else None

    out = io.BytesIO()
    Pickler(out, protocol=2).dump({"w": Tensor()})
    return out.getvalue()


@pytest.mark.parametrize(
    ("numel", "offset", "shape", "stride"),
    [
        (4, 1, (4,), (1,)),
        (4, 0, (2, 3), (3, 1)),
        (4, 0, (1 << 40,), (0,)),
        (4, 0, (1 << 62, 1 << 62), (1, 1)),
        (4, -1, (2,), (1,)),
        (4, 0, (-2,), (1,)),
        (4, 0, (2,), (-1,)),
        (4, 0, (2, 2), (1,)),
        (4, 0, (2.0,), (1,)),
        (1 << 60, 0, (4,), (1,)),
        (5, 0, (4,), (1,)),
        (-4, 0, (4,), (1,)),
    ],
)
def test_tensors_outside_their_storage_are_refused(tmp_path, numel, offset, shape, stride):
    path = tmp_path / "evil.pth"
    raw_zip(path, tensor_pickle(numel, offset, shape, stride), extra=[("data/0", bytes(16))])
    with pytest.raises(CheckpointError, match=r"evil\.pth"):
        read_state_dict(path)


def test_hand_written_zip_is_read_when_it_is_sound(tmp_path):
    raw_zip(tmp_path / "w.pth", tensor_pickle(4, 1, (3,), (1,)), extra=[("data/0", struct.pack("<4f", 1, 2, 3, 4))])
    assert read_state_dict(tmp_path / "w.pth")[0]["w"].tolist() == [2, 3, 4]


def test_bombs_stay_small(tmp_path, monkeypatch):
    monkeypatch.setattr("swin_scale.convert.pickles.MAX_PICKLE_BYTES", 1 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    deflated, stated, lists, shared = (tmp_path / f"{name}.pth" for name in ("deflated", "stated", "lists", "shared"))
    raw_zip(deflated, b"\x80\x02" + b"]" * (1 << 25), compression=zipfile.ZIP_DEFLATED)
    raw_zip(stated, b"\x80\x02" + b"]" * (9 << 20))
    legacy = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2)
    lists.write_bytes(legacy + b"\x80\x02" + b"]" * (2 << 20) + b".")
    nest = b"\x80\x02]q\x00" + b"".join(b"(h\x00h\x00tq\x00" for _ in range(1000))  # 2^1000 leaves, all one object
    raw_zip(shared, nest + b".")
    for path in (deflated, stated, lists, shared):
        with pytest.raises(CheckpointError, match=path.name):
            read_state_dict(path)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    assert grown < 250, f"{grown} MiB"


def damage_at_random(tmp_path, count, seed):
    """Flip bytes of whole files, and of the pickle inside a zip whose CRC is then right again."""
    rng = random.Random(seed)
    originals = []
    for zipped in (True, False):
        path = tmp_path / ("zip.pth" if zipped else "legacy.pth")
        torch.save(official_like(), path, _use_new_zipfile_serialization=zipped)
        originals.append(path.read_bytes())
    with zipfile.ZipFile(tmp_path / "zip.pth") as archive:
        parts = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    originals.append(parts.pop("data.pkl"))
    path = tmp_path / "mutant.pth"
    refused = intact = 0
    for _ in range(count):
        kind = rng.randrange(3)
        data = bytearray(originals[kind])
        for _ in range(rng.choice((1, 2, 20))):
            if rng.random() < 0.1:
                del data[rng.randrange(1, len(data) + 1) :]
            data[rng.randrange(len(data))] = rng.randrange(256)
        if kind == 2:
            raw_zip(path, bytes(data), extra=parts.items())
        else:
            path.write_bytes(data)
        try:
            read_state_dict(path)
        except CheckpointError as error:
            refused += "mutant" in str(error)
        else:
            intact += 1
    assert refused + intact == count and refused > count // 4


def test_damaged_files_never_crash(tmp_path):
    damage_at_random(tmp_path, 300, seed=0)


@pytest.mark.proof
def test_damaged_files_never_crash_proof(tmp_path):
    damage_at_random(tmp_path, 3000, seed=1)


def test_flipped_weights_in_a_zip_are_noticed(tmp_path):
    torch.save({"w": torch.arange(1000.0)}, tmp_path / "w.pth")
    data = bytearray((tmp_path / "w.pth").read_bytes())
    at = data.find(struct.pack("<3f", 500, 501, 502))
    data[at] ^= 1
    (tmp_path / "w.pth").write_bytes(data)
    with pytest.raises(CheckpointError, match="CRC"):
        read_state_dict(tmp_path / "w.pth")


def test_what_is_not_a_weight_file(tmp_path):
    (tmp_path / "page.pth").write_text("<html>")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"a": 1}, 2))
    torch.save({"model": {"epoch": 3}}, tmp_path / "numbers.pth")
    raw_zip(tmp_path / "other.pth", pickle.dumps([1, 2], 2))
    for name in ("page", "plain", "numbers", "other", "missing"):
        with pytest.raises(CheckpointError, match=name):
            read_state_dict(tmp_path / f"{name}.pth")


def test_ema_is_not_guessed(tmp_path):
    torch.save(weights(), tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="does not say that it is ema"):
        read_state_dict(tmp_path / "w.pth", kind="ema")
