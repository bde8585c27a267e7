"""Models with experts: numbers of the official code, identities, what comes back, checkpointing, overrides, ranks."""

import importlib.util
import json

import numpy as np
import pytest
import torch
import torch.distributed as dist

from swin_scale.errors import UserError
from swin_scale.models import create_model, variant
from swin_scale.models import layers as shared_layers
from swin_scale.models import swin as swin_module
from swin_scale.moe.config import MoEConfig
from swin_scale.moe.stats import RoutingStats
from tests.models.golden import fill, image
from tests.models.test_swin import SMALL, assert_golden
from tests.spawn import spawn_dist

V1, V2 = "swin_moe_nano_patch4_window4_32", "swinv2_moe_nano_patch4_window4_32"
FAMILIES = [V1, V2]
BLOCKS = ["layers.0.blocks.1", "layers.1.blocks.1"]
DROPLESS = {"capacity_factor": 0, "gate_noise": 0.0}


def randomised(model, seed=3, scale=0.1):
    """`model` with every parameter moved, so that experts differ, V2's branches are open, and routing is uneven."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                big = 3 * scale if "gates" in name else scale
                p.add_(torch.randn(p.shape, generator=generator).to(p.dtype), alpha=big)
    return model


def pixels(count=4, seed=0, dtype=torch.float32):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed)).to(dtype)


# The official model with Tutel on one process, filled as in golden.py (frozen biases left at zero), in float64 but for
# the gate, which computes in fp32: (top_k, factor, balance, training) -> logits, and the auxiliary loss.
GOLDEN = {
    ("linear", 1, 1.25, "load_importance", False): (
        *(0.1062461, 0.9311458, (1.693037, -0.699511, -1.065141, -0.979823, -0.570063)),
        *(0.00618161, [10, 3, 3]),
    ),
    ("linear", 1, 0.5, "load_importance", False): (
        *(0.0821589, 0.8702223, (1.335055, -0.809608, -1.13957, -0.93902, -0.294566)),
        *(0.00652227, [22, 5, 5]),
    ),
    ("cosine", 1, 1.25, "load_importance", False): (
        *(0.073244, 0.8735511, (0.886011, -0.698685, -1.514366, -0.907961, -0.234538)),
        *(0.00672149, [14, 4, 2]),
    ),
    ("linear", 2, 1.25, "gshard", True): (
        *(0.1238705, 0.9957662, (1.716231, -0.913236, -0.76909, -0.739551, -0.247581)),
        *(0.04160182, [12, 3, 4]),
    ),
}


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: "-".join(map(str, case)))
def test_golden_logits_and_auxiliary_loss(case):
    router, top_k, factor, balance, training = case
    mean, std, first, aux, dropped = GOLDEN[case]
    moe = {
        "num_experts": 4,
        "top_k": top_k,
        "router": router,
        "cosine_dim": 8,
        "capacity_factor": factor,
        "eval_capacity_factor": factor,
        "balance": balance,
        "gate_noise": 0.0 if training else 1.0,
        "normalize_gate": top_k > 1,
        "fc2_bias": training,
    }
    model = fill(create_model(V1, **SMALL, moe=moe, moe_blocks=((), (), (1,), (0, 1)), mlp_fc2_bias=training))
    for p in model.parameters():
        p.data.mul_(p.requires_grad)
    logits, total, stats = model.train(training)(image(2, 3, 64, 64), stats=True)
    assert_golden(logits, mean, std, first)
    assert total.item() == pytest.approx(aux, abs=1e-7)
    assert list(stats) == ["layers.2.blocks.1", "layers.3.blocks.0", "layers.3.blocks.1"]
    assert [int(s.dropped) for s in stats.values()] == dropped


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_model_returns(name):
    model = randomised(create_model(name, moe={"gate_noise": 0.0, "z_weight": 0.5}))
    x = pixels()
    logits, aux, stats = model(x, stats=True)
    again = model(x)
    assert len(again) == 2 and torch.equal(again[0], logits) and torch.equal(again[1], aux)
    assert logits.shape == (4, 10) and aux.shape == () and aux.dtype == torch.float32
    assert list(stats) == BLOCKS and all(isinstance(s, RoutingStats) for s in stats.values())
    tokens = [4 * 64, 4 * 16]
    assert [s.tokens for s in stats.values()] == tokens
    config = model.variant.moe
    by_hand = sum(config.aux_weight * s.balance_loss + config.z_weight * s.z / s.tokens for s in stats.values())
    assert aux.item() == pytest.approx(by_hand.item(), rel=1e-5) and aux > 0
    assert torch.equal(model.head(model.forward_pooled(x)), logits)
    assert [tuple(y.shape) for y in model.forward_intermediates(x)] == [(4, 32, 8, 8), (4, 64, 4, 4)]


def test_dense_models_return_logits_alone_and_have_no_stats():
    x = pixels(1)
    for model in (create_model(V1, moe=None), create_model("swinv2_nano_patch4_window4_32")):
        assert model(x).shape == (1, 10)
        with pytest.raises(UserError, match="stats: a dense"):
            model(x, stats=True)


def as_dense(name, model):
    """The dense model with the weights of `model`, whose mixtures are of one expert."""
    moe_free = create_model(name, moe=None, mlp_fc2_bias=True)
    state = {}
    for key, value in model.state_dict().items():
        for theirs, ours in (
            ("_moe_layer.experts.batched_fc1_w", "fc1.weight"),
            ("_moe_layer.experts.batched_fc1_bias", "fc1.bias"),
            ("_moe_layer.experts.batched_fc2_w", "fc2.weight"),
            ("_moe_layer.experts.batched_fc2_bias", "fc2.bias"),
        ):
            if key.endswith(theirs):
                key, value = key.replace(theirs, ours), value[0].t() if ours == "fc2.weight" else value[0]
        if "gates" not in key:
            state[key] = value
    moe_free.load_state_dict(state)
    return moe_free


@pytest.mark.parametrize("name", FAMILIES)
def test_one_expert_is_the_dense_model(name):
    mixture = create_model(name, mlp_fc2_bias=True, moe={"num_experts": 1, "capacity_factor": 0, "fc2_bias": True})
    dense = as_dense(name, randomised(mixture))
    x = pixels()
    logits, aux = mixture(x)
    expected = dense(x)
    assert torch.allclose(logits, expected, atol=1e-5) and aux.item() == 0
    logits.square().sum().backward()
    expected.square().sum().backward()
    grads = dict(mixture.named_parameters())
    for key, p in dense.named_parameters():
        if key in grads:
            assert torch.allclose(grads[key].grad, p.grad, rtol=1e-4, atol=1e-4), key


@pytest.mark.parametrize("name", FAMILIES)
def test_renaming_experts_changes_nothing(name):
    model = randomised(create_model(name)).eval()
    x = pixels()
    expected, aux = model(x)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(order, torch.arange(8))
    with torch.no_grad():
        for key, p in model.named_parameters():
            if ".experts." in key or "wg" in key:
                p.copy_(p[order].clone())
    got, same = model(x)
    assert torch.allclose(got, expected, atol=1e-5) and torch.allclose(same, aux)


@pytest.mark.parametrize("name", FAMILIES)
def test_in_eval_an_image_does_not_depend_on_its_batch(name):
    model = randomised(create_model(name)).eval()
    x = pixels(6)
    together = model(x)[0]
    assert torch.allclose(model(x.flip(0))[0].flip(0), together, atol=1e-5)
    assert torch.allclose(torch.cat([model(one)[0] for one in x.split(1)]), together, atol=1e-5)
    # With a capacity, as the official code evaluates, it does.
    limited = randomised(create_model(name, moe={"eval_capacity_factor": 0.5})).eval()
    assert not torch.allclose(limited(x)[0][:1], limited(x[:1])[0], atol=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_dropped_token_takes_the_residual_path_alone(name):
    """Also under V2, where a norm of the sum would give it the norm's bias."""
    model = randomised(create_model(name, moe={"eval_capacity_factor": 1e-3})).eval()
    block = model.layers[0].blocks[1]
    x = torch.randn(2, 8, 8, 32)
    with torch.no_grad():
        y, _, stats = block(x)
        assert not stats.kept_TK.any()
        assert torch.equal(y, block._attend(x, block.attn.position_bias())[0])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_top_1_gate_learns_from_the_task(name):
    """V2 norms after a branch: after the gate's weight, the norm would take it out again and leave no gradient."""
    model = randomised(create_model(name, moe=DROPLESS | {"aux_weight": 0.0}))
    logits, aux = model(pixels())
    assert aux.item() == 0
    logits.square().sum().backward()
    for block in BLOCKS:
        mlp = model.get_submodule(block).mlp
        gate = mlp._moe_layer.gates[0].wg.weight.grad.norm() / mlp._moe_layer.gates[0].wg.weight.norm()
        experts = mlp.experts.batched_fc1_w.grad.norm() / mlp.experts.batched_fc1_w.norm()
        assert gate > 0.05 * experts


