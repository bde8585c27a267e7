"""Residual norms and patch merging in one pass each way: operators around the Triton kernels of `norm_kernels`.

Each computes what its namesake in `reference` does. Forward keeps mean and 1 / standard deviation of each row, two fp32
numbers, for backward; the normed values are computed again. Gradients of weight and bias are partial sums of a number
of programs that follows from shape and chip alone, added in order: the same from run to run. First derivatives only.

Inputs are made contiguous where they are not. Nothing waits for the device.
"""

from typing import Any

import torch
from torch import Tensor

from swin_scale.kernels.tuning import chip_of

MAX_BLOCK = 4096
"""Channels a program holds at once; longer rows are read in pieces."""

VALUES_PER_THREAD = 16
"""Of each tile of a forward pass a thread holds: loads of 16 bytes, two or more of them in flight."""

BACKWARD_VALUES = 8
"""The same of a backward pass, which has five tiles in registers: 16 a thread took 128 and more of them, or spilled."""

WARPS_PER_PROCESSOR = 24
"""A backward pass has programs enough for this many warps on each multiprocessor, where 80 registers a thread fit."""

BACKWARD_REGISTERS = 128
"""The most a thread may have there. Given a limit, the assembler keeps to what it needs, about 80; without one it was
seen to spill a few bytes for the sake of more programs at a time."""


