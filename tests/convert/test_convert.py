"""From checkpoints and foreign files to weight files and back to models."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from swin_scale import create_model, labels, load_weights
from swin_scale.checkpoint import Fragment, begin, commit, write_rank_file
from swin_scale.cli import main
from swin_scale.convert import FORMATS, convert, infer_model, inspect_path, model_from_weights, read_state_dict
from swin_scale.errors import CheckpointError, UserError
from swin_scale.models import list_models, variant
from tests.convert.official import load_pretrained, official_model, with_official_buffers

NANO = ["swin_nano_patch4_window4_32", "swinv2_nano_patch4_window4_32", "swin_mlp_nano_patch4_window4_32"]
V2 = NANO[1]
needs_official = pytest.mark.skipif("SWIN_OFFICIAL" not in os.environ, reason="SWIN_OFFICIAL is not set")


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def fragments_of(state, kind):
    return [
        Fragment(name=name, kind=kind, shape=tuple(tensor.shape), start=0, data=tensor.reshape(-1))
        for name, tensor in state.items()
    ]


def save_run(run, name, step=3, seed=1, **overrides):
    """A run directory with one checkpoint of `name` (master and ema); returns the two models."""
    master, ema = create_model(name, seed=seed, **overrides), create_model(name, seed=seed + 1, **overrides)
    torch.manual_seed(seed)
    for parameter in (*master.parameters(), *ema.parameters()):
        parameter.data.add_(0.1 * torch.randn_like(parameter))  # zeroed norms would make blocks the identity
    root = run / "checkpoints"
    temporary = begin(root, step)
    fragments = fragments_of(master.state_dict(), "master") + fragments_of(ema.state_dict(), "ema")
    half = len(fragments) // 2
    files = [write_rank_file(temporary, rank, part) for rank, part in enumerate((fragments[:half], fragments[half:]))]
    parameters = {n: {"shape": list(p.shape), "dtype": "float32"} for n, p in master.named_parameters()}
    classes = [f"class {i}" for i in range(variant(name, **overrides).num_classes)]
    model = {"name": name, "overrides": overrides, "classes": classes, "wnids": None}
    commit(
        temporary,
        step=step,
        rank_files=files,
        state={"step": step},
        config_text="{}",
        parameters=parameters,
        model=model,
    )
    return master, ema


@pytest.mark.parametrize("name", NANO)
@pytest.mark.parametrize("kind", ["master", "ema"])
def test_checkpoint_to_safetensors_to_official_and_back(tmp_path, name, kind):
    models = dict(zip(("master", "ema"), save_run(tmp_path, name, num_classes=7), strict=True))
    wanted = models[kind].state_dict()
    report = convert(tmp_path, tmp_path / "w.safetensors", to="safetensors", kind=kind)
    assert len(report.copied) == len(wanted) and f"{kind} weights of step 3" in str(report)
    assert_same(safetensors.torch.load_file(tmp_path / "w.safetensors"), wanted)
    convert(tmp_path / "w.safetensors", tmp_path / "w.pth", to="official", kind=kind)
    loaded = torch.load(tmp_path / "w.pth", weights_only=True)
    assert loaded.keys() == {"model"}
    for path in (tmp_path / "w.safetensors", tmp_path / "w.pth"):
        network, info = model_from_weights(path)
        assert_same(network.state_dict(), wanted)
        assert (info.name, variant(info.name, **info.overrides).num_classes) == (name, 7)
    assert info.classes is None
    again = convert(tmp_path / "w.pth", tmp_path / "again.safetensors", to="safetensors")
    assert len(again.copied) == len(wanted) and len(again.dropped) == len(loaded["model"]) - len(wanted)
    assert_same(safetensors.torch.load_file(tmp_path / "again.safetensors"), wanted)


def test_weight_files_remember_their_model(tmp_path):
    master, ema = save_run(tmp_path, V2, img_size=64, num_classes=3)
    convert(tmp_path, tmp_path / "w.safetensors", to="safetensors", kind="ema")
    network, info = model_from_weights(tmp_path / "w.safetensors")
    assert (info.step, info.kind, info.classes) == (3, "ema", ("class 0", "class 1", "class 2"))
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(network.eval()(x), ema.eval()(x))
    network, info = model_from_weights(tmp_path, kind="master")
    assert info.format == "checkpoint" and torch.equal(network.eval()(x), master.eval()(x))


def test_the_receipt_lies_beside_the_file(tmp_path):
    save_run(tmp_path, V2)
    convert(tmp_path, tmp_path / "w.pth", to="official")
    receipt = json.loads((tmp_path / "w.pth.receipt.json").read_text())
    assert (receipt["format"], receipt["kind"], receipt["step"]) == ("official", "master", 3)
    assert receipt["bytes"] == (tmp_path / "w.pth").stat().st_size
    assert receipt["model"]["name"] == V2
    assert {line["target"] for line in receipt["created"]} <= torch.load(tmp_path / "w.pth")["model"].keys()
    without = convert(tmp_path, tmp_path / "small.pth", to="official", buffers=False)
    assert without.created == ()


@pytest.mark.parametrize(
    "name",
    [name for name in list_models() if name.startswith(("swin_tiny", "swinv2_tiny", "swin_mlp")) or "nano" in name]
    + ["swinv2_base_patch4_window12to24_192to384_22kto1k_ft", "swin_base_patch4_window12_384_finetune"],
)
def test_official_files_are_recognised(name):
    """From keys and shapes: the inferred model is the same but for the drop-path rate."""
    with torch.device("meta"):
        state = dict(create_model(name).state_dict())
    found, overrides = infer_model(with_official_buffers(state, name), Path("x.pth"))
    expected, inferred = variant(name), variant(found, **overrides)
    assert replace(inferred, drop_path_rate=expected.drop_path_rate) == expected


def test_sizes_of_no_known_model_become_overrides(tmp_path):
    model = create_model(V2, img_size=64, window_size=8, embed_dim=16, depths=(2, 1, 2), num_heads=(1, 2, 4))
    state = with_official_buffers(dict(model.state_dict()), V2, **vars_of(model))
    torch.save({"model": state}, tmp_path / "w.pth")
    network, info = model_from_weights(tmp_path / "w.pth")
    assert info.overrides["img_size"] == 64 and info.overrides["depths"] == (2, 1, 2)
    assert_same(network.state_dict(), model.state_dict())
    torch.save({"model": model.state_dict()}, tmp_path / "bare.pth")
    with pytest.raises(CheckpointError, match="does not tell the image size"):
        model_from_weights(tmp_path / "bare.pth")


def vars_of(model):
    v = model.variant
    return {
        key: getattr(v, key) for key in ("img_size", "window_size", "embed_dim", "depths", "num_heads", "num_classes")
    }


def test_wrong_pretrained_window_is_refused_and_the_right_one_named(tmp_path):
    small = create_model(V2, img_size=32, window_size=4)
    torch.save({"model": with_official_buffers(dict(small.state_dict()), V2)}, tmp_path / "w.pth")
    wrong = create_model(V2, img_size=64, window_size=8)
    with pytest.raises(
        CheckpointError, match=r"windows of 4, .* by 8; create it with pretrained_window_sizes=\(4, 4\)"
    ):
        load_weights(wrong, tmp_path / "w.pth")
    load_weights(create_model(V2, img_size=64, window_size=8, pretrained_window_sizes=(4, 4)), tmp_path / "w.pth")
    _, info = model_from_weights(tmp_path / "w.pth", img_size=64, window_size=8)
    assert info.overrides["pretrained_window_sizes"] == (4, 4)
    convert(tmp_path / "w.pth", tmp_path / "w.safetensors", to="safetensors")
    with pytest.raises(CheckpointError, match="create it with pretrained_window_sizes"):
        load_weights(wrong, tmp_path / "w.safetensors")


def test_class_names_of_foreign_imagenet_weights(tmp_path):
    model = create_model(V2, num_classes=1000)
    torch.save({"model": with_official_buffers(dict(model.state_dict()), V2, num_classes=1000)}, tmp_path / "w.pth")
    _, info = model_from_weights(tmp_path / "w.pth")
    assert info.classes == labels.imagenet1k().classes and info.wnids == labels.imagenet1k().wnids


def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path, caplog):
    older, _ = save_run(tmp_path, V2, step=1, seed=5)
    save_run(tmp_path, V2, step=2, seed=9)
    broken = tmp_path / "checkpoints" / "step_00000002" / "rank00001.safetensors"
    broken.write_bytes(broken.read_bytes()[:-1])
    state, source = read_state_dict(tmp_path)
    assert source.step == 1 and "rank00001.safetensors" in caplog.text
    assert_same(state, older.state_dict())
    text = inspect_path(tmp_path)
    assert "step_00000002  DAMAGED" in text and "step_00000001" in text
    with pytest.raises(CheckpointError, match="rank00001"):
        read_state_dict(broken.parent)
    with pytest.raises(CheckpointError, match="master, ema, but no momentum"):
        read_state_dict(tmp_path, kind="momentum")


def test_the_command_line_lists_every_format(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    shown = re.search(r"format to write: ([\w, \n-]+?)\n  -", capsys.readouterr().out)
    assert set(re.split(r",\s*", re.sub(r"-\s+", "-", shown[1]).strip())) == set(FORMATS)
    save_run(tmp_path, V2)
    for to in [to for to in FORMATS if to != "tutel-epN"]:  # for models with experts: tests/convert/test_write_ranks.py
        assert main(["convert", str(tmp_path), str(tmp_path / f"out_{to}"), "--to", to, "--model", V2, "--ema"]) == 0
        assert f"out_{to}: " in capsys.readouterr().out
    assert main(["convert", str(tmp_path), str(tmp_path / "w"), "--to", "onnx"]) == 2


def test_failures_name_the_cause(tmp_path):
    save_run(tmp_path, V2)
    with pytest.raises(UserError, match="known formats are official, safetensors"):
        convert(tmp_path, tmp_path / "w", to="onnx")
    with pytest.raises(UserError, match="existing directory"):
        convert(tmp_path, tmp_path / "no" / "w", to="official")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        convert(tmp_path / "empty", tmp_path / "w", to="official")
    save_run(tmp_path / "huge", V2, extra_norm_interval=2)
    with pytest.raises(CheckpointError, match=r"no norms on the main branch .*enorm"):
        convert(tmp_path / "huge", tmp_path / "w.pth", to="official")
    assert not (tmp_path / "w.pth").exists()


def test_inspect_tells_what_is_there(tmp_path):
    save_run(tmp_path, V2, num_classes=7)
    convert(tmp_path, tmp_path / "w.safetensors", to="safetensors")
    convert(tmp_path, tmp_path / "w.pth", to="official")
    count = sum(p.numel() for p in create_model(V2, num_classes=7).parameters())
    for path, words in {
        tmp_path: ["1 checkpoints", "step_00000003", V2, "master, ema", f"{count:,} parameters"],
        tmp_path / "checkpoints" / "step_00000003": ["checkpoint of step 3", "2 rank files"],
        tmp_path / "w.safetensors": ["safetensors", "master weights of step 3", "float32", "7 classes: class 0", V2],
        tmp_path / "w.pth": ["torch.save", "parameters in"],
    }.items():
        text = inspect_path(path)
        assert all(word in text for word in words), text
    with pytest.raises(UserError, match="does not exist"):
        inspect_path(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is not a run"):
        inspect_path(tmp_path / "empty")


def test_inspect_reads_checkpoints_whole_when_asked_to(tmp_path, capsys):
    save_run(tmp_path, V2)
    step = tmp_path / "checkpoints" / "step_00000003"
    assert main(["inspect", str(tmp_path), "--verify"]) == 0 and "digests match" in capsys.readouterr().out
    flipped = bytearray((step / "rank00001.safetensors").read_bytes())
    flipped[-1] ^= 1
    (step / "rank00001.safetensors").write_bytes(flipped)
    assert main(["inspect", str(tmp_path)]) == 0 and "DAMAGED" not in capsys.readouterr().out
    assert main(["inspect", str(tmp_path), "--verify"]) == 0
    assert "step_00000003  DAMAGED" in capsys.readouterr().out
    assert main(["inspect", str(step)]) == 0
    assert main(["inspect", str(step), "--verify"]) == 4 and "rank00001.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("x", ["--data", "shards"], "--data is for --routing; add it"),
        ("x", ["--model", V2], "--model is for --routing; add it"),
        ("x", ["--images", "10000"], "--images is for --routing; add it"),
        ("x.yaml", ["--out", "page.html"], "--out is for --routing; add it"),
        ("x.yaml", ["--ema"], "--ema is for --routing; add it"),
        ("x.yaml", ["--verify"], "no digests to verify"),
        (__file__, ["--verify"], "no digests to verify"),
        ("x", ["--verify", "--routing", "--data", "shards"], "--verify does not go with --routing"),
    ],
)
def test_options_of_inspect_that_would_do_nothing_are_refused(path, options, message, capsys):
    assert main(["inspect", path, *options]) == 2
    assert message in capsys.readouterr().err


@needs_official
@pytest.mark.proof
@pytest.mark.parametrize("overrides", [{}, {"img_size": 64, "window_size": 8, "pretrained_window_sizes": (4, 4)}])
@pytest.mark.parametrize("name", NANO)
def test_official_code_loads_our_files_strictly(tmp_path, name, overrides):
    if not name.startswith("swinv2"):
        overrides = {key: value for key, value in overrides.items() if key != "pretrained_window_sizes"}
    ours, _ = save_run(tmp_path, name, **overrides)
    convert(tmp_path, tmp_path / "w.pth", to="official")
    theirs = official_model(ours.variant)
    stored = torch.load(tmp_path / "w.pth", weights_only=True)["model"]
    for key, buffer in theirs.state_dict().items():
        if key.endswith(("relative_position_index", "relative_coords_table", "attn_mask")):
            assert torch.equal(stored[key], buffer), key
    assert theirs.load_state_dict(stored, strict=True)
    fresh, _ = model_from_weights(tmp_path)
    size = ours.variant.img_size
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(fresh.eval()(x), theirs.eval()(x), rtol=1e-5, atol=1e-5)


@needs_official
@pytest.mark.proof
@pytest.mark.parametrize("family", ["swin", "swinv2"])
def test_fine_tuning_starts_as_the_official_code_does(tmp_path, monkeypatch, family):
    """22K weights at window 4 into a 1K model at window 8: our load and the official one, bit for bit."""
    name = f"{family}_nano_patch4_window4_32"
    pretrained, _ = save_run(tmp_path, name, num_classes=21841, img_size=64)
    convert(tmp_path, tmp_path / "w.pth", to="official")
    windows = {"pretrained_window_sizes": (4, 4)} if family == "swinv2" else {}
    ours = create_model(name, num_classes=1000, img_size=64, window_size=8, **windows)
    report = load_weights(ours, tmp_path / "w.pth")
    resized = sum("bias_table" in key for key in pretrained.state_dict())
    assert len(report.converted) == 2 + resized
    theirs = official_model(ours.variant)
    monkeypatch.chdir(os.environ["SWIN_OFFICIAL"])
    load_pretrained(tmp_path / "w.pth", theirs)
    theirs_state = theirs.state_dict()
    for key, tensor in ours.state_dict().items():
        assert torch.equal(tensor, theirs_state[key]), key
