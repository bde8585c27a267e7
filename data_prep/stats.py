"""Figures of a shard set: counts per class, sizes, and how well the stored order mixes the classes."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

from data_prep.images import BadImageError, check_image
from data_prep.sample import read_images
from swin_scale.shards import ShardSet


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Smallest, median and largest of a quantity."""

    min: float
    median: float
    max: float


@dataclass(frozen=True, kw_only=True)
class ShardStats:
    """What `shard_stats` found."""

    shards: int
    samples: int
    bytes: int
    """Of the tars."""
    left_out: int
    image_bytes: Spread
    classes: int
    unlabelled: int
    per_class: Spread | None
    """Samples per class, missing classes counted as 0; None for a set without classes."""
    missing_classes: tuple[str, ...]
    sampled: int
    """Images whose headers were read for the three figures below."""
    width: Spread | None
    height: Spread | None
    megapixels: Spread | None
    adjacent_same_label: float
    """Share of neighbours in stored order with the same label."""
    permuted_same_label: float
    """What a full permutation gives on average: sum of c (c - 1) over n (n - 1), c the samples of each class."""


def shard_stats(directory: str | os.PathLike[str], *, headers: int = 2000, seed: int = 0) -> ShardStats:
    """Figures of the shard set in `directory`, from its index and the headers of `headers` images drawn by `seed`.

    Raises DataError when the set cannot be opened.
    """
    shards = ShardSet.open(directory)
    labels, sizes = np.asarray(shards.index["label"]), np.asarray(shards.index["size"])
    classes = shards.manifest.classes
    counts = np.bincount(labels[labels >= 0], minlength=len(classes))
    dimensions = []
    for _, image in read_images(shards, headers, seed):
        try:
            dimensions.append(check_image(image, decode=False)[1:])
        except BadImageError:
            continue  # `shards verify` names it
    width, height = np.array(dimensions).reshape(-1, 2).T
    pairs = len(labels) * (len(labels) - 1)
    return ShardStats(
        shards=len(shards.manifest.shards),
        samples=len(labels),
        bytes=sum(shard.bytes for shard in shards.manifest.shards),
        left_out=shards.manifest.left_out,
        image_bytes=_spread(sizes),
        classes=len(classes),
        unlabelled=int((labels < 0).sum()),
        per_class=_spread(counts) if len(counts) else None,
        missing_classes=tuple(name for name, count in zip(classes, counts.tolist(), strict=False) if not count),
        sampled=len(dimensions),
        width=_spread(width) if len(width) else None,
        height=_spread(height) if len(height) else None,
        megapixels=_spread(width * height / 1e6) if len(width) else None,
        adjacent_same_label=float((labels[1:] == labels[:-1]).mean()) if pairs else 0.0,
        permuted_same_label=float((counts * (counts - 1.0)).sum() / pairs) if pairs else 0.0,
    )


def _spread(values: np.ndarray) -> Spread:
    return Spread(min=float(values.min()), median=float(np.median(values)), max=float(values.max()))
