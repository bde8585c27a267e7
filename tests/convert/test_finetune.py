"""Fine-tuning from any checkpoint: what becomes of a SimMIM model, of windows and heads, alone and in one command."""

import os
import typing
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from scipy import interpolate

from swin_scale import create_model, create_simmim, labels, load_weights
from swin_scale.checkpoint import list_steps, save_safetensors
from swin_scale.config import Init, Optim
from swin_scale.convert import convert, fit, model_from_weights, open_weights
from swin_scale.convert.fit import Head
from swin_scale.convert.load import trained_windows
from swin_scale.engine.optim import layer_id, param_groups
from swin_scale.errors import CheckpointError
from swin_scale.models import variant
from tests.convert.official import official_model, official_module, with_official_buffers
from tests.convert.test_convert import save_run
from tests.runs import events, run, trajectory

V1, V2 = "swin_nano_patch4_window4_32", "swinv2_nano_patch4_window4_32"
MOE = "swinv2_moe_nano_patch4_window4_32"
DEEP = {"depths": (1, 2, 2, 1), "embed_dim": 16, "num_heads": (1, 2, 4, 8)}
"""Four stages, as all published sizes have, so that maps and windows are theirs; narrow."""
PRETRAINED = {"img_size": 192, "window_size": 12, **DEEP}
FROM_192 = (12, 12, 12, 6)
SQUARE = {"img_size": 256, "window_size": 16}
OBLONG = {"img_size": (192, 256), "window_size": (12, 16)}

needs_official = pytest.mark.skipif("SWIN_OFFICIAL" not in os.environ, reason="SWIN_OFFICIAL is not set")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def simmim(name=V2, **overrides):
    """A SimMIM model whose every parameter is some number, so that nothing is equal by chance."""
    model = create_simmim(name, **{**PRETRAINED, **overrides})
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def official_file(model, path, name=V2, **overrides):
    """`model` as the official code saves it: derived buffers among the encoder's keys, more beside them."""
    buffers = with_official_buffers({}, name, **{**PRETRAINED, "num_classes": 0, **overrides})
    state = {**model.state_dict(), **{f"encoder.{key}": tensor for key, tensor in buffers.items()}}
    torch.save({"model": state, "epoch": 799, "max_accuracy": 0.0}, path)
    return state


