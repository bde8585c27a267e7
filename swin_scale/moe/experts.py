"""The expert MLPs of one rank: linear, exact GELU, dropout, linear, each over the rows of its expert.

Shapes: S rows sorted by expert, E experts of this rank, D channels, H hidden. Three ways to the same numbers, chosen by
`method`; what they share is that an expert without rows costs nothing and gets a gradient of zeros.

| method | how | where |
|---|---|---|
| loop | expert after expert, both products and both gradients while the hidden rows are in cache | CPU |
| grouped | torch's grouped matrix product | CUDA, bf16 on Hopper and later, sizes in steps of 16 bytes |
| padded | one batched product, rows padded to the fullest expert | CUDA otherwise |
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

GROUPED_CAPABILITY = (9, 0)


class Experts(nn.Module):
    """The experts [first, first + E) of the `num_experts` of a layer, named and shaped as Tutel's.

    y = gelu(x @ fc1_w.T + fc1_bias) @ fc2_w + fc2_bias: `batched_fc2_w` is stored input first.
    Weights are left to `initial.initial_value`.
    """

    def __init__(
        self, num_experts: int, num_local: int, first: int, dim: int, hidden: int, drop: float, fc2_bias: bool
    ) -> None:
        super().__init__()
        self.num_experts, self.num_local, self.first = num_experts, num_local, first
        self.dim, self.hidden, self.drop = dim, hidden, drop
        self.batched_fc1_w = nn.Parameter(torch.empty(num_local, hidden, dim))
        self.batched_fc2_w = nn.Parameter(torch.empty(num_local, hidden, dim))
        self.batched_fc1_bias = nn.Parameter(torch.empty(num_local, hidden))
        self.batched_fc2_bias = nn.Parameter(torch.zeros(num_local, dim), requires_grad=fc2_bias)

    def forward(self, x_SD: Tensor, count_E: Tensor) -> Tensor:
        """x_SD: rows sorted by expert; count_E: (E,) int64, rows of each, summing to S. Computes in x's dtype."""
        dtype, drop = x_SD.dtype, self.drop if self.training else 0.0
        with torch.autocast(x_SD.device.type, enabled=False):
            return grouped_mlp(
                x_SD,
                count_E,
                self.batched_fc1_w.to(dtype),
                self.batched_fc1_bias.to(dtype),
                self.batched_fc2_w.to(dtype),
                self.batched_fc2_bias.to(dtype),
                drop,
            )


def grouped_mlp(
    x_SD: Tensor,
    count_E: Tensor,
    fc1_EHD: Tensor,
    bias1_EH: Tensor,
    fc2_EHD: Tensor,
    bias2_ED: Tensor,
    drop: float = 0.0,
    method: str | None = None,
) -> Tensor:
    """Each row through the MLP of its expert, (S, D). `loop` and `padded` read `count_E` back to the host.

    Dropout draws from torch's default generator, each method in an order of its own.
    """
    method = method or choose_method(x_SD, fc1_EHD)
    if method == "loop":
        weights = fc1_EHD, bias1_EH, fc2_EHD, bias2_ED
        # Asked here: inside of an autograd function gradients are off, and inputs need them even when nothing does.
        keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x_SD, *weights))
        return _Loop.apply(x_SD, count_E.tolist(), *weights, drop, keep)
    if method == "grouped":
        return _grouped(x_SD, count_E, fc1_EHD, bias1_EH, fc2_EHD, bias2_ED, drop)
    assert method == "padded", method
    return _padded(x_SD, count_E, fc1_EHD, bias1_EH, fc2_EHD, bias2_ED, drop)


def choose_method(x_SD: Tensor, fc1_EHD: Tensor) -> str:
    """The fastest method for this device, dtype and size."""
    if x_SD.device.type == "cpu":
        return "loop"
    _, H, D = fc1_EHD.shape
    aligned = H % 8 == 0 and D % 8 == 0
    new = x_SD.device.type == "cuda" and torch.cuda.get_device_capability(x_SD.device) >= GROUPED_CAPABILITY
    return "grouped" if new and aligned and x_SD.dtype == torch.bfloat16 else "padded"


