"""What `bench kernels` times of an attention block: its shapes, its inputs, what it must move, and its value in fp64.

The region is everything between a block's input and the norm of its attention branch less the two matrix products, qkv
and proj. Ours takes qkv in image layout and gives the image layout back. Other codes partition the C channels of the
block's input before the product, not the 3C of its output, so each of them gets a share in its own order: the input
image in and its windows out, qkv in windows in, and the output image out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from swin_scale.errors import UserError
from swin_scale.kernels import reference
from swin_scale.models import variant
from swin_scale.models.geometry import Pair, stages

_TABLE = (
    ("T w8", "swinv2_tiny_patch4_window8_256", (1, 2, 3, 4)),
    ("B 192 w12", "swinv2_base_patch4_window12_192_22k", (1, 3, 4)),
    ("T w16", "swinv2_tiny_patch4_window16_256", (1, 3)),
    ("L 384 w24", "swinv2_large_patch4_window12to24_192to384_22kto1k_ft", (1, 3)),
    ("B w16", "swinv2_base_patch4_window16_256", (1,)),
    ("G 192 w12", "swinv2_g3b_patch4_window12_192", (1, 3)),
)

FIRST = ("T w8 s1", "B 192 w12 s1", "T w16 s1", "L 384 w24 s1")
"""The shapes that tell most: one of each window size, where a model spends its time."""

SHIFTS = ("shifted", "unshifted")

QUANTITIES = ("output", "q", "k", "v", "scale", "bias")
"""What the gate compares: the output, and the gradients of the rest."""

BACKWARD_SOFTMAX = 14 / 8
"""Softmax work of backward to that of forward: about 14 lane operations a score for 8, one exponential each."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Attention of one block: a map of `hw` tokens with `dim` channels in `heads` heads."""

    name: str
    hw: Pair
    dim: int
    heads: int
    window: Pair
    shift: Pair

    @property
    def shifted(self) -> bool:
        return any(self.shift)

    @property
    def title(self) -> str:
        return f"{self.name}, shifted" if self.shifted else self.name

    def as_dict(self) -> dict[str, Any]:
        """For a result file."""
        return {**asdict(self), "tokens": self.tokens, "head_dim": self.head_dim}

    @property
    def tokens(self) -> int:
        """Of a window, N."""
        return self.window[0] * self.window[1]

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    def elements(self, batch: int) -> int:
        """Of the input image, T * C."""
        return batch * self.hw[0] * self.hw[1] * self.dim

    def scores(self, batch: int) -> int:
        """Entries of all attention matrices, T * heads * N."""
        return batch * self.hw[0] * self.hw[1] * self.heads * self.tokens


@dataclass(frozen=True, kw_only=True)
class Floor:
    """The least that a pass does, whatever the code: bytes moved, softmax work, and matrix products."""

    bytes: int
    exponentials: float
    """In units of a forward's, one a score."""
    flops: int

    def seconds(self, copy: float | None, exp: float | None, matmul: float | None) -> dict[str, float | None]:
        """Of memory, softmax and matrix products at the rates given (bytes/s, 1/s, FLOP/s); None without a rate."""
        return {
            "memory": self.bytes / copy if copy else None,
            "softmax": self.exponentials / exp if exp else None,
            "matmul": self.flops / matmul if matmul else None,
        }


def floors(shape: Shape, batch: int, dtype: torch.dtype) -> dict[str, Floor]:
    """Of `forward` and `forward+backward`.

    Forward reads q, k, v and writes the output: four values a token and channel. Backward reads them and the output's
    gradient and writes three gradients: seven; an output or a log-sum-exp need not be read again. Products: two of
    2 * d FLOP a score forward, and five backward, where the scores are computed again.
    """
    elements, scores = shape.elements(batch), shape.scores(batch)
    forward = Floor(bytes=4 * dtype.itemsize * elements, exponentials=float(scores), flops=4 * scores * shape.head_dim)
    both = Floor(
        bytes=11 * dtype.itemsize * elements,
        exponentials=scores * (1 + BACKWARD_SOFTMAX),
        flops=14 * scores * shape.head_dim,
    )
    return {"forward": forward, "forward+backward": both}