def outcome(model, x):
    """Everything a training pass gives, with the same random numbers each time."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    logits, aux, stats = model.train()(x, stats=True)
    (logits.square().sum() + 100 * aux).backward()
    routing = [t for s in stats.values() for t in (s.expert_TK, s.kept_TK)]
    return [logits, aux, *routing, *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("mode", ["block", "selective"])
@pytest.mark.parametrize("name", FAMILIES)
def test_checkpointing_changes_no_bit(name, mode):
    """With gate noise, dropout in experts and outside, drop path, and capacities that drop tokens by priority."""
    options = {"drop_path_rate": 0.5, "drop_rate": 0.1, "moe": {"drop": 0.3, "top_k": 2, "capacity_factor": 0.5}}
    model = randomised(create_model(name, **options))
    saving = create_model(name, activation_checkpointing=mode, **options)
    saving.load_state_dict(model.state_dict())
    x = pixels(8)
    expected, got = outcome(model, x), outcome(saving, x)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert not expected[3].all(), "nothing was dropped"


# Selective checkpointing may notice first: operations differ where an expert got its first token or lost its last.
NOTICED = "recomputed block chose other experts|backward but not found in storage"


@pytest.mark.parametrize("mode", ["block", "selective"])
def test_another_routing_in_the_recompute_is_noticed(monkeypatch, mode):
    model = randomised(create_model(V1, activation_checkpointing=mode, moe=DROPLESS))
    logits, _ = model(pixels())
    with torch.no_grad():
        for block in BLOCKS:
            model.get_submodule(block).mlp._moe_layer.gates[0].wg.weight.data.neg_()
    with pytest.raises(RuntimeError, match=NOTICED):
        logits.sum().backward()
    # And where random numbers are not restored.
    plain = shared_layers.checkpoint
    monkeypatch.setattr(shared_layers, "checkpoint", lambda *a, **k: plain(*a, preserve_rng_state=False, **k))
    noisy = randomised(create_model(V1, activation_checkpointing=mode, moe={"gate_noise": 20.0, "capacity_factor": 0}))
    with pytest.raises(RuntimeError, match=NOTICED):
        noisy(pixels())[0].sum().backward()


@pytest.mark.parametrize("name", FAMILIES)
def test_meta_to_empty_init_equals_direct_construction(name):
    before = torch.get_rng_state()
    direct = create_model(name, seed=4, moe={"router": "cosine"})
    with torch.device("meta"):
        model = create_model(name, moe={"router": "cosine"})
    assert torch.equal(torch.get_rng_state(), before), "building draws nothing from the global generator"
    model = model.to_empty(device="cpu")
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.fill_(77)
    model.init_weights(4)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), direct.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), direct.buffers(), strict=True))


def test_initial_values_follow_the_official_rules():
    model = create_model(V1, init_std=0.005, moe={"router": "cosine"})
    mlp = "layers.1.blocks.1.mlp._moe_layer."
    state = model.state_dict()
    std = {key: state[key].std().item() for key in state if state[key].ndim > 1}
    for key in (mlp + "experts.batched_fc1_w", mlp + "experts.batched_fc2_w", mlp + "gates.0.cosine_projector.weight"):
        assert std[key] == pytest.approx(0.005, rel=0.03), key
    assert std["layers.0.blocks.0.attn.cpb_mlp.0.weight"] == pytest.approx(0.005, rel=0.1)
    assert std[mlp + "gates.0.sim_matrix"] == pytest.approx(0.01, rel=0.1)
    assert state[mlp + "gates.0.temperature"].item() == pytest.approx(np.log(2))
    assert (state["layers.1.blocks.1.norm2.weight"] == 1).all(), "no norm of V1 starts at zero"
    # The second biases of the published models: left out where dense, frozen at zero in experts.
    assert "layers.0.blocks.0.mlp.fc2.bias" not in state
    frozen = [key for key, p in model.named_parameters() if not p.requires_grad]
    assert frozen == [f"{block}.mlp._moe_layer.experts.batched_fc2_bias" for block in BLOCKS]
    assert not any(state[key].any() for key in frozen)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_half_precision_has_an_fp32_loss_and_finite_gradients(name, dtype):
    model = randomised(create_model(name)).to(dtype)
    logits, aux = model(pixels(dtype=dtype))
    assert logits.dtype == dtype and aux.dtype == torch.float32
    (logits.float().square().sum() + aux).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


def test_overrides_of_the_mixture():
    v = variant(V1, moe={"num_experts": 4, "top_k": 2})
    assert v.moe == MoEConfig(num_experts=4, top_k=2, drop=0.0, fc2_bias=False)
    assert variant(V1, moe=MoEConfig(num_experts=2)).moe == MoEConfig(num_experts=2)
    # As a checkpoint's JSON gives them back.
    stored = json.loads(json.dumps({"moe": {"num_experts": 4}, "moe_blocks": ((0, 1), ()), "depths": (2, 2)}))
    assert variant(V2, **stored).moe_blocks == ((0, 1), ())
    assert hash(variant(V2, **stored)) != hash(variant(V2))


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        (V1, {"moe": {"expert": 4}}, "unknown moe override 'expert', did you mean num_experts"),
        (V1, {"moe": {"top_k": 9}}, r"moe.top_k: 9 is not possible; choose 1 to 8"),
        (V1, {"depths": (2, 1)}, r"moe_blocks: \[\[1\], \[1\]\] names a block that stage 1, of 1 blocks"),
        (V1, {"moe_blocks": ((1,),)}, "moe_blocks: .* needs 2 entries"),
        (V1, {"moe_blocks": ((), ())}, "names no block; name one, or set moe to None"),
        (V1, {"init_std": 0.0}, "init_std: 0.0 must be positive"),
        (V1, {"moe_backend": "fairseq"}, "moe.backend: 'fairseq'.*native or tutel"),
        (V2, {"moe_backend": "tutel"}, "moe.backend tutel.*native"),
        ("swinv2_nano_patch4_window4_32", {"moe": MoEConfig(num_experts=2)}, "swinv2 have no experts"),
        (
            "swin_moe_small_patch4_window12_192_densebaseline_22k",
            {"moe": {"top_k": 2}},
            "this model is dense; give num_experts, and moe_blocks",
        ),
    ],
)
def test_refusals_name_the_key_the_value_and_the_fix(name, overrides, message):
    with pytest.raises(UserError, match=message), torch.device("meta"):
        create_model(name, **overrides)


def on_ranks(d, name, mode):
    """A quarter-size model on two ranks that share its experts: this rank's half of the batch, forward and backward."""
    model = randomised_shards(create_model(name, **PARALLEL, activation_checkpointing=mode, ep_group=dist.group.WORLD))
    logits, _, stats = model(pixels(4)[2 * d.rank : 2 * d.rank + 2], stats=True)
    logits.square().sum().backward()
    routed = [s.routed_E.numpy() for s in stats.values()]
    grads = {key: p.grad.numpy() for key, p in model.named_parameters() if p.requires_grad}
    return logits.detach().numpy(), routed, grads, model.layers[1].blocks[1].mlp.experts.first


