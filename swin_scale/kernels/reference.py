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
    words = philox_4x32((seed & _WORD, seed >> 32 & _WORD), (entry, head, window, image))
    return words[0] >= int(rate * 2**32)


_WORD = 0xFFFFFFFF


def philox_4x32(key: tuple[Tensor, Tensor], counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four random words per counter by Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3").

    All tensors are int64, hold values below 2³² and broadcast. Products wrap modulo 2⁶⁴, which leaves their bits right.
    """
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32 & _WORD) ^ c1 ^ k0, b & _WORD, (a >> 32 & _WORD) ^ c3 ^ k1, a & _WORD
        k0, k1 = k0 + 0x9E3779B9 & _WORD, k1 + 0xBB67AE85 & _WORD
    return c0, c1, c2, c3
