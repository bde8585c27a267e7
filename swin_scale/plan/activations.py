"""What each layer keeps between forward and backward, in bytes: a count of the tensors that our blocks save.

A token map is T x C values, T = images x tokens, in the activations' dtype of e bytes. A dense block of MLP ratio r
keeps 8 + 2r of them (16 at r = 4), whichever kernels compute it:

| kept by | SwinV2 (post-norm) | Swin, Swin-MoE (pre-norm) |
|---|---|---|
| qkv: its input | x: 1 | x by the norm, normed x: 2 |
| attention: qkv; projection: its input | 3 + 1 | 3 + 1 |
| norm of the branch: its input | 1 | none; total by the second norm: 1 |
| MLP: input, before GELU, after it | 1 + 2r | 1 + 2r |
| norm of the branch: its input | 1 | none |

Beside these, fp32 and mostly independent of the batch: two numbers a token for every norm, the position bias (heads x
N x N), the hidden layer of the MLP it comes from, and in Triton's attention of windows above 64 tokens the log-sum-exp
of every row. Nothing of N x N x windows is kept by anyone.

Under activation checkpointing a block keeps its input and what makes its position bias, which is outside of what is
recomputed; `selective` keeps the attention's output too. The rest comes back while the block's own backward runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from swin_scale.models.geometry import Stage, pair, stages
from swin_scale.models.variants import Variant

Checkpointing = Literal["off", "block", "selective"]
Backend = Literal["triton", "torch", "cpu"]
"""Who computes: Triton's kernels on a GPU, torch on a GPU, or torch on a CPU, in cache-sized pieces."""

FP32, INT64 = 4, 8
CPB_HIDDEN = 512
"""Of `models.attention`; a test compares them."""
WHOLE_WINDOW = 64
"""Of `kernels.tuning`: Triton's attention keeps a log-sum-exp for larger windows only."""
MLP_PIECE = 1 << 21
"""Of `models.layers`: hidden values that a CPU computes at once."""
CHUNKS: Mapping[str, int] = {"cpu": 1 << 20, "torch": 1 << 28}
"""Of `kernels.chunked`: logits of attention that torch holds at once, on a CPU and on a GPU."""
MAP_READS_AND_WRITES = 6
"""Times that a byte kept crosses HBM in a step: written and read in forward, read in backward, and its gradient written
and read, and once more for what is neither. Fitted once to counts of fused kernels; see tests/plan."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One step of the forward pass, in bytes and multiply-adds of one rank's micro-batch."""

    name: str
    """Prefix of its parameters' names."""
    kept: float
    """Alive from its forward to its backward."""
    recomputed: float = 0.0
    """More of the same while its own backward runs, under activation checkpointing."""
    working: float = 0.0
    """Gradients of activations while its own backward runs."""
    macs: float = 0.0
    """Multiply-adds of one forward."""
    moved: float = 0.0
    """Bytes through HBM in forward and backward, without recomputation."""


@dataclass
class _Kept:
    """Bytes that a block keeps, by when they are given up under checkpointing."""

    always: float = 0.0
    attention: float = 0.0
    rest: float = 0.0
    whole: float = field(init=False, default=0.0)

    def layer(self, name: str, mode: Checkpointing, working: float, macs: float) -> Layer:
        whole = self.always + self.attention + self.rest
        kept = {"off": whole, "selective": self.always + self.attention, "block": self.always}[mode]
        moved = MAP_READS_AND_WRITES * whole
        return Layer(name=name, kept=kept, recomputed=whole - kept, working=working, macs=macs, moved=moved)


def layers(
    v: Variant,
    *,
    batch: int,
    itemsize: int,
    mode: Checkpointing = "off",
    backend: Backend = "triton",
    simmim: bool = False,
) -> list[Layer]:
    """Every layer of `v` in the order of forward, for a micro-batch of `batch` images.

    Args:
        itemsize: bytes of an activation: 4 in fp32, 2 in bf16 and fp16.
        simmim: the model is an encoder without a head, drawing masked pixels.

    Of a mixture of experts the rows are those of an even load without drops, so no rank has more on average.
    """
    all_stages = stages(v)
    prefix = "encoder." if simmim else ""
    found = [_embedding(v, all_stages[0], batch, itemsize, simmim)]
    for i, stage in enumerate(all_stages):
        for j in range(stage.depth):
            name = f"{prefix}layers.{i}.blocks.{j}."
            found.append(_block(v, stage, j, name, batch, itemsize, mode, backend))
        if i < len(all_stages) - 1:
            found.append(_merging(v, stage, f"{prefix}layers.{i}.downsample.", batch, itemsize))
    found.append(_decoder(v, all_stages[-1], batch, itemsize) if simmim else _head(v, all_stages[-1], batch, itemsize))
    return found