PARALLEL = {"moe": DROPLESS | {"num_experts": 4, "drop": 0.0}, "seed": 1, "init_std": 0.2}


def randomised_shards(model):
    """Norms of V2 branches opened; all else as initialised, which must not depend on where experts live."""
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "norm" in key and key.endswith("weight"):
                p.fill_(0.5)
    return model


@pytest.mark.parametrize(("name", "mode"), [(V1, "block"), (V2, "selective")])
def test_two_ranks_that_share_experts_equal_one(name, mode):
    model = randomised_shards(create_model(name, **PARALLEL))
    logits, _, stats = model(pixels(4), stats=True)
    logits.square().sum().backward()
    results = spawn_dist(2, on_ranks, name, mode)
    assert np.allclose(np.concatenate([r[0] for r in results]), logits.detach().numpy(), atol=1e-5)
    for i, whole in enumerate(stats.values()):
        assert (sum(r[1][i] for r in results) == whole.routed_E.numpy()).all() and (whole.routed_E > 0).sum() > 1
    assert [r[3] for r in results] == [0, 2]
    for key, p in model.named_parameters():
        if p.requires_grad:
            parts = [r[2][key] for r in results]
            got = np.concatenate(parts) if ".experts." in key else sum(parts)
            assert np.allclose(got, p.grad.numpy(), rtol=1e-4, atol=1e-4), key


