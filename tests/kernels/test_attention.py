"""Forward of the fused window attention under Triton's interpreter, and the operator around it.

Memory that no one has written reads as NaN here (`interpreted`). The error bar is torch's own error in the same dtype,
twice (`precision`).
"""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from swin_scale.kernels import attention, reference, tuning
from swin_scale.kernels.attention import FUSED_ATTENTION_OP, fused_window_attention
from tests.kernels.interpreter import interpreted  # noqa: F401
from tests.kernels.precision import assert_at_most_twice

pytestmark = pytest.mark.usefixtures("interpreted")

SEED = 0x7EDC_BA98_0123_4567


def draw(window, shift, dtype=torch.float32, *, maps=(2, 1), batch=1, heads=2, head_dim=16, cosine=True, tau=10.0):
    """(qkv, scale, bias) of a map of `maps` windows, as rounded to `dtype`; scale and bias in fp32."""
    generator = torch.Generator().manual_seed(window[0] * 100 + window[1] * 10 + shift[0])
    N = window[0] * window[1]
    qkv = torch.randn(batch, window[0] * maps[0], window[1] * maps[1], 3 * heads * head_dim, generator=generator)
    scale = torch.rand(heads, 1, 1, generator=generator).add(0.5).mul(tau if cosine else head_dim**-0.5)
    bias = torch.randn(heads, N, N, generator=generator)
    return qkv.to(dtype), scale.to(dtype).float(), bias.to(dtype).float()


def check(qkv, scale, bias, *rest, dropout=0.0):
    """The error is at most twice that of the definition in the dtype of `qkv` throughout; returns the output."""
    seed = torch.tensor(SEED)
    out = fused_window_attention(qkv, scale, bias, *rest, dropout=dropout, seed=seed)
    own = [x.to(qkv.dtype) for x in (qkv, scale, bias)]
    torchs = reference.window_attention(*own, *rest, dropout=dropout, seed=seed)
    assert_at_most_twice([out], [torchs], [exact(qkv, scale, bias, *rest, dropout=dropout, seed=seed)])
    return out


def exact(qkv, scale, bias, *rest, **kwargs):
    """The definition in fp64."""
    return reference.window_attention(qkv.double(), scale.double(), bias.double(), *rest, **kwargs)


