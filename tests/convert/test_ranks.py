"""Official Swin-MoE files: read from every way they are split, and refused where they do not add up."""

import importlib.util
import random
import shutil
import stat
import tempfile
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from swin_scale import create_model, load_weights
from swin_scale.cli import main
from swin_scale.convert import convert, inspect_path, model_from_weights, open_weights, read_state_dict
from swin_scale.convert.torch_weights import TorchWeights
from swin_scale.errors import CheckpointError
from tests.convert.moe_files import MOE, moe_model, rank_part, rank_states, write_ranks
from tests.convert.official import with_official_buffers
from tests.spawn import spawn

FC1 = "layers.0.blocks.1.mlp._moe_layer.experts.batched_fc1_w"
COUNT = FC1.replace("experts.batched_fc1_w", "_num_global_experts")
FC2_BIAS = FC1.replace("fc1_w", "fc2_bias")


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.shape == second[name].shape and torch.equal(tensor, second[name]), name


def zip_of(directory, path, compression=zipfile.ZIP_DEFLATED, prefix="moe/"):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for file in sorted(directory.iterdir()):
            archive.write(file, prefix + file.name)
    return path


def official_state(model, name=MOE, **overrides):
    return with_official_buffers(dict(model.state_dict()), name, **overrides)


SPLITS = [
    # experts, ranks, shapes before August 2022, every file whole
    (8, 8, True, False),
    (8, 4, False, False),
    (2, 8, True, False),
    (4, 1, False, True),
    (4, 2, False, True),
    (2, 6, False, True),  # a third of 32 channels: second biases are padded
    (1, 4, False, False),
]


@pytest.mark.parametrize(("experts", "ranks", "legacy", "whole"), SPLITS)
def test_experts_of_any_split_are_joined(tmp_path, experts, ranks, legacy, whole):
    overrides = {"mlp_ratio": 3.0} if ranks == 6 else {}
    model = moe_model(experts, fc2_bias=whole, **overrides)
    files = write_ranks(tmp_path / "files", official_state(model, **overrides), ranks, legacy=legacy, whole=whole)
    network, info = model_from_weights(files)
    assert info.format == "ranks" and network.variant.moe.num_experts == experts
    assert_same(network.state_dict(), model.state_dict())
    again = moe_model(experts, seed=1, **overrides)
    report = load_weights(again, files)
    assert_same(again.state_dict(), model.state_dict())
    written = sum(len(torch.load(file)["model"]) for file in files.iterdir())
    read = {line.source for line in (*report.copied, *report.converted, *report.dropped)}
    assert len(read) == written  # every key of every file
    assert not report.created


def test_every_name_of_a_set_and_the_published_zip(tmp_path):
    model = moe_model()
    files = write_ranks(tmp_path / "files", official_state(model), 4, legacy=True)
    zipped = zip_of(files, tmp_path / "published.zip")
    stored = zip_of(files, tmp_path / "stored", zipfile.ZIP_STORED, prefix="")
    for path in (zipped, stored, files / "swin.pth", files / "swin.pth.rank2", files / "swin.pth.master"):
        state, source = read_state_dict(path)
        assert_same({key: state[key] for key in model.state_dict()}, model.state_dict())
        assert source.format == "ranks"
        shown = inspect_path(path)
        assert MOE in shown and "official files of 4 ranks and master" in shown and "2 on each rank" in shown
    with open_weights(zipped) as weights:
        unpacked = weights._files["rank0"].source.path.parent
        assert unpacked.is_dir()
    assert not unpacked.exists()


def test_cosine_routers_and_drifted_copies(tmp_path):
    model = moe_model(4, moe={"router": "cosine", "cosine_dim": 16})
    state = official_state(model, moe={"num_experts": 4})
    files = write_ranks(tmp_path / "files", state, 2, whole=True)
    content = torch.load(files / "swin.pth.rank1")
    content["model"]["norm.weight"] += 1
    torch.save(content, files / "swin.pth.rank1")
    network, _ = model_from_weights(files)
    assert_same(network.state_dict(), model.state_dict())
    assert network.variant.moe.router == "cosine" and network.variant.moe.cosine_dim == 16
    report = convert(files, tmp_path / "w.safetensors", to="safetensors")
    assert "1 shared tensors differ between ranks" in str(report)
    assert "left out, beside the weights in the file: epoch" in str(report)