# -- a SimMIM checkpoint of 192 px -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [SQUARE, OBLONG], ids=["256/w16", "192x256/w12x16"])
def test_it_is_fine_tuned_at_other_sizes_and_every_key_is_accounted_for(tmp_path, sizes):
    pretrained = simmim()
    keys = official_file(pretrained, tmp_path / "simmim.pth")
    model = create_model(V2, **DEEP, **sizes, pretrained_window_sizes=FROM_192, num_classes=5)
    head = model.head.weight.detach().clone()
    report = load_weights(model, tmp_path / "simmim.pth")
    report.check(keys, model.state_dict())
    encoder = pretrained.encoder.state_dict()
    assert {line.target for line in report.copied} == encoder.keys() - {"mask_token"}
    assert all(torch.equal(model.state_dict()[line.target], encoder[line.target]) for line in report.copied)
    assert {line.target for line in report.created} == {"head.weight", "head.bias"} and not report.converted
    buffers = len(keys) - len(pretrained.state_dict())
    assert Counter(line.reason for line in report.dropped) == {
        "only for masked-image pre-training": 3,
        "derived from sizes, rebuilt by the model": buffers,
    }
    assert torch.equal(model.head.weight, head) and head.std() == pytest.approx(0.02, rel=0.2)
    height, width = model.stages[0].resolution
    x, labelled = torch.randn(2, 3, 4 * height, 4 * width), torch.tensor([0, 1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        loss = torch.nn.functional.cross_entropy(model(x), labelled)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.85 * losses[0], losses


@pytest.mark.parametrize("sizes", [SQUARE, OBLONG], ids=["256/w16", "192x256/w12x16"])
def test_coordinates_in_another_unit_are_refused(tmp_path, sizes):
    """Such weights would load, and be wrong: a window of 16 would be seen as one of 12."""
    official_file(simmim(), tmp_path / "simmim.pth")
    wrong = create_model(V2, **DEEP, **sizes)
    with pytest.raises(CheckpointError, match=r"windows of 12, .* by (16|12 x 16); create it with pretrained_window_s"):
        load_weights(wrong, tmp_path / "simmim.pth")
    assert trained_windows(tmp_path / "simmim.pth") == FROM_192
    right = create_simmim(V2, **DEEP, **sizes, pretrained_window_sizes=FROM_192)
    wrong_too = create_simmim(V2, **DEEP, **sizes)
    with pytest.raises(CheckpointError, match="windows of 12"):
        load_weights(wrong_too, tmp_path / "simmim.pth")
    report = load_weights(right, tmp_path / "simmim.pth")  # further pre-training, at another size
    assert len(report.copied) == len(right.state_dict()) and not report.converted + report.created


def test_tables_of_swin_v1_follow_the_geometric_rule(tmp_path):
    """192 px, window 6 to 224 px, window 7: as the official fine-tuning config of Swin-B has it."""
    sizes = {"img_size": 192, "window_size": 6}
    pretrained = simmim(V1, **sizes)
    keys = official_file(pretrained, tmp_path / "simmim.pth", V1, **sizes)
    model = create_model(V1, **DEEP, img_size=224, window_size=7)
    report = load_weights(model, tmp_path / "simmim.pth")
    report.check(keys, model.state_dict())
    assert {line.reason for line in report.converted} == {
        "encoder of a SimMIM model, geometric from 11 x 11 to 13 x 13"
    }
    assert len(report.converted) == sum(DEEP["depths"])


def test_an_encoder_with_experts_becomes_a_classifier_with_experts(tmp_path):
    pretrained = create_simmim(MOE)
    save_safetensors(tmp_path / "simmim.safetensors", dict(pretrained.state_dict()))
    model = create_model(MOE, seed=1)
    report = load_weights(model, tmp_path / "simmim.safetensors")
    report.check(pretrained.state_dict(), model.state_dict())
    for key, tensor in pretrained.encoder.state_dict().items():
        assert key == "mask_token" or torch.equal(model.state_dict()[key], tensor), key


def test_features_of_its_encoder_can_be_had(tmp_path):
    """For probes: the model of a file of SimMIM is the encoder without a head."""
    pretrained = simmim()
    official_file(pretrained, tmp_path / "simmim.pth")
    network, info = model_from_weights(tmp_path / "simmim.pth")
    assert variant(info.name, **info.overrides).num_classes == 0
    x = torch.randn(1, 3, 192, 192)
    with torch.no_grad():
        assert torch.equal(network.eval()(x), pretrained.encoder.eval()(x))
    receipt = convert(tmp_path / "simmim.pth", tmp_path / "encoder.safetensors", to="safetensors")
    assert "the encoder of a SimMIM model" in str(receipt)
    assert len(receipt.copied) == len(network.state_dict())


# -- heads -------------------------------------------------------------------------------------------------------------


def test_config_and_loader_know_the_same_policies():
    assert typing.get_args(typing.get_type_hints(Init)["head"]) == typing.get_args(Head)


@pytest.mark.parametrize("policy", typing.get_args(Head))
def test_head_policies(policy):
    source = create_model(V2, num_classes=21841, seed=1).state_dict()
    target = create_model(V2, num_classes=1000, seed=2).state_dict()
    if policy == "keep":
        with pytest.raises(CheckpointError, match=r"a head of 21841 classes, the model has 1000 .* set init\.head"):
            fit(source, target, where="w.pth", into="model", head=policy)
        return
    placed, report = fit(source, target, where="w.pth", into="model", head=policy)
    weight = placed["head.weight"]
    if policy in ("auto", "map22kto1k"):
        assert torch.equal(weight, source["head.weight"][torch.tensor(labels.map_22k_to_1k())])
        assert {line.target for line in report.converted} == {"head.weight", "head.bias"}
    else:
        wanted = torch.zeros_like(weight) if policy == "zero" else target["head.weight"]
        assert torch.equal(weight, wanted) and not placed["head.bias"].any()
        assert len(report.created) == len(report.dropped) == 2
        assert weight.std() == pytest.approx(0.0 if policy == "zero" else 0.02, rel=0.05)


@pytest.mark.parametrize("policy", ["keep", "map22kto1k"])
def test_a_head_that_is_not_there_cannot_be_kept(policy):
    target = create_model(V2).state_dict()
    source = {key: value for key, value in target.items() if not key.startswith("head.")}
    with pytest.raises(CheckpointError, match=r"no head.*set init\.head"):
        fit(source, target, where="w.pth", into="model", head=policy)


# -- one command -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pretrained_run(digits, tmp_path_factory):
    """A supervised run at 32 px, window 4, of two steps."""
    directory = tmp_path_factory.mktemp("pretrained") / "run"
    done = run(directory, digits[0], nproc=1, train__max_steps=2)
    assert done.returncode == 0, done.stderr
    return directory


@pytest.mark.parametrize(
    "form", ["run", pytest.param("pth", marks=pytest.mark.proof), pytest.param("safetensors", marks=pytest.mark.proof)]
)
def test_double_resolution_and_window_in_one_command(digits, tmp_path, pretrained_run, form):
    """The windows that coordinates are scaled by follow from the weights, and the command resumes."""
    weights = pretrained_run
    if form != "run":
        weights = tmp_path / f"w.{form}"
        convert(pretrained_run, weights, to="official" if form == "pth" else form)
    options = {"init__weights": weights, "data__img_size": 64, "model__window_size": 8, "optim__layer_decay": 0.8}
    done = run(tmp_path / "fine", digits[0], nproc=1, train__max_steps=2, **options)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "fine" / "config.yaml").read_text()
    assert "pretrained_window_sizes: [4, 4]" in text
    count = len(create_model(V2).state_dict())
    assert f"{count} copied, 0 converted" in (tmp_path / "fine" / "logs" / "rank0.log").read_text()
    if form != "run":
        weights.unlink()  # what a resumed run started from need not be there any more
    done = run(tmp_path / "fine", digits[0], nproc=1, train__max_steps=3, **options)
    assert done.returncode == 0, done.stderr
    assert list_steps(tmp_path / "fine" / "checkpoints")[-1] == 3
    assert len(trajectory(tmp_path / "fine")) == 3


@pytest.mark.parametrize(
    ("img_size", "window_size"), [(64, 8), pytest.param([32, 64], [4, 8], marks=pytest.mark.proof)], ids=str
)
def test_from_simmim_to_labels_in_one_command(digits, tmp_path, img_size, window_size):
    """Pre-trained without labels at 32 px, window 4, fine-tuned at other sizes from the run's directory."""
    done = run(tmp_path / "simmim", digits[0], nproc=1, train__max_steps=2, task="simmim", simmim__mask_patch_size=8,
               simmim__pictures=0)  # fmt: skip
    assert done.returncode == 0, done.stderr
    with open_weights(tmp_path / "simmim") as weights:
        assert {"encoder.mask_token", "decoder.0.weight"} <= weights.tensors.keys()
    done = run(tmp_path / "fine", digits[0], nproc=1, train__max_steps=2, init__weights=tmp_path / "simmim",
               data__img_size=img_size, model__window_size=window_size, init__head="trunc_normal")  # fmt: skip
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "fine" / "logs" / "rank0.log").read_text()
    assert "3 dropped, 2 created" in log and "only for masked-image pre-training" in log
    assert "pretrained_window_sizes: [4, 4]" in (tmp_path / "fine" / "config.yaml").read_text()
    assert events(tmp_path / "fine", "start")


