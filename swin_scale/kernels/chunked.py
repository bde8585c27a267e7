"""Window attention in cache-sized pieces: the op the models call, equal to `reference.window_attention`.

On a CPU the time of eager window attention goes into streaming N x N logits through memory and into the copies of
partition, roll and head split. Here one gather brings the rows of a few images from image layout straight into
(3, images, windows, heads, N, d), shift included; logits, softmax and their gradients live in scratch of about
`CHUNK` elements that stays in cache; one gather takes the result back. Backward recomputes the probabilities, so
nothing of size N x N is kept between forward and backward.

It is a registered operator, hence one opaque node for selective activation checkpointing, export and tracing.
"""

from dataclasses import dataclass

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
    """How a (B, H, W) map is cut: groups of whole images, inside an image ranges of windows."""

    images: int
    windows: int
    step: int
    gather_qkv: Tensor
    scatter_qkv: Tensor
    gather_out: Tensor
    scatter_out: Tensor
    regions: Tensor | None

    def ranges(self) -> list[slice]:
        return [slice(at, min(at + self.step, self.windows)) for at in range(0, self.windows, self.step)]


def _plan(qkv: Tensor, heads: int, window_size: Size, shift_size: Size) -> _Plan:
    """Row indices between image layout (image, token, q|k|v, head) and windows (q|k|v, image, window, head, token)."""
    B, H, W, _ = qkv.shape
    N, device = window_size[0] * window_size[1], qkv.device
    L, per_image = H * W, H * W * N * heads
    fit = CHUNK // per_image if device.type == "cpu" else B
    images = max(n for n in range(1, B + 1) if B % n == 0 and n <= max(1, fit))
    step = max(1, min(L // N, CHUNK // (heads * N * N))) if device.type == "cpu" else L // N

    def rows(parts: int) -> Tensor:
        """(images, L, parts, heads) row numbers in image layout, arranged as (parts, images, window, head, token)."""
        at = torch.arange(images * L * parts * heads, device=device).view(images, H, W, parts * heads)
        at = window_partition(at, window_size, shift_size).view(images, L // N, N, parts, heads)
        return at.permute(3, 0, 1, 4, 2).flatten()

    def inverse(order: Tensor) -> Tensor:
        return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=device))

    to_qkv, to_out = rows(3), rows(1)
    return _Plan(
        images=images,
        windows=L // N,
        step=step,
        gather_qkv=to_qkv,
        scatter_qkv=inverse(to_qkv),
        gather_out=to_out,
        scatter_out=inverse(to_out),
        regions=shift_regions((H, W), window_size, shift_size, device) if any(shift_size) else None,
    )


def _take(rows: Tensor, index: Tensor, out: Tensor) -> None:
    """out <- rows[index], (R, d) rows into the flat shape of `out`, converted to its dtype."""
    if rows.dtype == out.dtype:
        torch.index_select(rows, 0, index, out=out.view(-1, rows.shape[1]))
    else:
        out.view(-1, rows.shape[1]).copy_(rows.index_select(0, index))


def _fill_logits(logits: Tensor, bias: Tensor, mask: Tensor | None) -> None:
    """(images, windows, heads, N, N) <- bias + mask; what q kᵀ is then added to."""
    logits.copy_(bias)
    if mask is not None:
        logits.add_(mask[:, None])


def _unit(qk: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """In place: q to scale · q/|q| and k to k/|k|, of (2, images, windows, heads, N, d).

    Returns the factor each row was multiplied by, and the same with 0 for rows too short to have a gradient.
    """
    norm = torch.linalg.vector_norm(qk, dim=-1, keepdim=True)
    factor = norm.clamp(min=1e-12).reciprocal_()
    factor[0].mul_(scale)
    qk.mul_(factor)
    return factor, factor.masked_fill(norm < NORM_FLOOR, 0.0)


@torch.library.custom_op("swin_scale::window_attention", mutates_args=())
def _forward(
    qkv: Tensor, scale: Tensor, bias: Tensor, window_size: list[int], shift_size: list[int], cosine: bool
) -> Tensor:
    B, H, W, C3 = qkv.shape
    heads, N, _ = bias.shape
    d, dtype = C3 // 3 // heads, bias.dtype
    plan = _plan(qkv, heads, tuple(window_size), tuple(shift_size))
    n, windows, step = plan.images, plan.windows, plan.step
    rows = qkv.reshape(B // n, -1, d)
    out = qkv.new_empty(B, H, W, C3 // 3)
    out_rows = out.view(B // n, -1, d)
    parts = qkv.new_empty(3, n, windows, heads, N, d, dtype=dtype)
    logits = qkv.new_empty(n * step * heads * N * N, dtype=dtype)
    result = qkv.new_empty(n, windows, heads, N, d, dtype=dtype)
    whole = shift_mask(plan.regions, dtype) if plan.regions is not None and step == windows else None
    for group in range(B // n):
        _take(rows[group], plan.gather_qkv, parts)
        if cosine:
            _unit(parts[:2], scale)
        else:
            parts[0].mul_(scale)
        for at in plan.ranges():
            # With several images in a group, `at` covers all windows, so these are views.
            q, k, v = (part[:, at].flatten(0, 2) for part in parts)
            s = logits[: len(q) * N * N].view(n, -1, heads, N, N)
            mask = whole
            if plan.regions is not None and whole is None:
                mask = shift_mask(plan.regions[at], dtype)
            _fill_logits(s, bias, mask)
            o = result[:, at].flatten(0, 2)
            if N >= SDPA_TOKENS:
                fold = (n * s.shape[1], heads, N)
                o.view(*fold, d).copy_(
                    F.scaled_dot_product_attention(
                        q.view(*fold, d), k.view(*fold, d), v.view(*fold, d), attn_mask=s.view(*fold, N), scale=1.0
                    )
                )
            else:
                p = s.view(-1, N, N)
                torch.baddbmm(p, q, k.transpose(1, 2), out=p)
                torch.softmax(p, -1, out=p)
                torch.bmm(p, v, out=o)
        if dtype == out.dtype:
            torch.index_select(result.view(-1, d), 0, plan.scatter_out, out=out_rows[group])
        else:
            out_rows[group].copy_(result.view(-1, d).index_select(0, plan.scatter_out))
    return out


@torch.library.custom_op("swin_scale::window_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    qkv: Tensor,
    scale: Tensor,
    bias: Tensor,
    window_size: list[int],
    shift_size: list[int],
    cosine: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    B, H, W, C3 = qkv.shape
    heads, N, _ = bias.shape
    d, dtype = C3 // 3 // heads, bias.dtype
    plan = _plan(qkv, heads, tuple(window_size), tuple(shift_size))
    n, windows, step = plan.images, plan.windows, plan.step
    rows, grad_rows = qkv.reshape(B // n, -1, d), grad.reshape(B // n, -1, d)
    d_qkv, d_bias, d_scale = torch.empty_like(qkv, memory_format=torch.contiguous_format), torch.zeros_like(bias), torch.zeros_like(scale)
    d_rows = d_qkv.view(B // n, -1, d)
    parts = qkv.new_empty(3, n, windows, heads, N, d, dtype=dtype)
    d_parts = torch.empty_like(parts)
    d_out = torch.empty_like(parts[0])
    scratch = qkv.new_empty(2, n * step * heads * N * N, dtype=dtype)
    whole = shift_mask(plan.regions, dtype) if plan.regions is not None and step == windows else None
    for group in range(B // n):
        _take(rows[group], plan.gather_qkv, parts)
        _take(grad_rows[group], plan.gather_out, d_out)
        if cosine:
            _, factor = _unit(parts[:2], scale)
        else:
            parts[0].mul_(scale)
        for at in plan.ranges():
            q, k, v = (part[:, at].flatten(0, 2) for part in parts)
            dq, dk, dv = (part[:, at].flatten(0, 2) for part in d_parts)
            do = d_out[:, at].flatten(0, 2)
            p, ds = scratch[:, : len(q) * N * N].view(2, -1, N, N)
            mask = whole
            if plan.regions is not None and whole is None:
                mask = shift_mask(plan.regions[at], dtype)
            _fill_logits(p.view(n, -1, heads, N, N), bias, mask)
            torch.baddbmm(p, q, k.transpose(1, 2), out=p)
            torch.softmax(p, -1, out=p)
            torch.bmm(p.transpose(1, 2), do, out=dv)
            torch.bmm(do, v.transpose(1, 2), out=ds)
            torch.ops.aten._softmax_backward_data.out(ds, p, -1, dtype, grad_input=ds)
            d_bias.add_(ds.view(-1, heads, N, N).sum(0))
            torch.bmm(ds, k, out=dq)
            torch.bmm(ds.transpose(1, 2), q, out=dk)
        if cosine:
            # u = f v with f = s / |v|:  dv = f (du - u (u · du) / s²), and s collects (u · du) / s.
            along = (d_parts[:2] * parts[:2]).sum(-1, keepdim=True)
            d_scale.add_((along[0].sum((0, 1, 3)) / scale.squeeze(-1)).unsqueeze(-1))
            along[0].div_(scale.square())
            d_parts[:2].addcmul_(parts[:2], along, value=-1).mul_(factor)
        else:
            d_parts[0].mul_(scale)
        if dtype == d_qkv.dtype:
            torch.index_select(d_parts.view(-1, d), 0, plan.scatter_qkv, out=d_rows[group])
        else:
            d_rows[group].copy_(d_parts.view(-1, d).index_select(0, plan.scatter_qkv))
    return d_qkv, d_scale, d_bias


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


_forward.register_autograd(_grads, setup_context=_keep)


def window_attention(
    qkv: Tensor, scale: Tensor, bias: Tensor, window_size: Size, shift_size: Size = (0, 0), cosine: bool = False
) -> Tensor:
    """`reference.window_attention`, in pieces. First derivatives only."""
    return _forward(qkv, scale, bias, list(window_size), list(shift_size), cosine)