def shapes(names: Sequence[str] = (), models: Sequence[str] = (), shifts: Sequence[str] = SHIFTS) -> list[Shape]:
    """Of the table (default: all of it, the most telling first), or all stages of other `models`.

    Each is there unshifted and, where the stage shifts, shifted, as far as `shifts` asks for it. Raises UserError for a
    name that is not in the table.
    """
    table = {f"{family} s{i}": (model, i) for family, model, numbers in _TABLE for i in numbers}
    unknown = [name for name in names if name not in table]
    if unknown:
        raise UserError(f"--shapes {unknown[0]!r} is not one of {', '.join(map(repr, table))}")
    if not names and not models:
        names = [*FIRST, *(name for name in table if name not in FIRST)]
    wanted = [(name, *table[name]) for name in names]
    wanted += [(f"{model} s{i + 1}", model, i + 1) for model in models for i in range(len(variant(model).depths))]
    found = []
    for name, model, number in wanted:
        stage = stages(variant(model))[number - 1]
        for shift in ((stage.shift_size,) if any(stage.shift_size) else ()) + ((0, 0),):
            found.append(
                Shape(
                    name=name,
                    hw=stage.resolution,
                    dim=stage.dim,
                    heads=stage.heads,
                    window=stage.window_size,
                    shift=shift,
                )
            )
    # All shifted ones first: that is the kernel with everything in it.
    wanted_kinds = [SHIFTS[not shape.shifted] in shifts for shape in found]
    return sorted((s for s, is_wanted in zip(found, wanted_kinds) if is_wanted), key=lambda shape: not shape.shifted)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """One set, every value exact in `dtype`, so that nobody errs by having been handed it."""

    x: Tensor
    """(B, H, W, C): the block's input."""
    qkv: Tensor
    """(B, H, W, 3C)."""
    qkv_windows: Tensor
    """(B * nW, N, 3C): the same, shifted and in windows."""
    scale: Tensor
    """(heads, 1, 1) fp32, from 5 to 30."""
    bias: Tensor
    """(heads, N, N) fp32, within 0 to 16 as SwinV2's."""
    upstream: Tensor
    """(B, H, W, C): gradient of the output."""


def draw(shape: Shape, batch: int, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Random inputs; on a GPU they are drawn there, since they are gigabytes."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=dtype)

    image = (batch, *shape.hw, shape.dim)
    qkv = normal(*image[:-1], 3 * shape.dim)
    spread = torch.rand((shape.heads, 1, 1), generator=generator, device=device)
    scale = (math.log(5) + spread * math.log(6)).exp()
    table = torch.randn((shape.heads, shape.tokens, shape.tokens), generator=generator, device=device)
    return Inputs(
        x=normal(*image),
        qkv=qkv,
        qkv_windows=reference.window_partition(qkv, shape.window, shape.shift),
        scale=scale.to(dtype).float(),
        # Not so near 16 that it would be 16 in half precision.
        bias=(16 * table.clamp_(-3, 3).sigmoid()).to(dtype).float(),
        upstream=normal(*image),
    )


def judged_images(shape: Shape, batch: int, most_scores: int = 1 << 26) -> list[int]:
    """The images that the fp64 reference computes: the first and the last ones, as many as it has room for."""
    count = max(1, min(batch, 8, most_scores // shape.scores(1)))
    return sorted({*range(count // 2), *range(batch - (count - count // 2), batch)})


def outcome(shape: Shape, inputs: Inputs, images: Sequence[int]) -> dict[str, Tensor]:
    """`QUANTITIES` in fp64 when only `images` have an upstream gradient; output and q, k, v of those images."""
    at = torch.tensor(images, device=inputs.qkv.device)
    leaves = [part.double().requires_grad_() for part in (inputs.qkv.index_select(0, at), inputs.scale, inputs.bias)]
    qkv, scale, bias = leaves
    y = reference.window_attention(qkv, scale, bias, shape.window, shape.shift, True)
    d_qkv, d_scale, d_bias = torch.autograd.grad(y, leaves, inputs.upstream.index_select(0, at).double())
    return dict(zip(QUANTITIES, (y.detach(), *d_qkv.chunk(3, -1), d_scale, d_bias), strict=True))
