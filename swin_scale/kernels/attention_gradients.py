"""Gradients of window attention: Triton kernels, launched by `attention_backward`.

With S = logits, P = softmax(S), dO the gradient of the output and everything per window and head:

    dP = dO Vᵀ,  δ = rowsum(P ∘ dP) = rowsum(dO ∘ O),  dS = P ∘ (dP - δ)      (Dao, "FlashAttention-2", section 3.1)
    dV = Pᵀ dO,  G = dS K,  d scale = Σ G ∘ Q,  dQ = scale · G,  dK = dSᵀ (scale · Q),  d bias = Σ over windows of dS

where the cosine score puts unit rows u = x / |x| for Q and K, and dx = (du - u (u · du)) / |x| goes back through it.
Logits are in base 2, as in forward: log2(e) is folded into the scaled query and `LN2` takes it out of dK again.
With dropout, dP and the P of dV are masked and divided by the keep probability; δ is the same sum.

- `whole_windows` (N <= 64) holds one window in one tile, reads q, k, v, dO once and writes dq, dk, dv once. It needs
  neither the output nor the log-sum-exp of forward.
- `query_rows`, `key_rows` and `bias_tiles` (N > 64) own rows of dS, rows of its transpose and tiles of it. They make dq
  and δ, dk and dv, and d bias.

Where d bias is made, a program runs over several windows of one head with its sum in registers and writes one partial
sum when done. (Rows of the sum beside dq would not fit: 144 columns are 72 registers a thread, and spilled.)
Padded rows and columns have dO = 0 or P = 0 and add nothing.

fp16 dots: under loss scaling dO may sit anywhere between 6e-8 and 65504, and dS, smaller by the number of keys, would
leave fp16's range. So each tile of dO is multiplied by the power of two that brings its largest entry into [1, 2),
which is exact, and the sums are multiplied back in fp32 (`into_range`). dS overflows only where |v| is near 1000.
Infinities of an overflowed step stay infinite or NaN. bf16 and fp32 have the range and skip this.

Letters: R, C rows and columns of a tile; D channels of a head, padded to a power of two in BLOCK_D.
"""

import triton
import triton.language as tl

from swin_scale.kernels.attention_forward import SIZES, pack_bias
from swin_scale.kernels.attention_tiles import (
    LOG2E,
    dropout_keep,
    has_seam,
    into_range,
    load_bias,
    load_rows,
    mask_regions,
    packed_tile,
    scaled_queries,
    scored_keys,
    scored_rows,
    store_rows,
    through_norm,
    token_pixels,
    token_regions,
    window_corner,
)

__all__ = ["bias_tiles", "key_rows", "pack_bias", "query_rows", "whole_windows"]

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _add_bias_sum(dbias, slot, row, column, tile, N: tl.constexpr, ATOMIC: tl.constexpr):
    """One program's sum over its windows: into a slot of its own or, if ATOMIC, onto those of other programs."""
    at = (slot.to(tl.int64) * N + row)[:, None] * N + column[None, :]
    mask = (row < N)[:, None] & (column < N)[None, :]
    if ATOMIC:
        tl.atomic_add(dbias + at, tile, mask=mask, sem="relaxed")
    else:
        tl.store(dbias + at, tile, mask=mask)