@pytest.mark.proof
def test_base_from_22k_at_192_to_1k_at_384(tmp_path):
    """An official 22K file of SwinV2-B, window 12, into the model of its 384 px recipe, window 24."""
    stem = "swinv2_base_patch4_window12_192_22k"
    source = with_official_buffers(dict(create_model(stem).state_dict()), stem)
    torch.save({"model": source}, tmp_path / f"{stem}.pth")
    model = create_model("swinv2_base_patch4_window12to24_192to384_22kto1k_ft", seed=1)
    report = load_weights(model, tmp_path / f"{stem}.pth")
    report.check(source, model.state_dict())
    parameters = len(model.state_dict())
    assert (len(report.copied), len(report.converted), len(report.created)) == (parameters - 2, 2, 0)
    assert len(source) == 475 and len(report.dropped) == 475 - parameters
    print(f"\n{report}")  # noqa: T201


# -- the official code -------------------------------------------------------------------------------------------------


@needs_official
@pytest.mark.proof
@pytest.mark.parametrize("family", ["swin", "swinv2"])
def test_the_official_code_makes_the_same_of_it(tmp_path, monkeypatch, family):
    """The loader of official SimMIM fine-tuning on the same file. SciPy has taken away the interpolation it calls."""

    def interp2d(x, y, z, kind):
        return interpolate.RectBivariateSpline(y, x, z, kx=3, ky=3, s=0)

    monkeypatch.setattr(interpolate, "interp2d", interp2d, raising=False)
    name = f"{family}_nano_patch4_window4_32"
    sizes = {"img_size": 192, "window_size": 6 if family == "swin" else 12}
    fine = {"img_size": 224, "window_size": 7 if family == "swin" else 14}
    fine |= {"pretrained_window_sizes": FROM_192} if family == "swinv2" else {}
    official_file(simmim(name, **sizes), tmp_path / "simmim.pth", name, **sizes)
    ours = create_model(name, **DEEP, **fine)
    load_weights(ours, tmp_path / "simmim.pth")
    theirs = official_model(ours.variant)
    config = SimpleNamespace(MODEL=SimpleNamespace(PRETRAINED=str(tmp_path / "simmim.pth"), TYPE=family))
    logger = SimpleNamespace(info=lambda *_: None)
    with monkeypatch.context() as patch:
        load = torch.load
        patch.setattr(torch, "load", lambda path, map_location: load(path, map_location, weights_only=True))
        official_module("utils_simmim").load_pretrained(config, theirs, logger)
    wanted = theirs.state_dict()
    for key, tensor in ours.state_dict().items():
        if not key.startswith("head."):
            # Its ratio is known to 1e-6, and splines are evaluated in another order.
            torch.testing.assert_close(tensor, wanted[key], rtol=0, atol=1e-5 if "bias_table" in key else 0, msg=key)