def half(window):
    return (window[0] // 2, window[1] // 2)


SIDES = [4, 6, 7, 8, 10, 12, 16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("side", SIDES)
def test_error_is_at_most_twice_torchs(side, dtype):
    """Shifted on a map that is not square; dot products in turn with cosine."""
    cosine = (side + (dtype == torch.float16)) % 2 == 0
    check(*draw((side, side), half((side, side)), dtype, cosine=cosine), (side, side), half((side, side)), cosine)


@pytest.mark.proof
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("cosine", [True, False], ids=["cosine", "dot"])
@pytest.mark.parametrize("shifted", [True, False], ids=["shifted", "plain"])
@pytest.mark.parametrize("side", [*SIDES, 5, 14, 20, 24, 32])
def test_error_over_the_whole_grid(side, shifted, cosine, dtype):
    window, shift = (side, side), half((side, side)) if shifted else (0, 0)
    heads = 2 if side < 20 else 1
    check(*draw(window, shift, dtype, maps=(1, 2), heads=heads, cosine=cosine), window, shift, cosine)


@pytest.mark.parametrize(
    ("window", "shift"), [((4, 8), (2, 4)), ((8, 4), (0, 2)), ((7, 3), (3, 0)), ((6, 12), (3, 0)), ((16, 8), (0, 4))]
)
def test_rectangular_windows_and_shifts_along_one_axis(window, shift):
    check(*draw(window, shift, maps=(2, 2) if math.prod(window) <= 64 else (1, 2)), window, shift, True)


@pytest.mark.parametrize("head_dim", [16, 24, 48, 96, 128])
@pytest.mark.parametrize("window", [(4, 4), (9, 8)])
def test_heads_of_any_width(window, head_dim):
    check(*draw(window, (2, 2), torch.float16, head_dim=head_dim, heads=3, maps=(1, 1)), window, (0, 0), True)


@pytest.mark.parametrize(("window", "maps"), [((4, 4), (2, 1)), ((8, 16), (1, 1))])
def test_dropout_drops_the_very_entries_of_the_definition(window, maps):
    """Images, windows and heads more than one, for every word of the counter; the seed has bits in both halves."""
    args, rest = draw(window, half(window), maps=maps, batch=2), (window, half(window), True)
    out = check(*args, *rest, dropout=0.3)
    if math.prod(window) == 16:
        for seed in (SEED + 1, SEED + (1 << 40)):
            other = fused_window_attention(*args, *rest, dropout=0.3, seed=torch.tensor(seed))
            assert not torch.allclose(out, other, atol=1e-2)


@pytest.mark.parametrize("rate", [0.0, 2**-32, 0.5, 0.999])
def test_dropout_of_rates_at_the_ends(rate):
    """The threshold of the smallest rate is 1; from 0.5 on it does not fit 31 bits."""
    check(*draw((4, 4), (0, 0), maps=(1, 1)), (4, 4), (0, 0), True, dropout=rate)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("window", [(4, 4), (9, 8)])
def test_rows_of_no_length_and_nearly_none(window, dtype):
    """Against torch's error on ordinary rows: in fp16 it makes NaN of rows of zeros."""
    args, rest = draw(window, (0, 0), dtype, maps=(1, 1)), (window, (0, 0), True)
    usual = (reference.window_attention(*(x.to(dtype) for x in args), *rest) - exact(*args, *rest)).abs().max()
    for row, length in enumerate((0.0, 1e-7, 1e-5)):
        args[0][0, row, 0] = args[0][0, row, 1] * length
    out = fused_window_attention(*args, *rest)
    assert float((out - exact(*args, *rest)).abs().max()) <= 2 * float(usual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("window", [(7, 7), (10, 8)])
def test_large_logits(window, dtype):
    """tau = 100, the largest SwinV2 allows, biases up to 16, seams: logits from -216 to 116."""
    qkv, scale, bias = draw(window, half(window), dtype)
    check(qkv, scale.fill_(100.0), (bias * 5).clamp(-16, 16), window, half(window), True)


def test_seams_mask_by_adding_100_and_no_more():
    """Logits across a seam that are 100 higher weigh as much as those inside: the mask is no minus infinity."""
    qkv, scale, bias = draw((4, 4), (2, 2), heads=1, maps=(1, 1))
    qkv[..., :32] = torch.nn.functional.normalize(qkv[..., :32], dim=-1)
    regions = reference.shift_regions((4, 4), (4, 4), (2, 2))[0]
    bias = torch.where(regions[:, None] == regions[None, :], 0.0, 100.0)[None]
    out = fused_window_attention(qkv, scale, bias, (4, 4), (2, 2), True)
    unmasked = fused_window_attention(qkv.roll((-2, -2), (1, 2)), scale, torch.zeros_like(bias), (4, 4), (0, 0), True)
    assert torch.allclose(out.roll((-2, -2), (1, 2)), unmasked, atol=1e-5)


@pytest.mark.parametrize("cosine", [True, False], ids=["cosine", "dot"])
def test_log_sum_exp_of_large_windows(cosine):
    window, shift = (9, 8), (4, 4)
    qkv, scale, bias = draw(window, shift, cosine=cosine, batch=2, maps=(1, 1))
    _, log_sum = torch.ops.swin_scale.fused_window_attention(
        qkv, scale, bias, list(window), list(shift), cosine, 0.0, None, True
    )
    q, k, _ = reference.window_partition(qkv, window, shift).double().view(2, 72, 3, 2, 16).permute(2, 0, 3, 1, 4)
    if cosine:
        q, k = reference.unit_rows(q), reference.unit_rows(k)
    logits = (q * scale) @ k.transpose(-2, -1) + bias
    logits += reference.shift_mask(reference.shift_regions((9, 8), window, shift))[0]
    assert log_sum.shape == (2, 2, 72) and log_sum.dtype == torch.float32
    assert torch.allclose(log_sum.double(), logits.logsumexp(-1) / math.log(2), atol=1e-5)


@pytest.mark.parametrize("window", [(4, 4), (8, 16)])
def test_how_windows_are_shared_out_changes_no_bit(monkeypatch, window):
    args = *draw(window, (2, 2), maps=(2, 1), batch=2, heads=1), window, (2, 2), True
    outputs = []
    for count in (1, 3, 4):
        monkeypatch.setattr(tuning, "window_slots", lambda *_, count=count, **__: count)
        monkeypatch.setattr(tuning, "window_group", lambda *_, count=count, **__: count)
        outputs.append(fused_window_attention(*args))
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    window=st.tuples(st.integers(2, 12), st.integers(2, 12)),
    maps=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    part=st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)),
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([16, 24, 32, 40]),
    cosine=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_drawn_shapes(window, maps, part, heads, head_dim, cosine, dtype):
    shift = (int(window[0] * part[0]), int(window[1] * part[1]))
    args = draw(window, shift, dtype, maps=maps, heads=heads, head_dim=head_dim, cosine=cosine)
    check(*args, window, shift, cosine)


def test_takes_inputs_that_are_not_contiguous():
    qkv, scale, bias = draw((4, 4), (0, 0), maps=(1, 1))
    args = (4, 4), (0, 0), True
    expected = fused_window_attention(qkv, scale, bias, *args)
    strided = qkv.transpose(1, 2).contiguous().transpose(1, 2), scale.expand(2, 1, 1), bias.mT.contiguous().mT
    assert not strided[0].is_contiguous()
    assert torch.equal(fused_window_attention(*strided, *args), expected)


@pytest.mark.parametrize(("window", "dropout"), [((4, 4), 0.1), ((8, 16), 0.0)])
def test_registered_as_an_operator(window, dropout):
    args = draw(window, (2, 2), maps=(1, 1), heads=1)
    inputs = *(x.requires_grad_() for x in args), list(window), [2, 2], True, dropout, torch.tensor(SEED), True
    torch.library.opcheck(FUSED_ATTENTION_OP, inputs, atol=1e-5, rtol=1e-4)


def test_compiles_without_a_break():
    args = [x.requires_grad_() for x in draw((4, 4), (2, 2))]

    def model(qkv, scale, bias):
        return fused_window_attention(qkv * 2, scale, bias, (4, 4), (2, 2), True).square().sum()

    expected = torch.autograd.grad(model(*args), args)
    got = torch.autograd.grad(torch.compile(model, fullgraph=True, backend="aot_eager")(*args), args)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, expected, strict=True))


