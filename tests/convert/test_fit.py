"""Fitting state dicts: each rule by hand-made cases, and by what the official code does."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from swin_scale import create_model, labels, load_weights
from swin_scale.checkpoint import save_safetensors
from swin_scale.convert import fit
from swin_scale.errors import CheckpointError

V1, V2 = "swin_nano_patch4_window4_32", "swinv2_nano_patch4_window4_32"


def state_of(name, seed=1, **overrides):
    return dict(create_model(name, seed=seed, **overrides).state_dict())


def run(source, target, **options):
    return fit(source, target, where="weights.pth", into="model", **options)


def test_equal_states_are_copied_and_the_report_adds_up():
    source = state_of(V2)
    placed, report = run(source, state_of(V2, seed=2))
    assert all(torch.equal(placed[name], tensor) for name, tensor in source.items())
    assert len(report.copied) == len(source)
    assert not report.converted + report.dropped + report.created
    assert f"{len(source)} copied, 0 converted, 0 dropped, 0 created" in str(report)


def test_derived_buffers_prefixes_and_aliases_are_explained():
    source = state_of(V2)
    foreign = {f"module.{name.replace('cpb_mlp', 'rpe_mlp')}": tensor for name, tensor in source.items()}
    foreign["module.layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16)
    foreign["module.layers.0.blocks.1.attn_mask"] = torch.zeros(1)
    placed, report = run(foreign, source)
    assert all(torch.equal(placed[name], tensor) for name, tensor in source.items())
    assert [line.source.rpartition(".")[2] for line in report.dropped] == ["relative_position_index", "attn_mask"]
    renamed = next(line for line in report.copied if line.target == "layers.0.blocks.0.attn.cpb_mlp.0.bias")
    assert renamed.reason == "prefix module. removed, rpe_mlp is cpb_mlp"


def test_simmim_encoder_is_taken_out():
    source = state_of(V2, num_classes=0)
    simmim = {f"encoder.{name}": tensor for name, tensor in source.items()}
    simmim |= {"encoder.mask_token": torch.zeros(1, 1, 32), "decoder.0.weight": torch.zeros(8, 64, 1, 1)}
    target = state_of(V2, seed=2)
    placed, report = run(simmim, target)
    assert all(torch.equal(placed[name], tensor) for name, tensor in source.items())
    assert {line.source for line in report.dropped} == {"encoder.mask_token", "decoder.0.weight"}
    assert {line.target for line in report.created} == {"head.weight", "head.bias"}
    assert torch.equal(placed["head.weight"], target["head.weight"])  # official fine-tuning keeps the fresh head
    into_simmim, report = run(simmim, simmim)
    assert len(report.copied) == len(simmim) == len(into_simmim)


def test_window_change_of_v1_resizes_tables_as_the_official_code_does():
    source = state_of(V1, img_size=64, window_size=4)
    target = state_of(V1, img_size=64, window_size=8, seed=2)
    placed, report = run(source, target)
    name = "layers.0.blocks.0.attn.relative_position_bias_table"
    image = source[name].t().view(1, -1, 7, 7)
    expected = F.interpolate(image, size=(15, 15), mode="bicubic").view(-1, 225).t()
    assert torch.equal(placed[name], expected)
    assert {line.reason for line in report.converted} == {"bicubic from 7 x 7 to 15 x 15"}
    assert len(report.converted) == 4


def test_absolute_position_embedding_is_resized():
    source = state_of(V1, img_size=32, ape=True)
    target = state_of(V1, img_size=64, ape=True, seed=2)
    placed, report = run(source, target)
    image = source["absolute_pos_embed"].view(1, 8, 8, 32).permute(0, 3, 1, 2)
    expected = F.interpolate(image, size=(16, 16), mode="bicubic").permute(0, 2, 3, 1).flatten(1, 2)
    assert torch.equal(placed["absolute_pos_embed"], expected)
    assert [line.reason for line in report.converted] == ["bicubic from 8 x 8 to 16 x 16"]
    with pytest.raises(CheckpointError, match="only square windows and maps can"):
        run(source, state_of(V1, img_size=(32, 64), ape=True))


def head(classes, width=4):
    return {"head.weight": torch.randn(classes, width), "head.bias": torch.randn(classes)}


def test_22k_head_becomes_the_1k_head_by_the_official_rows():
    source, target = head(21841), head(1000)
    placed, report = run(source, target)
    rows = torch.tensor(labels.map_22k_to_1k())
    assert torch.equal(placed["head.weight"], source["head.weight"][rows])
    assert torch.equal(placed["head.bias"], source["head.bias"][rows])
    assert len(report.converted) == 2
    with pytest.raises(CheckpointError, match="a head of 21841 classes, the model has 1000"):
        run(source, target, head="keep")


@pytest.mark.parametrize(("policy", "zero"), [("auto", True), ("zero", True), ("trunc_normal", False)])
def test_other_heads_start_anew_and_the_report_says_so(policy, zero):
    source, target = head(5), head(3)
    placed, report = run(source, target, head=policy)
    for name, tensor in target.items():
        assert torch.equal(placed[name], torch.zeros_like(tensor) if zero else tensor)
    assert len(report.dropped) == len(report.created) == 2
    assert "its head has 5 classes, the model's 3" in str(report)


def test_equal_heads_can_be_started_anew_and_headless_models_drop_theirs():
    placed, report = run(head(3), head(3), head="zero")
    assert not placed["head.weight"].any() and len(report.created) == 2
    placed, report = run(head(3), {})
    assert placed == {} and {line.reason for line in report.dropped} == {"the model has no head"}
    with pytest.raises(CheckpointError, match="needs 21841 -> 1000 classes, here 3 -> 3"):
        run(head(3), head(3), head="map22kto1k")


def test_unknown_keys_name_the_nearest():
    source = state_of(V1)
    source["layers.0.blocks.0.mlp.fc3.weight"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"1 keys that the model does not: layers.*fc3\.weight \(nearest: layers"):
        run(source, state_of(V1))


def test_missing_keys_and_shapes_are_errors():
    source = state_of(V1)
    del source["norm.weight"]
    with pytest.raises(CheckpointError, match=r"lacks 1 of the model's \d+ keys: norm\.weight"):
        run(source, state_of(V1))
    with pytest.raises(CheckpointError, match=r"norm\.weight has shape \(3,\), the model's norm\.weight has \(64,\)"):
        run(state_of(V1) | {"norm.weight": torch.zeros(3)}, state_of(V1))
    table = "layers.0.blocks.0.attn.relative_position_bias_table"
    with pytest.raises(CheckpointError, match=r"has shape \(49, 3\), the model's .* has \(49, 2\)"):
        run(state_of(V1) | {table: torch.zeros(49, 3)}, state_of(V1))


def test_two_sources_for_one_key_are_an_error():
    source = state_of(V2)
    name = "layers.0.blocks.0.attn.cpb_mlp.0.bias"
    source[name.replace("cpb_mlp", "rpe_mlp")] = source[name]
    with pytest.raises(CheckpointError, match="two of its keys"):
        run(source, state_of(V2))


def test_half_precision_weights_are_cast_and_say_so():
    source = {name: tensor.half() for name, tensor in head(3).items()}
    placed, report = run(source, head(3))
    assert placed["head.bias"].dtype == torch.float32
    assert {line.reason for line in report.converted} == {"cast from float16 to float32"}


def test_a_failed_load_leaves_the_model_alone(tmp_path):
    model = create_model(V1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_safetensors(tmp_path / "w.safetensors", {"norm.weight": torch.zeros(64)})
    with pytest.raises(CheckpointError, match=r"w\.safetensors lacks"):
        load_weights(model, tmp_path / "w.safetensors")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_any_module_can_be_filled(tmp_path):
    save_safetensors(tmp_path / "w.safetensors", {"weight": torch.ones(2, 2), "bias": torch.ones(2)})
    model = nn.Linear(2, 2)
    report = load_weights(model, tmp_path / "w.safetensors")
    assert model.weight.eq(1).all() and len(report.copied) == 2
