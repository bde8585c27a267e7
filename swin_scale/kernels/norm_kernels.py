"""Triton kernels of `norms`: LayerNorm over the rows of a map, with what stands before and after it in one pass.

R rows of C channels. A program holds tiles of BLOCK_R rows by BLOCK_C channels in registers; a row longer than BLOCK_C
is read in pieces, twice. Statistics and sums are fp32. A pointer that is None says what to leave out:

    skip                given: a residual is added, after the norm, or before it where `total` is given too
    keep                given: what drop-path multiplies the branch of a sample by
    half_width          given: the row of channels is gathered from a 2 x 2 neighbourhood of a map 2 * half_width wide

Neither half of the pair uses atomics: each value is written once, sums over rows are partial sums per program, added in
a fixed order by `add_partials`.
"""

import triton
import triton.language as tl


@triton.jit
def forward(
    source,  # (R, C), or the map (B, H, W, C / 4) to gather rows from
    skip,  # (R, C)
    weight,  # (C,)
    bias,  # (C,)
    keep,  # (B,)
    total,  # out (R, C): skip + keep * source, of which the norm is taken
    y,  # out (R, C)
    stats,  # out (2, R): mean and 1 / standard deviation
    rows,
    rows_per_sample,
    half_width,
    eps,
    C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    here = row < rows
    kept = _kept(keep, row, here, rows_per_sample)
    column = tl.arange(0, BLOCK_C)
    if C <= BLOCK_C:
        s, beside = _load(source, skip, kept, total, row, column, here, half_width, C)
        mean = tl.sum(s, 1) / C
        apart = tl.where((column < C)[None, :], s - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(apart * apart, 1) / C + eps)
        _store(s, beside, mean, rstd, skip, weight, bias, kept, total, y, row, column, here, C)
    else:
        mean = tl.zeros([BLOCK_R], tl.float32)
        squares = tl.zeros([BLOCK_R], tl.float32)
        for first in range(0, C, BLOCK_C):
            # Mean and sum of squares about it, of the pieces so far and this one (Chan et al., 1979).
            column = first + tl.arange(0, BLOCK_C)
            s, beside = _load(source, skip, kept, total, row, column, here, half_width, C)
            count = tl.minimum(C - first, BLOCK_C)
            here_mean = tl.sum(s, 1) / count
            apart = tl.where((column < C)[None, :], s - here_mean[:, None], 0.0)
            step = here_mean - mean
            share = count / (first + count)
            mean += step * share
            squares += tl.sum(apart * apart, 1) + step * step * share * first
        rstd = tl.rsqrt(squares / C + eps)
        for first in range(0, C, BLOCK_C):
            column = first + tl.arange(0, BLOCK_C)
            s, beside = _load(source, skip, kept, total, row, column, here, half_width, C)
            _store(s, beside, mean, rstd, skip, weight, bias, kept, total, y, row, column, here, C)
    tl.store(stats + row, mean, mask=here)
    tl.store(stats + rows + row, rstd, mask=here)


@triton.jit
def backward(
    grad,  # (R, C), of y
    grad_total,  # (R, C), of total where the residual comes before the norm
    source,  # what was normed: as in `forward`, or its total
    weight,  # (C,)
    keep,  # (B,)
    stats,  # (2, R)
    d_source,  # out, laid out as source
    d_branch,  # out (R, C): keep * d_source, where the residual comes before the norm
    partial,  # out (2, programs, C) fp32: gradients of weight and bias
    rows,
    rows_per_sample,
    half_width,
    C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # Of a row in several pieces, each program along axis 1 reads all for the two means and writes one.
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    scale = tl.load(weight + column, mask=column < C, other=0.0).to(tl.float32)[None, :]
    d_weight = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    d_bias = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, BLOCK_R), tl.num_programs(0)):
        row = block * BLOCK_R + tl.arange(0, BLOCK_R)
        here = row < rows
        kept = _kept(keep, row, here, rows_per_sample)
        mean = tl.load(stats + row, mask=here, other=0.0)
        rstd = tl.load(stats + rows + row, mask=here, other=0.0)
        inside, flat = _flat(row, column, here, C)
        at = _gathered(row, column, half_width, C)
        g = tl.load(grad + flat, mask=inside, other=0.0).to(tl.float32)
        if grad_total is None:
            g *= kept
        else:
            onward = tl.load(grad_total + flat, mask=inside, other=0.0)
        normed = (tl.load(source + at, mask=inside, other=0.0).to(tl.float32) - mean[:, None]) * rstd[:, None]
        if C <= BLOCK_C:
            level = tl.sum(g * scale, 1)
            along = tl.sum(g * scale * normed, 1)
        else:
            level = tl.zeros([BLOCK_R], tl.float32)
            along = tl.zeros([BLOCK_R], tl.float32)
            for first in range(0, C, BLOCK_C):
                other = first + tl.arange(0, BLOCK_C)
                other_inside, other_flat = _flat(row, other, here, C)
                other_at = _gathered(row, other, half_width, C)
                u = tl.load(grad + other_flat, mask=other_inside, other=0.0).to(tl.float32)
                if grad_total is None:
                    u *= kept
                u *= tl.load(weight + other, mask=other < C, other=0.0).to(tl.float32)[None, :]
                n = tl.load(source + other_at, mask=other_inside, other=0.0).to(tl.float32)
                level += tl.sum(u, 1)
                along += tl.sum(u * (n - mean[:, None]) * rstd[:, None], 1)
        d = (g * scale - (level[:, None] + normed * along[:, None]) / C) * rstd[:, None]
        if grad_total is not None:
            d += onward.to(tl.float32)
        tl.store(d_source + at, d.to(d_source.dtype.element_ty), mask=inside)
        if d_branch is not None:
            tl.store(d_branch + flat, (d * kept).to(d_branch.dtype.element_ty), mask=inside)
        d_weight += g * normed
        d_bias += g
    out = partial + tl.program_id(0) * C + column
    tl.store(out, tl.sum(d_weight, 0), mask=column < C)
    tl.store(out + tl.num_programs(0) * C, tl.sum(d_bias, 0), mask=column < C)