@pytest.mark.skipif(importlib.util.find_spec("tutel") is None, reason="Tutel is not installed")
@pytest.mark.parametrize("router", ["linear", "cosine"])
def test_the_tutel_backend_is_the_same_model(router):
    """Same initial values, names, random numbers and results; recomputed blocks too."""
    options = {"seed": 2, "moe": {"router": router, "cosine_dim": 8}, "activation_checkpointing": "block"}
    native, theirs = (create_model(V1, moe_backend=backend, **options) for backend in ("native", "tutel"))
    ours = dict(native.named_parameters())
    assert ours.keys() == dict(theirs.named_parameters()).keys()
    assert all(torch.equal(p, ours[key]) for key, p in theirs.named_parameters())
    theirs.load_state_dict(randomised(native).state_dict(), strict=True)
    results = [outcome(model, pixels())[:2] for model in (native, theirs)]
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    for key, p in theirs.named_parameters():
        if p.requires_grad:
            assert torch.allclose(p.grad, ours[key].grad, rtol=1e-3, atol=1e-3), key


def test_the_kinds_of_attention():
    """Swin-MoE: dot product, keys with a bias, raw position MLP; SwinV2-MoE: as SwinV2."""
    keys = {name: set(create_model(name).layers[0].blocks[0].attn.state_dict()) for name in FAMILIES}
    cpb = {"cpb_mlp.0.weight", "cpb_mlp.0.bias", "cpb_mlp.2.weight"}
    linear = {"qkv.weight", "proj.weight", "proj.bias"}
    assert keys[V1] == cpb | linear | {"qkv.bias"}
    assert keys[V2] == cpb | linear | {"logit_scale", "q_bias", "v_bias"}
    raw, bounded = (
        fill(swin_module.WindowAttention(8, (4, 4), 2, score="dot", position=position))
        for position in ("raw_cpb", "sigmoid_cpb")
    )
    assert torch.allclose(16 * torch.sigmoid(raw.position_bias()), bounded.position_bias())
