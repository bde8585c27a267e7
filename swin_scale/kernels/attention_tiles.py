"""What the Triton kernels of window attention share: where a window's tokens lie, its mask, unit rows, dropout.

Numbers run as follows. `window`: over the batch, images outermost, row-major in the rolled map. `token`: row-major in
its window, 0 to N - 1; a tile may hold more rows than tokens, those past the end are padding. `pixel`: row of the
(B * H * W, ...) view of a feature map in image layout, 64 bits wide, as tensors may pass 2^31 elements.
Names in capitals are compile-time constants: WH x WW the window, N = WH * WW, HEAD_DIM channels of a head, padded to
BLOCK_D lanes. Logits are in base 2 throughout: multiplied by log2(e), exponentiated by exp2.

Importing this file imports Triton.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
MASKED_LOG2E = tl.constexpr(-100.0 * 1.4426950408889634)
"""`reference.MASKED` in base 2."""
TINY = tl.constexpr(1e-12)
"""Rows are divided by their norm, but by no less than this."""
NORM_FLOOR = tl.constexpr(1e-6)
"""`reference.NORM_FLOOR`: rows shorter than this pass no gradient."""


@triton.jit
def window_corner(window, H, W, WH: tl.constexpr, WW: tl.constexpr):
    """(image, window number inside the image, top, left); top and left: its first token's place in the rolled map."""
    across = W // WW
    per_image = (H // WH) * across
    image = window // per_image
    inside = window % per_image
    return image, inside, (inside // across) * WH, (inside % across) * WW


@triton.jit
def token_pixels(token, image, top, left, H, W, shift_y, shift_x, WW: tl.constexpr):
    """int64 pixel of each token: the map was rolled by (-shift_y, -shift_x), so a token comes from that far on."""
    y = top + token // WW + shift_y
    x = left + token % WW + shift_x
    # Padding tokens may lie below the map, further than one turn brings back: they are masked wherever they are used.
    y = tl.where(y >= H, y - H, y)
    x = tl.where(x >= W, x - W, x)
    return (image.to(tl.int64) * H + y) * W + x


@triton.jit
def has_seam(top, left, H, W, shift_y, shift_x, WH: tl.constexpr, WW: tl.constexpr):
    """Whether the window joins tokens across the border of the image: a scalar, the same for all threads."""
    return ((shift_y > 0) & (top + WH == H)) | ((shift_x > 0) & (left + WW == W))


@triton.jit
def token_regions(
    token, top, left, H, W, shift_y, shift_x, WH: tl.constexpr, WW: tl.constexpr, KEPT: tl.constexpr = False
):
    """Region of each token as `reference.shift_regions` numbers them, up to a constant of the window.

    KEPT: the tokens' columns may stay in registers over a loop over windows. Otherwise they are computed where they are
    used, from a width the compiler does not know: in kernels that are short of registers they would bring spills.
    """
    below = ((top + WH == H) & (token >= (WH - shift_y) * WW)).to(tl.int32)
    if KEPT:
        column = token % WW
    else:
        column = token % (W // (W // WW))
    beyond = ((left + WW == W) & (column >= WW - shift_x)).to(tl.int32)
    return 3 * below + beyond


@triton.jit
def mask_regions(logits, row_region, column_region):
    """Add -100 (in base 2) to the logits of pairs from different regions."""
    return logits + tl.where(row_region[:, None] != column_region[None, :], MASKED_LOG2E, 0.0)


@triton.jit
def row_offsets(pixel, stride, BLOCK_D: tl.constexpr):
    """[rows, BLOCK_D] int64 offsets of a head's channels, from the head's first channel on; `stride` of a pixel."""
    return pixel[:, None] * stride + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def row_mask(token, N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """[rows, BLOCK_D]: false on padded rows and padded lanes."""
    return (token < N)[:, None] & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]


@triton.jit
def load_rows(head, pixel, stride, token, N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """[rows, BLOCK_D] of one head, padding zero. `head` points at the head's first channel of pixel 0."""
    mask = row_mask(token, N, HEAD_DIM, BLOCK_D)
    return tl.load(head + row_offsets(pixel, stride, BLOCK_D), mask=mask, other=0.0)


@triton.jit
def store_rows(head, rows, pixel, stride, token, N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Inverse of `load_rows`, cast to the tensor's dtype."""
    mask = row_mask(token, N, HEAD_DIM, BLOCK_D)
    tl.store(head + row_offsets(pixel, stride, BLOCK_D), rows.to(head.dtype.element_ty), mask=mask)


@triton.jit
def row_norms(x):
    """Euclidean length of each row; x: [rows, BLOCK_D], computed in fp32."""
    x = x.to(tl.float32)
    return tl.sqrt_rn(tl.sum(x * x, 1))


@triton.jit
def inverse_norms(x):
    """1 / max(|row|, 1e-12) in fp32, [rows]."""
    if x.dtype == tl.float32:
        return tl.div_rn(1.0, tl.maximum(row_norms(x), TINY))
    else:
        # One approximate instruction (22 bits) for some forty: beside fp16 and bf16 its error does not show.
        wide = x.to(tl.float32)
        return tl.rsqrt(tl.maximum(tl.sum(wide * wide, 1), TINY * TINY))


@triton.jit
def scaled_queries(q, scale, COSINE: tl.constexpr):
    """q, of unit length if COSINE, times scale * log2(e), computed in fp32 and cast back; `scale` is a scalar."""
    factor = scale * LOG2E
    if COSINE:
        wide = q.to(tl.float32) * (inverse_norms(q) * factor)[:, None]
    else:
        wide = q.to(tl.float32) * factor
    return wide.to(q.dtype)


@triton.jit
def scored_keys(k, COSINE: tl.constexpr):
    """k, of unit length if COSINE, in its own dtype."""
    if COSINE:
        k = (k.to(tl.float32) * inverse_norms(k)[:, None]).to(k.dtype)
    return k


@triton.jit
def load_bias(bias, head, row, column, N: tl.constexpr):
    """[rows, columns] fp32 of the (heads, N, N) bias, unscaled, padding zero; kept in cache before other data."""
    at = (head * N + row)[:, None] * N + column[None, :]
    mask = (row < N)[:, None] & (column < N)[None, :]
    return tl.load(bias + at, mask=mask, other=0.0, eviction_policy="evict_last")


@triton.jit
def fragments(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] to [ROWS * COLUMNS], in the order in which threads hold the result of a product of matrices.

    With 16 rows a warp, a thread's four neighbouring numbers here are what mma and wgmma instructions leave to it of
    each 16 x 8 block: two rows, eight apart, by two columns. Stored so, a tile that is added to products is loaded 16
    bytes at a time by the thread that needs it, where a tile in plain order is exchanged through shared memory. The
    order is right on any chip, and fast on those whose products lie so (compute capability 8 and 9).
    """
    blocks = tl.reshape(tile, (ROWS // 16, 2, 8, COLUMNS // 8, 4, 2))
    return tl.reshape(tl.permute(blocks, (3, 0, 2, 4, 1, 5)), (ROWS * COLUMNS,))


@triton.jit
def from_fragments(flat, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Inverse of `fragments`."""
    blocks = tl.reshape(flat, (COLUMNS // 8, ROWS // 16, 8, 4, 2, 2))
    return tl.reshape(tl.permute(blocks, (1, 4, 2, 0, 3, 5)), (ROWS, COLUMNS))


@triton.jit
def packed_tile(packed, head, block, first, N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] of what `attention_forward.pack_bias` wrote: rows of `block`, columns from `first` on."""
    BLOCKS: tl.constexpr = (N + ROWS - 1) // ROWS
    ACROSS: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    tile = (head * BLOCKS + block) * ACROSS + first // COLUMNS
    flat = packed + tile.to(tl.int64) * (ROWS * COLUMNS) + tl.arange(0, ROWS * COLUMNS)
    return from_fragments(tl.load(flat, eviction_policy="evict_last"), ROWS, COLUMNS)


@triton.jit
def dropout_keep(seed, threshold, row, column, head, inside, image, N: tl.constexpr):
    """[rows, columns]: which probabilities stay. As `reference.dropout_keep`: Philox4x32-10, key `seed` (int64 scalar).

    Counter (row * N + column, head, window inside the image, image); the first word stays from `threshold` on.
    """
    counter = row[:, None] * N + column[None, :]
    word, _, _, _ = tl.philox(seed, counter, head, inside, image)
    return word >= tl.cast(threshold, tl.uint32)


@triton.jit
def into_range(grad):
    """(tile · 2^-e, 2^e, 2^-e) with 2^e <= max |tile| < 2^(e+1) if the tile is fp16; else (tile, 1, 1)."""
    if grad.dtype == tl.float16:
        wide = grad.to(tl.float32)
        exponent = tl.max(tl.max(tl.abs(wide), 1), 0).to(tl.int32, bitcast=True) & 0x7F800000
        inverse = ((254 << 23) - exponent).to(tl.float32, bitcast=True)
        return (wide * inverse).to(tl.float16), exponent.to(tl.float32, bitcast=True), inverse
    else:
        return grad, 1.0, 1.0


@triton.jit
def scored_rows(x, COSINE: tl.constexpr):
    """Rows as the score multiplies them, in fp32: of unit length if COSINE."""
    wide = x.to(tl.float32)
    if COSINE:
        wide *= inverse_norms(x)[:, None]
    return wide


@triton.jit
def through_norm(du, x, COSINE: tl.constexpr):
    """Gradient of x from that of `scored_rows(x)`; none for rows shorter than NORM_FLOOR."""
    if COSINE:
        u = scored_rows(x, COSINE)
        factor = tl.where(row_norms(x) < NORM_FLOOR, 0.0, inverse_norms(x))
        du = (du - u * tl.sum(u * du, 1)[:, None]) * factor[:, None]
    return du