@triton.jit(do_not_specialize=[*SIZES, "slots"])
def whole_windows(
    grad,  # (B, H, W, C)
    qkv,  # (B, H, W, 3C)
    scale,  # (heads,)
    bias,  # (heads, N, N), or by `pack_bias` if PACKED
    seed,  # () int64, or None without dropout
    dqkv,  # (B, H, W, 3C)
    dscale,  # (slots, heads)
    dbias,  # (slots, heads, N, N), or zeros (heads, N, N) if ATOMIC
    threshold,  # dropout · 2^32
    kept,  # 1 / (1 - dropout)
    windows,  # in the batch
    slots,  # programs that share the windows of a head
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
    ATOMIC: tl.constexpr,
    PACKED: tl.constexpr,
):
    """All gradients of every `slots`-th window of one head, N = WH · WW <= BLOCK. Grid: (slots · heads,)."""
    N: tl.constexpr = WH * WW
    head = tl.program_id(0) % heads
    slot = tl.program_id(0) // heads
    C = heads * HEAD_DIM
    token = tl.arange(0, BLOCK)
    tau = tl.load(scale + head)
    # Packed, it is read from the cache for each window: kept, it would take 32 registers a thread.
    if not PACKED:
        logit_bias = load_bias(bias, head, token, token, N) * LOG2E
        logit_bias = tl.where((token < N)[None, :], logit_bias, float("-inf"))
    bias_sum = tl.zeros([BLOCK, BLOCK], tl.float32)
    scale_sum = tl.zeros([BLOCK], tl.float32)
    q_head, dq_head = qkv + head * HEAD_DIM, dqkv + head * HEAD_DIM
    for window in range(slot, windows, slots):
        image, inside, top, left = window_corner(window, H, W, WH, WW)
        pixel = token_pixels(token, image, top, left, H, W, shift_y, shift_x, WW)
        q = load_rows(q_head, pixel, 3 * C, token, N, HEAD_DIM, BLOCK_D)
        k = load_rows(q_head + C, pixel, 3 * C, token, N, HEAD_DIM, BLOCK_D)
        v = load_rows(q_head + 2 * C, pixel, 3 * C, token, N, HEAD_DIM, BLOCK_D)
        do = load_rows(grad + head * HEAD_DIM, pixel, C, token, N, HEAD_DIM, BLOCK_D)
        do, size, _inverse = into_range(do)
        q_dot, k_dot = scaled_queries(q, tau, COSINE), scored_keys(k, COSINE)

        if PACKED:
            logits = packed_tile(bias, head, 0, 0, N, BLOCK, BLOCK)
        else:
            logits = logit_bias
        logits = tl.dot(q_dot, tl.trans(k_dot), acc=logits, input_precision="ieee")
        if SHIFTED and has_seam(top, left, H, W, shift_y, shift_x, WH, WW):
            region = token_regions(token, top, left, H, W, shift_y, shift_x, WH, WW)
            logits = mask_regions(logits, region, region)
        p = tl.exp2(logits - tl.max(logits, 1)[:, None])
        p *= (1.0 / tl.sum(p, 1))[:, None]
        # Each gradient is stored before the next is made, and q and k are read again from cache: all at once would not
        # fit the registers.
        p_kept = p
        if DROPOUT:
            keep = dropout_keep(tl.load(seed), threshold, token, token, head, inside, image, N)
            p_kept = tl.where(keep, p * kept, 0.0)
        dv = tl.dot(tl.trans(p_kept.to(q.dtype)), do, input_precision="ieee") * size
        store_rows(dq_head + 2 * C, dv, pixel, 3 * C, token, N, HEAD_DIM, BLOCK_D)
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        if DROPOUT:
            dp = tl.where(keep, dp * kept, 0.0)
        ds = p * (dp - tl.sum(p * dp, 1)[:, None])
        bias_sum += ds * size
        ds_dot = ds.to(q.dtype)
        g = tl.dot(ds_dot, k_dot, input_precision="ieee") * size
        q = load_rows(q_head, pixel, 3 * C, token, N, HEAD_DIM, BLOCK_D)
        scale_sum += tl.sum(g * scored_rows(q, COSINE), 1)
        dq = through_norm(g * tau, q, COSINE)
        store_rows(dq_head, dq, pixel, 3 * C, token, N, HEAD_DIM, BLOCK_D)
        k = load_rows(q_head + C, pixel, 3 * C, token, N, HEAD_DIM, BLOCK_D)
        dk = tl.dot(tl.trans(ds_dot), q_dot, input_precision="ieee") * (size * LN2)
        dk = through_norm(dk, k, COSINE)
        store_rows(dq_head + C, dk, pixel, 3 * C, token, N, HEAD_DIM, BLOCK_D)

    tl.store(dscale + slot * heads + head, tl.sum(scale_sum, 0))
    _add_bias_sum(dbias, head if ATOMIC else slot * heads + head, token, token, bias_sum, N, ATOMIC)


