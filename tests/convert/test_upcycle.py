"""A dense model becomes one with experts: every expert a copy of its MLP, the gates new."""

import pytest
import torch

from swin_scale import create_model, load_weights
from swin_scale.convert import convert
from swin_scale.errors import CheckpointError, UserError
from swin_scale.moe.layer import MoEMlp
from tests.convert.moe_files import MOE, filled
from tests.convert.test_ranks import group

V1, V2, V2_MOE = "swin_nano_patch4_window4_32", "swinv2_nano_patch4_window4_32", "swinv2_moe_nano_patch4_window4_32"


def dense(family, seed=1):
    return filled(create_model(V2) if family == "swinv2_moe" else create_model(MOE, moe=None), seed)


def sparse(family, **moe):
    has_bias = family == "swinv2_moe"
    values = {"mlp_fc2_bias": has_bias, "moe": {"fc2_bias": has_bias, "capacity_factor": 0.0, **moe}}
    return create_model(V2_MOE if has_bias else MOE, seed=2, **values)


def saved(tmp_path, model):
    torch.save({"model": model.state_dict()}, tmp_path / "dense.pth")
    return tmp_path / "dense.pth"


@pytest.mark.parametrize("family", ["swin_moe", "swinv2_moe"])
@pytest.mark.parametrize("moe", [{"num_experts": 1}, {"num_experts": 4, "top_k": 2, "normalize_gate": True}])
def test_logits_are_the_dense_ones_where_gates_sum_to_one(tmp_path, family, moe):
    before, after = dense(family), sparse(family, **moe)
    report = load_weights(after, saved(tmp_path, before), upcycle=True)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(after.eval()(x)[0], before.eval()(x), rtol=0, atol=1e-5)
    gates = {name for name in after.state_dict() if ".gates." in name}
    biases = {name for name in after.state_dict() if name.endswith("batched_fc2_bias")}
    assert {line.target for line in report.created} == gates | (biases if family == "swin_moe" else set())
    assert {line.target for line in report.converted} | {line.target for line in report.created} == {
        name for name in after.state_dict() if "._moe_layer." in name
    }
    assert "a copy of the dense MLP in each of" in str(report) and "gate: the model's own initialisation" in str(report)


@pytest.mark.parametrize("router", ["linear", "cosine"])
def test_a_block_gives_the_dense_output_times_the_gate(tmp_path, router):
    before, after = dense("swin_moe"), sparse("swin_moe", num_experts=4, router=router)
    load_weights(after, saved(tmp_path, before), upcycle=True)
    x = torch.randn(2, 8, 8, 32, generator=torch.Generator().manual_seed(0))
    mlp, moe = before.eval().layers[0].blocks[1].mlp, after.eval().layers[0].blocks[1].mlp
    with torch.no_grad():
        gate = moe._moe_layer.gates[0].logits(x.flatten(0, 2)).softmax(1).amax(1).view(2, 8, 8, 1)
        torch.testing.assert_close(moe(x)[0], gate * mlp(x), rtol=0, atol=1e-6)
    assert gate.min() < 0.9  # the case is not the one of a single expert


def test_a_process_fills_its_experts_only(tmp_path):
    before, whole = dense("swin_moe"), sparse("swin_moe")
    own = type(whole)(whole.variant, 2, lambda *a: MoEMlp(*a, ep_group=group(3, 4)))
    load_weights(own, saved(tmp_path, before), upcycle=True)
    experts = own.layers[1].blocks[1].mlp.experts
    mlp = before.layers[1].blocks[1].mlp
    assert experts.batched_fc1_w.shape == (2, 256, 64)
    assert all(torch.equal(weight, mlp.fc2.weight.t()) for weight in experts.batched_fc2_w)


def test_upcycling_is_asked_for(tmp_path):
    path, model = saved(tmp_path, dense("swin_moe")), sparse("swin_moe")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"dense layers.0.blocks.1.mlp.fc1.weight, .*set init.upcycle=true"):
        load_weights(model, path)
    with pytest.raises(UserError, match="fill a model without experts"):
        load_weights(dense("swin_moe"), path, upcycle=True)
    torch.save({"model": model.state_dict()}, tmp_path / "sparse.pth")
    with pytest.raises(UserError, match="has experts itself"):
        load_weights(model, tmp_path / "sparse.pth", upcycle=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_has_no_place_is_named(tmp_path):
    path = saved(tmp_path, dense("swinv2_moe"))
    with pytest.raises(CheckpointError, match=r"create it with mlp_fc2_bias=True and moe\.fc2_bias=True"):
        load_weights(create_model(V2_MOE), path, upcycle=True)
    with pytest.raises(CheckpointError, match="tables of position biases"):
        load_weights(sparse("swin_moe"), saved(tmp_path, create_model(V1)), upcycle=True)


def test_from_our_own_files(tmp_path):
    before = dense("swinv2_moe")
    convert(saved(tmp_path, before), tmp_path / "w.safetensors", to="safetensors", model=V2)
    after = sparse("swinv2_moe", num_experts=2)
    load_weights(after, tmp_path / "w.safetensors", upcycle=True)
    assert torch.equal(
        after.layers[0].blocks[1].mlp.experts.batched_fc1_bias[1], before.layers[0].blocks[1].mlp.fc1.bias
    )