class _Loop(Function):
    """Expert by expert: no graph per expert, nothing stacked or copied.

    Hidden rows are kept before and after the GELU, as a dense MLP's are, but by expert: pieces of a size that the
    allocator has at hand, where one tensor of all rows is given fresh pages each time. Everything else that is as wide
    lives for one expert only.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, counts: list[int], w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, drop: float, keep: bool
    ) -> Tensor:
        y = torch.empty_like(x)
        befores, afters, masks = [], [], []
        for x_e, y_e, w1_e, b1_e, w2_e, b2_e in _busy(counts, rows=(x, y), experts=(w1, b1, w2, b2)):
            before = torch.addmm(b1_e, x_e, w1_e.t())
            after = F.gelu(before) if keep else torch.ops.aten.gelu_(before)
            if drop:
                masks.append(torch.empty_like(after, dtype=torch.bool).bernoulli_(1 - drop))
                _drop(after, masks[-1], drop)
            torch.addmm(b2_e, after, w2_e, out=y_e)
            if keep:
                befores.append(before)
                afters.append(after)
        ctx.counts, ctx.drop = counts, drop
        ctx.save_for_backward(x, w1, w2, *befores, *afters, *masks)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, w2, *kept = ctx.saved_tensors
        busy = sum(map(bool, ctx.counts))
        befores, afters, masks = kept[:busy], kept[busy : 2 * busy], kept[2 * busy :] or [None] * busy
        needs_x, _, needs_w1, needs_b1, needs_w2, needs_b2, *_ = ctx.needs_input_grad
        grad = grad.contiguous()
        grad_x = torch.empty_like(x) if needs_x else None
        grad_w1 = torch.empty_like(w1) if needs_w1 else None
        grad_w2 = torch.empty_like(w2) if needs_w2 else None
        grad_b1 = w1.new_zeros(w1.shape[:2]) if needs_b1 else None
        grad_b2 = w2.new_zeros(w2.shape[0], w2.shape[2]) if needs_b2 else None
        for e, count in enumerate(ctx.counts):
            if not count:
                for whole in (grad_w1, grad_w2):
                    if whole is not None:
                        whole[e].zero_()
        scratch, more = x.new_empty(2, max(ctx.counts, default=0), w1.shape[1])
        parts = _busy(ctx.counts, rows=(x, grad, grad_x), experts=(w1, w2, grad_w1, grad_b1, grad_w2, grad_b2))
        for before, after, mask, (x_e, grad_y, dx, w1_e, w2_e, dw1, db1, dw2, db2) in zip(
            befores, afters, masks, parts
        ):
            count = len(before)
            if dw2 is not None:
                torch.mm(after.t(), grad_y, out=dw2)
            if db2 is not None:
                torch.sum(grad_y, 0, out=db2)
            grad_h = torch.mm(grad_y, w2_e.t(), out=more[:count])
            if mask is not None:
                _drop(grad_h, mask, ctx.drop)
            grad_a = torch.ops.aten.gelu_backward.grad_input(grad_h, before, grad_input=scratch[:count])
            if dw1 is not None:
                torch.mm(grad_a.t(), x_e, out=dw1)
            if db1 is not None:
                torch.sum(grad_a, 0, out=db1)
            if dx is not None:
                torch.mm(grad_a, w1_e, out=dx)
        return grad_x, None, grad_w1, grad_b1, grad_w2, grad_b2, None, None


def _drop(x: Tensor, mask: Tensor, drop: float) -> None:
    """Dropout in place: what `mask` keeps, scaled up."""
    x.mul_(mask).div_(1 - drop)


def _busy(
    counts: list[int], *, rows: Sequence[Tensor | None], experts: Sequence[Tensor | None]
) -> Iterator[tuple[Any, ...]]:
    """For every expert that has rows: its part of each tensor of `rows`, then of `experts`; None of what is None."""
    parts = [[None] * len(counts) if t is None else t.split(counts) for t in rows]
    parts += [[None] * len(counts) if t is None else t.unbind(0) for t in experts]
    return (tuple(part) for count, *part in zip(counts, *parts, strict=True) if count)


def _grouped(x: Tensor, count_E: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, drop: float) -> Tensor:
    ends = count_E.cumsum(0).to(torch.int32)
    h = _GroupedLinear.apply(x, w1.transpose(1, 2), b1, ends)
    return _GroupedLinear.apply(F.dropout(F.gelu(h), drop, training=drop > 0), w2, b2, ends)


class _GroupedLinear(Function):
    """x (S, I) @ w (E, I, O) + b (E, O), rows of expert e ending at ends[e]; no number is read back to the host."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, w, ends)
        rows = torch.arange(len(x), device=x.device, dtype=ends.dtype)
        return F.grouped_mm(x, w, offs=ends).add_(b[torch.searchsorted(ends, rows, right=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, w, ends = ctx.saved_tensors
        grad = grad.contiguous()  # the product refuses expanded gradients
        # A sum of rows as a product with ones; 8 of them, as the product wants strides in steps of 16 bytes.
        ones = grad.new_ones(len(grad), 8)
        grad_x = F.grouped_mm(grad, w.transpose(1, 2), offs=ends)
        return grad_x, F.grouped_mm(x.t(), grad, offs=ends), F.grouped_mm(ones.t(), grad, offs=ends)[:, 0], None


def _padded(x: Tensor, count_E: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, drop: float) -> Tensor:
    width = int(count_E.max())
    mask = (torch.arange(width, device=x.device) < count_E[:, None])[..., None]
    padded = x.new_zeros(len(count_E), width, x.shape[1]).masked_scatter(mask, x)
    h = F.gelu(torch.baddbmm(b1[:, None], padded, w1.transpose(1, 2)))
    y = torch.baddbmm(b2[:, None], F.dropout(h, drop, training=drop > 0), w2)
    return y.masked_select(mask).view(x.shape)
