"""timm, Hugging Face, torchvision and mmpretrain: what they load, what comes back, and what they cannot say."""

import json
import re

import pytest
import safetensors.torch
import torch
from torch import nn

from swin_scale import create_model, load_weights
from swin_scale.convert import FORMATS, convert, infer_model, inspect_path, model_from_weights, open_weights
from swin_scale.convert.layouts import LAYOUTS, recognise, timm_model
from swin_scale.convert.translate import as_official
from swin_scale.convert.weights import Loaded, Source
from swin_scale.errors import CheckpointError, UserError
from swin_scale.models import list_models, variant
from tests.convert.test_convert import assert_same
from tests.peers import Unfilled, timm, torchvision

V1, V2 = "swin_nano_patch4_window4_32", "swinv2_nano_patch4_window4_32"
SMALL = [
    (V1, {}),
    (V1, {"img_size": 64, "embed_dim": 24, "depths": (1, 2, 2), "num_heads": (1, 2, 4), "num_classes": 5}),
    (V1, {"img_size": 64, "window_size": 8, "qkv_bias": False}),
    (V2, {}),
    (V2, {"img_size": 64, "embed_dim": 24, "depths": (1, 2, 2), "num_heads": (1, 2, 4), "num_classes": 5}),
    (V2, {"img_size": 64, "window_size": 8, "pretrained_window_sizes": (4, 4)}),
]
FULL = [
    ("swin_tiny_patch4_window7_224", {}),
    ("swin_base_patch4_window7_224_22k", {}),
    ("swinv2_small_patch4_window16_256", {}),
    ("swinv2_base_patch4_window12to24_192to384_22kto1k_ft", {}),
]


@pytest.fixture
def made(tmp_path):
    """(model, its safetensors file): weights in which every tensor matters and no two are equal."""

    def make(name, seed=1, noise=0.1, **overrides):
        torch.manual_seed(seed)
        model = create_model(name, seed=seed, **overrides).eval()
        for parameter in model.parameters():
            parameter.data.add_(noise * torch.randn_like(parameter))
        path = tmp_path / "ours.pth"
        classes = [f"class {i}" for i in range(model.variant.num_classes)]
        description = {"name": name, "overrides": overrides, "classes": classes, "wnids": None}
        from swin_scale.convert import plain

        source = Source(path=path, format="safetensors", kind="master", step=7)
        plain.write(path.with_suffix(".safetensors"), Loaded(model.state_dict(), source), description)
        return model, path.with_suffix(".safetensors")

    return make


def agree(ours, theirs):
    size = ours.variant.img_size
    x = torch.randn(1 if size > 64 else 2, 3, size, size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        mine, other = ours(x), theirs(x)
    assert mine.std() > 1e-3
    torch.testing.assert_close(other, mine, rtol=1e-5, atol=1e-5)


def round_trip(model, name, path, report):
    """Ours -> theirs -> ours gives the same bits, and the model described in our metadata."""
    back, info = model_from_weights(path)
    assert_same(back.state_dict(), model.state_dict())
    assert (info.name, info.step, variant(info.name, **info.overrides)) == (name, 7, model.variant)
    assert {line.source for line in (*report.copied, *report.converted)} == model.state_dict().keys()


def check_timm(model, name, path, tmp_path):
    report = convert(path, tmp_path / "timm.safetensors", to="timm")
    entry, arguments = timm_model(name, model.variant)
    assert entry in str(report)
    with Unfilled():
        theirs = timm.create_model(entry, checkpoint_path=str(tmp_path / "timm.safetensors"), **arguments).eval()
    theirs.load_state_dict(safetensors.torch.load_file(tmp_path / "timm.safetensors"), strict=True)
    agree(model, theirs)
    round_trip(model, name, tmp_path / "timm.safetensors", report)
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "trained.pth")  # no metadata of ours
    fresh = create_model(name, **overrides_of(model, name))
    report = load_weights(fresh, tmp_path / "trained.pth")
    assert_same(fresh.state_dict(), model.state_dict())
    assert any(line.source == "head.fc.weight" and line.target == "head.weight" for line in report.copied)


