import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

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


def outputs(op, args, window, shift, cosine, **options):
    """Output and the gradients of everything that has one; the scale of plain attention is a constant."""
    out = op(*args, window, shift, cosine, **options)
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


# With dropout pieces are smaller: from a group of images down to a row.
@pytest.mark.parametrize("chunk", [1 << 20, 16 * 3 * 2 * 16 * 16, 16 * 700, 1])
@pytest.mark.parametrize(("window", "shift"), WINDOWS[1:3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_dropout_equals_the_reference_with_every_gradient(monkeypatch, chunk, window, shift, dtype):
    monkeypatch.setattr(chunked, "CHUNK", chunk)
    args, options = inputs(window, dtype), {"dropout": 0.3, "seed": torch.tensor(2**40 + 3)}
    expected = outputs(reference.window_attention, args, window, shift, True, **options)
    got = outputs(chunked.window_attention, args, window, shift, True, **options)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a, b, rtol=tolerance, atol=tolerance / 100)
    plain = outputs(chunked.window_attention, args, window, shift, True)
    assert not torch.allclose(got[0], plain[0], atol=0.1)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("chunk", [1 << 20, 700, 1])
def test_masks_of_one_piece_at_a_time_change_nothing(monkeypatch, chunk, fused):
    monkeypatch.setattr(chunked, "CHUNK", chunk)
    monkeypatch.setattr(chunked, "SDPA_TOKENS", 1 if fused else 1000)
    args = inputs((4, 4))
    ahead = outputs(chunked.window_attention, args, (4, 4), (2, 2), True)
    monkeypatch.setattr(chunked, "MASKED_BIASES", 0)
    for a, b in zip(outputs(chunked.window_attention, args, (4, 4), (2, 2), True), ahead, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-11)


class Peak(TorchDispatchMode):
    """The most bytes that tensors made inside held at one time, less those that were there before."""

    def __init__(self, *before):
        super().__init__()
        self.before = {tensor.untyped_storage().data_ptr() for tensor in before}
        self.live, self.bytes = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(made, torch.Tensor):
                storage = made.untyped_storage()
                if storage.data_ptr() not in self.before:
                    self.live[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        self.live = {at: held for at, held in self.live.items() if not held[0].expired()}
        self.bytes = max(self.bytes, sum(size for _, size in self.live.values()))
        return out


@pytest.mark.parametrize(
    ("side", "shift", "heads", "dropout"), [(32, 0, 2, 0.0), (32, 16, 4, 0.0), (40, 20, 4, 0.0), (32, 0, 2, 0.1)]
)
def test_scratch_of_very_large_windows_is_bounded(monkeypatch, side, shift, heads, dropout):
    """N = 1024 and 1600, forward and backward: copies of the map and its gradients, and five buffers of `CHUNK`."""
    chunk, N = heads << 17, side * side
    monkeypatch.setattr(chunked, "CHUNK", chunk)
    monkeypatch.setattr(chunked, "MASKED_BIASES", chunk)
    grad = torch.randn(1, 2 * side if shift else side, side, 16)
    qkv, scale, bias = torch.randn(*grad.shape[:3], 48), torch.rand(heads, 1, 1), torch.randn(heads, N, N)
    static = [side, side], [shift, 0], True, dropout, torch.tensor(3)
    for op, args, of_bias in ((chunked._forward, (), 0), (chunked._backward, (grad,), bias.nbytes)):
        with Peak(qkv, bias, grad) as peak:
            op._init_fn(*args, qkv, scale, bias, *static)
        scratch = peak.bytes - of_bias
        assert scratch <= 8 * qkv.nbytes + 5 * 4 * chunk < heads * N * N * 4, "less than the logits of one window"


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
