"""Masks of SimMIM (Xie et al., 2022, section 3.1): random square cells of an image are hidden, the same share of each.

A mask is keyed by (seed, epoch, sample id): it does not depend on ranks, workers or batches.
"""

from __future__ import annotations

import math

import numpy as np

from swin_scale.data.keyed import permutation


def draw_mask(
    height: int, width: int, *, ratio: float, cell: int, patch: int, seed: int, epoch: int, sample: int
) -> np.ndarray:
    """(height / patch, width / patch) uint8, 1 where a token is hidden.

    ceil(ratio * cells) of the image's cells of `cell` x `cell` pixels are hidden, drawn without replacement; where
    sides do not divide, the last row and column of cells reach beyond the image. `cell` is a multiple of `patch`.
    """
    rows, columns = -(-height // cell), -(-width // cell)
    hidden = np.zeros(rows * columns, dtype=np.uint8)
    count = math.ceil(rows * columns * ratio)
    hidden[permutation(rows * columns, "mask", seed, epoch, sample)[:count]] = 1
    tokens = cell // patch
    mask = hidden.reshape(rows, columns).repeat(tokens, 0).repeat(tokens, 1)
    return mask[: height // patch, : width // patch]