def check_hf(model, name, path, tmp_path):
    from transformers import AutoConfig, AutoModelForImageClassification

    report = convert(path, tmp_path / "hf", to="hf")
    theirs, info = AutoModelForImageClassification.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert theirs.config.id2label[1] == "class 1"
    agree(model, lambda x: theirs.eval()(x).logits)
    round_trip(model, name, tmp_path / "hf", report)
    theirs.save_pretrained(tmp_path / "saved")  # by the library itself, so no metadata of ours
    back, info = model_from_weights(tmp_path / "saved")
    assert_same(back.state_dict(), model.state_dict())
    assert info.classes[1] == "class 1"
    v, found = model.variant, variant(info.name, **info.overrides)
    assert (found.img_size, found.window_size, found.depths) == (v.img_size, v.window_size, v.depths)
    assert AutoConfig.from_pretrained(tmp_path / "hf").num_labels == v.num_classes


def overrides_of(model, name):
    known, v = variant(name), model.variant
    return {key: getattr(v, key) for key in vars(v) if key != "family" and getattr(v, key) != getattr(known, key)}


@pytest.mark.parametrize(("name", "overrides"), SMALL)
def test_timm(made, tmp_path, name, overrides):
    model, path = made(name, **overrides)
    check_timm(model, name, path, tmp_path)


@pytest.mark.parametrize(("name", "overrides"), [case for case in SMALL if case != SMALL[1]])
def test_hugging_face(made, tmp_path, name, overrides):
    model, path = made(name, **overrides)
    check_hf(model, name, path, tmp_path)


@pytest.mark.proof
@pytest.mark.parametrize(("name", "overrides"), FULL)
def test_full_sizes_in_timm_and_hugging_face(made, tmp_path, name, overrides):
    model, path = made(name, noise=0.02, **overrides)  # logits of about 1, for which 1e-5 is a few roundings
    check_timm(model, name, path, tmp_path)
    check_hf(model, name, path, tmp_path)


def torchvision_model(v):
    parts = torchvision.models.swin_transformer
    v2 = v.family == "swinv2"
    return parts.SwinTransformer(
        patch_size=[4, 4], embed_dim=v.embed_dim, depths=list(v.depths), num_heads=list(v.num_heads),
        window_size=[v.window_size, v.window_size], num_classes=v.num_classes,
        block=parts.SwinTransformerBlockV2 if v2 else None,
        downsample_layer=parts.PatchMergingV2 if v2 else parts.PatchMerging,
    ).eval()  # fmt: skip


@pytest.mark.parametrize("name", [V1, V2])
def test_torchvision(made, tmp_path, name):
    model, path = made(name, img_size=64)
    report = convert(path, tmp_path / "tv.pth", to="torchvision")
    theirs = torchvision_model(model.variant)
    theirs.load_state_dict(torch.load(tmp_path / "tv.pth", weights_only=True), strict=True)
    agree(model, theirs)
    fresh = create_model(name, img_size=64)
    back = load_weights(fresh, tmp_path / "tv.pth")
    assert_same(fresh.state_dict(), model.state_dict())
    assert len(back.dropped) == len(report.created) > 0


@pytest.mark.proof
@pytest.mark.parametrize(
    ("entry", "name"), [("swin_t", "swin_tiny_patch4_window7_224"), ("swin_v2_s", "swinv2_small_patch4_window8_256")]
)
def test_torchvision_own_models_are_recognised(tmp_path, entry, name):
    theirs = getattr(torchvision.models, entry)().eval()
    torch.save(theirs.state_dict(), tmp_path / "tv.pth")
    model, info = model_from_weights(tmp_path / "tv.pth")
    assert info.name == name
    agree(model.eval(), theirs)


class Unfolded(nn.Module):
    """The merging of the OpenMMLab projects: neighbours gathered by ``nn.Unfold``."""

    def __init__(self, state, prefix, post_norm):
        super().__init__()
        self.weight, self.post_norm = state[prefix + "reduction.weight"], post_norm
        self.norm = [state[prefix + "norm.weight"], state[prefix + "norm.bias"]]

    def forward(self, x):
        x = nn.functional.unfold(x.permute(0, 3, 1, 2), 2, stride=2).transpose(1, 2)
        norm = lambda y: nn.functional.layer_norm(y, y.shape[-1:], *self.norm)  # noqa: E731
        return norm(x @ self.weight.T) if self.post_norm else norm(x) @ self.weight.T