@triton.jit
def add_partials(
    partial,  # (2, P, C) fp32
    d_weight,  # out (C,)
    d_bias,  # out (C,)
    P,
    C,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    which = tl.program_id(1)
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for first in range(0, P, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        inside = (p < P)[:, None] & (column < C)[None, :]
        total += tl.load(partial + ((which * P + p) * C)[:, None] + column[None, :], mask=inside, other=0.0)
    values = tl.sum(total, 0)
    if which == 0:
        tl.store(d_weight + column, values.to(d_weight.dtype.element_ty), mask=column < C)
    else:
        tl.store(d_bias + column, values.to(d_bias.dtype.element_ty), mask=column < C)


@triton.jit
def move_patches(
    tokens,  # (B, H, W, C / 4)
    merged,  # (B, H / 2, W / 2, C): R rows
    rows,
    half_width,
    C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    MERGE: tl.constexpr,  # from tokens to merged, or back
):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside, flat = _flat(row, column, row < rows, C)
    at = _gathered(row, column, half_width, C)
    if MERGE:
        tl.store(merged + flat, tl.load(tokens + at, mask=inside), mask=inside)
    else:
        tl.store(tokens + at, tl.load(merged + flat, mask=inside), mask=inside)


@triton.jit
def _kept(keep, row, here, rows_per_sample):
    """What each row's branch is multiplied by, (BLOCK_R, 1)."""
    if keep is None:
        kept = tl.full([row.shape[0], 1], 1.0, tl.float32)
    else:
        kept = tl.load(keep + row // rows_per_sample, mask=here, other=0.0).to(tl.float32)[:, None]
    return kept


@triton.jit
def _flat(row, column, here, C: tl.constexpr):
    """Which of a tile's values exist, and where they lie in (R, C)."""
    return here[:, None] & (column < C)[None, :], row.to(tl.int64)[:, None] * C + column[None, :]


@triton.jit
def _gathered(row, column, half_width, C: tl.constexpr):
    """Where the values of a tile lie in the map that rows are gathered from; in (R, C) if they are not."""
    if half_width is None:
        at = row.to(tl.int64)[:, None] * C + column[None, :]
    else:
        channels: tl.constexpr = C // 4
        token = row // half_width * (4 * half_width) + row % half_width * 2  # the top left of its neighbourhood
        # Down a column first: (0, 0), (1, 0), (0, 1), (1, 1) as (row, column).
        part = column // channels
        offset = (part % 2 * (2 * half_width) + part // 2) * channels + column % channels
        at = token.to(tl.int64)[:, None] * channels + offset[None, :]
    return at


@triton.jit
def _load(source, skip, kept, total, row, column, here, half_width, C: tl.constexpr):
    """The tile of which the norm is taken, a total as it will be stored, rounded to its dtype; and that of `skip`.

    Both are asked for before the sums over rows wait for the first.
    """
    inside, flat = _flat(row, column, here, C)
    s = tl.load(source + _gathered(row, column, half_width, C), mask=inside, other=0.0)
    beside = s
    if skip is not None:
        beside = tl.load(skip + flat, mask=inside, other=0.0)
    s = s.to(tl.float32)
    if total is not None:
        s = (beside.to(tl.float32) + kept * s).to(total.dtype.element_ty).to(tl.float32)
    return s, beside


@triton.jit
def _store(s, beside, mean, rstd, skip, weight, bias, kept, total, y, row, column, here, C: tl.constexpr):
    """Norm the tile `s` and write what is asked for."""
    inside, flat = _flat(row, column, here, C)
    scale = tl.load(weight + column, mask=column < C, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=column < C, other=0.0).to(tl.float32)
    out = (s - mean[:, None]) * rstd[:, None] * scale[None, :] + shift[None, :]
    if total is not None:
        tl.store(total + flat, s.to(total.dtype.element_ty), mask=inside)
    elif skip is not None:
        out = beside.to(tl.float32) + kept * out
    tl.store(y + flat, out.to(y.dtype.element_ty), mask=inside)
