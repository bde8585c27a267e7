"""Forward kernels of window attention, launched by `attention`: qkv in image layout to its output in image layout.

Both read q, k and v of their tokens where the projection wrote them, the shift being arithmetic on pixel numbers, and
write the output where the next projection reads it; logits and probabilities never leave the registers.

- `attend_windows`, N <= 64: the whole window is one tile. A program loops over windows of one head with the head's
  bias in registers, so of each window it moves q, k, v and the output, once.
- `attend_rows`, larger N: a program has some rows (queries) of one window and head and passes over the keys with a
  running maximum and sum (Dao, "FlashAttention-2", section 3.1). It also writes the log-sum-exp of each row, in base 2,
  which backward needs instead of the maximum and the sum.

Programs that run at one time share what they read: neighbouring heads, whose channels share cache lines, in the first
kernel; in the second, where the bias is the larger part, one strip of the bias over a group of windows. `pack_bias`
puts the bias into the order of its tiles first.

Importing this file imports Triton.
"""

import triton
import triton.language as tl

from swin_scale.kernels.attention_tiles import (
    LOG2E,
    dropout_keep,
    fragments,
    has_seam,
    load_bias,
    load_rows,
    mask_regions,
    packed_tile,
    scaled_queries,
    scored_keys,
    store_rows,
    token_pixels,
    token_regions,
    window_corner,
)

SIZES = ("threshold", "windows", "heads", "H", "W", "shift_y", "shift_x")
"""Arguments whose values do not change the code of a kernel: one binary serves them all."""