@needs_official
@pytest.mark.proof
@pytest.mark.parametrize(
    ("name", "decay"), [("swin_base_patch4_window7_224", 0.8), ("swinv2_base_patch4_window12_192_22k", 0.75),
                        ("swin_large_patch4_window7_224_22k", 0.7)],
)  # fmt: skip
def test_layers_and_groups_are_the_official_ones(name, decay):
    """Depth, rate and weight decay of every parameter, by the official code on our model."""
    official = official_module("optimizer")
    with torch.device("meta"):
        model = create_model(name, ape=True)
    depths = model.variant.depths
    names = [key for key, _ in model.named_parameters()]
    total = sum(depths) + 2
    for key in [*names, "mask_token", "layers.2.blocks.17.enorm.weight"]:
        assert layer_id(key, depths) == official.get_swin_layer(key, total, depths), key
    scales = [decay**i for i in reversed(range(total))]
    skip, keywords = {"absolute_pos_embed"}, {"cpb_mlp", "logit_scale", "relative_position_bias_table"}
    theirs = official.get_finetune_param_groups(
        model, 1.0, 0.05, lambda key: official.get_swin_layer(key, total, depths), scales, skip, keywords
    )
    key_of = {id(parameter): key for key, parameter in model.named_parameters()}
    wanted = {key_of[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in theirs for p in g["params"]}
    ours = param_groups(model, Optim(lr=1.0, weight_decay=0.05, layer_decay=decay))
    found = {key: (g["lr_scale"], g["weight_decay"]) for g in ours for key in g["names"]}
    assert found.keys() == wanted.keys() == set(names)
    assert all(found[key] == pytest.approx(wanted[key], rel=1e-12) for key in names)


def test_windows_of_our_own_checkpoints_are_known(tmp_path):
    """Those of plain weights are not, and Swin V1 has no coordinates."""
    save_run(tmp_path, V2, img_size=64, window_size=8)
    assert trained_windows(tmp_path) == (8, 8)
    save_run(tmp_path / "v1", V1)
    assert trained_windows(tmp_path / "v1") is None
    save_safetensors(tmp_path / "w.safetensors", dict(create_model(V2).state_dict()))
    assert trained_windows(tmp_path / "w.safetensors") is None
