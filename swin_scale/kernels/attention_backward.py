"""Backward of the fused window attention: which kernels run, on what grid, and how partial sums become one.

The gradient of the bias is a sum over all windows of the batch. Each program keeps the sum over its own windows and
writes it once; the partial sums are then added in the order of programs, whose number follows from shape and chip
alone. So two runs give the same bits. `deterministic=False` adds with atomics instead and needs no partial sums.
Windows of at most `tuning.WHOLE_WINDOW` tokens take one kernel. Larger ones take three, after the bias was laid out for
the first two as their products are: dq, dk and dv, d bias.

It is an operator of its own, so that tracing and compilation see one opaque node. `attention_gradients` holds the
kernels and the formulae; it imports Triton and is imported when one is to run.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from swin_scale.kernels import tuning


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
        slots: programs that share the windows of a tile of the bias gradient; None: as `tuning` has it.
    """
    from swin_scale.kernels.attention_gradients import bias_tiles, key_rows, pack_bias, query_rows, whole_windows

    (B, H, W, C3), (heads, N, _) = qkv.shape, bias.shape
    windows, head_dim, chip = B * H * W // N, C3 // 3 // heads, tuning.chip_of(qkv.device)
    grad, qkv, scale, bias = grad.contiguous(), qkv.contiguous(), scale.contiguous(), bias.contiguous()
    shape = tuning.Shape(N, head_dim, qkv.dtype)
    d_qkv = torch.empty_like(qkv)
    arguments = {"grad": grad, **shared_arguments(qkv, scale, heads, window_size, shift_size, cosine, dropout, seed)}

    def partial_sums(tiles: int, at_once: int) -> tuple[int, Tensor]:
        """(programs that share the windows of a tile of d bias, what they write their sums of it into).

        As many programs as a processor has registers for at once, `at_once`: more would only make more sums to add.
        """
        count = slots or tuning.window_slots(windows, heads * tiles, chip, per_processor=max(1, at_once))
        if deterministic:
            return count, bias.new_empty(count, heads, N, N)
        return count, bias.new_zeros(1, heads, N, N)

    def packed(bias: Tensor, rows: int, columns: int) -> Tensor:
        tiles = bias.new_empty(heads, -(-N // rows), -(-N // columns), rows * columns)
        pack_bias[(tiles.shape[:-1].numel(),)](bias, tiles, N, rows, columns)
        return tiles

    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(qkv):
        if N <= tuning.WHOLE_WINDOW:
            tile = tuning.tiles("backward", shape, chip)
            # Products of fp32 tiles lie otherwise in registers than those of tensor cores.
            order_counts = qkv.dtype != torch.float32
            count, d_bias = partial_sums(1, 8 // tile.warps)
            d_scale = bias.new_empty(count, heads)
            whole_windows[(count * heads,)](
                bias=packed(bias, tile.rows, tile.rows) if order_counts else bias,
                PACKED=order_counts,
                dqkv=d_qkv,
                dscale=d_scale,
                dbias=d_bias,
                slots=count,
                SHIFTED=any(shift_size),
                ATOMIC=not deterministic,
                BLOCK=tile.rows,
                **arguments,
                **tile.options(),
            )
        else:
            group = tuning.window_group(windows, 4 * N * head_dim * qkv.element_size(), chip)
            rounds = -(-windows // group) * heads * group
            tile = tuning.tiles("backward_rows", shape, chip)
            blocks = -(-N // tile.rows)
            arguments |= {"lse": lse, "delta": torch.empty_like(lse)}
            d_scale = bias.new_empty(windows * blocks, heads)
            query_rows[(rounds * blocks,)](
                out=out,
                packed=packed(bias, tile.rows, tile.columns),
                dqkv=d_qkv,
                dscale=d_scale,
                group=group,
                **_sizes(tile),
                **arguments,
            )
            tile = tuning.tiles("backward_columns", shape, chip)
            key_rows[(rounds * -(-N // tile.columns),)](
                packed=packed(bias.transpose(1, 2).contiguous(), tile.columns, tile.rows),
                dqkv=d_qkv,
                group=group,
                **_sizes(tile),
                **arguments,
            )
            tile = tuning.tiles("backward_bias", shape, chip)
            tiles = -(-N // tile.rows) * -(-N // tile.columns)
            count, d_bias = partial_sums(tiles, 16 // tile.warps)
            bias_tiles[(count * tiles * heads,)](
                bias=bias, dbias=d_bias, slots=count, ATOMIC=not deterministic, **_sizes(tile), **arguments
            )
    return d_qkv, d_scale.sum(0).view_as(scale), d_bias[0] if len(d_bias) == 1 else d_bias.sum(0)


def shared_arguments(
    qkv: Tensor,
    scale: Tensor,
    heads: int,
    window_size: Sequence[int],
    shift_size: Sequence[int],
    cosine: bool,
    dropout: float,
    seed: Tensor | None,
) -> dict[str, Any]:
    """What every kernel of window attention, forward and backward, is told of a call, by its parameters' names."""
    B, H, W, C3 = qkv.shape
    head_dim = C3 // 3 // heads
    return {
        "qkv": qkv,
        "scale": scale,
        "seed": seed,
        "threshold": int(dropout * 2**32),
        "kept": 1 / (1 - dropout),
        "windows": B * H * W // (window_size[0] * window_size[1]),
        "heads": heads,
        "H": H,
        "W": W,
        "shift_y": shift_size[0],
        "shift_x": shift_size[1],
        "WH": window_size[0],
        "WW": window_size[1],
        "HEAD_DIM": head_dim,
        "BLOCK_D": tuning.power_of_two(head_dim),
        "COSINE": cosine,
        "DROPOUT": dropout > 0,
    }


def _sizes(tile: tuning.Tiles) -> dict[str, Any]:
    return {"BLOCK_R": tile.rows, "BLOCK_C": tile.columns, **tile.options()}