def test_one_file_with_all_experts_in_any_shape(tmp_path):
    model = moe_model(4, fc2_bias=True)
    state = official_state(model)
    state[COUNT] = torch.tensor(4)
    legacy = {key: tensor.unsqueeze(1) if key.endswith(("fc1_bias", "fc2_bias")) else tensor for key, tensor in
              state.items()}  # fmt: skip
    for number, table in enumerate((state, legacy)):
        torch.save({"model": table}, tmp_path / f"{number}.pth")
        network, _ = model_from_weights(tmp_path / f"{number}.pth")
        assert_same(network.state_dict(), model.state_dict())
    torch.save({"model": {**state, FC1: state[FC1][:2]}}, tmp_path / "part.pth")
    with pytest.raises(CheckpointError, match="give the directory with all ranks"):
        model_from_weights(tmp_path / "part.pth")
    torch.save({"model": {**state, COUNT: torch.tensor(8)}}, tmp_path / "count.pth")
    with pytest.raises(CheckpointError, match=r"_num_global_experts is \[8\], the gate is for 4"):
        model_from_weights(tmp_path / "count.pth")


def test_what_tutels_scatter_tool_leaves_of_a_shared_expert(tmp_path):
    """It cuts the last axis where the layer cuts the hidden one, and drops the axis of experts: the elements agree."""
    model = moe_model(2, fc2_bias=True)
    state = dict(model.state_dict())
    (tmp_path / "files").mkdir()
    for rank in range(4):
        table = {}
        for key, tensor in state.items():
            table[key] = tensor.view(4, -1)[rank].view(*tensor.shape[1:-1], -1) if ".experts." in key else tensor
        torch.save({"model": table}, tmp_path / "files" / f"swin.pth.rank{rank}")
    again = moe_model(2, seed=1)
    load_weights(again, tmp_path / "files")
    assert_same(again.state_dict(), state)


# A process of an expert-parallel run takes its own experts


def group(rank, size):
    return SimpleNamespace(rank=lambda: rank, size=lambda: size)


@pytest.mark.parametrize("kind", ["ranks", "shared", "zip", "one file", "safetensors"])
def test_a_process_takes_its_experts(tmp_path, kind, monkeypatch):
    model = moe_model(8)
    state = official_state(model)
    path = tmp_path / "w"
    if kind == "one file":
        torch.save({"model": state}, path)
    else:
        write_ranks(path, state, 16 if kind == "shared" else 4)
    if kind == "zip":
        path = zip_of(path, tmp_path / "moe.zip")
    if kind == "safetensors":
        convert(path, path := tmp_path / "w.safetensors", to="safetensors")
    read = []
    original = TorchWeights.read
    monkeypatch.setattr(TorchWeights, "read", lambda self, key: (read.append((self, key)), original(self, key))[1])
    for rank in range(4):
        part = moe_model(8, seed=1, fc2_bias=True)
        own = type(part)(part.variant, 1, lambda *a, rank=rank: _layer(*a, ep_group=group(rank, 4)))
        read.clear()
        report = load_weights(own, path)
        for key, tensor in own.state_dict().items():
            wanted = model.state_dict()[key]
            wanted = wanted[2 * rank : 2 * rank + 2] if ".experts." in key else wanted
            assert torch.equal(tensor, wanted), key
        lines = [line for line in report.converted if line.target == FC1]
        assert f"experts {2 * rank} to {2 * rank + 1} of 8, this process's" in lines[0].reason
        if kind in ("ranks", "zip"):  # nothing of other ranks' experts is read
            files = {self.source.path.name.removeprefix("swin.pth.") for self, key in read if key == FC1}
            assert files == {f"rank{rank}"}


def _layer(*arguments, ep_group):
    from swin_scale.moe.layer import MoEMlp

    return MoEMlp(*arguments, ep_group=ep_group)


def logits_of_a_rank(path, backend):
    """What one of two real processes computes, with its half of the experts filled from `path`."""
    dist.init_process_group("gloo")
    model = create_model(MOE, moe={"num_experts": 4}, ep_group=dist.group.WORLD, moe_backend=backend)
    load_weights(model, path)
    with torch.no_grad():
        logits = model.eval()(images())[0].numpy()
    dist.destroy_process_group()
    return logits


def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("backend", ["native", "tutel"])
def test_two_processes_fill_their_halves(tmp_path, backend):
    if backend == "tutel" and importlib.util.find_spec("tutel") is None:
        pytest.skip("Tutel is not installed")
    model = moe_model(4)
    path = zip_of(write_ranks(tmp_path / "files", official_state(model), 8), tmp_path / "moe.zip")
    with torch.no_grad():
        expected = model.eval()(images())[0].numpy()
    for logits in spawn(2, logits_of_a_rank, path, backend):
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


