"""Backward of the fused window attention under Triton's interpreter.

Memory that no one has written reads as NaN here (`interpreted`): each element of every gradient is written. The error
bar is torch's own error in the same dtype, twice (`check`).
"""

import math

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from swin_scale.kernels import attention_backward, reference, tuning
from swin_scale.kernels.attention import fused_window_attention
from swin_scale.kernels.tuning import Tiles
from tests.kernels import aot
from tests.kernels.interpreter import interpreted  # noqa: F401
from tests.kernels.test_attention import SEED, draw, half

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
PHASES = [Phase.explicit, Phase.generate]
"""No shrinking: an example takes a second."""
pytestmark = pytest.mark.usefixtures("interpreted")


@pytest.fixture
def large_tiles(monkeypatch):
    """Fewer and larger tiles, at least two each way: the interpreter takes its time by calls, not by elements."""
    heuristic = tuning.heuristic

    def tiles(kernel, shape, chip):
        side = min(256, tuning.power_of_two(shape.tokens) // 2)
        return heuristic(kernel, shape) if shape.tokens <= tuning.WHOLE_WINDOW else Tiles(side, side, 4, 2)

    monkeypatch.setattr(tuning, "tiles", tiles)


def upstream(out, dtype):
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(dtype).to(out.dtype)


def gradients(op, inputs, dtype, *rest, **kwargs):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = op(*leaves, *rest, **kwargs)
    return torch.autograd.grad(out, leaves, upstream(out, dtype))


def check(qkv, scale, bias, *rest, dropout=0.0):
    """Every gradient's error, in the mean square, is at most twice that of the definition in the dtype of `qkv`.

    The largest error is that of a few rows whose softmax is close to a tie, by chance: at most four times torch's.
    The gradient of `scale` is one number a head, and its error a draw that is another one on another processor: twelve
    standard deviations of torch's. `test_error_of_the_scales_gradient` has enough of them for twice.
    """
    dtype, kwargs = qkv.dtype, {"dropout": dropout, "seed": torch.tensor(SEED) if dropout else None}
    rows = scale[None].expand(qkv[..., 0].numel() // bias.shape[1], -1, bias.shape[1], 1)
    got = gradients(fused_window_attention, (qkv, scale, bias), dtype, *rest, **kwargs)
    own, exact = (
        gradients(reference.window_attention, [x.to(to) for x in (qkv, rows, bias)], dtype, *rest, **kwargs)
        for to in (dtype, torch.float64)
    )
    assert [g.dtype for g in got] == [dtype, torch.float32, torch.float32]
    for ours, torchs, truth in ((got[0], own[0], exact[0]), (got[2], own[2], exact[2])):
        mine, theirs = (ours.double() - truth).abs(), (torchs.double() - truth).abs()
        assert float(mine.square().mean()) <= 4 * float(theirs.square().mean())
        assert float(mine.max()) <= 4 * float(theirs.max())
    spread = (own[1].double() - exact[1]).square().sum((0, 2)).sqrt().view(scale.shape)
    assert ((got[1] - exact[1].sum((0, 2)).view(scale.shape)).abs() <= 12 * spread).all()


@pytest.mark.parametrize("cosine", [True, False], ids=["cosine", "dot"])
@pytest.mark.parametrize(
    ("side", "heads", "dtype"),
    [(8, 64, torch.float32), (8, 64, torch.float16), pytest.param(12, 256, torch.float32, marks=pytest.mark.proof)],
)
def test_error_of_the_scales_gradient(side, heads, dtype, cosine, large_tiles):
    """In the mean square over many heads at most twice torch's.

    Larger windows take a row's sum of output times its gradient for that of probabilities times theirs, as all that do
    not hold a row at once: one rounding for the whole row, where torch's are as many as its columns. That makes 1.6.
    """
    window, shift = (side, side), half((side, side))
    inputs = draw(window, shift, dtype, maps=(1, 1), heads=heads, cosine=cosine)
    ours = gradients(fused_window_attention, inputs, dtype, window, shift, cosine)[1]
    torchs, truth = (
        gradients(reference.window_attention, [x.to(to) for x in inputs], dtype, window, shift, cosine)[1]
        for to in (dtype, torch.float64)
    )
    mine, theirs = ((x.double() - truth).square().mean().sqrt() for x in (ours, torchs))
    assert float(mine) <= 2 * float(theirs)


SIDES = [4, 6, 7, 8, 10, 12, 16]


@DTYPES
@pytest.mark.parametrize("side", SIDES)
def test_error_is_at_most_twice_torchs(side, dtype, large_tiles):
    """Shifted, on a map that is not square; dot products in turn with cosine."""
    window, shift = (side, side), half((side, side))
    cosine = (side + (dtype == torch.float32)) % 2 == 0
    size = {"maps": (2, 1)} if side <= 8 else {"maps": (1, 1), "heads": 1}
    check(*draw(window, shift, dtype, cosine=cosine, **size), window, shift, cosine)


@pytest.mark.proof
@DTYPES
@pytest.mark.parametrize("cosine", [True, False], ids=["cosine", "dot"])
@pytest.mark.parametrize("shifted", [True, False], ids=["shifted", "plain"])
@pytest.mark.parametrize("side", SIDES)
def test_error_over_the_whole_grid(side, shifted, cosine, dtype, large_tiles):
    window, shift = (side, side), half((side, side)) if shifted else (0, 0)
    size = {"maps": (1, 2)} if side <= 12 else {"maps": (1, 1), "heads": 1}
    check(*draw(window, shift, dtype, cosine=cosine, **size), window, shift, cosine)


@pytest.mark.proof
@pytest.mark.parametrize("cosine", [True, False], ids=["cosine", "dot"])
@pytest.mark.parametrize("side", [24, 32])
def test_error_of_the_largest_windows(side, cosine, large_tiles):
    window, shift = (side, side), half((side, side)) if cosine else (0, 0)
    dtype = torch.float16 if (side == 24) == cosine else torch.float32
    check(*draw(window, shift, dtype, cosine=cosine, heads=1, maps=(1, 1)), window, shift, cosine)


@pytest.mark.proof
@DTYPES
def test_error_with_the_tiles_of_a_gpu(dtype):
    check(*draw((12, 12), (6, 6), dtype, heads=1, maps=(1, 1)), (12, 12), (6, 6), True)


@pytest.mark.parametrize(
    ("window", "shift"), [((4, 8), (2, 4)), ((8, 4), (0, 2)), ((7, 3), (3, 0)), ((6, 12), (3, 0)), ((16, 5), (0, 4))]
)
def test_rectangular_windows_and_shifts_along_one_axis(window, shift, large_tiles):
    size = {"maps": (2, 2)} if math.prod(window) <= 64 else {"maps": (1, 2), "heads": 1}
    check(*draw(window, shift, **size), window, shift, True)


@pytest.mark.parametrize("head_dim", [16, 24, 48, 96, 128])
def test_heads_of_any_width(head_dim):
    check(*draw((4, 4), (2, 2), torch.float16, head_dim=head_dim, heads=3, maps=(1, 1)), (4, 4), (0, 0), True)


@DTYPES
@pytest.mark.parametrize(("window", "maps"), [((4, 4), (2, 1)), ((9, 8), (1, 1))])
def test_dropout_drops_what_forward_dropped(window, maps, dtype, large_tiles):
    """Images, windows and heads more than one, for every word of the counter."""
    heads = 2 if maps == (2, 1) else 1
    check(*draw(window, (2, 2), dtype, maps=maps, batch=2, heads=heads), window, (2, 2), True, dropout=0.3)


@DTYPES
@pytest.mark.parametrize("window", [(4, 4), (9, 8)])
def test_rows_without_direction_have_exactly_no_gradient(window, dtype, large_tiles):
    qkv, scale, bias = draw(window, (0, 0), dtype, heads=1, maps=(1, 1))
    q, k, v = (slice(16 * part, 16 * part + 16) for part in range(3))
    qkv[0, 0, 0, q], qkv[0, 1, 2, k] = 0.0, qkv[0, 1, 2, k] * 1e-7
    qkv[0, 2, 1, q] *= 1e-3
    rest = window, (0, 0), True
    got, _, d_bias = gradients(fused_window_attention, (qkv, scale, bias), dtype, *rest)
    exact, _, exact_bias = gradients(reference.window_attention, [x.double() for x in (qkv, scale, bias)], dtype, *rest)
    assert not got[0, 0, 0, q].any() and not got[0, 1, 2, k].any()
    assert got[0, 0, 0, v].any() and got[0, 2, 1, q].any()
    short = 0, 2, 1, q
    assert float((got[short] - exact[short]).norm()) <= 1e-2 * float(exact[short].norm())
    got[short], exact[short] = 0.0, 0.0
    assert torch.allclose(got.double(), exact, rtol=2e-2, atol=2e-2)
    assert torch.allclose(d_bias.double(), exact_bias, atol=5e-3)


@DTYPES
@pytest.mark.parametrize("window", [(7, 7), (10, 8)])
def test_large_logits(window, dtype, large_tiles):
    """tau = 100, the largest SwinV2 allows, biases up to 16, seams: logits from -216 to 116."""
    qkv, scale, bias = draw(window, half(window), dtype, heads=2, maps=(1, 1), batch=2)
    check(qkv, scale.fill_(100.0), (bias * 5).clamp(-16, 16), window, half(window), True)


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), phases=PHASES)
@given(
    window=st.tuples(st.integers(2, 10), st.integers(2, 10)),
    maps=st.sampled_from([(1, 1), (1, 2), (2, 1)]),
    part=st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)),
    head_dim=st.sampled_from([16, 24, 32, 40]),
    cosine=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_drawn_shapes(window, maps, part, head_dim, cosine, dtype, large_tiles):
    shift = (int(window[0] * part[0]), int(window[1] * part[1]))
    check(*draw(window, shift, dtype, maps=maps, heads=1, head_dim=head_dim, cosine=cosine), window, shift, cosine)


