"""The ways to run experts agree with one another and with plain MLPs."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from swin_scale.moe.experts import Experts, choose_method, grouped_mlp

COUNTS = [[10, 0, 15, 5], [0, 0, 0, 30], [0, 0, 0, 0]]


def given(dtype, counts, dim=8, hidden=16):
    """x, the four parameters and an upstream gradient."""
    generator = torch.Generator().manual_seed(3)
    E = len(counts)
    shapes = [(sum(counts), dim), (E, hidden, dim), (E, hidden), (E, hidden, dim), (E, dim), (sum(counts), dim)]
    *leaves, upstream = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return [leaf.requires_grad_() for leaf in leaves], upstream


def plain(x, counts, w1, b1, w2, b2):
    parts = zip(x.split(counts), w1, b1, w2, b2)
    return torch.cat([F.linear(F.gelu(F.linear(x_e, a, c)), b.t(), d) for x_e, a, c, b, d in parts])


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize(
    ("method", "dtype"), [("loop", torch.float64), ("padded", torch.float64), ("grouped", torch.float32)]
)
def test_every_method_is_an_mlp_per_expert_with_its_gradients(method, dtype, counts):
    leaves, upstream = given(dtype, counts)
    want = plain(leaves[0], counts, *leaves[1:])
    wanted = torch.autograd.grad((want * upstream).sum(), leaves)
    got = grouped_mlp(leaves[0], torch.tensor(counts), *leaves[1:], method=method)
    grads = torch.autograd.grad((got * upstream).sum(), leaves)
    torch.testing.assert_close([got, *grads], [want, *wanted], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["loop", "padded", "grouped"])
def test_an_expanded_gradient_is_taken_and_half_precision_keeps_its_dtype(method):
    leaves, _ = given(torch.bfloat16, COUNTS[0])
    y = grouped_mlp(leaves[0], torch.tensor(COUNTS[0]), *leaves[1:], method=method)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(leaves[4].grad, torch.tensor(COUNTS[0], dtype=y.dtype)[:, None].expand(4, 8))
    exact, _ = given(torch.float64, COUNTS[0])
    plain(exact[0], COUNTS[0], *exact[1:]).sum().backward()
    for leaf, other in zip(leaves, exact):
        torch.testing.assert_close(leaf.grad.double(), other.grad, rtol=0.05, atol=0.4)


@pytest.mark.parametrize("method", ["loop", "padded", "grouped"])
def test_dropout_scales_what_it_keeps_and_backward_drops_the_same(method):
    """With fc1 = 0 the hidden row is a constant h; y / h then counts the kept units, and so do the gradients."""
    E, H, D, rows = 2, 64, 8, 40
    leaves = [torch.zeros(rows, D), torch.zeros(E, H, D), torch.ones(E, H), torch.ones(E, H, D), torch.zeros(E, D)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    torch.manual_seed(0)
    y = grouped_mlp(leaves[0], torch.tensor([25, 15]), *leaves[1:], drop=0.25, method=method)
    unit = F.gelu(torch.ones(())) / 0.75
    kept = y.detach()[:, 0] / unit
    torch.testing.assert_close(kept, kept.round())
    assert 0.70 < float(kept.mean() / H) < 0.80
    y.sum().backward()
    sums = leaves[3].grad[..., 0].sum(1) / unit
    counts = torch.stack([kept[:25].sum(), kept[25:].sum()])
    torch.testing.assert_close(sums, counts)
    one = torch.ones((), requires_grad=True)
    (slope,) = torch.autograd.grad(F.gelu(one), one)
    torch.testing.assert_close(leaves[2].grad.sum(1), counts * D * slope / 0.75)


def test_a_frozen_second_bias_gets_no_gradient():
    experts = Experts(4, 4, 0, 8, 16, 0.0, fc2_bias=False)
    with torch.no_grad():
        for p in experts.parameters():
            p.fill_(0.1)
    x = torch.ones(30, 8)
    experts(x, torch.tensor(COUNTS[0])).sum().backward()
    assert experts.batched_fc2_bias.grad is None and experts.batched_fc1_w.grad is not None


def test_without_gradients_hidden_rows_live_for_one_expert_only():
    leaves, _ = given(torch.float64, [10] * 50)
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out,) if isinstance(t, torch.Tensor))
            return out

    with torch.no_grad(), Sizes():
        grouped_mlp(leaves[0], torch.tensor([10] * 50), *leaves[1:])
    assert max(sizes) == 500 * 8 and 500 * 16 not in sizes


def test_on_a_cpu_hidden_rows_are_kept_before_and_after_the_gelu_and_dropout_as_bits():
    leaves, _ = given(torch.float64, COUNTS[0])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        grouped_mlp(leaves[0], torch.tensor(COUNTS[0]), *leaves[1:], drop=0.5)
    hidden = [t for t in kept if t.shape[-1] == 16]
    rows = {dtype: sum(len(t) for t in hidden if t.dtype == dtype) for dtype in (torch.float64, torch.bool)}
    assert rows == {torch.float64: 2 * sum(COUNTS[0]), torch.bool: sum(COUNTS[0])}


def test_the_best_method_for_a_cpu_is_the_loop():
    assert choose_method(torch.zeros(1, 8), torch.zeros(2, 16, 8)) == "loop"
