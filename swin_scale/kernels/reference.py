"""Every op in plain torch: the definition that faster versions are tested against.

Feature maps are (B, H, W, C), windows (B * nW, N, C) with N = window height x window width; windows are ordered
row-major inside an image and images are outermost. Sizes are (height, width) pairs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

Size = tuple[int, int]

MASKED = -100.0
"""Added to the logit of a pair that a shifted window joins across the image border (Swin, section 3.2).

Not -inf: the official models were trained with -100, and SwinV2 logits reach +-116, so it must be the same number.
"""

NORM_FLOOR = 1e-6
"""Rows of q and k shorter than this get no gradient: that of v / |v| grows as 1 / |v| and is NaN in fp16 at zero."""

WORD = 0xFFFFFFFF
"""The largest word of 32 bits; tensors hold words in int64."""


def window_partition(x: Tensor, window_size: Size, shift_size: Size = (0, 0)) -> Tensor:
    """(B, H, W, C) to windows (B * nW, N, C), after rolling the map by `-shift_size`. H and W must divide."""
    B, H, W, C = x.shape
    wh, ww = window_size
    if any(shift_size):
        x = x.roll((-shift_size[0], -shift_size[1]), (1, 2))
    return x.view(B, H // wh, wh, W // ww, ww, C).transpose(2, 3).reshape(-1, wh * ww, C)


def window_reverse(windows: Tensor, window_size: Size, shift_size: Size, hw: Size) -> Tensor:
    """Inverse of `window_partition`: (B * nW, N, C) back to (B, H, W, C) with (H, W) = `hw`."""
    (wh, ww), (H, W) = window_size, hw
    C = windows.shape[-1]
    x = windows.view(-1, H // wh, W // ww, wh, ww, C).transpose(2, 3).reshape(-1, H, W, C)
    return x.roll(shift_size, (1, 2)) if any(shift_size) else x


def shift_regions(hw: Size, window_size: Size, shift_size: Size, device: torch.device | None = None) -> Tensor:
    """Region of each token of the rolled map, (nW, N) int64: tokens attend to each other only within a region.

    Along an axis that is shifted there are three: before the last window, the last window up to the seam, after it.
    """
    rows, cols = (
        (at >= size - window).long() + (at >= size - shift).long() if shift else torch.zeros_like(at)
        for at, size, window, shift in (
            (torch.arange(size, device=device), size, window, shift)
            for size, window, shift in zip(hw, window_size, shift_size, strict=True)
        )
    )
    regions = (rows[:, None] * 3 + cols)[None, :, :, None]
    return window_partition(regions, window_size).squeeze(-1)


def shift_mask(regions: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """(nW, N) regions to the additive mask (nW, N, N): 0 inside a region, -100 between regions."""
    return (regions[:, :, None] != regions[:, None, :]).to(dtype).mul_(MASKED)


def unit_rows(x: Tensor) -> Tensor:
    """x / max(|x|, 1e-12) over the last axis; rows below `NORM_FLOOR` pass no gradient."""
    norm = x.detach().norm(dim=-1, keepdim=True)
    safe = torch.where(norm < NORM_FLOOR, x.detach(), x)
    return safe / torch.where(norm < NORM_FLOOR, norm, safe.norm(dim=-1, keepdim=True)).clamp_min(1e-12)


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
    """Self-attention inside (shifted) windows, from image layout to image layout.

    logits = q kᵀ · scale + bias (+ the shift mask), with q and k of unit length when `cosine` (SwinV2, section 3.2).

    Args:
        qkv: (B, H, W, 3C), q, k, v in this order, each split into `heads` groups of channels.
        scale: (heads, 1, 1), in the dtype to compute in (fp32 for half-precision models).
        bias: (heads, N, N), same dtype as `scale`.
        window_size, shift_size: pairs; H and W are multiples of the window.
        cosine: normalise q and k.
        dropout: rate in [0, 1) at which entries of the softmax are dropped, by `dropout_keep`; the others are divided
            by one less the rate.
        seed: () int64 on the device of `qkv`; needed where `dropout` is above 0.

    Returns: (B, H, W, C) in the dtype of `qkv`.
    """
    B, H, W, C3 = qkv.shape
    heads, N, _ = bias.shape
    windows = window_partition(qkv, window_size, shift_size).to(bias.dtype)
    q, k, v = windows.view(-1, N, 3, heads, C3 // 3 // heads).permute(2, 0, 3, 1, 4).unbind(0)
    if cosine:
        q, k = unit_rows(q), unit_rows(k)
    logits = (q * scale) @ k.transpose(-2, -1) + bias
    if any(shift_size):
        mask = shift_mask(shift_regions((H, W), window_size, shift_size, qkv.device), bias.dtype)
        logits = (logits.view(B, -1, heads, N, N) + mask[:, None]).view_as(logits)
    p = logits.softmax(-1)
    if dropout:
        assert seed is not None, "dropout needs a seed"
        entry, head, window, image = (torch.arange(n, device=qkv.device) for n in (N * N, heads, H * W // N, B))
        head, window, image = head.view(-1, 1, 1), window.view(-1, 1, 1, 1), image.view(-1, 1, 1, 1, 1)
        p = p * dropout_keep(seed, dropout, entry.view(N, N), head, window, image).view_as(p) / (1 - dropout)
    out = (p @ v).transpose(1, 2).reshape(-1, N, C3 // 3)
    return window_reverse(out, window_size, shift_size, (H, W)).to(qkv.dtype)


def dropout_keep(seed: Tensor, rate: float, entry: Tensor, head: Tensor, window: Tensor, image: Tensor) -> Tensor:
    """Which entries of softmax matrices attention dropout keeps: a pure function of the seed and of where they are.

    The first word of Philox at counter (entry, head, window, image), as uint32, is at least floor(rate · 2³²).

    Args:
        seed: () int64; its low and high 32 bits are the key.
        rate: of dropping, in [0, 1).
        entry, head, window, image: int64 tensors that broadcast; entry = query · N + key, windows are numbered inside
            an image.

    Returns: bool, of the common shape.
    """
    words = philox_4x32((seed & WORD, seed >> 32 & WORD), (entry, head, window, image))
    return words[0] >= int(rate * 2**32)


def philox_4x32(key: tuple[Tensor, Tensor], counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four random words per counter by Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3").

    All tensors are int64, hold values below 2³² and broadcast. Products wrap modulo 2⁶⁴, which leaves their bits right.
    """
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32 & WORD) ^ c1 ^ k0, b & WORD, (a >> 32 & WORD) ^ c3 ^ k1, a & WORD
        k0, k1 = k0 + 0x9E3779B9 & WORD, k1 + 0xBB67AE85 & WORD
    return c0, c1, c2, c3


