"""Pure fp16: half-precision parameters, fp32 masters in the optimizer, fp32 where half would not do (Apex's O2)."""

import copy

import numpy as np
import pytest
import torch

from swin_scale.checkpoint import Checkpoint
from swin_scale.engine.engine import DTYPES
from swin_scale.engine.losses import soft_target_cross_entropy
from swin_scale.models import attention as attention_module
from swin_scale.models import create_model
from swin_scale.models.layers import LayerNorm
from tests.engine.test_engine import BATCH, batch_of, local_state, make_config, make_engine, proof, save_step, weights
from tests.spawn import spawn_dist

STEPS, SAVED, OVERFLOW, WINDOW = 20, 10, 3, 8
SCALES = (65536.0,) * 4 + (32768.0,) * 9 + (65536.0,) * 7
"""Halved by the overflow, doubled after eight steps without one, which the save at step 10 lies among."""


@pytest.mark.parametrize(
    ("precision", "stage", "tolerance"), [("fp16", 1, 5e-4), proof("fp16", 3, 5e-4), proof("bf16", 1, 5e-3)]
)
def test_a_half_precision_run_follows_fp32(tmp_path, precision, stage, tolerance):
    """While the loss falls from 2.3 to 0.9, with an overflow on the last rank alone, on both; bit-equal after a resume.

    DeepSpeed divides gradients by a scale that it has just doubled; left to it, fp16 would be 3e-3 off after that.
    """
    optim = {"lr": 3e-3, "ema_decay": 0.9}
    [expected, _] = spawn_dist(2, whole_case, make_config(optim=optim))
    expected_losses, expected_norms, *_ = zip(*expected)
    config = make_config(engine={"precision": precision, "zero_stage": stage}, optim=optim)
    for steps, resumed, before, after, dtypes in spawn_dist(2, halves_case, config, tmp_path):
        losses, norms, skipped, scales = zip(*steps)
        assert losses == pytest.approx(expected_losses, abs=tolerance, nan_ok=True)
        assert norms == pytest.approx(expected_norms, rel=100 * tolerance)
        assert losses[-1] < losses[0] / 2
        assert skipped == tuple(step == OVERFLOW for step in range(STEPS))
        assert scales == (SCALES if precision == "fp16" else (1.0,) * STEPS)
        assert steps[SAVED:] == resumed
        assert before.keys() == after.keys()
        assert all(np.array_equal(value, after[name]) for name, value in before.items())
        assert dtypes == ({str(DTYPES[precision])}, {"torch.float32"})
    with Checkpoint.open(tmp_path / f"step_{SAVED:08d}") as checkpoint:
        masters = checkpoint.load_full("master")
    assert {value.dtype for value in masters.values()} == {torch.float32}
    assert any(not torch.equal(value, value.to(DTYPES[precision]).float()) for value in masters.values())


def whole_case(dist, config):
    engine, plan = make_engine(dist, config)
    return learn(engine, plan, dist, 0, STEPS)


def halves_case(dist, config, root):
    from swin_scale.engine import ds_config

    ds_config.FP16_SCALE_WINDOW = WINDOW
    engine, plan = make_engine(dist, config)
    losses = learn(engine, plan, dist, 0, SAVED)
    save_step(engine, dist, root, SAVED)
    losses += learn(engine, plan, dist, SAVED, STEPS)
    fresh, _ = make_engine(dist, config, seed=1)
    with Checkpoint.open(root / f"step_{SAVED:08d}") as checkpoint:
        fresh.load(checkpoint, checkpoint.state)
    resumed = learn(fresh, plan, dist, SAVED, STEPS)
    states = [{**weights(e), **local_state(e)} for e in (engine, fresh)]
    of_model = {str(p.dtype) for p in engine.module.parameters()}
    of_state = {str(fragment.data.dtype) for fragment in engine.local_fragments()}
    return losses, resumed, *states, (of_model, of_state)