def test_another_number_of_experts_is_refused(tmp_path):
    files = write_ranks(tmp_path / "files", official_state(moe_model(4)), 4)
    with pytest.raises(CheckpointError, match=r"the model has 8 experts there; set moe.experts"):
        load_weights(moe_model(8), files)


# What does not add up, and what is hostile


def damaged(tmp_path, change, ranks=4, experts=4, **options):
    files = write_ranks(tmp_path / "files", official_state(moe_model(experts)), ranks, **options)
    change(files)
    return files


def edit(file, change):
    def apply(files):
        content = torch.load(files / f"swin.pth.{file}")
        change(content["model"])
        torch.save(content, files / f"swin.pth.{file}")

    return apply


def remove(name):
    return lambda files: (files / f"swin.pth.{name}").unlink()


CASES = {
    "a rank is missing": (remove("rank1"), {}, r"swin\.pth\.rank1 is missing, there are ranks up to 3; add it"),
    "the last rank is missing": (remove("rank3"), {}, r"swin\.pth\.rank3 may be missing: there are 3 .rank files"),
    "the last half is missing": (
        lambda files: [remove(name)(files) for name in ("rank2", "rank3")],
        {},
        r"2 ranks make it torch.float32 of \(2, 128, 32\); files are missing",
    ),
    "half the ranks of shared experts are missing": (
        lambda files: [remove(f"rank{rank}")(files) for rank in range(8, 16)],
        {"ranks": 16},
        r"experts of 64 hidden units .* the dense blocks have 128 for 32",
    ),
    "no master": (remove("master"), {}, r"swin\.pth\.master is missing: the .rank files hold experts only"),
    "master only": (
        lambda files: [remove(f"rank{rank}")(files) for rank in range(4)],
        {},
        r"the .rank files with the experts are missing",
    ),
    "two files of one rank": (
        lambda files: shutil.copy(files / "swin.pth.rank1", files / "swin.pth.rank01"),
        {},
        r"rank01 and swin\.pth\.rank1 both claim to be rank 1 and so the same experts",
    ),
    "every rank has all experts": (
        lambda files: [shutil.copy(files / "swin.pth.rank0", files / f"swin.pth.rank{rank}") for rank in (1, 2, 3)],
        {"ranks": 1},
        r"make it torch.float32 of \(1, 128, 32\)",
    ),
    "two models": (
        lambda files: shutil.copy(files / "swin.pth.rank0", files / "other.pth.rank0"),
        {},
        r"holds the files of 2 models, other\.pth, swin\.pth; give one, such as",
    ),
    "a wrong shape": (
        edit("rank2", lambda model: model.update({FC1: model[FC1][:, :-1]})),
        {},
        r"swin\.pth\.rank2: .*batched_fc1_w is torch.float32 of shape \(1, 127, 32\)",
    ),
    "a transposed weight": (
        edit("rank2", lambda model: model.update({FC1: model[FC1].transpose(1, 2)})),
        {},
        r"swin\.pth\.rank2: .*of shape \(1, 32, 128\)",
    ),
    "a wrong dtype": (
        edit("rank2", lambda model: model.update({FC1: model[FC1].half()})),
        {},
        r"swin\.pth\.rank2: .*batched_fc1_w is torch.float16",
    ),
    "a rank without a key": (
        edit("rank2", lambda model: model.pop(FC1)),
        {},
        r"swin\.pth\.rank2 and .rank0 are not of one model: .*batched_fc1_w is in one of them only",
    ),
    "experts in the master file too": (
        edit("master", lambda model: model.update({FC1: torch.zeros(1, 128, 32)})),
        {},
        r"swin\.pth\.master and .rank0 are not of one model: .*batched_fc1_w is in both",
    ),
    "no gate": (
        edit("master", lambda model: [model.pop(key) for key in list(model) if ".gates." in key]),
        {},
        r"has experts but no gate at layers\.0\.blocks\.1\.mlp\._moe_layer\.gates\.0",
    ),
    "lost biases": (
        edit("master", lambda model: model[FC2_BIAS].fill_(1)),
        {},
        r"swin\.pth\.master: .*batched_fc2_bias is not zero, and no .rank file has it",
    ),
    "another count": (
        edit("master", lambda model: model.update({COUNT: torch.tensor(7)})),
        {},
        r"swin\.pth\.master: .*_num_global_experts is \[7\], the gate is for 4",
    ),
    "a torn file": (
        lambda files: (files / "swin.pth.rank2").write_bytes((files / "swin.pth.rank2").read_bytes()[:-100]),
        {},
        r"swin\.pth\.rank2 is damaged",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_files_that_do_not_add_up(tmp_path, case):
    change, options, message = CASES[case]
    with pytest.raises(CheckpointError, match=message):
        model_from_weights(damaged(tmp_path, change, **options))


def member(name, data=b"x", mode=0):
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    return info, data


ZIPS = {
    "a path that climbs": ([member("../swin.pth.rank9")], r"member '../swin.pth.rank9' would lie outside"),
    "an absolute path": ([member("/etc/swin.pth.rank9")], r"would lie outside"),
    "a Windows path": ([member("..\\swin.pth.rank9")], r"would lie outside"),
    "a link": ([member("swin.pth.rank4", b"/etc/passwd", stat.S_IFLNK | 0o777)], r"'swin.pth.rank4' is a link"),
    "the same rank twice": ([member("b/swin.pth.rank1")], r"both claim to be rank 1 and so the same experts"),
    "no weights": ([member("moe/swin.pth.rank4")], r"moe\.zip/swin\.pth\.rank4: cannot be read|rank4"),
    "a bomb": ([member("moe/zeros", bytes(1 << 26))], r"would unpack to \d+ bytes, over \d+ for a zip of its size"),
}


@pytest.mark.parametrize("case", ZIPS)
def test_hostile_zips(tmp_path, case):
    extra, message = ZIPS[case]
    files = write_ranks(tmp_path / "files", official_state(moe_model(4)), 4)
    path = zip_of(files, tmp_path / "moe.zip")
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        for info, data in extra:
            archive.writestr(info, data, zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match=message):
        open_weights(path)
    assert main(["inspect", str(path)]) == main(["convert", str(path), str(tmp_path / "w"), "--to", "safetensors"]) == 4


def test_a_damaged_zip_names_itself(tmp_path):
    path = zip_of(write_ranks(tmp_path / "files", official_state(moe_model(4)), 4), tmp_path / "moe.zip")
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo("moe/swin.pth.rank1").header_offset
    data[offset + 5000 : offset + 5010] = bytes(10)
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"moe\.zip is damaged: .*fetch it again"):
        open_weights(path)


@pytest.mark.proof
def test_no_flipped_bytes_crash_or_stay_unseen(tmp_path, monkeypatch):
    """A zip with 1 to 8 bytes changed anywhere is refused, or gives the same weights."""
    model = moe_model(2)
    good = zip_of(write_ranks(tmp_path / "files", official_state(model), 2), tmp_path / "moe.zip").read_bytes()
    unpacked = tmp_path / "unpacked"
    unpacked.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(unpacked))
    drawn, refused = random.Random(1), 0
    for _ in range(150):
        data = bytearray(good)
        for _ in range(drawn.randint(1, 8)):
            # Half of them in the zip's own tables, at its end.
            at = drawn.randrange(len(data)) if drawn.random() < 0.5 else -drawn.randrange(1, 400)
            data[at] ^= drawn.randint(1, 255)
        (tmp_path / "moe.zip").write_bytes(data)
        try:
            network, _ = model_from_weights(tmp_path / "moe.zip")
        except CheckpointError:
            refused += 1
        else:
            assert_same(network.state_dict(), model.state_dict())
    assert refused > 100
    assert not list(unpacked.iterdir())