def launch(qkv, scale, bias, window, shift, *, grad=None, **options):
    out, log_sum = torch.ops.swin_scale.fused_window_attention(
        qkv, scale, bias, list(window), list(shift), True, 0.0, None, True
    )
    grad = upstream(out, out.dtype) if grad is None else grad
    return attention_backward.launch(
        grad, qkv, scale, bias, out, log_sum, list(window), list(shift), True, 0.0, None, **options
    )


@pytest.mark.parametrize("window", [(4, 6), (9, 8)])
def test_rows_of_the_bias_gradient_sum_to_zero(window, large_tiles):
    """Adding the same to all logits of a row changes no probability."""
    d_bias = launch(*draw(window, half(window), heads=1), window, half(window))[2]
    assert float(d_bias.sum(-1).abs().max()) <= 1e-5 * float(d_bias.abs().sum(-1).max())


@pytest.mark.parametrize("window", [(4, 4), (9, 8)])
def test_sums_of_any_number_of_programs_are_deterministic(window, large_tiles):
    """Two windows of one program, of two, of more than there are windows; and of two that add atomically."""
    args = *draw(window, (2, 2), heads=1, maps=(2, 1)), window, (2, 2)
    alone, shared, again = (launch(*args, slots=slots) for slots in (1, 2, 2))
    assert all(torch.equal(a, b) for a, b in zip(shared, again, strict=True))
    for other in (shared, launch(*args, slots=3), launch(*args, slots=2, deterministic=False)):
        assert torch.equal(other[0], alone[0])
        for a, b in zip(other[1:], alone[1:], strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("exponent", [-14, 12])
@pytest.mark.parametrize("window", [(4, 4), (9, 8)])
def test_half_precision_has_the_same_gradients_under_any_loss_scale(window, exponent, large_tiles):
    """Bit for bit, where dS itself would be far below the smallest fp16 number or above the largest."""
    args = draw(window, (2, 2), torch.float16, heads=1, maps=(1, 1))
    grad = upstream(args[0][..., :16], torch.float16).mul(8).round().div(8)
    scaled = grad * 2.0**exponent
    assert torch.equal(scaled.float(), grad.float() * 2.0**exponent)
    for a, b in zip(launch(*args, window, (2, 2), grad=scaled), launch(*args, window, (2, 2), grad=grad), strict=True):
        expected = b.float() * 2.0**exponent
        normal = (a.abs() >= 2**-14) & (b.abs() >= 2**-14) | (a.dtype == torch.float32)
        assert normal.any() and torch.equal(a.float()[normal], expected[normal])


def test_an_overflowed_gradient_is_not_hidden():
    """Loss scaling skips a step by its infinities and NaNs."""
    args = draw((4, 4), (0, 0), torch.float16, heads=1, maps=(1, 1))
    grad = torch.ones(1, 4, 4, 16, dtype=torch.float16)
    grad[0, 1, 1, 3] = math.inf
    assert not any(x.isfinite().all() for x in launch(*args, (4, 4), (0, 0), grad=grad))


def test_registered_as_an_operator():
    window, shift = [4, 4], [2, 2]
    qkv, scale, bias = draw(window, shift, heads=1, maps=(1, 1))
    forward = torch.ops.swin_scale.fused_window_attention
    out, log_sum = forward(qkv, scale, bias, window, shift, True, 0.1, torch.tensor(SEED), True)
    torch.library.opcheck(
        torch.ops.swin_scale.fused_window_attention_backward.default,
        (out, qkv, scale, bias, out, log_sum, window, shift, True, 0.1, torch.tensor(SEED), True),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("window", [(4, 4), (9, 8)])
def test_only_the_variant_that_is_asked_for_uses_atomics(window):
    """In the compiler's intermediate code, of all kernels that are launched."""
    N = math.prod(window)
    with aot.compiling(), torch.device("meta"):
        from swin_scale.kernels import attention_gradients

        qkv, grad = torch.empty(1, *window, 48, dtype=torch.float16), torch.empty(1, *window, 16, dtype=torch.float16)
        args = grad, qkv, torch.empty(1, 1, 1), torch.empty(1, N, N), grad, torch.empty(1, 1, N)
        found = []
        for deterministic in (True, False):
            with aot.recording(attention_gradients) as calls:
                attention_backward.launch(
                    *args, list(window), [0, 0], True, 0.0, None, deterministic=deterministic, slots=1
                )
            found.append(["atomic" in aot.compile_call(call, 90).ttir for call in calls])
    assert not any(found[0])
    assert sum(found[1]) == 1