# Residuals, norms and patch merging.


def residual_norm(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, keep: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """x + keep · LN(branch): the residual branch of SwinV2, normed at its end (SwinV2, section 3.1).

    Args:
        x, branch: (B, ..., C).
        weight, bias: (C,), of the LayerNorm over C.
        keep: (B,) fp32, stochastic depth: 0 for a dropped sample, 1 / (keep probability) for another; None keeps all.
            It multiplies, so a branch that is not finite is not hidden by dropping it.

    Returns: the shape and dtype of `x`.
    """
    return _add(x, _layer_norm(branch, weight, bias, eps), keep)


def add_norm(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, keep: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """(total, LN(total)) with total = x + keep · branch: a residual sum and the norm that opens the next branch.

    Arguments as in `residual_norm`. The norm is that of the total as returned, in the dtype of `x`.
    """
    total = _add(x, branch, keep)
    return total, _layer_norm(total, weight, bias, eps).to(x.dtype)


def patch_merge(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """(B, H, W, C) to (B, H/2, W/2, 4C): each 2 x 2 neighbourhood into one token; H and W are even.

    Channel groups run down a column first: (0, 0), (1, 0), (0, 1), (1, 1) as (row, column). Normed over 4C by `weight`
    and `bias` (4C,) where they are given (Swin V1).
    """
    x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2, 5).flatten(3)
    return x if weight is None or bias is None else _layer_norm(x, weight, bias, eps).to(x.dtype)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last axis in the wider dtype of `x` and `weight`; statistics are fp32 at least."""
    dtype = torch.promote_types(x.dtype, weight.dtype)
    return F.layer_norm(x.to(dtype), weight.shape, weight.to(dtype), bias.to(dtype), eps)


def _add(x: Tensor, branch: Tensor, keep: Tensor | None) -> Tensor:
    """x + keep · branch in the dtype of `x`; keep: (B,) or None."""
    if keep is None:
        return (x + branch).to(x.dtype)
    return torch.addcmul(x, branch, keep.view(-1, *[1] * (x.ndim - 1))).to(x.dtype)


# Tokens to the rows of experts and back. T tokens, K choices per token, R rows kept of the T * K choices, D channels.


def permute(x_TD: Tensor, choice_R: Tensor, slot_TK: Tensor) -> Tensor:
    """The row of each token, once for each of its choices that was kept: (R, D).

    Args:
        choice_R: (R,) int64, the choice, as token * K + k, that a row serves.
        slot_TK: (T, K) int64, the row that serves a choice, -1 where it was dropped. The inverse of `choice_R`.

    The gradient of a token is the sum of its rows', taken by gather: no order of summation depends on timing.
    """
    return _Permute.apply(x_TD, choice_R, slot_TK)


def unpermute(y_RD: Tensor, gate_TK: Tensor, choice_R: Tensor, slot_TK: Tensor) -> Tensor:
    """sum over k of gate_TK[:, k] times the row that serves the choice: (T, D) in the dtype of `y_RD`.

    Summed in the wider dtype of `y_RD` and `gate_TK`. Dropped choices add nothing, and their gates have no gradient.
    """
    return _Unpermute.apply(y_RD, gate_TK, choice_R, slot_TK)


def _take(x_RD: Tensor, slot_T: Tensor) -> Tensor:
    """Rows `slot_T` of x_RD, (T, D); any row, 0 if there is none, where the slot is -1."""
    if len(x_RD) == 0:
        return x_RD.new_zeros(len(slot_T), x_RD.shape[1])
    return x_RD.index_select(0, slot_T.clamp_min(0))


class _Permute(Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, choice_R: Tensor, slot_TK: Tensor) -> Tensor:
        ctx.save_for_backward(slot_TK)
        K = slot_TK.shape[1]
        return x_TD.index_select(0, choice_R if K == 1 else choice_R // K)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None]:
        (slot_TK,) = ctx.saved_tensors
        wide = torch.promote_types(grad_RD.dtype, torch.float32) if slot_TK.shape[1] > 1 else grad_RD.dtype
        total: Tensor | None = None
        for slot_T in slot_TK.unbind(1):
            part = _take(grad_RD, slot_T).to(wide)
            if len(grad_RD) < slot_TK.numel():
                part.masked_fill_(slot_T[:, None] < 0, 0)
            total = part if total is None else total.add_(part)
        assert total is not None, "every token has at least one choice"
        return total.to(grad_RD.dtype), None, None


class _Unpermute(Function):
    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, gate_TK: Tensor, choice_R: Tensor, slot_TK: Tensor) -> Tensor:
        ctx.save_for_backward(y_RD, gate_TK, choice_R, slot_TK)
        wide = torch.promote_types(y_RD.dtype, gate_TK.dtype)
        weight_TK = gate_TK.to(wide).masked_fill(slot_TK < 0, 0)
        total: Tensor | None = None
        for weight_T, slot_T in zip(weight_TK.unbind(1), slot_TK.unbind(1)):
            row_TD = _take(y_RD, slot_T).to(wide)
            if len(y_RD) < slot_TK.numel():  # by weight alone, a row that is not finite would spread
                row_TD.masked_fill_(slot_T[:, None] < 0, 0)
            total = row_TD.mul_(weight_T[:, None]) if total is None else total.addcmul_(row_TD, weight_T[:, None])
        assert total is not None, "every token has at least one choice"
        return total.to(y_RD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y_RD, gate_TK, choice_R, slot_TK = ctx.saved_tensors
        wide = torch.promote_types(y_RD.dtype, gate_TK.dtype)
        grad_RD = grad_TD.index_select(0, choice_R // gate_TK.shape[1]).to(wide)
        grad_R = torch.linalg.vecdot(grad_RD, y_RD.to(wide))
        grad_gate_TK = _take(grad_R[:, None], slot_TK.flatten()).view(slot_TK.shape).masked_fill_(slot_TK < 0, 0)
        gate_R = gate_TK.to(wide).flatten()[choice_R]
        return grad_RD.mul_(gate_R[:, None]).to(y_RD.dtype), grad_gate_TK.to(gate_TK.dtype), None, None