def test_selective_checkpointing_runs_forward_once(monkeypatch):
    """What the operator returned, log-sum-exp included, is kept: backward launches no forward."""
    launches = []
    launch = attention.launch_forward
    monkeypatch.setattr(attention, "launch_forward", lambda *args: launches.append(1) or launch(*args))
    args = [x.requires_grad_() for x in draw((8, 16), (2, 2), maps=(1, 1), heads=1)]

    def block(qkv, scale, bias):
        return fused_window_attention(qkv * 2, scale, bias, (8, 16), (2, 2), True).square()

    def keep(_, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op == FUSED_ATTENTION_OP else CheckpointPolicy.PREFER_RECOMPUTE

    def run(**kwargs):
        launches.clear()
        return torch.autograd.grad(checkpoint(block, *args, use_reentrant=False, **kwargs).sum(), args)

    recomputed = run()
    assert len(launches) == 2
    kept = run(context_fn=lambda: create_selective_checkpoint_contexts(keep))
    assert len(launches) == 1
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))


def test_keeps_nothing_of_window_squared_size_for_backward():
    args = [x.requires_grad_() for x in draw((4, 4), (2, 2))]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        out = fused_window_attention(*args, (4, 4), (2, 2), True)
    assert sorted(saved) == sorted([*(x.numel() for x in args), out.numel(), 0])


def test_unwritten_memory_is_nan():
    """What the tests of this file rest on."""
    assert torch.empty(3).isnan().all() and torch.zeros(1).new_empty(3).isnan().all()
