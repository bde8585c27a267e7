"""Window attention in cache-sized pieces: the op the models call, equal to `reference.window_attention`.

On a CPU the time of eager window attention goes into streaming N x N logits through memory and into the copies of
partition, roll and head split. Here one gather brings the rows of a few images from image layout straight into
(3, windows, images, heads, N, d), shift included; logits, softmax and their gradients live in scratch of about
`CHUNK` elements that stays in cache; one gather takes the result back. Backward recomputes the probabilities, so
nothing of size N x N is kept between forward and backward.

It is a registered operator, hence one opaque node for selective activation checkpointing, export and tracing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from swin_scale.kernels.reference import NORM_FLOOR, Size, shift_mask, shift_regions, window_partition

CHUNK = 1 << 20
"""Logits per piece: 4 MiB in fp32. Measured fastest on a 32 MiB last-level cache, flat from half to twice of it."""

SDPA_TOKENS = 144
"""From this window area on, torch's fused attention beats softmax in scratch (measured at N = 64, 144, 256)."""


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """How a (B, H, W) map is cut: groups of `images`, and in each group ranges of windows that share one mask."""

    images: int
    windows: int
    ranges: list[tuple[slice, int]]
    """Consecutive windows, in the order of `to_qkv`, and the row of `biases` they share."""
    longest: int
    """Windows of the longest range."""
    biases: Tensor
    """(masks, heads, N, N): the bias under each mask that occurs; one without shift, at most four with it."""
    to_qkv: Tensor
    from_qkv: Tensor
    to_heads: Tensor
    from_heads: Tensor