@pytest.mark.parametrize(("name", "at"), [(V1, 0), (V2, 1)])
def test_mmpretrain_gathers_neighbours_in_another_order(made, tmp_path, name, at):
    model, path = made(name)
    convert(path, tmp_path / "mm.pth", to="mm")
    state = torch.load(tmp_path / "mm.pth", weights_only=True)["state_dict"]
    theirs = Unfolded(state, f"backbone.stages.{at}.downsample.", name == V2)
    x = torch.randn(2, 8, 8, 32)
    ours = model.layers[0].downsample(x).reshape(2, 16, 64)
    torch.testing.assert_close(theirs(x), ours, rtol=1e-5, atol=1e-5)
    fresh = create_model(name)
    load_weights(fresh, tmp_path / "mm.pth")
    assert_same(fresh.state_dict(), model.state_dict())
    assert "backbone.norm1.weight" in state and "backbone.stages.0.blocks.1.attn.w_msa.qkv.weight" in state
    headless = {key.removeprefix("backbone."): t for key, t in state.items() if key.startswith("backbone.")}
    torch.save(headless, tmp_path / "backbone.pth")  # as mmdetection and mmsegmentation take it
    load_weights(fresh, tmp_path / "backbone.pth", head="zero")
    assert torch.equal(fresh.norm.weight, model.norm.weight) and not fresh.head.weight.any()


@pytest.mark.parametrize("to", LAYOUTS)
@pytest.mark.parametrize("name", [n for n in list_models() if n.startswith(("swin_tiny_patch4_w", "swinv2_large"))])
def test_tables_go_both_ways_and_are_told_apart(to, name):
    """Every key of every released size, by name only."""
    with torch.device("meta"):
        state = dict(create_model(name).state_dict())
    v = variant(name)
    layout = LAYOUTS[to][v.family]
    steps, homeless = layout.outbound(list(state))
    assert not homeless
    foreign = [key for step in steps for key in step.targets]
    assert len(set(foreign)) == len(foreign)
    assert recognise(foreign) == (to, layout)
    back, dropped = layout.inbound(foreign)
    assert {key for step in back for key in step.targets} == state.keys() and not dropped
    assert recognise(list(state)) is None


@pytest.mark.parametrize(
    ("to", "name", "overrides", "field"),
    [
        ("timm", V2, {"extra_norm_interval": 2}, "extra_norm_interval 2"),
        ("timm", V1, {"ape": True}, "ape True"),
        ("timm", V1, {"patch_norm": False}, "patch_norm False"),
        ("hf", "swin_mlp_nano_patch4_window4_32", {}, "family swin_mlp"),
        ("hf", V1, {"window_size": 8}, "window_size 8: stage 1 has a map"),
        ("hf", V2, {"img_size": (64, 32)}, "square ones only"),
        ("torchvision", V2, {"window_size": 4, "pretrained_window_sizes": (2, 2)}, "pretrained_window_sizes"),
        ("torchvision", V2, {"window_size": 8}, "smaller than a window"),
        ("mm", V1, {"window_size": 8}, "smaller than a window"),
    ],
)
def test_what_a_format_cannot_say_is_refused_by_name(made, tmp_path, to, name, overrides, field):
    _, path = made(name, **overrides)
    with pytest.raises(UserError, match=r"cannot express model\.") as caught:
        convert(path, tmp_path / "out", to=to)
    assert field in str(caught.value)
    assert not list(tmp_path.glob("*out*"))


def test_every_key_is_in_the_receipt(made, tmp_path):
    _, path = made(V1)
    report = convert(path, tmp_path / "hf", to="hf")
    receipt = json.loads((tmp_path / "hf.receipt.json").read_text())
    state = safetensors.torch.load_file(tmp_path / "hf" / "model.safetensors")
    ours = safetensors.torch.load_file(path)
    lines = [*receipt["copied"], *receipt["converted"]]
    assert {line["source"] for line in lines} == ours.keys() and {line["target"] for line in lines} == state.keys()
    query = "swin.encoder.layers.0.blocks.0.attention.self.query.weight"
    qkv = "layers.0.blocks.0.attn.qkv.weight"
    assert torch.equal(state[query], ours[qkv][:32])
    assert next(line.target for line in report.converted if line.source == qkv) == query
    back = convert(tmp_path / "hf", tmp_path / "back.safetensors", to="safetensors")
    assert [line.source for line in back.converted if line.target == qkv] == [
        query, query.replace("query", "key"), query.replace("query", "value")
    ]  # fmt: skip
    assert_same(safetensors.torch.load_file(tmp_path / "back.safetensors"), ours)
    assert "recognised as a model of Hugging Face" in str(back)


