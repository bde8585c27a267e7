"""Masks of SimMIM (Xie et al., 2022, section 3.1): random square cells of an image are hidden, the same share of each.

A mask is keyed by (seed, epoch, sample id): it does not depend on ranks, workers or batches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from swin_scale.data.keyed import permutation

FIXED_EPOCH = -1
"""Stands in the key of masks that never change, those of evaluation; no training epoch has this number."""


@dataclass(frozen=True, kw_only=True)
class Masking:
    """How a stream masks its images."""

    ratio: float
    """Share of the cells that are hidden."""
    cell: int
    """Side of a cell in pixels, a multiple of `patch`."""
    patch: int
    """Side of a token in pixels."""
    seed: int = 0
    fixed: bool = False
    """A sample has the same mask in every epoch."""

    def shape(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of the mask of an image."""
        return height // self.patch, width // self.patch

    def draw(self, height: int, width: int, *, epoch: int, sample: int, copy: int = 0) -> np.ndarray:
        """See `draw_mask`."""
        return draw_mask(
            height, width, ratio=self.ratio, cell=self.cell, patch=self.patch, seed=self.seed,
            epoch=FIXED_EPOCH if self.fixed else epoch, sample=sample, copy=copy,
        )  # fmt: skip


def hidden_cells(height: int, width: int, *, ratio: float, cell: int) -> tuple[int, int]:
    """(hidden, all) cells of an image."""
    cells = -(-height // cell) * -(-width // cell)
    return math.ceil(cells * ratio), cells


def draw_mask(
    height: int, width: int, *, ratio: float, cell: int, patch: int, seed: int, epoch: int, sample: int, copy: int = 0
) -> np.ndarray:
    """(height / patch, width / patch) uint8, 1 where a token is hidden.

    ceil(ratio * cells) of the image's cells of `cell` x `cell` pixels are hidden, drawn without replacement; where
    sides do not divide, the last row and column of cells reach beyond the image. `cell` is a multiple of `patch`;
    `copy` tells apart the views of a sample that an epoch has several of.
    """
    rows, columns = -(-height // cell), -(-width // cell)
    hidden = np.zeros(rows * columns, dtype=np.uint8)
    count, _ = hidden_cells(height, width, ratio=ratio, cell=cell)
    hidden[permutation(rows * columns, "mask", seed, epoch, sample, copy)[:count]] = 1
    tokens = cell // patch
    mask = hidden.reshape(rows, columns).repeat(tokens, 0).repeat(tokens, 1)
    return mask[: height // patch, : width // patch]
