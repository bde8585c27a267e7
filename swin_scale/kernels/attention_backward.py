"""Backward of the fused window attention: which kernels run, on what grid, and how partial sums become one.

The gradient of the bias is a sum over all windows of the batch. Each program keeps the sum over its own windows and
writes it once; the partial sums are then added in the order of programs, whose number follows from shape and chip
alone. So two runs give the same bits. `deterministic=False` adds with atomics instead and needs no partial sums.

It is an operator of its own, so that tracing and compilation see one opaque node. `attention_gradients` holds the
kernels and the formulae; it imports Triton and is imported when one is to run.
"""

import torch
from torch import Tensor

from swin_scale.kernels.tuning import WHOLE_WINDOW, Shape, Tiles, chip_of, power_of_two, tiles, window_slots


@torch.library.custom_op("swin_scale::fused_window_attention_backward", mutates_args=())
def attention_backward(
    grad: Tensor,
    qkv: Tensor,
    scale: Tensor,
    bias: Tensor,
    out: Tensor,
    lse: Tensor,
    window_size: list[int],
    shift_size: list[int],
    cosine: bool,
    dropout: float,
    seed: Tensor | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `reference.window_attention`, from what its fused forward returned.

    Args:
        grad: (B, H, W, C), gradient of `out`, in the dtype of `qkv`.
        qkv, scale, bias, window_size, shift_size, cosine, dropout, seed: as given to forward.
        out: (B, H, W, C), the result of forward.
        lse: (windows, heads, N) fp32, log2 of the sum of 2 to the logits in base 2; unused, so may be empty, where
            windows have at most 64 tokens.
        deterministic: add partial sums of the bias gradient in a fixed order, not with atomics.

    Returns: d_qkv (B, H, W, 3C) in the dtype of `qkv`; d_scale (heads, 1, 1) and d_bias (heads, N, N) in fp32.
    """
    return launch(
        grad, qkv, scale, bias, out, lse, window_size, shift_size, cosine, dropout, seed, deterministic=deterministic
    )


@attention_backward.register_fake
def _(grad, qkv, scale, bias, out, lse, window_size, shift_size, cosine, dropout, seed, deterministic):
    return torch.empty_like(qkv, memory_format=torch.contiguous_format), torch.empty_like(scale), torch.empty_like(bias)


def launch(
    grad: Tensor,
    qkv: Tensor,
    scale: Tensor,
    bias: Tensor,
    out: Tensor,
    lse: Tensor,
    window_size: list[int],
    shift_size: list[int],
    cosine: bool,
    dropout: float,
    seed: Tensor | None,
    *,
    deterministic: bool = True,
    slots: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`attention_backward` without the operator around it: meta tensors serve to record its launches.

    Args:
        slots: programs that share the windows of a head (and of a block of rows); None: as `tuning` has it.
    """
    from swin_scale.kernels.attention_gradients import key_rows, query_rows, whole_windows

    (B, H, W, C3), (heads, N, _), (WH, WW) = qkv.shape, bias.shape, window_size
    windows, head_dim, chip = B * H * W // N, C3 // 3 // heads, chip_of(qkv.device)
    grad, qkv, scale, bias = grad.contiguous(), qkv.contiguous(), scale.contiguous(), bias.contiguous()
    shape = Shape(N, head_dim, qkv.dtype)
    tile = tiles("backward" if N <= WHOLE_WINDOW else "backward_rows", shape, chip)
    blocks = -(-N // tile.rows) if N > WHOLE_WINDOW else 1
    slots = slots or window_slots(windows, heads * blocks, chip)
    d_qkv = torch.empty_like(qkv)
    d_scale = qkv.new_empty(slots, blocks, heads, dtype=torch.float32)
    empty = torch.empty if deterministic else torch.zeros
    d_bias = empty(slots if deterministic else 1, heads, N, N, dtype=torch.float32, device=qkv.device)
    arguments = {
        "grad": grad,
        "qkv": qkv,
        "scale": scale,
        "seed": seed,
        "dqkv": d_qkv,
        "threshold": int(dropout * 2**32),
        "kept": 1 / (1 - dropout),
        "windows": windows,
        "heads": heads,
        "H": H,
        "W": W,
        "shift_y": shift_size[0],
        "shift_x": shift_size[1],
        "WH": WH,
        "WW": WW,
        "HEAD_DIM": head_dim,
        "BLOCK_D": power_of_two(head_dim),
        "COSINE": cosine,
        "SHIFTED": any(shift_size),
        "DROPOUT": dropout > 0,
    }
    sums = {"dscale": d_scale, "dbias": d_bias, "bias": bias, "slots": slots, "ATOMIC": not deterministic}
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(qkv):
        if N <= WHOLE_WINDOW:
            whole_windows[(slots * heads,)](
                BLOCK=tile.rows, **sums, **arguments, **_options(tile)
            )
        else:
            delta = torch.empty_like(lse)
            arguments |= {"lse": lse, "delta": delta}
            query_rows[(slots * blocks * heads,)](
                out=out, BLOCK_R=tile.rows, BLOCK_C=tile.columns, **sums, **arguments, **_options(tile)
            )
            tile = tiles("backward_columns", shape, chip)
            key_rows[(windows * -(-N // tile.columns) * heads,)](
                bias_t=bias.transpose(1, 2).contiguous(),
                BLOCK_R=tile.rows,
                BLOCK_C=tile.columns,
                **arguments,
                **_options(tile),
            )
    return d_qkv, d_scale.sum((0, 1)).view_as(scale), d_bias[0] if len(d_bias) == 1 else d_bias.sum(0)


def _options(tile: Tiles) -> dict[str, int]:
    return {"num_warps": tile.warps, "num_stages": tile.stages}