def test_hugging_face_directories_are_read_as_they_come(made, tmp_path):
    """A masked-image model, names inside transformers 5, and an incomplete one."""
    from transformers import SwinConfig, SwinForImageClassification, SwinForMaskedImageModeling

    sizes = {"image_size": 64, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
    model = SwinForMaskedImageModeling(SwinConfig(encoder_stride=8, **sizes))
    model.save_pretrained(tmp_path / "simmim")
    ours, info = model_from_weights(tmp_path / "simmim")
    assert (info.overrides["img_size"], info.overrides["num_classes"]) == (64, 0)
    assert torch.equal(ours.norm.weight, model.swin.layernorm.weight)
    model = SwinForImageClassification(SwinConfig(num_labels=3, **sizes)).eval()
    torch.save(model.state_dict(), tmp_path / "inside.pth")
    fresh = create_model(V1, **{**info.overrides, "num_classes": 3}).eval()
    load_weights(fresh, tmp_path / "inside.pth")
    agree(fresh, lambda x: model(x).logits)
    state = {key: tensor for key, tensor in model.state_dict().items() if "blocks.0.attention.k_proj.bias" not in key}
    torch.save(state, tmp_path / "part.pth")
    with pytest.raises(CheckpointError, match=r"query\.bias|q_proj\.bias"):
        load_weights(fresh, tmp_path / "part.pth")


def test_hugging_face_weights_in_several_files(tmp_path):
    from transformers import SwinConfig, SwinForImageClassification

    sizes = {"image_size": 64, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
    model = SwinForImageClassification(SwinConfig(num_labels=3, **sizes)).eval()
    model.save_pretrained(tmp_path / "hf", max_shard_size="200KB")
    index = tmp_path / "hf" / "model.safetensors.index.json"
    ours, _ = model_from_weights(tmp_path / "hf")
    agree(ours, lambda x: model(x).logits)
    report = convert(tmp_path / "hf", tmp_path / "w.safetensors", to="safetensors")
    assert re.search(r"[2-9] files, as model.safetensors.index.json names them", str(report))
    assert "3 classes" in inspect_path(tmp_path / "hf") or "num_classes=3" in inspect_path(tmp_path / "hf")
    good = json.loads(index.read_text())
    name, file = next(iter(good["weight_map"].items()))
    other = next(other for other in good["weight_map"].values() if other != file)
    for change, message in (
        ({name: "../w.safetensors"}, "names '../w.safetensors', which is no file beside it"),
        ({name: "model-00009-of-00009.safetensors"}, r"model-00009-of-00009.safetensors is missing"),
        ({name: other}, "do not agree on"),
        ({"another": file}, "do not agree on another"),
        ({name: 3}, "has no table weight_map"),
    ):
        index.write_text(json.dumps({**good, "weight_map": {**good["weight_map"], **change}}))
        with pytest.raises(CheckpointError, match=message):
            model_from_weights(tmp_path / "hf")


def test_windows_that_nothing_tells_are_asked_for(tmp_path):
    """timm's files hold no window of a SwinV2: 8 and 16 have the same keys and shapes, and different logits."""
    with torch.device("meta"):
        state = dict(create_model("swinv2_tiny_patch4_window8_256").state_dict())
    with pytest.raises(CheckpointError, match=r"does not tell the window size.*window16_256.*name the model"):
        infer_model(state, tmp_path / "x")
    config = tmp_path / "config.json"
    source = Source(path=tmp_path, format="safetensors", kind="master")
    from swin_scale.convert import hub

    for name in ("swinv2_tiny_patch4_window16_256", "swinv2_base_patch4_window12to16_192to256_22kto1k_ft"):
        entry, _ = timm_model(name, variant(name))
        config.write_text(json.dumps({"architecture": entry}))
        with torch.device("meta"):
            state = dict(create_model(name).state_dict())
        assert infer_model(state, tmp_path, hub.describe(tmp_path, source).facts)[0] == name
    config.write_text(json.dumps({"model_type": "swinv2", "id2label": {"x": "y"}}))
    with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
        hub.describe(tmp_path, source)


def test_official_prefixes_are_seen_through(made, tmp_path):
    """Distributed training, SimMIM and the names of the internal code, before the model is known."""
    model, path = made(V2)
    from tests.convert.official import with_official_buffers

    state = with_official_buffers(dict(model.state_dict()), V2)
    simmim = {f"encoder.{k.replace('cpb_mlp', 'rpe_mlp')}": t for k, t in state.items() if "head" not in k}
    simmim |= {"encoder.mask_token": torch.zeros(1, 1, 32), "decoder.0.weight": torch.zeros(8, 64, 1, 1)}
    torch.save({"model": {f"module.{key}": tensor for key, tensor in simmim.items()}}, tmp_path / "simmim.pth")
    report = convert(tmp_path / "simmim.pth", tmp_path / "encoder.safetensors", to="safetensors")
    encoder, info = model_from_weights(tmp_path / "encoder.safetensors")
    assert (info.name, info.overrides) == (V2, {"num_classes": 0})
    wanted = {key: tensor for key, tensor in model.state_dict().items() if "head" not in key}
    assert_same(encoder.state_dict(), wanted)
    assert {"module.encoder.mask_token", "module.decoder.0.weight"} <= {line.source for line in report.dropped}
    entry, arguments = timm_model(V2, model.variant)
    timm_keys = {f"module.{k}": t for k, t in timm.create_model(entry, **arguments).state_dict().items()}
    view = as_official(Loaded(timm_keys, Source(path=path, format="torch", kind="master")))
    assert view.layout == "timm" and view.weights.tensors.keys() == model.state_dict().keys()


@pytest.mark.parametrize("key", ["model_ema", "state_dict_ema", "module", "state_dict"])
def test_tables_under_other_names(made, tmp_path, key):
    model, _ = made(V2)
    other, _ = made(V2, seed=9)
    is_ema = "ema" in key
    content = {key: model.state_dict(), "epoch": 3}
    torch.save(content, tmp_path / "w.pth")
    fresh = create_model(V2)
    load_weights(fresh, tmp_path / "w.pth")
    assert_same(fresh.state_dict(), model.state_dict())
    with open_weights(tmp_path / "w.pth") as weights:
        assert weights.source.kind == ("ema" if is_ema else "master")
    if is_ema:
        torch.save({**content, "model": other.state_dict()}, tmp_path / "w.pth")
        load_weights(fresh, tmp_path / "w.pth")
        assert_same(fresh.state_dict(), other.state_dict())
        load_weights(fresh, tmp_path / "w.pth", kind="ema")
        assert_same(fresh.state_dict(), model.state_dict())
    else:
        with pytest.raises(CheckpointError, match="leave ema out"):
            load_weights(fresh, tmp_path / "w.pth", kind="ema")


def test_weights_of_other_models_become_plain_safetensors(tmp_path):
    state = {"conv.weight": torch.randn(3, 2), "count": torch.tensor(5), "half": torch.randn(4).half()}
    torch.save({"state_dict": state, "epoch": 1}, tmp_path / "other.pth")
    report = convert(tmp_path / "other.pth", tmp_path / "other.safetensors", to="safetensors")
    assert_same(safetensors.torch.load_file(tmp_path / "other.safetensors"), state)
    assert json.loads((tmp_path / "other.safetensors.receipt.json").read_text())["model"] is None
    assert "the model is not known" in str(report) and len(report.copied) == 3
    with open_weights(tmp_path / "other.safetensors") as weights:
        assert weights.source.model is None
    assert "unknown" in inspect_path(tmp_path / "other.pth") and "3 tensors" in inspect_path(tmp_path / "other.pth")
    for to in {*FORMATS, "tutel-ep2"} - {"safetensors", "tutel-epN"}:
        with pytest.raises(CheckpointError, match="is not a Swin model"):
            convert(tmp_path / "other.pth", tmp_path / "out", to=to)


def test_a_directory_with_files_is_not_replaced(made, tmp_path):
    _, path = made(V2)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="files in it"):
        convert(path, tmp_path / "hf", to="hf")
    assert (tmp_path / "hf" / "notes.txt").read_text() == "mine"