def test_code_in_a_member_does_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (eval, ("open('/tmp/never', 'w')",))

    files = write_ranks(tmp_path / "files", official_state(moe_model(4)), 4)
    torch.save({"model": Evil()}, files / "swin.pth.rank2")
    path = zip_of(files, tmp_path / "moe.zip")
    with pytest.raises(CheckpointError, match=r"moe\.zip/swin\.pth\.rank2 refers to .*eval"):
        open_weights(path)


def test_the_writer_of_these_tests_shapes_parts_as_tutel_does():
    """By hand: 2 experts of 6 hidden units, 5 channels, on 4 ranks."""
    whole = torch.arange(60.0).view(2, 6, 5)
    assert torch.equal(rank_part("w", whole, 3, 4), whole[1:, 3:])
    bias = torch.arange(10.0).view(2, 5)
    assert rank_part("b.bias", bias, 2, 4, legacy=True).tolist() == [[[5.0, 6.0, 7.0]]]
    assert rank_part("b.bias", bias, 3, 4).tolist() == [[8.0, 9.0, 0.0]]
    files, master = rank_states({FC1: whole, FC2_BIAS: bias}, 2)
    assert [list(file) for file in files] == [[FC1], [FC1]] and torch.equal(master[FC2_BIAS], bias[:1])
