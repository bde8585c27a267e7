"""The ops that models call: each goes to a Triton kernel or to torch, as `choice` decides for its `kernels` mode.

Files with Triton kernels are imported only when one is to run. Both versions of an op compute what `reference` defines.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from swin_scale.kernels import apex, chunked, reference
from swin_scale.kernels.choice import Mode, use_triton
from swin_scale.kernels.reference import Size

LayerNormBy = Literal["torch", "apex"]
"""Whose LayerNorm is used where no Triton kernel serves."""

ATTENTION_OPS = ("swin_scale::window_attention", "swin_scale::fused_window_attention")
"""Names of the operators whose outputs selective activation checkpointing keeps. Names, because the second is only
registered once it has been used."""


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
    kernels: Mode = "auto",
) -> Tensor:
    """`reference.window_attention`: (B, H, W, 3C) to (B, H, W, C), with gradients for qkv, scale and bias.

    Raises UserError where `kernels` is `triton` and Triton cannot serve.
    """
    heads, tokens, _ = bias.shape
    head_dim = qkv.shape[-1] // 3 // heads
    if use_triton(kernels, qkv.device, qkv.dtype, head_dim=head_dim, tokens=tokens):
        from swin_scale.kernels.attention import fused_window_attention

        return fused_window_attention(
            qkv, scale, bias, window_size, shift_size, cosine, dropout=dropout, seed=seed, deterministic=True
        )
    return chunked.window_attention(qkv, scale, bias, window_size, shift_size, cosine, dropout=dropout, seed=seed)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, *, by: LayerNormBy = "torch") -> Tensor:
    """LayerNorm of x (..., C) by weight and bias (C,), in the dtype of x with statistics in fp32."""
    if by == "apex":
        return apex.layer_norm(x, weight, bias, eps)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def residual(x: Tensor, branch: Tensor, keep: Tensor | None = None) -> Tensor:
    """x + keep · branch, (B, ..., C); keep: (B,) or None, see `residual_norm`."""
    if keep is None:
        return x + branch
    return torch.addcmul(x, branch, keep.to(branch.dtype).view(-1, *[1] * (branch.ndim - 1)))


def residual_norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    keep: Tensor | None = None,
    eps: float = 1e-5,
    *,
    kernels: Mode = "auto",
    by: LayerNormBy = "torch",
) -> Tensor:
    """x + keep · LayerNorm(branch), the residual post-norm (SwinV2, section 3.1).

    Args:
        x, branch: (B, ..., C).
        weight, bias: (C,).
        keep: (B,) fp32, 0 where drop-path drops the sample's branch, else one over the keep probability; None: all 1.
        by: whose LayerNorm, where Triton does not serve.
    """
    if use_triton(kernels, x.device, x.dtype):
        from swin_scale.kernels.norms import fused_residual_norm

        return fused_residual_norm(x, branch, weight, bias, keep, eps)
    return residual(x, layer_norm(branch, weight, bias, eps, by=by), keep)


def add_norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    keep: Tensor | None = None,
    eps: float = 1e-5,
    *,
    kernels: Mode = "auto",
    by: LayerNormBy = "torch",
) -> tuple[Tensor, Tensor]:
    """(total, LayerNorm(total)) with total = x + keep · branch: a residual and the pre-norm that reads it.

    Arguments as of `residual_norm`.
    """
    if use_triton(kernels, x.device, x.dtype):
        from swin_scale.kernels.norms import fused_add_norm

        return fused_add_norm(x, branch, weight, bias, keep, eps)
    total = residual(x, branch, keep)
    return total, layer_norm(total, weight, bias, eps, by=by)


def patch_merge(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    kernels: Mode = "auto",
    by: LayerNormBy = "torch",
) -> Tensor:
    """(B, H, W, C) to (B, H/2, W/2, 4C): each 2 x 2 neighbourhood as one row, normed where `weight` (4C,) is given.

    Channel groups run down a column first: (0, 0), (1, 0), (0, 1), (1, 1) as (row, column).
    """
    if use_triton(kernels, x.device, x.dtype):
        from swin_scale.kernels.norms import fused_patch_merge

        return fused_patch_merge(x, weight, bias, eps)
    B, H, W, C = x.shape
    x = x.view(B, H // 2, 2, W // 2, 2, C).permute(0, 1, 3, 4, 2, 5).reshape(B, H // 2, W // 2, 4 * C)
    return x if weight is None or bias is None else layer_norm(x, weight, bias, eps, by=by)


def permute(x_TD: Tensor, choice_R: Tensor, slot_TK: Tensor, *, kernels: Mode = "auto") -> Tensor:
    """The rows (R, D) that go to experts: row r is the token of choice `choice_R[r]`; see `moe.dispatch`."""
    if use_triton(kernels, x_TD.device, x_TD.dtype):
        from swin_scale.kernels.permutation import fused_permute

        return fused_permute(x_TD, choice_R, slot_TK)
    return reference.permute(x_TD, choice_R, slot_TK)


def unpermute(y_RD: Tensor, gate_TK: Tensor, choice_R: Tensor, slot_TK: Tensor, *, kernels: Mode = "auto") -> Tensor:
    """Each token's gate-weighted sum of the rows that serve its choices, (T, D) in the dtype of `y_RD`."""
    if use_triton(kernels, y_RD.device, y_RD.dtype):
        from swin_scale.kernels.permutation import fused_unpermute

        return fused_unpermute(y_RD, gate_TK, choice_R, slot_TK)
    return reference.unpermute(y_RD, gate_TK, choice_R, slot_TK)