@triton.jit(do_not_specialize=[*SIZES, "group"])
def query_rows(
    grad,  # (B, H, W, C)
    qkv,  # (B, H, W, 3C)
    scale,  # (heads,)
    packed,  # the bias, by `pack_bias`
    out,  # (B, H, W, C)
    lse,  # (windows, heads, N), base 2
    seed,  # () int64, or None without dropout
    dqkv,  # (B, H, W, 3C): q is written
    delta,  # (windows, heads, N), written
    dscale,  # (windows, blocks, heads)
    threshold,  # dropout · 2^32
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
    """dq, delta and d scale of BLOCK_R queries of a window and head. Grid: (groups · heads · blocks · group,)."""
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
        pixel = token_pixels(row, image, top, left, H, W, shift_y, shift_x, WW)
        region = token_regions(row, top, left, H, W, shift_y, shift_x, WH, WW)
        tau = tl.load(scale + head)
        q = load_rows(q_head, pixel, 3 * C, row, N, HEAD_DIM, BLOCK_D)
        q_dot = scaled_queries(q, tau, COSINE)
        o = load_rows(out + head * HEAD_DIM, pixel, C, row, N, HEAD_DIM, BLOCK_D)
        do = load_rows(grad + head * HEAD_DIM, pixel, C, row, N, HEAD_DIM, BLOCK_D)
        do, size, _ = into_range(do)
        at_row = (window.to(tl.int64) * heads + head) * N + row
        log_sum = tl.load(lse + at_row, mask=row < N, other=0.0)
        delta_row = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
        tl.store(delta + at_row, delta_row * size, mask=row < N)
        g = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
        for first in range(0, N, BLOCK_C):
            column = first + tl.arange(0, BLOCK_C)
            pixel_c = token_pixels(column, image, top, left, H, W, shift_y, shift_x, WW)
            k = load_rows(q_head + C, pixel_c, 3 * C, column, N, HEAD_DIM, BLOCK_D)
            v = load_rows(q_head + 2 * C, pixel_c, 3 * C, column, N, HEAD_DIM, BLOCK_D)
            k_dot = scored_keys(k, COSINE)
            logits = packed_tile(packed, head, strip % BLOCKS, first, N, BLOCK_R, BLOCK_C)
            logits = tl.dot(q_dot, tl.trans(k_dot), acc=logits, input_precision="ieee")
            if seam:
                region_c = token_regions(column, top, left, H, W, shift_y, shift_x, WH, WW)
                logits = mask_regions(logits, region, region_c)
            p = tl.exp2(logits - log_sum[:, None])
            dp = tl.dot(do, tl.trans(v), input_precision="ieee")
            if DROPOUT:
                keep = dropout_keep(tl.load(seed), threshold, row, column, head, inside, image, N)
                dp = tl.where(keep, dp * kept, 0.0)
            ds = p * (dp - delta_row[:, None])
            g = tl.dot(ds.to(k.dtype), k_dot, acc=g, input_precision="ieee")
        g *= size
        tl.store(
            dscale + (window * BLOCKS + strip % BLOCKS) * heads + head, tl.sum(tl.sum(g * scored_rows(q, COSINE), 1), 0)
        )
        dq = through_norm(g * tau, q, COSINE)
        store_rows(dqkv + head * HEAD_DIM, dq, pixel, 3 * C, row, N, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=[*SIZES, "group"])
def key_rows(
    grad,  # (B, H, W, C)
    qkv,  # (B, H, W, 3C)
    scale,  # (heads,)
    packed,  # the bias, keys before queries, by `pack_bias`
    lse,  # (windows, heads, N), base 2
    delta,  # (windows, heads, N)
    seed,  # () int64, or None without dropout
    dqkv,  # (B, H, W, 3C): k and v are written
    threshold,  # dropout · 2^32
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
    """dk and dv of BLOCK_C keys of a window and head; tiles are (keys, queries). Grid as of `query_rows`."""
    N: tl.constexpr = WH * WW
    BLOCKS: tl.constexpr = (N + BLOCK_C - 1) // BLOCK_C
    strip = tl.program_id(0) // group
    window = strip // BLOCKS // heads * group + tl.program_id(0) % group
    if window < windows:
        head = strip // BLOCKS % heads
        C = heads * HEAD_DIM
        q_head, dk_head = qkv + head * HEAD_DIM, dqkv + C + head * HEAD_DIM
        image, inside, top, left = window_corner(window, H, W, WH, WW)
        seam = has_seam(top, left, H, W, shift_y, shift_x, WH, WW)
        column = strip % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
        pixel_c = token_pixels(column, image, top, left, H, W, shift_y, shift_x, WW)
        region_c = token_regions(column, top, left, H, W, shift_y, shift_x, WH, WW)
        k = load_rows(q_head + C, pixel_c, 3 * C, column, N, HEAD_DIM, BLOCK_D)
        v = load_rows(q_head + 2 * C, pixel_c, 3 * C, column, N, HEAD_DIM, BLOCK_D)
        k_dot = scored_keys(k, COSINE)
        tau = tl.load(scale + head)
        dk = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
        for first in range(0, N, BLOCK_R):
            row = first + tl.arange(0, BLOCK_R)
            pixel = token_pixels(row, image, top, left, H, W, shift_y, shift_x, WW)
            q = load_rows(q_head, pixel, 3 * C, row, N, HEAD_DIM, BLOCK_D)
            do = load_rows(grad + head * HEAD_DIM, pixel, C, row, N, HEAD_DIM, BLOCK_D)
            do, size, inverse = into_range(do)
            q_dot = scaled_queries(q, tau, COSINE)
            at_row = (window.to(tl.int64) * heads + head) * N + row
            log_sum = tl.load(lse + at_row, mask=row < N, other=0.0)
            delta_row = tl.load(delta + at_row, mask=row < N, other=0.0) * inverse
            logits = packed_tile(packed, head, strip % BLOCKS, first, N, BLOCK_C, BLOCK_R)
            logits = tl.dot(k_dot, tl.trans(q_dot), acc=logits, input_precision="ieee")
            if seam:
                region = token_regions(row, top, left, H, W, shift_y, shift_x, WH, WW)
                logits = mask_regions(logits, region_c, region)
            p = tl.exp2(logits - log_sum[None, :])
            dp = tl.dot(v, tl.trans(do), input_precision="ieee")
            p_kept = p
            if DROPOUT:
                keep = tl.trans(dropout_keep(tl.load(seed), threshold, row, column, head, inside, image, N))
                p_kept, dp = tl.where(keep, p * kept, 0.0), tl.where(keep, dp * kept, 0.0)
            ds = p * (dp - delta_row[None, :])
            dv += tl.dot(p_kept.to(k.dtype), do, input_precision="ieee") * size
            dk += tl.dot(ds.to(k.dtype), q_dot, input_precision="ieee") * size
        dk = through_norm(dk * LN2, k, COSINE)
        store_rows(dk_head, dk, pixel_c, 3 * C, column, N, HEAD_DIM, BLOCK_D)
        store_rows(dk_head + C, dv, pixel_c, 3 * C, column, N, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=[*SIZES, "slots"])
def bias_tiles(
    grad,  # (B, H, W, C)
    qkv,  # (B, H, W, 3C)
    scale,  # (heads,)
    bias,  # (heads, N, N)
    lse,  # (windows, heads, N), base 2
    delta,  # (windows, heads, N)
    seed,  # () int64, or None without dropout
    dbias,  # (slots, heads, N, N), or zeros (heads, N, N) if ATOMIC
    threshold,  # dropout · 2^32
    kept,  # 1 / (1 - dropout)
    windows,  # in the batch
    slots,  # programs that share the windows of a head
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
    ATOMIC: tl.constexpr,
):
    """A tile of d bias: dS summed over every `slots`-th window of one head. Grid: (slots · tiles · heads,)."""
    N: tl.constexpr = WH * WW
    ACROSS: tl.constexpr = (N + BLOCK_C - 1) // BLOCK_C
    TILES: tl.constexpr = (N + BLOCK_R - 1) // BLOCK_R * ACROSS
    head = tl.program_id(0) % heads
    tile = tl.program_id(0) // heads % TILES
    slot = tl.program_id(0) // heads // TILES
    C = heads * HEAD_DIM
    q_head = qkv + head * HEAD_DIM
    row = tile // ACROSS * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tile % ACROSS * BLOCK_C + tl.arange(0, BLOCK_C)
    tau = tl.load(scale + head)
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for window in range(slot, windows, slots):
        image, inside, top, left = window_corner(window, H, W, WH, WW)
        pixel = token_pixels(row, image, top, left, H, W, shift_y, shift_x, WW)
        pixel_c = token_pixels(column, image, top, left, H, W, shift_y, shift_x, WW)
        q = load_rows(q_head, pixel, 3 * C, row, N, HEAD_DIM, BLOCK_D)
        k = load_rows(q_head + C, pixel_c, 3 * C, column, N, HEAD_DIM, BLOCK_D)
        v = load_rows(q_head + 2 * C, pixel_c, 3 * C, column, N, HEAD_DIM, BLOCK_D)
        do = load_rows(grad + head * HEAD_DIM, pixel, C, row, N, HEAD_DIM, BLOCK_D)
        do, size, inverse = into_range(do)
        at_row = (image.to(tl.int64) * (H * W // N) + inside) * heads * N + head * N + row
        log_sum = tl.load(lse + at_row, mask=row < N, other=0.0)
        delta_row = tl.load(delta + at_row, mask=row < N, other=0.0) * inverse
        logits = tl.dot(scaled_queries(q, tau, COSINE), tl.trans(scored_keys(k, COSINE)), input_precision="ieee")
        logits += load_bias(bias, head, row, column, N) * LOG2E
        if has_seam(top, left, H, W, shift_y, shift_x, WH, WW):
            region = token_regions(row, top, left, H, W, shift_y, shift_x, WH, WW)
            region_c = token_regions(column, top, left, H, W, shift_y, shift_x, WH, WW)
            logits = mask_regions(logits, region, region_c)
        p = tl.exp2(logits - log_sum[:, None])
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        if DROPOUT:
            keep = dropout_keep(tl.load(seed), threshold, row, column, head, inside, image, N)
            dp = tl.where(keep, dp * kept, 0.0)
        total += p * (dp - delta_row[:, None]) * size
    _add_bias_sum(dbias, head if ATOMIC else slot * heads + head, row, column, total, N, ATOMIC)