def _plan(qkv: Tensor, bias: Tensor, window_size: Sequence[int], shift_size: Sequence[int]) -> _Plan:
    """Row numbers between image layout (image, token, q|k|v, head) and windows (q|k|v, window, image, head, token)."""
    B, H, W, _ = qkv.shape
    heads, N, _ = bias.shape
    window, shift = (window_size[0], window_size[1]), (shift_size[0], shift_size[1])
    windows, device = H * W // N, qkv.device
    order, counts, biases = None, [windows], bias[None]
    if any(shift):
        # Windows with the same seams share a mask. The regions follow from sizes alone: on the host, no device waits.
        kinds, kind, count = shift_regions((H, W), window, shift).unique(dim=0, return_inverse=True, return_counts=True)
        order, counts = kind.argsort(stable=True).to(device), count.tolist()
        biases = bias + shift_mask(kinds, bias.dtype).to(device)[:, None]
    images, step = B, windows
    if device.type == "cpu":
        pieces = max(1, CHUNK // (heads * N * N))
        images = max(n for n in range(1, B + 1) if B % n == 0 and (n == 1 or n * max(counts) <= pieces))
        step = max(1, pieces // images)

    def rows(parts: int) -> Tensor:
        at = torch.arange(images * H * W * parts * heads, device=device).view(images, H, W, parts * heads)
        at = window_partition(at, window, shift).view(images, windows, N, parts, heads).permute(3, 1, 0, 4, 2)
        return (at if order is None else at[:, order]).flatten()

    def inverse(rows: Tensor) -> Tensor:
        return torch.empty_like(rows).scatter_(0, rows, torch.arange(len(rows), device=device))

    ends = list(accumulate(counts))
    ranges = [
        (slice(at, min(at + step, end)), mask)
        for mask, (count, end) in enumerate(zip(counts, ends, strict=True))
        for at in range(end - count, end, step)
    ]
    to_qkv, to_heads = rows(3), rows(1)
    return _Plan(
        images=images,
        windows=windows,
        ranges=ranges,
        longest=min(step, max(counts)),
        biases=biases,
        to_qkv=to_qkv,
        from_qkv=inverse(to_qkv),
        to_heads=to_heads,
        from_heads=inverse(to_heads),
    )


def _move(rows: Tensor, index: Tensor, out: Tensor) -> None:
    """out <- rows[index] for rows of d values, in the dtype of `out`, whose last axis is d."""
    rows, out = rows.view(-1, out.shape[-1]), out.view(-1, out.shape[-1])
    if rows.dtype == out.dtype:
        torch.index_select(rows, 0, index, out=out)
    else:
        out.copy_(rows.index_select(0, index))


def _scale_rows(qk: Tensor, scale: Tensor, cosine: bool) -> Tensor:
    """In place: q to scale · q and, if `cosine`, q and k to unit length first; qk: (2, windows, images, heads, N, d).

    Returns the factor by which gradients of q and k are multiplied: 0 for rows too short to have one.
    """
    if not cosine:
        qk[0].mul_(scale)
        return torch.stack((scale, torch.ones_like(scale)))[:, None, None]
    norm = torch.linalg.vector_norm(qk, dim=-1, keepdim=True)
    factor = norm.clamp(min=1e-12).reciprocal_()
    factor[0].mul_(scale)
    qk.mul_(factor)
    return factor.masked_fill_(norm < NORM_FLOOR, 0.0)


def _probabilities(q: Tensor, k: Tensor, bias: Tensor, scratch: Tensor) -> Tensor:
    """softmax(q kᵀ + bias) in `scratch`, (windows, images, heads, N, N); returns it as (-1, N, N)."""
    logits = scratch.copy_(bias).flatten(0, 2)
    return torch.softmax(torch.baddbmm(logits, q, k.transpose(1, 2), out=logits), -1, out=logits)


@torch.library.custom_op("swin_scale::window_attention", mutates_args=())
def _forward(
    qkv: Tensor, scale: Tensor, bias: Tensor, window_size: list[int], shift_size: list[int], cosine: bool
) -> Tensor:
    B, H, W, C3 = qkv.shape
    heads, N, _ = bias.shape
    d, dtype = C3 // 3 // heads, bias.dtype
    # Detached: torch's fused attention declines a bias that requires a gradient, even where none is recorded.
    plan = _plan(qkv, bias.detach(), window_size, shift_size)
    n, groups = plan.images, B // plan.images
    rows, out = qkv.reshape(groups, -1, d), qkv.new_empty(groups, n * H * W, heads, d)
    parts = qkv.new_empty(3, plan.windows, n, heads, N, d, dtype=dtype)
    result = torch.empty_like(parts[0])
    scratch = qkv.new_empty(plan.longest if N < SDPA_TOKENS else 0, n, heads, N, N, dtype=dtype)
    for group in range(groups):
        _move(rows[group], plan.to_qkv, parts)
        _scale_rows(parts[:2], scale, cosine)
        for at, mask in plan.ranges:
            q, k, v = (part[at].flatten(0, 1) for part in parts)
            o, bias = result[at].flatten(0, 1), plan.biases[mask]
            if N >= SDPA_TOKENS:
                o.copy_(F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None], scale=1.0))
            else:
                p = _probabilities(q.flatten(0, 1), k.flatten(0, 1), bias, scratch[: at.stop - at.start])
                torch.bmm(p, v.flatten(0, 1), out=o.flatten(0, 1))
        _move(result, plan.from_heads, out[group])
    return out.view(B, H, W, C3 // 3)


@torch.library.custom_op("swin_scale::window_attention_backward", mutates_args=())
def _backward(
    grad: Tensor, qkv: Tensor, scale: Tensor, bias: Tensor, window_size: list[int], shift_size: list[int], cosine: bool
) -> tuple[Tensor, Tensor, Tensor]:
    B, _, _, C3 = qkv.shape
    heads, N, _ = bias.shape
    d, dtype = C3 // 3 // heads, bias.dtype
    plan = _plan(qkv, bias.detach(), window_size, shift_size)
    n, groups = plan.images, B // plan.images
    rows, grad_rows = qkv.reshape(groups, -1, d), grad.reshape(groups, -1, d)
    d_qkv, d_scale, d_bias = qkv.new_empty(rows.shape), torch.zeros_like(scale), torch.zeros_like(bias)
    parts = qkv.new_empty(3, plan.windows, n, heads, N, d, dtype=dtype)
    d_parts, d_out = torch.empty_like(parts), torch.empty_like(parts[0])
    scratch = qkv.new_empty(2, plan.longest, n, heads, N, N, dtype=dtype)
    ones = scratch.new_ones(1, plan.longest * n)
    for group in range(groups):
        _move(rows[group], plan.to_qkv, parts)
        _move(grad_rows[group], plan.to_heads, d_out)
        factor = _scale_rows(parts[:2], scale, cosine)
        for at, mask in plan.ranges:
            q, k, v = (part[at].flatten(0, 2) for part in parts)
            dq, dk, dv = (part[at].flatten(0, 2) for part in d_parts)
            do = d_out[at].flatten(0, 2)
            logits, ds = scratch[:, : at.stop - at.start]
            p = _probabilities(q, k, plan.biases[mask], logits)
            ds = ds.flatten(0, 2)
            torch.bmm(p.transpose(1, 2), do, out=dv)
            torch.bmm(do, v.transpose(1, 2), out=ds)
            torch.ops.aten._softmax_backward_data.out(ds, p, -1, dtype, grad_input=ds)
            # The sum over windows as a matrix product: 1.7x to 4x the speed of a reduction over a short outer axis.
            d_bias.view(1, -1).addmm_(ones[:, : len(ds) // heads], ds.view(-1, d_bias.numel()))
            torch.bmm(ds, k, out=dq)
            torch.bmm(ds.transpose(1, 2), q, out=dk)
        d_qk = d_parts[:2]
        if cosine:
            # u = f x with f = s / |x|, s = 1 for k:  dx = f (du - u (u · du) / s²), and ds = (u · du) / s.
            along = (d_qk * parts[:2]).sum(-1, keepdim=True)
            d_scale.add_(along[0].sum((0, 1, 3)).unsqueeze(-1) / scale)
            along[0].div_(scale.square())
            d_qk.addcmul_(parts[:2], along, value=-1)
        d_qk.mul_(factor)
        _move(d_parts, plan.from_qkv, d_qkv[group].view(-1, d))
    return d_qkv.view(qkv.shape), d_scale, d_bias


@_forward.register_fake
def _(qkv, scale, bias, window_size, shift_size, cosine):
    B, H, W, C3 = qkv.shape
    return qkv.new_empty(B, H, W, C3 // 3)


@_backward.register_fake
def _(grad, qkv, scale, bias, window_size, shift_size, cosine):
    return torch.empty_like(qkv, memory_format=torch.contiguous_format), torch.empty_like(scale), torch.empty_like(bias)


def _keep(ctx, inputs, output) -> None:
    qkv, scale, bias, *ctx.static = inputs
    ctx.save_for_backward(qkv, scale, bias)


def _grads(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    d_qkv, d_scale, d_bias = _backward(grad, *ctx.saved_tensors, *ctx.static)
    return d_qkv, d_scale, d_bias, None, None, None


ATTENTION_OP = torch.ops.swin_scale.window_attention.default
"""The operator as selective activation checkpointing sees it: its outputs are worth keeping."""

_forward.register_autograd(_grads, setup_context=_keep)


def window_attention(
    qkv: Tensor, scale: Tensor, bias: Tensor, window_size: Size, shift_size: Size = (0, 0), cosine: bool = False
) -> Tensor:
    """`reference.window_attention`, in pieces. First derivatives only."""
    return _forward(qkv, scale, bias, list(window_size), list(shift_size), cosine)
