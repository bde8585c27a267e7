"""Triton kernels of `permutation`: rows to where they are needed by index, with weights and their gradients on the way.

T tokens, K choices of each, R rows kept of the T * K, D channels. Each value is written once, sums run in a fixed
order: no atomics. Sums are fp32.
"""

import triton
import triton.language as tl


@triton.jit
def spread(
    x,  # (T, D)
    choice,  # (R,) int64: token * K + k
    gate,  # (T, K), or None for no weights
    y,  # (R, D), with gate: what was weighted
    out,  # out (R, D): gate of the row's choice times the row of its token
    d_gate,  # out (T, K), with gate: <x of the token, y of the row>; only choices that have a row
    R,
    D: tl.constexpr,
    K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    here = row < R
    served = tl.load(choice + row, mask=here, other=0)
    start, out_start = (served // K * D)[:, None], (row.to(tl.int64) * D)[:, None]
    if gate is not None:
        weight = tl.load(gate + served, mask=here, other=0.0).to(tl.float32)[:, None]
        along = tl.zeros([BLOCK_R], tl.float32)
    for first in range(0, D, BLOCK_D):
        column = first + tl.arange(0, BLOCK_D)[None, :]
        inside = here[:, None] & (column < D)
        value = tl.load(x + start + column, mask=inside, other=0.0)
        if gate is not None:
            value = value.to(tl.float32)
            along += tl.sum(value * tl.load(y + out_start + column, mask=inside, other=0.0).to(tl.float32), 1)
            value = (value * weight).to(out.dtype.element_ty)
        tl.store(out + out_start + column, value, mask=inside)
    if gate is not None:
        tl.store(d_gate + served, along.to(d_gate.dtype.element_ty), mask=here)


@triton.jit
def collect(
    y,  # (R, D)
    slot,  # (T, K) int64: row of a choice, -1 for none
    gate,  # (T, K), or None for weights of 1
    out,  # out (T, D): sum over the choices of a token that have a row
    T,
    D: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    here = token < T
    first_choice = token.to(tl.int64) * K
    for first in range(0, D, BLOCK_D):
        column = first + tl.arange(0, BLOCK_D)[None, :]
        total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        for k in range(K):
            row = tl.load(slot + first_choice + k, mask=here, other=-1)
            kept = row >= 0
            inside = kept[:, None] & (column < D)
            value = tl.load(y + (row * D)[:, None] + column, mask=inside, other=0.0).to(tl.float32)
            if gate is not None:
                value *= tl.load(gate + first_choice + k, mask=kept, other=0.0).to(tl.float32)[:, None]
            total += value
        at = (token.to(tl.int64) * D)[:, None] + column
        tl.store(out + at, total.to(out.dtype.element_ty), mask=here[:, None] & (column < D))
