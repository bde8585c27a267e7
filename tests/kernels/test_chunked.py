import pytest
import torch

from swin_scale.kernels import chunked, reference

WINDOWS = [((4, 4), (0, 0)), ((4, 4), (2, 2)), ((4, 6), (0, 3)), ((1, 1), (0, 0)), ((8, 12), (0, 0))]


def inputs(window, dtype=torch.float64, batch=3, heads=2, d=4):
    generator = torch.Generator().manual_seed(1)
    N = window[0] * window[1]

    def draw(*shape, to=dtype):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(to).requires_grad_()

    wide = torch.promote_types(dtype, torch.float32)
    scale = (torch.rand(heads, 1, 1, generator=generator) + 0.5).to(wide).requires_grad_()
    return draw(batch, 8, 12, 3 * heads * d), scale, draw(heads, N, N, to=wide)


def outputs(op, args, window, shift, cosine):
    """Output and the gradients of everything that has one; the scale of plain attention is a constant."""
    out = op(*args, window, shift, cosine)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    wanted = args if cosine else (args[0], args[2])
    return [out, *torch.autograd.grad(out, wanted, weight)]


# From everything in one piece down to one window at a time.
@pytest.mark.parametrize("chunk", [1 << 20, 2 * 6 * 2 * 16 * 16, 700, 1])
@pytest.mark.parametrize(("window", "shift"), WINDOWS)
@pytest.mark.parametrize("cosine", [True, False])
def test_equals_the_reference_with_every_gradient(monkeypatch, chunk, window, shift, cosine):
    monkeypatch.setattr(chunked, "CHUNK", chunk)
    args = inputs(window)
    expected = outputs(reference.window_attention, args, window, shift, cosine)
    got = outputs(chunked.window_attention, args, window, shift, cosine)
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-11)


def test_large_windows_take_the_fused_forward_and_agree(monkeypatch):
    assert chunked.SDPA_TOKENS > 8 * 12
    args = inputs((8, 12))
    slow = outputs(chunked.window_attention, args, (8, 12), (0, 0), True)
    monkeypatch.setattr(chunked, "SDPA_TOKENS", 8 * 12)
    fast = outputs(chunked.window_attention, args, (8, 12), (0, 0), True)
    for a, b in zip(fast, slow, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-11)


def test_gradcheck():
    args = inputs((2, 2), batch=1, heads=1, d=2)
    small = (args[0][:, :4, :4].detach().requires_grad_(), *args[1:])

    def op(*a):
        return chunked.window_attention(*a, (2, 2), (1, 1), True)

    assert torch.autograd.gradcheck(op, small, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_computes_in_fp32(dtype):
    """Only input and output are rounded: as close to fp32 as rounding its result."""
    args = inputs((4, 4), dtype)
    exact = [a.detach().float().requires_grad_() for a in args]
    got = outputs(chunked.window_attention, args, (4, 4), (2, 2), True)
    expected = outputs(reference.window_attention, exact, (4, 4), (2, 2), True)
    for a, b in zip(got[:2], expected[:2], strict=True):
        assert a.dtype == dtype
        assert torch.allclose(a.float(), b, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_zero_rows_give_finite_gradients(dtype):
    qkv, scale, bias = inputs((4, 4), dtype)
    with torch.no_grad():
        qkv[:, 0, 0] = 0
    out = outputs(chunked.window_attention, (qkv, scale, bias), (4, 4), (0, 0), True)
    assert all(torch.isfinite(t).all() for t in out)
    assert not out[1][:, 0, 0, :16].any()


def test_keeps_nothing_of_window_squared_size_for_backward():
    args = inputs((8, 12))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        chunked.window_attention(*args, (8, 12), (0, 0), True)
    assert sorted(saved) == sorted(a.numel() for a in args)


def test_traces_on_meta_and_registers_as_an_operator():
    qkv, scale, bias = (a.detach().to("meta") for a in inputs((4, 4)))
    assert chunked.window_attention(qkv, scale, bias, (4, 4)).shape == (3, 8, 12, 8)
    torch.library.opcheck(
        torch.ops.swin_scale.window_attention.default,
        (*inputs((4, 4), torch.float32), [4, 4], [2, 2], True, 0.0, None),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
