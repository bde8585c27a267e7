"""Tokens to the rows of experts and back: operators around the Triton kernels of `permutation_kernels`.

Both compute what their namesakes in `reference` do, gradients too: two gathers, each the other's backward. T tokens, K
choices of each, R rows kept of the T * K, D channels. R is the length of `choice_R`: nothing waits for the device.
First derivatives only.
"""

from typing import Any

import torch
from torch import Tensor

TILE = 2048
"""Values of a program's tile: 16 a thread."""

WARPS = 4


def fused_permute(x_TD: Tensor, choice_R: Tensor, slot_TK: Tensor) -> Tensor:
    """`reference.permute`: the row of each token, once for each of its choices that was kept, (R, D)."""
    return _permute(x_TD, choice_R, slot_TK)


def fused_unpermute(y_RD: Tensor, gate_TK: Tensor, choice_R: Tensor, slot_TK: Tensor) -> Tensor:
    """`reference.unpermute`: each token's gate-weighted sum of the rows that serve its choices, (T, D)."""
    return _unpermute(y_RD, gate_TK, choice_R, slot_TK)


# Launching. Tensors on the meta device do, for tests that compile ahead of time.


def launch_spread(
    x_TD: Tensor, choice_R: Tensor, top_k: int, out_RD: Tensor, weighing: tuple[Tensor, Tensor, Tensor] | None = None
) -> None:
    """Fill `out_RD`; with weighing = (gate_TK, y_RD, d_gate_TK) weigh by gate and fill d_gate where choices were kept.

    All are contiguous; see `permutation_kernels.spread`.
    """
    from swin_scale.kernels import permutation_kernels

    R, D = out_RD.shape
    gate_TK, y_RD, d_gate_TK = weighing or (None, None, None)
    rows, block_d = _tile(D)
    if R and D:
        with torch.cuda.device_of(x_TD):
            permutation_kernels.spread[(-(-R // rows),)](
                x_TD,
                choice_R,
                gate_TK,
                y_RD,
                out_RD,
                d_gate_TK,
                R,
                D=D,
                K=top_k,
                BLOCK_R=rows,
                BLOCK_D=block_d,
                num_warps=WARPS,
            )


def launch_collect(y_RD: Tensor, slot_TK: Tensor, gate_TK: Tensor | None, out_TD: Tensor) -> None:
    """Fill `out_TD` with sums of rows, weighted if there is a gate. All are contiguous."""
    from swin_scale.kernels import permutation_kernels

    T, D = out_TD.shape
    assert len(slot_TK) == T and (gate_TK is None or gate_TK.shape == slot_TK.shape), "one slot and gate per choice"
    rows, block_d = _tile(D)
    if T and D:
        with torch.cuda.device_of(y_RD):
            permutation_kernels.collect[(-(-T // rows),)](
                y_RD,
                slot_TK,
                gate_TK,
                out_TD,
                T,
                D=D,
                K=slot_TK.shape[1],
                BLOCK_T=rows,
                BLOCK_D=block_d,
                num_warps=WARPS,
            )


def _tile(D: int) -> tuple[int, int]:
    """(rows, channels) of a program."""
    block_d = min(1 << max(D - 1, 0).bit_length(), TILE)
    return TILE // block_d, block_d


# Operators. Each is the other's backward, up to weights.


@torch.library.custom_op("swin_scale::fused_permute", mutates_args=())
def _permute(x_TD: Tensor, choice_R: Tensor, slot_TK: Tensor) -> Tensor:
    out_RD = x_TD.new_empty(len(choice_R), x_TD.shape[1])
    launch_spread(x_TD.contiguous(), choice_R.contiguous(), slot_TK.shape[1], out_RD)
    return out_RD


@torch.library.custom_op("swin_scale::fused_permute_backward", mutates_args=())
def _permute_backward(grad_RD: Tensor, slot_TK: Tensor) -> Tensor:
    d_x_TD = grad_RD.new_empty(len(slot_TK), grad_RD.shape[1])
    launch_collect(grad_RD.contiguous(), slot_TK.contiguous(), None, d_x_TD)
    return d_x_TD


@torch.library.custom_op("swin_scale::fused_unpermute", mutates_args=())
def _unpermute(y_RD: Tensor, gate_TK: Tensor, choice_R: Tensor, slot_TK: Tensor) -> Tensor:
    out_TD = y_RD.new_empty(len(slot_TK), y_RD.shape[1])
    launch_collect(y_RD.contiguous(), slot_TK.contiguous(), gate_TK.contiguous(), out_TD)
    return out_TD


@torch.library.custom_op("swin_scale::fused_unpermute_backward", mutates_args=())
def _unpermute_backward(grad_TD: Tensor, y_RD: Tensor, gate_TK: Tensor, choice_R: Tensor) -> tuple[Tensor, Tensor]:
    d_y_RD = torch.empty_like(y_RD, memory_format=torch.contiguous_format)
    # Zeros: no row speaks for a choice that was dropped.
    d_gate_TK = torch.zeros_like(gate_TK, memory_format=torch.contiguous_format)
    weighing = (gate_TK.contiguous(), y_RD.contiguous(), d_gate_TK)
    launch_spread(grad_TD.contiguous(), choice_R.contiguous(), gate_TK.shape[1], d_y_RD, weighing)
    return d_y_RD, d_gate_TK


@_permute.register_fake
def _(x_TD, choice_R, slot_TK):
    return x_TD.new_empty(choice_R.shape[0], x_TD.shape[1])


@_permute_backward.register_fake
def _(grad_RD, slot_TK):
    return grad_RD.new_empty(slot_TK.shape[0], grad_RD.shape[1])


@_unpermute.register_fake
def _(y_RD, gate_TK, choice_R, slot_TK):
    return y_RD.new_empty(slot_TK.shape[0], y_RD.shape[1])


@_unpermute_backward.register_fake
def _(grad_TD, y_RD, gate_TK, choice_R):
    contiguous = torch.contiguous_format
    return torch.empty_like(y_RD, memory_format=contiguous), torch.empty_like(gate_TK, memory_format=contiguous)


def _keep_permute(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[2])


def _permute_grads(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
    return _permute_backward(grad_RD, *ctx.saved_tensors), None, None


def _keep_unpermute(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _unpermute_grads(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
    return *_unpermute_backward(grad_TD, *ctx.saved_tensors), None, None


_permute.register_autograd(_permute_grads, setup_context=_keep_permute)
_unpermute.register_autograd(_unpermute_grads, setup_context=_keep_unpermute)