def kept_bytes(found: Sequence[Layer]) -> float:
    """Alive when forward ends."""
    return sum(layer.kept for layer in found)


def peak_bytes(found: Sequence[Layer], gradients: Sequence[float] = ()) -> float:
    """The largest sum of activations alive at any moment of backward, which frees them from the last layer on.

    `gradients`: bytes of the parameters' gradients of each layer, which come as activations go; none if not given.
    """
    alive, made, peak = kept_bytes(found), 0.0, 0.0
    for layer, gradient in zip(reversed(found), reversed(gradients or [0.0] * len(found)), strict=True):
        made += gradient
        peak = max(peak, alive + layer.recomputed + layer.working + made)
        alive -= layer.kept
    return peak


def _norm_statistics(rows: float) -> float:
    return 2 * rows * FP32


def _embedding(v: Variant, first: Stage, batch: int, e: int, simmim: bool) -> Layer:
    height, width = pair(v.img_size)
    T = batch * first.resolution[0] * first.resolution[1]
    tokens = T * first.dim * e
    kept = float(batch * v.in_chans * height * width * e)
    if v.patch_norm:
        kept += tokens + _norm_statistics(T)
    if simmim:
        kept += T  # where tokens are hidden
    if v.drop_rate:
        kept += T * first.dim
    macs = T * first.dim * v.in_chans * v.patch_size**2
    return Layer(
        name="encoder.patch_embed." if simmim else "patch_embed.",
        kept=kept,
        working=2 * tokens,
        macs=macs,
        moved=MAP_READS_AND_WRITES * kept,
    )


def _block(
    v: Variant, stage: Stage, index: int, name: str, batch: int, e: int, mode: Checkpointing, backend: Backend
) -> Layer:
    (H, W), (wh, ww), C = stage.resolution, stage.window_size, stage.dim
    T, N, r = batch * H * W, wh * ww, v.mlp_ratio
    unit = T * C * e
    kept = _Kept(always=unit)
    if v.family == "swin_mlp":
        shift = stage.shift_size if index % 2 else (0, 0)
        padded = batch * (H + wh * (shift[0] > 0)) * (W + ww * (shift[1] > 0))
        kept.rest += padded * C * e + _norm_statistics(T)
        macs = float(padded * C * N)
    else:
        kept.always += position_bias(v, stage, e)
        kept.attention += unit
        if backend == "triton" and N > WHOLE_WINDOW:
            kept.attention += T * stage.heads * FP32
        # q, k, v; then the branch (post-norm) or the normed input (pre-norm).
        kept.rest += 4 * unit + _norm_statistics(T) + _dropped(v.drop_rate, T * C, e, backend)
        macs = float(4 * T * C * C + 2 * T * N * C)
    if not v.post_norm:
        kept.rest += unit  # the sum that the second norm reads
    mixture = 0.0
    if v.moe is not None and index in stage.moe_blocks:
        mixture, working = _mixture(v, stage, T, e, backend)
        kept.rest += mixture
        if mode != "off":
            kept.always += T * v.moe.top_k * INT64  # the first routing, to compare with
        macs += 2 * T * v.moe.top_k * C * C * r
    else:
        kept.rest += unit * (1 + 2 * r) + _norm_statistics(T) + _dropped(v.drop_rate, T * C * (r + 1), e, backend)
        if v.post_norm:
            kept.rest += unit
        # While fc2 and GELU run backward: the gradient of the block, of the branch, and of the hidden map.
        hidden = min(T * C * r, MLP_PIECE) if backend == "cpu" else T * C * r
        working = 2 * unit + hidden * e
        macs += 2 * T * C * C * r
    if v.extra_norm_interval > 0 and (index + 1) % v.extra_norm_interval == 0:
        kept.rest += unit + _norm_statistics(T)
    if v.family != "swin_mlp" and backend != "triton":
        # Attention's backward comes when all of the MLP has gone, what the norm before it kept, and the output.
        branch = mixture if v.moe is not None and index in stage.moe_blocks else unit * (1 + 2 * r)
        working = max(working, 5 * unit + _attention_scratch(stage, batch, CHUNKS[backend]) - branch - 2 * unit)
    return kept.layer(name, mode, working, macs)


