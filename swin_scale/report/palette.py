"""Colours of heat maps: one sequential scale of nine levels whose lightness falls evenly, so that it can be read by
people of any colour vision and in grey (YlGnBu of ColorBrewer, Brewer and Harrower, 2002)."""

from __future__ import annotations

import numpy as np

LEVELS = ("#ffffd9", "#edf8b1", "#c7e9b4", "#7fcdbb", "#41b6c4", "#1d91c0", "#225ea8", "#253494", "#081d58")
"""From the least to the most, on a light page; a dark page takes them in reverse."""


def level(values: np.ndarray, top: float) -> np.ndarray:
    """Level, 0 to 8, of each value on a scale from 0 to `top`, in nine equal steps; -1 where a value is NaN."""
    here = np.isfinite(values)
    scaled = np.where(here, values, 0.0) / (top or 1.0) * len(LEVELS)
    return np.where(here, np.clip(np.floor(scaled), 0, len(LEVELS) - 1), -1).astype(np.int8)


def paint(values: np.ndarray, top: float) -> np.ndarray:
    """A map (H, W) as colours (H, W, 3) uint8, blended between the levels, on a scale from 0 to `top`."""
    table = np.array([[int(colour[at : at + 2], 16) for at in (1, 3, 5)] for colour in LEVELS], dtype=np.float64)
    place = np.clip(np.nan_to_num(values) / (top or 1.0), 0.0, 1.0) * (len(LEVELS) - 1)
    low = np.minimum(place.astype(np.int64), len(LEVELS) - 2)
    share = (place - low)[..., None]
    return np.rint(table[low] * (1 - share) + table[low + 1] * share).astype(np.uint8)
