"""Models with experts to the files of ranks and back: the same bits, whatever the number of ranks."""

import json

import pytest
import safetensors.torch
import torch

from swin_scale.checkpoint import Fragment, begin, commit, write_rank_file
from swin_scale.cli import main
from swin_scale.convert import convert, infer_model, inspect_path, model_from_weights, read_state_dict
from swin_scale.errors import UserError
from swin_scale.models import create_model, list_models, variant
from tests.convert.moe_files import MOE, moe_model, rank_part
from tests.convert.official import with_official_buffers
from tests.convert.test_ranks import FC1, assert_same

V2_MOE = "swinv2_moe_nano_patch4_window4_32"


def checkpoint_of(run, model, ep_size=4, *, name=MOE, overrides=None):
    """A step directory as `ep_size` expert-parallel ranks write it: each its experts, under global coordinates."""
    temporary = begin(run / "checkpoints", 7)
    files = []
    for rank in range(ep_size):
        fragments = []
        for key, tensor in model.state_dict().items():
            start, data = 0, tensor.reshape(-1)
            if ".experts." in key:
                start = rank * data.numel() // ep_size
                data = data[start : start + data.numel() // ep_size]
            elif rank:
                continue
            fragments.append(Fragment(name=key, kind="master", shape=tuple(tensor.shape), start=start, data=data))
        files.append(write_rank_file(temporary, rank, fragments))
    parameters = {key: {"shape": list(p.shape), "dtype": "float32"} for key, p in model.named_parameters()}
    description = {"name": name, "overrides": overrides or {}, "classes": None, "wnids": None}
    commit(
        temporary,
        step=7,
        rank_files=files,
        state={"step": 7},
        config_text="{}",
        parameters=parameters,
        model=description,
    )
    return run


@pytest.mark.parametrize(
    ("to", "file"),
    [
        ("official", "moe"),
        ("official", "moe.zip"),
        ("tutel-ep1", "moe"),
        ("tutel-ep2", "moe.zip"),
        ("tutel-ep16", "moe"),
        ("safetensors", "moe"),
    ],
)
def test_a_sharded_checkpoint_to_ranks_and_back(tmp_path, to, file):
    model = moe_model(8, fc2_bias=True)
    run, path = checkpoint_of(tmp_path / "run", model), tmp_path / file
    report = convert(run, path, to=to)
    assert {line.source for line in (*report.copied, *report.converted)} == set(model.state_dict())
    assert json.loads(path.with_name(f"{path.name}.receipt.json").read_text())["bytes"] > 0
    network, info = model_from_weights(path)
    assert_same(network.state_dict(), model.state_dict())
    assert info.format == ("safetensors" if to == "safetensors" else "ranks")
    again = convert(path, tmp_path / "again.safetensors", to="safetensors")
    assert_same(safetensors.torch.load_file(tmp_path / "again.safetensors"), model.state_dict())
    assert "step 7" in str(report) and again.created == ()
    assert MOE in inspect_path(path)


def test_files_are_those_the_official_code_and_tutel_expect(tmp_path):
    model = moe_model(8, fc2_bias=True)
    state = dict(model.state_dict())
    torch.save({"model": state}, tmp_path / "w.pth")
    convert(tmp_path / "w.pth", tmp_path / "published", to="official", model=MOE)
    assert {file.name for file in (tmp_path / "published").iterdir()} == {
        "published.pth.master",
        *(f"published.pth.rank{rank}" for rank in range(8)),
    }
    master = torch.load(tmp_path / "published" / "published.pth.master")["model"]
    buffers = with_official_buffers({}, MOE)
    counts = {key for key in master if key.endswith("_num_global_experts")}
    assert master.keys() == {key for key in state if ".experts." not in key} | buffers.keys() | counts
    assert len(counts) == 2 and all(int(master[key]) == 8 for key in counts)
    for ranks, name in ((8, "published"), (2, "two"), (16, "sixteen")):
        if name != "published":
            convert(tmp_path / "w.pth", tmp_path / name, to=f"tutel-ep{ranks}", model=MOE)
        for rank in range(ranks):
            file = tmp_path / name / f"{name}.pth.rank{rank}"
            content = torch.load(file)["model"]
            for key in state:
                if ".experts." in key:
                    assert torch.equal(content[key], rank_part(key, state[key], rank, ranks)), key
                elif name != "published":
                    assert torch.equal(content[key], state[key])
            elements = sum(tensor.numel() for tensor in content.values())
            assert file.stat().st_size < 4 * elements + 200_000  # a part is written, not all that it is a view of


def test_published_form_comes_back_after_other_ranks(tmp_path):
    """16 ranks to one file to 2 ranks to 8: nothing but the split changes."""
    model = moe_model(4)
    run = checkpoint_of(tmp_path / "run", model, 2, overrides={"moe": {"num_experts": 4}})
    convert(run, tmp_path / "a.zip", to="tutel-ep16")
    report = convert(tmp_path / "a.zip", tmp_path / "direct", to="tutel-ep8")
    experts = [(line.source, line.target) for line in report.converted if (line.source or "").endswith(FC1)]
    assert experts == [(f"rank{rank}/{FC1}", f"rank{rank // 2}/{FC1}") for rank in range(16)]
    convert(tmp_path / "a.zip", tmp_path / "b.safetensors", to="safetensors")
    convert(tmp_path / "b.safetensors", tmp_path / "c", to="tutel-ep2")
    convert(tmp_path / "c", tmp_path / "d.zip", to="official")
    state, source = read_state_dict(tmp_path / "d.zip")
    assert_same({key: state[key] for key in model.state_dict()}, model.state_dict())
    assert "4 experts, 1 on each rank" in source.notes


def test_a_moe_of_swinv2(tmp_path):
    model = moe_model(8, name=V2_MOE, fc2_bias=True)
    run = checkpoint_of(tmp_path / "run", model, name=V2_MOE)
    convert(run, tmp_path / "two", to="tutel-ep2")
    network, info = model_from_weights(tmp_path / "two")
    assert info.name == V2_MOE
    assert_same(network.state_dict(), model.state_dict())
    with pytest.raises(UserError, match="official code has no model like swinv2_moe_nano"):
        convert(run, tmp_path / "x", to="official")


def test_what_formats_and_numbers_of_ranks_cannot_do_is_exit_2(tmp_path, capsys):
    run, dense = checkpoint_of(tmp_path / "run", moe_model(8)), tmp_path / "dense.pth"
    name = "swin_moe_small_patch4_window12_192_densebaseline_22k"
    sizes = {"img_size": 32, "window_size": 4, "depths": (2, 2), "num_heads": (3, 6)}
    state = dict(create_model(name, num_classes=3, **sizes).state_dict())
    torch.save({"model": with_official_buffers(state, name, **sizes)}, dense)
    for to, source, message in (
        *((to, run, "cannot express model.moe with 8 experts") for to in ("timm", "hf", "torchvision", "mm")),
        ("tutel-ep3", run, "8 experts do not lie on 3 ranks; choose one of 1, 2, 4, 8"),
        ("tutel-ep24", run, "do not lie on 24 ranks"),
        ("tutel-ep0", run, "at least one rank"),
        ("tutel-epN", run, "put the number of ranks in place of N"),
        ("tutel-ep2", dense, "has no experts; convert to official instead"),
    ):
        assert main(["convert", str(source), str(tmp_path / "out"), "--to", to]) == 2, to
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    assert main(["convert", str(run), str(tmp_path / "out.pth"), "--to", "official"]) == 2
    assert "give a new directory, or a name that ends in .zip" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    assert main(["convert", str(run), str(tmp_path / "full"), "--to", "official"]) == 2


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    run = checkpoint_of(tmp_path / "run", moe_model(8))

    def full(*_):
        raise RuntimeError("No space left on device")

    monkeypatch.setattr("swin_scale.convert.write_ranks.torch.save", full)
    for name in ("out", "out.zip"):
        assert main(["convert", str(run), str(tmp_path / name), "--to", "official"]) == 4
        assert [file.name for file in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("name", [name for name in list_models() if "_moe_" in name])
def test_every_variant_is_told_by_its_tensors(name, tmp_path):
    with torch.device("meta"):
        state = dict(create_model(name).state_dict())
    found, overrides = infer_model(with_official_buffers(state, name), tmp_path)
    inferred, expected = variant(found, **overrides), variant(name)
    for field in ("family", "moe", "moe_blocks", "embed_dim", "depths", "num_heads", "img_size", "window_size",
                  "num_classes", "mlp_fc2_bias"):  # fmt: skip
        if field != "moe_blocks" or expected.moe:
            assert getattr(inferred, field) == getattr(expected, field), field


def test_mixtures_of_no_known_model_become_overrides(tmp_path):
    model = moe_model(6, moe={"router": "cosine", "cosine_dim": 24}, moe_blocks=((0,), (0, 1)))
    state = with_official_buffers(dict(model.state_dict()), MOE)
    found, overrides = infer_model(state, tmp_path)
    assert overrides["moe_blocks"] == ((0,), (0, 1))
    assert overrides["moe"] == {"num_experts": 6, "router": "cosine", "cosine_dim": 24}
    assert FC1 not in state and variant(found, **overrides).moe.num_experts == 6