def _attention_scratch(stage: Stage, batch: int, chunk: int) -> float:
    """Of backward by torch: logits twice, then q, k, v, their gradients and that of the output in fp32, and the row
    numbers of partition, all for one group of images."""
    (H, W), (wh, ww), heads = stage.resolution, stage.window_size, stage.heads
    N = wh * ww
    images = min(batch, max(1, chunk // (heads * N * H * W)))
    logits = min(chunk, batch * H * W * heads * N)
    return 2 * logits * FP32 + images * H * W * (7 * stage.dim * FP32 + 8 * heads * INT64)


def position_bias(v: Variant, stage: Stage, e: int) -> float:
    """Bytes that a block's position bias keeps, however many images there are."""
    (h, w), heads = stage.window_size, stage.heads
    bias = heads * (h * w) ** 2 * FP32
    if v.family in ("swin", "swin_mlp"):
        return bias
    offsets = (2 * h - 1) * (2 * w - 1)
    hidden = offsets * CPB_HIDDEN * FP32
    sigmoid = offsets * heads * FP32 if v.post_norm else 0
    upcast = heads * CPB_HIDDEN * FP32 if e < FP32 else 0
    return bias + hidden + sigmoid + upcast


def _dropped(rate: float, values: float, e: int, backend: Backend) -> float:
    """The mask of a dropout, as bytes on a GPU and as factors on a CPU."""
    return values * (e if backend == "cpu" else 1) if rate else 0.0


def _mixture(v: Variant, stage: Stage, T: int, e: int, backend: Backend) -> tuple[float, float]:
    """Kept by gate, dispatch, experts and combination; and the working memory of their backward."""
    assert v.moe is not None
    moe, C, hidden = v.moe, stage.dim, int(stage.dim * v.mlp_ratio)
    R, K, E = T * moe.top_k, moe.top_k, moe.num_experts
    noisy = moe.gate_noise > 0
    # The gate reads tokens in fp32. Of (T, E): probabilities, logits, and with noise those of the choice, and load.
    gate = (
        float(T * C * FP32) + T * E * FP32 * (2 + 2 * noisy) + T * 3 * FP32 + T * K * (2 * INT64 + FP32 + 1) + R * INT64
    )
    if moe.router == "cosine":
        gate += T * (2 * moe.cosine_dim + E + 2) * FP32
    if e < FP32:
        gate += E * C * FP32
    row = R * C * e
    # Rows in, before GELU, after it, rows out.
    experts = float(row) + 2 * R * hidden * e + row
    if moe.drop:
        experts += R * hidden
    if v.post_norm:
        experts += row + _norm_statistics(R)
    wide = R * hidden * e / E * 2 if backend == "cpu" else R * hidden * e
    # The weighted sum's backward is in fp32.
    return gate + experts, 3 * row + wide + (R * C * FP32 if e < FP32 else 0)


def _merging(v: Variant, stage: Stage, name: str, batch: int, e: int) -> Layer:
    T, C = batch * stage.resolution[0] * stage.resolution[1], stage.dim
    unit = T * C * e
    # The reduction's input, and its output (post-norm) or the norm's input (pre-norm).
    kept = unit + (unit / 2 if v.post_norm else unit) + _norm_statistics(T / 4)
    macs = T / 4 * 8 * C * C
    return Layer(name=name, kept=kept, working=2 * unit, macs=macs, moved=MAP_READS_AND_WRITES * kept)


def _head(v: Variant, last: Stage, batch: int, e: int) -> Layer:
    T, C = batch * last.resolution[0] * last.resolution[1], last.dim
    # The norm's input, the mean, log-probabilities and targets.
    kept = T * C * e + _norm_statistics(T) + batch * C * e + 2 * batch * v.num_classes * FP32
    working = T * C * e + batch * v.num_classes * (FP32 + e)
    return Layer(name="", kept=kept, working=working, macs=batch * C * v.num_classes, moved=MAP_READS_AND_WRITES * kept)


def _decoder(v: Variant, last: Stage, batch: int, e: int) -> Layer:
    height, width = pair(v.img_size)
    T, C, pixels = batch * last.resolution[0] * last.resolution[1], last.dim, batch * height * width
    # The norm's input and output, errors of every pixel and the mask over them.
    kept = 2 * T * C * e + _norm_statistics(T) + pixels * (v.in_chans + 1) * FP32
    macs = T * C * (v.patch_size << (len(v.depths) - 1)) ** 2 * v.in_chans
    working = T * C * e + 2 * pixels * v.in_chans * FP32
    return Layer(name="", kept=kept, working=working, macs=macs, moved=MAP_READS_AND_WRITES * kept)
