"""Window attention fused into one Triton kernel each way: its registered operator and the launch of forward.

`fused_window_attention` computes what `reference.window_attention` defines. Between forward and backward it keeps its
inputs, its output and, for windows of more than `tuning.WHOLE_WINDOW` tokens, the log-sum-exp of every row of logits,
(windows, heads, N) fp32 in base 2; nothing of size N x N. Backward is the operator of `attention_backward`.

Importing this file imports no Triton.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from swin_scale.kernels import tuning
from swin_scale.kernels.attention_backward import attention_backward, shared_arguments
from swin_scale.kernels.reference import Size


@torch.library.custom_op("swin_scale::fused_window_attention", mutates_args=())
def _forward(
    qkv: Tensor,
    scale: Tensor,
    bias: Tensor,
    window_size: list[int],
    shift_size: list[int],
    cosine: bool,
    dropout: float,
    seed: Tensor | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    out, log_sum = empty_outputs(qkv, bias)
    launch_forward(qkv, scale, bias, out, log_sum, window_size, shift_size, cosine, dropout, seed)
    return out, log_sum


def empty_outputs(qkv: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """(output, log-sum-exp), not yet written; the second is empty for windows that are one tile."""
    B, H, W, C3 = qkv.shape
    heads, N, _ = bias.shape
    rows = (B * H * W // N, heads, N) if N > tuning.WHOLE_WINDOW else (0, heads, N)
    return qkv.new_empty(B, H, W, C3 // 3), qkv.new_empty(rows, dtype=torch.float32)


def launch_forward(
    qkv: Tensor,
    scale: Tensor,
    bias: Tensor,
    out: Tensor,
    log_sum: Tensor,
    window_size: Sequence[int],
    shift_size: Sequence[int],
    cosine: bool,
    dropout: float,
    seed: Tensor | None,
) -> None:
    """Launch the kernel that fills `out` and `log_sum`; everything contiguous, arguments as of the operator."""
    from swin_scale.kernels.attention_forward import attend_rows, attend_windows, pack_bias

    B, H, W, C3 = qkv.shape
    heads, N, _ = bias.shape
    head_dim = C3 // 3 // heads
    windows = B * H * W // N
    chip = tuning.chip_of(qkv.device)
    tiles = tuning.tiles("forward", tuning.Shape(N, head_dim, qkv.dtype), chip)
    arguments = {
        "out": out,
        **shared_arguments(qkv, scale, heads, window_size, shift_size, cosine, dropout, seed),
        **(tiles.for_dropout() if dropout else tiles).options(),
    }
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(qkv):
        if N <= tuning.WHOLE_WINDOW:
            slots = tuning.window_slots(windows, heads, chip, per_processor=32 // tiles.warps)
            attend_windows[(slots * heads,)](
                bias=bias, slots=slots, BLOCK=tiles.rows, SHIFTED=any(shift_size), **arguments
            )
        else:
            group = tuning.window_group(windows, 2 * N * head_dim * qkv.element_size(), chip)
            down, across = -(-N // tiles.rows), -(-N // tiles.columns)
            block = {"BLOCK_R": tiles.rows, "BLOCK_C": tiles.columns}
            packed = bias.new_empty(heads, down, across, tiles.rows * tiles.columns)
            pack_bias[(heads * down * across,)](bias, packed, N, **block)
            grid = -(-windows // group) * heads * down * group
            attend_rows[(grid,)](packed=packed, lse=log_sum, group=group, **block, **arguments)


@_forward.register_fake
def _(qkv, scale, bias, window_size, shift_size, cosine, dropout, seed, deterministic):
    return empty_outputs(qkv, bias)


def _keep(ctx, inputs, output) -> None:
    qkv, scale, bias, *ctx.static, seed, ctx.deterministic = inputs
    ctx.save_for_backward(qkv, scale, bias, *output, seed)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _grads(ctx, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    constants = (None,) * 6
    if grad is None:
        return None, None, None, *constants
    *tensors, seed = ctx.saved_tensors
    gradients = attention_backward(grad.contiguous(), *tensors, *ctx.static, seed, ctx.deterministic)
    return *gradients, *constants


FUSED_ATTENTION_OP = torch.ops.swin_scale.fused_window_attention.default
"""The operator as selective activation checkpointing sees it: its outputs, log-sum-exp included, are worth keeping."""

_forward.register_autograd(_grads, setup_context=_keep)


def fused_window_attention(
    qkv: Tensor,
    scale: Tensor,
    bias: Tensor,
    window_size: Size,
    shift_size: Size = (0, 0),
    cosine: bool = False,
    *,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    deterministic: bool = True,
) -> Tensor:
    """`reference.window_attention` by Triton kernels. First derivatives, for qkv, scale and bias.

    Logits, norms, softmax and sums are fp32, products of matrices in the dtype of `qkv`, fp32 ones in full precision.

    Args:
        qkv: (B, H, W, 3C) in fp16, bf16 or fp32; head_dim 16 to 128, N up to 1024 (`choice.why_not_triton`).
        scale: (heads, 1, 1), bias: (heads, N, N), computed with in fp32.
        deterministic: sum the gradient of `bias` over windows in a fixed order; False adds atomically, in any order.

    Returns: (B, H, W, C) in the dtype of `qkv`.
    """
    _, H, W, _ = qkv.shape
    assert H % window_size[0] == 0 and W % window_size[1] == 0, f"a map of {H} x {W} in windows of {window_size}"
    assert bias.shape[1] == window_size[0] * window_size[1], f"bias {tuple(bias.shape)} for windows of {window_size}"
    assert not dropout or seed is not None, "dropout needs a seed"
    scale, bias = scale.to(torch.float32).contiguous(), bias.to(torch.float32).contiguous()
    static = list(window_size), list(shift_size), cosine, dropout, seed if dropout else None, deterministic
    return _forward(qkv.contiguous(), scale, bias, *static)[0]