@triton.jit(do_not_specialize=[*SIZES, "slots"])
def attend_windows(
    qkv,  # (B, H, W, 3, heads, HEAD_DIM)
    scale,  # (heads,) fp32
    bias,  # (heads, N, N) fp32
    out,  # (B, H, W, heads, HEAD_DIM)
    seed,  # () int64, or None without dropout
    threshold,  # dropout * 2^32
    kept,  # 1 / (1 - dropout)
    windows,  # in the batch
    slots,  # programs of a head
    heads,
    H,
    W,
    shift_y,
    shift_x,
    WH: tl.constexpr,
    WW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COSINE: tl.constexpr,
    SHIFTED: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """Every `slots`-th window of one head, N <= BLOCK tokens each. Grid: (slots * heads,), heads fastest."""
    N: tl.constexpr = WH * WW
    head = tl.program_id(0) % heads
    C = heads * HEAD_DIM
    token = tl.arange(0, BLOCK)
    q_head = qkv + head * HEAD_DIM
    factor = tl.load(scale + head)
    head_bias = load_bias(bias, head, token, token, N) * LOG2E
    head_bias = tl.where((token < N)[None, :], head_bias, float("-inf"))
    for window in range(tl.program_id(0) // heads, windows, slots):
        image, inside, top, left = window_corner(window, H, W, WH, WW)
        pixel = token_pixels(token, image, top, left, H, W, shift_y, shift_x, WW)
        q = load_rows(q_head, pixel, 3 * C, token, N, HEAD_DIM, BLOCK_D)
        k = load_rows(q_head + C, pixel, 3 * C, token, N, HEAD_DIM, BLOCK_D)
        v = load_rows(q_head + 2 * C, pixel, 3 * C, token, N, HEAD_DIM, BLOCK_D)
        q, k = scaled_queries(q, factor, COSINE), scored_keys(k, COSINE)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") + head_bias
        if SHIFTED and has_seam(top, left, H, W, shift_y, shift_x, WH, WW):
            region = token_regions(token, top, left, H, W, shift_y, shift_x, WH, WW, True)
            logits = mask_regions(logits, region, region)
        p = tl.exp2(logits - tl.max(logits, 1)[:, None])
        total = tl.sum(p, 1)
        if DROPOUT:
            keep = dropout_keep(tl.load(seed), threshold, token, token, head, inside, image, N)
            p = tl.where(keep, p * kept, 0.0)
        o = tl.dot(p.to(v.dtype), v, input_precision="ieee") / total[:, None]
        store_rows(out + head * HEAD_DIM, o, pixel, C, token, N, HEAD_DIM, BLOCK_D)


@triton.jit
def pack_bias(
    bias,  # (heads, N, N) fp32
    packed,  # (heads, row blocks, column blocks, BLOCK_R * BLOCK_C) fp32
    N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Bias times log2(e) as the tiles that `attend_rows` adds, -inf on padded columns. Grid: (tiles of all heads,)."""
    BLOCKS: tl.constexpr = (N + BLOCK_R - 1) // BLOCK_R
    ACROSS: tl.constexpr = (N + BLOCK_C - 1) // BLOCK_C
    tile = tl.program_id(0)
    row = tile // ACROSS % BLOCKS * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tile % ACROSS * BLOCK_C + tl.arange(0, BLOCK_C)
    values = load_bias(bias, tile // ACROSS // BLOCKS, row, column, N) * LOG2E
    values = tl.where((column < N)[None, :], values, float("-inf"))
    flat = tile.to(tl.int64) * (BLOCK_R * BLOCK_C) + tl.arange(0, BLOCK_R * BLOCK_C)
    tl.store(packed + flat, fragments(values, BLOCK_R, BLOCK_C))


@triton.jit(do_not_specialize=[*SIZES, "group"])
def attend_rows(
    qkv,  # (B, H, W, 3, heads, HEAD_DIM)
    scale,  # (heads,) fp32
    packed,  # the bias, by `pack_bias`
    out,  # (B, H, W, heads, HEAD_DIM)
    lse,  # (windows, heads, N) fp32, base 2
    seed,  # () int64, or None without dropout
    threshold,  # dropout * 2^32
    kept,  # 1 / (1 - dropout)
    windows,  # in the batch
    group,  # windows that take turns on one strip of the bias
    heads,
    H,
    W,
    shift_y,
    shift_x,
    WH: tl.constexpr,
    WW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COSINE: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """BLOCK_R rows of one window and head. Grid: (groups * heads * row blocks * group,), the last fastest."""
    N: tl.constexpr = WH * WW
    BLOCKS: tl.constexpr = (N + BLOCK_R - 1) // BLOCK_R
    strip = tl.program_id(0) // group
    window = strip // BLOCKS // heads * group + tl.program_id(0) % group
    if window < windows:
        head = strip // BLOCKS % heads
        C = heads * HEAD_DIM
        q_head = qkv + head * HEAD_DIM
        image, inside, top, left = window_corner(window, H, W, WH, WW)
        seam = has_seam(top, left, H, W, shift_y, shift_x, WH, WW)
        row = strip % BLOCKS * BLOCK_R + tl.arange(0, BLOCK_R)
        row_pixel = token_pixels(row, image, top, left, H, W, shift_y, shift_x, WW)
        row_region = token_regions(row, top, left, H, W, shift_y, shift_x, WH, WW, True)
        q = load_rows(q_head, row_pixel, 3 * C, row, N, HEAD_DIM, BLOCK_D)
        q = scaled_queries(q, tl.load(scale + head), COSINE)
        top_logit = tl.full([BLOCK_R], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_R], tl.float32)
        o = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
        for first in range(0, N, BLOCK_C):
            column = first + tl.arange(0, BLOCK_C)
            pixel = token_pixels(column, image, top, left, H, W, shift_y, shift_x, WW)
            k = load_rows(q_head + C, pixel, 3 * C, column, N, HEAD_DIM, BLOCK_D)
            v = load_rows(q_head + 2 * C, pixel, 3 * C, column, N, HEAD_DIM, BLOCK_D)
            logits = packed_tile(packed, head, strip % BLOCKS, first, N, BLOCK_R, BLOCK_C)
            logits = tl.dot(q, tl.trans(scored_keys(k, COSINE)), acc=logits, input_precision="ieee")
            if seam:
                region = token_regions(column, top, left, H, W, shift_y, shift_x, WH, WW, True)
                logits = mask_regions(logits, row_region, region)
            top_now = tl.maximum(top_logit, tl.max(logits, 1))
            p = tl.exp2(logits - top_now[:, None])
            shrink = tl.exp2(top_logit - top_now)
            total = total * shrink + tl.sum(p, 1)
            if DROPOUT:
                keep = dropout_keep(tl.load(seed), threshold, row, column, head, inside, image, N)
                p = tl.where(keep, p * kept, 0.0)
            o = tl.dot(p.to(v.dtype), v, acc=o * shrink[:, None], input_precision="ieee")
            top_logit = top_now
        o = o / total[:, None]
        store_rows(out + head * HEAD_DIM, o, row_pixel, C, row, N, HEAD_DIM, BLOCK_D)
        at = (window.to(tl.int64) * heads + head) * N + row
        tl.store(lse + at, top_logit + tl.log2(total), mask=row < N)