def learn(engine, plan, dist, first, last):
    """Steps on one batch, which the model learns by heart: (loss, norm, skipped, scale) of each."""
    results = []
    for step in range(first, last):
        poison = (0, BATCH - 1) if step == OVERFLOW else None
        result = engine.train_step(step, *batch_of(0, plan, dist, engine, poison=poison))
        results.append((float(result.loss), float(result.grad_norm), result.skipped, result.loss_scale))
    return results


V1, V2 = "swin_nano_patch4_window4_32", "swinv2_nano_patch4_window4_32"
COSINE = {"moe": {"router": "cosine"}}


def half_and_twin(name, **overrides):
    """A model in fp16 and one in fp32 with the very same values, which fp16 would get visibly wrong."""
    model = create_model(name, **overrides)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
            if "logit_scale" in key or "temperature" in key:
                parameter.fill_(4.6)
    model = model.half().eval()
    return model, copy.deepcopy(model).float()


@pytest.mark.parametrize("name", [V1, V2, "swin_moe_nano_patch4_window4_32", "swinv2_moe_nano_patch4_window4_32"])
def test_scale_and_bias_of_attention_are_those_of_the_upcast_weights(name, monkeypatch):
    """Bit for bit: computed in fp32 after the cast, never cast after a computation in fp16."""
    seen = []
    compute = attention_module.window_attention

    def spy(qkv, scale, bias, *args, **options):
        seen.append((qkv.dtype, scale.detach(), bias.detach()))
        return compute(qkv, scale, bias, *args, **options)

    monkeypatch.setattr(attention_module, "window_attention", spy)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    half, twin = half_and_twin(name)
    half(images.half())
    count = len(seen)
    twin(images)
    assert count == len(seen) - count == sum(half.variant.depths)
    for (low, scale, bias), (high, expected_scale, expected_bias) in zip(seen[:count], seen[count:], strict=True):
        assert (low, high) == (torch.float16, torch.float32)
        assert scale.dtype == bias.dtype == torch.float32
        assert torch.equal(scale, expected_scale) and torch.equal(bias, expected_bias)


@pytest.mark.parametrize("router", ["linear", "cosine"])
def test_gates_compute_in_fp32(router):
    half, twin = half_and_twin("swin_moe_nano_patch4_window4_32", moe={"router": router})
    [*gates], [*twins] = ([m for m in model.modules() if type(m).__name__ == "Router"] for model in (half, twin))
    assert gates
    generator = torch.Generator().manual_seed(2)
    for gate, other in zip(gates, twins, strict=True):
        width = (gate.wg if router == "linear" else gate.cosine_projector).in_features
        x = torch.randn(64, width, generator=generator).half()
        logits = gate.logits(x)
        assert logits.dtype == torch.float32
        assert torch.equal(logits, other.logits(x.float()))


def test_losses_compute_in_fp32():
    generator = torch.Generator().manual_seed(3)
    logits = (20 * torch.randn(16, 1000, generator=generator)).half()
    targets = torch.rand(16, 1000, generator=generator).softmax(1)
    losses = soft_target_cross_entropy(logits, targets)
    assert losses.dtype == torch.float32
    assert torch.equal(losses, soft_target_cross_entropy(logits.float(), targets))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_take_their_statistics_in_fp32(dtype):
    """Rows whose mean is a thousand times their spread: one rounding of the output is all the error there is."""
    generator = torch.Generator().manual_seed(4)
    norm = LayerNorm(96)
    with torch.no_grad():
        norm.weight.add_(torch.randn(96, generator=generator))
        norm.bias.add_(torch.randn(96, generator=generator))
    norm = norm.to(dtype)
    x = (torch.tensor([1.0, 100.0, 3e4])[:, None] + torch.randn(3, 96, generator=generator) * 30).to(dtype)
    y, expected = norm(x), copy.deepcopy(norm).double()(x.double())
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), expected, rtol=eps / 2 + 1e-4, atol=eps / 4)