def fused_residual_norm(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, keep: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """`reference.residual_norm`: x + keep · LN(branch) for x, branch (B, ..., C). `keep` gets no gradient."""
    return _residual_norm(x, branch, weight, bias, keep, eps)[0]


def fused_add_norm(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, keep: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """`reference.add_norm`: (total, LN(total)), total = x + keep · branch, for x, branch (B, ..., C).

    `keep` gets no gradient.
    """
    total, normed, _ = _add_norm(x, branch, weight, bias, keep, eps)
    return total, normed


def fused_patch_merge(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """`reference.patch_merge`: (B, H, W, C) to (B, H/2, W/2, 4C), normed where weight and bias (4C,) are given."""
    if weight is None or bias is None:
        return _merge(x)
    return _merge_norm(x, weight, bias, eps)[0]


# Launching. Tensors on the meta device do, for tests that compile ahead of time.


def tile(C: int, values: int) -> tuple[int, int, int]:
    """(rows, channels, warps) of a program for rows of C channels and so many values per thread."""
    block_c = min(1 << (C - 1).bit_length(), MAX_BLOCK)
    warps = max(block_c // (32 * values), 4)
    return max(warps * 32 * values // block_c, 1), block_c, warps


def launch_forward(
    source: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    keep: Tensor | None,
    total: Tensor | None,
    y: Tensor,
    stats: Tensor,
    eps: float,
    half_width: int | None = None,
) -> None:
    """Fill `y`, `stats` (2, R) and `total`; see `norm_kernels.forward`. All are contiguous."""
    from swin_scale.kernels import norm_kernels

    (C,), rows = weight.shape, stats.shape[1]
    assert skip is None or skip.shape == source.shape, "residual and branch have one shape"
    assert y.numel() == source.numel() == rows * C and bias.shape == weight.shape, "one weight and bias per channel"
    assert keep is None or keep.shape == y.shape[:1], "one keep per sample"
    if rows == 0:
        return
    block_r, block_c, warps = tile(C, VALUES_PER_THREAD)
    with torch.cuda.device_of(y):
        norm_kernels.forward[(_ceil(rows, block_r),)](
            source,
            skip,
            weight,
            bias,
            keep,
            total,
            y,
            stats,
            rows,
            rows // len(y),
            half_width,
            eps,
            C=C,
            BLOCK_R=block_r,
            BLOCK_C=block_c,
            num_warps=warps,
        )


def launch_backward(
    grad: Tensor,
    grad_total: Tensor | None,
    source: Tensor,
    weight: Tensor,
    keep: Tensor | None,
    stats: Tensor,
    d_source: Tensor,
    d_branch: Tensor | None,
    half_width: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Fill `d_source` and `d_branch`; returns the gradients of weight and bias. All are contiguous."""
    from swin_scale.kernels import norm_kernels

    (C,), rows = weight.shape, stats.shape[1]
    if rows == 0:
        return torch.zeros_like(weight), torch.zeros_like(weight)
    block_r, block_c, warps = tile(C, BACKWARD_VALUES)
    programs = min(_ceil(rows, block_r), chip_of(grad.device).processors * WARPS_PER_PROCESSOR // warps)
    partial = grad.new_empty(2, programs, C, dtype=torch.float32)
    d_weight, d_bias = torch.empty_like(weight), torch.empty_like(weight)
    with torch.cuda.device_of(grad):
        norm_kernels.backward[(programs, _ceil(C, block_c))](
            grad,
            grad_total,
            source,
            weight,
            keep,
            stats,
            d_source,
            d_branch,
            partial,
            rows,
            rows // len(grad),
            half_width,
            C=C,
            BLOCK_R=block_r,
            BLOCK_C=block_c,
            num_warps=warps,
            maxnreg=BACKWARD_REGISTERS,
        )
        norm_kernels.add_partials[(_ceil(C, 64), 2)](
            partial, d_weight, d_bias, programs, C, BLOCK_P=32, BLOCK_C=64, num_warps=4
        )
    return d_weight, d_bias


def launch_move(tokens: Tensor, merged: Tensor, *, merge: bool) -> None:
    """Copy `tokens` (B, H, W, C) to `merged` (B, H/2, W/2, 4C), or back if not `merge`."""
    from swin_scale.kernels import norm_kernels

    *_, half_width, C = merged.shape
    rows = merged.numel() // C
    block_r, block_c, warps = tile(C, VALUES_PER_THREAD)
    if rows == 0:
        return
    with torch.cuda.device_of(merged):
        norm_kernels.move_patches[(_ceil(rows, block_r), _ceil(C, block_c))](
            tokens, merged, rows, half_width, C=C, BLOCK_R=block_r, BLOCK_C=block_c, MERGE=merge, num_warps=warps
        )


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _stats_of(x: Tensor) -> Tensor:
    """(2, R) fp32 for x (..., C)."""
    return x.new_empty(2, x.numel() // x.shape[-1], dtype=torch.float32)


def _merged(x: Tensor) -> Tensor:
    B, H, W, C = x.shape
    assert H % 2 == W % 2 == 0, "patches are merged two by two"
    return x.new_empty(B, H // 2, W // 2, 4 * C)


def _contiguous(*tensors: Tensor | None) -> tuple[Any, ...]:
    return tuple(None if t is None else t.contiguous() for t in tensors)


# Post-norm.


@torch.library.custom_op("swin_scale::fused_residual_norm", mutates_args=())
def _residual_norm(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, keep: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    x, branch, weight, bias, keep = _contiguous(x, branch, weight, bias, keep)
    y, stats = _like(x), _stats_of(branch)
    launch_forward(branch, x, weight, bias, keep, None, y, stats, eps)
    return y, stats


@torch.library.custom_op("swin_scale::fused_residual_norm_backward", mutates_args=())
def _residual_norm_backward(
    grad: Tensor, branch: Tensor, weight: Tensor, keep: Tensor | None, stats: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad, branch, weight, keep = _contiguous(grad, branch, weight, keep)
    d_branch = _like(branch)
    return d_branch, *launch_backward(grad, None, branch, weight, keep, stats, d_branch, None)


@_residual_norm.register_fake
def _(x, branch, weight, bias, keep, eps):
    return _like(x), _stats_of(branch)


@_residual_norm_backward.register_fake
def _(grad, branch, weight, keep, stats):
    return _like(branch), _like(weight), _like(weight)


def _keep_residual_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, branch, weight, _, keep, _ = inputs
    ctx.save_for_backward(branch, weight, keep, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _residual_norm_grads(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    # The gradient of x is that of y, the very tensor: no kernel, no copy.
    return grad, *_residual_norm_backward(grad, *ctx.saved_tensors), None, None


_residual_norm.register_autograd(_residual_norm_grads, setup_context=_keep_residual_norm)


# Pre-norm.


@torch.library.custom_op("swin_scale::fused_add_norm", mutates_args=())
def _add_norm(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, keep: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    x, branch, weight, bias, keep = _contiguous(x, branch, weight, bias, keep)
    total, normed, stats = _like(x), _like(x), _stats_of(x)
    launch_forward(branch, x, weight, bias, keep, total, normed, stats, eps)
    return total, normed, stats


@torch.library.custom_op("swin_scale::fused_add_norm_backward", mutates_args=())
def _add_norm_backward(
    grad_total: Tensor, grad: Tensor, total: Tensor, weight: Tensor, keep: Tensor | None, stats: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, of branch (empty without `keep`: that of x), of weight and of bias."""
    grad_total, grad, weight, keep = _contiguous(grad_total, grad, weight, keep)
    d_x = _like(total)
    d_branch = None if keep is None else _like(total)
    d_weight, d_bias = launch_backward(grad, grad_total, total, weight, keep, stats, d_x, d_branch)
    return d_x, total.new_empty(0) if d_branch is None else d_branch, d_weight, d_bias


@_add_norm.register_fake
def _(x, branch, weight, bias, keep, eps):
    return _like(x), _like(x), _stats_of(x)


@_add_norm_backward.register_fake
def _(grad_total, grad, total, weight, keep, stats):
    return _like(total), total.new_empty(0) if keep is None else _like(total), _like(weight), _like(weight)


def _keep_add_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, _, weight, _, keep, _ = inputs
    total, _, stats = output
    ctx.save_for_backward(total, weight, keep, stats)
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)


def _add_norm_grads(ctx: Any, grad_total: Tensor | None, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    total, weight, keep, stats = ctx.saved_tensors
    grad_total = torch.zeros_like(total) if grad_total is None else grad_total
    grad = torch.zeros_like(total) if grad is None else grad
    d_x, d_branch, d_weight, d_bias = _add_norm_backward(grad_total, grad, total, weight, keep, stats)
    return d_x, d_x if keep is None else d_branch, d_weight, d_bias, None, None


_add_norm.register_autograd(_add_norm_grads, setup_context=_keep_add_norm)


# Patch merging, with a norm and without.


@torch.library.custom_op("swin_scale::fused_patch_merge_norm", mutates_args=())
def _merge_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x, weight, bias = _contiguous(x, weight, bias)
    y = _merged(x)
    stats = _stats_of(y)
    launch_forward(x, None, weight, bias, None, None, y, stats, eps, half_width=y.shape[2])
    return y, stats


@torch.library.custom_op("swin_scale::fused_patch_merge_norm_backward", mutates_args=())
def _merge_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, stats: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    grad, x, weight = _contiguous(grad, x, weight)
    d_x = _like(x)
    return d_x, *launch_backward(grad, None, x, weight, None, stats, d_x, None, half_width=grad.shape[2])


@torch.library.custom_op("swin_scale::fused_patch_merge", mutates_args=())
def _merge(x: Tensor) -> Tensor:
    y = _merged(x)
    launch_move(x.contiguous(), y, merge=True)
    return y


@torch.library.custom_op("swin_scale::fused_patch_split", mutates_args=())
def _split(y: Tensor) -> Tensor:
    """The inverse of `_merge`, and its gradient."""
    x = _unmerged(y)
    launch_move(x, y.contiguous(), merge=False)
    return x


def _unmerged(y: Tensor) -> Tensor:
    B, half_height, half_width, C = y.shape
    return y.new_empty(B, 2 * half_height, 2 * half_width, C // 4)


@_merge_norm.register_fake
def _(x, weight, bias, eps):
    y = _merged(x)
    return y, _stats_of(y)


@_merge_norm_backward.register_fake
def _(grad, x, weight, stats):
    return _like(x), _like(weight), _like(weight)


_merge.register_fake(_merged)
_split.register_fake(_unmerged)


def _keep_merge_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, _ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _merge_norm_grads(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    return *_merge_norm_backward(grad, *ctx.saved_tensors), None


_merge_norm.register_autograd(_merge_norm_grads, setup_context=_keep_merge_norm)
_merge.register_autograd(lambda ctx, grad: _split(grad))
_split.register_autograd(lambda ctx, grad: _merge(grad))
