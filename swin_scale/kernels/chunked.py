"""Window attention in cache-sized pieces: the op the models call, equal to `reference.window_attention`.

On a CPU the time of eager window attention goes into streaming N x N logits through memory and into the copies of
partition, roll and head split. Here one gather brings the rows of a few images from image layout straight into
(3, windows, images, heads, N, d), shift included; logits, softmax and their gradients live in scratch of about
`CHUNK` elements that stays in cache; one gather takes the result back. Backward recomputes the probabilities, so
nothing of size N x N is kept between forward and backward.

It is also the way through windows that no kernel takes, on any device (the sequential attention of SwinV2, section
3.5): cut over images and windows, then heads, then rows of the N x N matrix. However large N is, scratch is up to five
times `CHUNK` values (`DEVICE_CHUNK` on a GPU) and masked biases of up to `MASKED_BIASES`, beside copies of q, k, v and
their gradients for one group of images.

It is a registered operator, hence one opaque node for selective activation checkpointing, export and tracing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from swin_scale.kernels.reference import (
    MASKED,
    NORM_FLOOR,
    Size,
    dropout_keep,
    shift_mask,
    shift_regions,
    window_partition,
)

CHUNK = 1 << 20
"""Logits per piece: 4 MiB in fp32. Measured fastest on a 32 MiB last-level cache, flat from half to twice of it."""

DEVICE_CHUNK = 1 << 28
"""The same on other devices, which large pieces keep busy: 1 GiB in fp32."""

MASKED_BIASES = 1 << 24
"""Values of biases under the shift masks that are kept for all windows; where there are more, each piece adds its own.
"""

SDPA_TOKENS = 144
"""From this window area on, torch's fused attention beats softmax in scratch (measured at N = 64, 144, 256)."""


Tile = tuple[slice, slice]
"""Heads and rows of a window's logits."""


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """How a (B, H, W) map is cut: groups of `images`, in each ranges of windows that share one mask, in those tiles."""

    images: int
    windows: int
    ranges: list[tuple[slice, int]]
    """Consecutive windows, in the order of `to_qkv`, and the number of the mask they share."""
    tiles: list[Tile]
    """One of everything, or several, and then every range is a single window of a single image."""
    scratch: int
    """Logits of the largest piece."""
    regions: Tensor | None
    """(masks, N): tokens of a window attend inside a region; None without shift."""
    biases: Tensor | None
    """(masks, heads, N, N): the bias under each mask; None where that is more than `MASKED_BIASES`."""
    order: Tensor
    """(windows,): the row-major number, inside an image, of each window in the order of `to_qkv`."""
    to_qkv: Tensor
    from_qkv: Tensor
    to_heads: Tensor
    from_heads: Tensor

    def masked(self, bias: Tensor, mask: int, tile: Tile) -> Tensor:
        """(heads, rows, N) of a tile: `bias` under mask number `mask`."""
        if self.biases is not None:
            return self.biases[mask][tile]
        assert self.regions is not None
        rows, columns = self.regions[mask, tile[1], None], self.regions[mask]
        return bias[tile] + (rows != columns).to(bias.dtype).mul_(MASKED)


def _plan(qkv: Tensor, bias: Tensor, window_size: Sequence[int], shift_size: Sequence[int], dropout: float) -> _Plan:
    """Row numbers between image layout (image, token, q|k|v, head) and windows (q|k|v, window, image, head, token)."""
    B, H, W, _ = qkv.shape
    heads, N, _ = bias.shape
    window, shift = (window_size[0], window_size[1]), (shift_size[0], shift_size[1])
    windows, device = H * W // N, qkv.device
    order, counts, regions = torch.arange(windows, device=device), [windows], None
    biases: Tensor | None = bias[None]
    if any(shift):
        # Windows with the same seams share a mask. The regions follow from sizes alone: on the host, no device waits.
        kinds, kind, count = shift_regions((H, W), window, shift).unique(dim=0, return_inverse=True, return_counts=True)
        order, counts, regions = kind.argsort(stable=True).to(device), count.tolist(), kinds.to(device)
        fits = len(kinds) * bias.numel() <= MASKED_BIASES
        biases = bias + shift_mask(kinds, bias.dtype).to(device)[:, None] if fits else None
    limit = CHUNK if device.type == "cpu" else DEVICE_CHUNK
    if dropout:
        # Random words are of 8 bytes, and about six are computed with at a time.
        limit = max(1, limit // 16)
    pieces = max(1, limit // (heads * N * N))
    images = max(n for n in range(1, B + 1) if B % n == 0 and (n == 1 or n * max(counts) <= pieces))
    step = max(1, pieces // images)

    def rows(parts: int) -> Tensor:
        at = torch.arange(images * H * W * parts * heads, device=device).view(images, H, W, parts * heads)
        at = window_partition(at, window, shift).view(images, windows, N, parts, heads).permute(3, 1, 0, 4, 2)
        return (at if regions is None else at[:, order]).flatten()

    def inverse(rows: Tensor) -> Tensor:
        return torch.empty_like(rows).scatter_(0, rows, torch.arange(len(rows), device=device))

    ends = list(accumulate(counts))
    ranges = [
        (slice(at, min(at + step, end)), mask)
        for mask, (count, end) in enumerate(zip(counts, ends, strict=True))
        for at in range(end - count, end, step)
    ]
    tiles = _tiles(heads, N, limit)
    to_qkv, to_heads = rows(3), rows(1)
    return _Plan(
        images=images,
        windows=windows,
        ranges=ranges,
        tiles=tiles,
        scratch=min(step, max(counts)) * images * heads * N * N if len(tiles) == 1 else max(limit, N),
        regions=regions,
        biases=biases,
        order=order,
        to_qkv=to_qkv,
        from_qkv=inverse(to_qkv),
        to_heads=to_heads,
        from_heads=inverse(to_heads),
    )


def _tiles(heads: int, N: int, limit: int) -> list[Tile]:
    """The (heads, N, N) logits of a window in tiles of up to `limit`, cut by heads first; a row is the least."""
    if heads * N * N <= limit:
        return [(slice(None), slice(None))]
    some, rows = max(1, limit // (N * N)), max(1, min(N, limit // N))
    return [
        (slice(head, min(head + some, heads)), slice(row, min(row + rows, N)))
        for head in range(0, heads, some)
        for row in range(0, N, rows)
    ]


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
    """softmax(q kᵀ + bias) in `scratch`, (P * heads, rows, N); q is (P * heads, rows, d), bias (heads, rows, N)."""
    logits = scratch[: len(q) * bias[0].numel()].view(len(q), *bias.shape[1:])
    logits.view(-1, *bias.shape).copy_(bias)
    return torch.softmax(torch.baddbmm(logits, q, k.transpose(1, 2), out=logits), -1, out=logits)


def _kept(plan: _Plan, group: int, at: slice, tile: Tile, sizes: Size, rate: float, seed: Tensor) -> Tensor:
    """(P * heads, rows, N) bool: which probabilities of a piece dropout keeps; sizes: heads and N."""
    heads, N = (torch.arange(size, device=seed.device) for size in sizes)
    entry = N[tile[1], None] * len(N) + N
    image = torch.arange(plan.images, device=seed.device) + group * plan.images
    window = plan.order[at, None, None, None, None]
    return dropout_keep(seed, rate, entry, heads[tile[0], None, None], window, image[:, None, None, None]).flatten(0, 2)


@torch.library.custom_op("swin_scale::window_attention", mutates_args=())
def _forward(
    qkv: Tensor,
    scale: Tensor,
    bias: Tensor,
    window_size: list[int],
    shift_size: list[int],
    cosine: bool,
    dropout: float,
    seed: Tensor | None,
) -> Tensor:
    B, H, W, C3 = qkv.shape
    heads, N, _ = bias.shape
    d, dtype = C3 // 3 // heads, bias.dtype
    # Detached: torch's fused attention declines a bias that requires a gradient, even where none is recorded.
    bias = bias.detach()
    plan = _plan(qkv, bias, window_size, shift_size, dropout)
    n, groups = plan.images, B // plan.images
    rows, out = qkv.reshape(groups, -1, d), qkv.new_empty(groups, n * H * W, heads, d)
    parts = qkv.new_empty(3, plan.windows, n, heads, N, d, dtype=dtype)
    result = torch.empty_like(parts[0])
    fused = N >= SDPA_TOKENS and not dropout
    scratch = qkv.new_empty(0 if fused else plan.scratch, dtype=dtype)
    for group in range(groups):
        _move(rows[group], plan.to_qkv, parts)
        _scale_rows(parts[:2], scale, cosine)
        for at, mask in plan.ranges:
            for tile in plan.tiles:
                # A tile of all heads may be of many windows, one of some heads is of a single one: index 0 below.
                q, k, v = (part[at].flatten(0, 1)[:, tile[0]] for part in parts)
                q, o, masked = (
                    q[:, :, tile[1]],
                    result[at].flatten(0, 1)[:, tile[0], tile[1]],
                    plan.masked(bias, mask, tile),
                )
                if fused:
                    o.copy_(F.scaled_dot_product_attention(q, k, v, attn_mask=masked[None], scale=1.0))
                    continue
                q, k, v, o = (t.flatten(0, 1) for t in (q, k, v, o))
                p = _probabilities(q, k, masked, scratch)
                if dropout:
                    assert seed is not None, "dropout needs a seed"
                    p.mul_(_kept(plan, group, at, tile, (heads, N), dropout, seed)).div_(1 - dropout)
                torch.bmm(p, v, out=o)
        _move(result, plan.from_heads, out[group])
    return out.view(B, H, W, C3 // 3)


@torch.library.custom_op("swin_scale::window_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    qkv: Tensor,
    scale: Tensor,
    bias: Tensor,
    window_size: list[int],
    shift_size: list[int],
    cosine: bool,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    B, _, _, C3 = qkv.shape
    heads, N, _ = bias.shape
    d, dtype = C3 // 3 // heads, bias.dtype
    bias = bias.detach()
    plan = _plan(qkv, bias, window_size, shift_size, dropout)
    n, groups = plan.images, B // plan.images
    rows, grad_rows = qkv.reshape(groups, -1, d), grad.reshape(groups, -1, d)
    d_qkv, d_scale, d_bias = qkv.new_empty(rows.shape), torch.zeros_like(scale), torch.zeros_like(bias)
    parts = qkv.new_empty(3, plan.windows, n, heads, N, d, dtype=dtype)
    d_parts, d_out = torch.empty_like(parts), torch.empty_like(parts[0])
    scratch = qkv.new_empty(2, plan.scratch, dtype=dtype)
    ones = scratch.new_ones(1, plan.windows * n)
    for group in range(groups):
        _move(rows[group], plan.to_qkv, parts)
        _move(grad_rows[group], plan.to_heads, d_out)
        factor = _scale_rows(parts[:2], scale, cosine)
        for at, mask in plan.ranges:
            for some, these in plan.tiles:
                q, k, v = (part[at].flatten(0, 2)[some] for part in parts)
                dq, dk, dv = (part[at].flatten(0, 2)[some] for part in d_parts)
                q, dq, do = q[:, these], dq[:, these], d_out[at].flatten(0, 2)[some, these]
                p = _probabilities(q, k, plan.masked(bias, mask, (some, these)), scratch[0])
                ds = scratch[1, : p.numel()].view(p.shape)
                torch.bmm(do, v.transpose(1, 2), out=ds)
                weights = p
                if dropout:
                    assert seed is not None, "dropout needs a seed"
                    kept = _kept(plan, group, at, (some, these), (heads, N), dropout, seed)
                    ds.mul_(kept).div_(1 - dropout)
                    weights = (p * kept).div_(1 - dropout)
                first = not these.start
                _add_product(dv, weights.transpose(1, 2), do, first)
                torch.ops.aten._softmax_backward_data.out(ds, p, -1, dtype, grad_input=ds)
                if len(plan.tiles) == 1:
                    # The sum over windows as a product: 1.7x to 4x the speed of a reduction over a short outer axis.
                    d_bias.view(1, -1).addmm_(ones[:, : len(ds) // heads], ds.view(-1, d_bias.numel()))
                else:
                    d_bias[some, these].add_(ds)
                torch.bmm(ds, k, out=dq)
                _add_product(dk, ds.transpose(1, 2), q, first)
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


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total (+)= a b, for (P, ., .) matrices; the `first` time what `total` held counts for nothing."""
    if first:
        torch.bmm(a, b, out=total)
    else:
        total.baddbmm_(a, b)


@_forward.register_fake
def _(qkv, scale, bias, window_size, shift_size, cosine, dropout, seed):
    B, H, W, C3 = qkv.shape
    return qkv.new_empty(B, H, W, C3 // 3)


@_backward.register_fake
def _(grad, qkv, scale, bias, window_size, shift_size, cosine, dropout, seed):
    return torch.empty_like(qkv, memory_format=torch.contiguous_format), torch.empty_like(scale), torch.empty_like(bias)


def _keep(ctx, inputs, output) -> None:
    qkv, scale, bias, *ctx.static, seed = inputs
    ctx.save_for_backward(qkv, scale, bias, seed)


def _grads(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, seed = ctx.saved_tensors
    d_qkv, d_scale, d_bias = _backward(grad, *tensors, *ctx.static, seed)
    return d_qkv, d_scale, d_bias, None, None, None, None, None


_forward.register_autograd(_grads, setup_context=_keep)


def window_attention(
    qkv: Tensor,
    scale: Tensor,
    bias: Tensor,
    window_size: Size,
    shift_size: Size = (0, 0),
    cosine: bool = False,
    *,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """`reference.window_attention`, in pieces. First derivatives only."""
    return _forward(qkv, scale, bias, list(window_size), list(shift_size), cosine, dropout, seed)
