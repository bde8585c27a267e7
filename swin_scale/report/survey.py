"""What a look at the routing of a trained model counts, and the arithmetic that makes its structure visible.

C classes, E experts, (H, W) places of a layer's map. A choice is one of the K experts of one token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

BINS = 20
"""Of the histogram of confidences, equal parts of [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class LayerSurvey:
    """Counts of one MoE layer over all images that were looked at."""

    name: str
    top_k: int
    tokens: int
    by_class: np.ndarray
    """(C, E) int64: choices of tokens of images of a class that fell on an expert, dropped ones included."""
    by_place: np.ndarray
    """(H, W, E) int64: the same by place in the image."""
    dropped: np.ndarray
    """(H, W) int64: choices dropped for want of capacity."""
    confidence: np.ndarray
    """(BINS,) int64: tokens by their largest gate probability."""
    confidence_sum: float
    confidence_by_expert: np.ndarray
    """(E,): sum of the largest gate probability over the tokens whose first choice an expert is."""
    first_choices: np.ndarray
    """(E,) int64: those tokens."""
    entropy_sum: float
    """Nats, over all tokens."""

    @property
    def experts(self) -> int:
        return self.by_class.shape[1]

    @cached_property
    def load(self) -> np.ndarray:
        """(E,): share of all choices."""
        count = self.by_class.sum(0)
        return count / max(count.sum(), 1)


@dataclass(frozen=True, kw_only=True)
class Survey:
    """A trained model's routing over some images, in evaluation."""

    title: str
    model: str
    weights: str
    data: tuple[str, ...]
    images: int
    """Looked at; of so many that the data has:"""
    available: int
    unusable: int
    classes: tuple[str, ...]
    capacity_factor: float
    """In evaluation; 0 drops nothing."""
    layers: tuple[LayerSurvey, ...]


def shares(counts: np.ndarray) -> np.ndarray:
    """Each row (last axis) over its sum; NaN where that is 0."""
    total = counts.sum(-1, keepdims=True)
    return np.divide(counts, total, out=np.full(counts.shape, np.nan), where=total > 0)


def explained(counts: np.ndarray) -> float:
    """How much a row tells about the expert: mutual information over the experts' entropy, from 0 to 1.

    counts: (n, E). The bias of finite counts, (n - 1)(E - 1) / 2N nats in the mean (Miller, 1955), is taken off; tokens
    of one image are alike, so a little of it is left.
    """
    counts = counts[counts.sum(1) > 0]
    total = counts.sum()
    if not total:
        return 0.0
    joint, experts = counts / total, counts.sum(0) / total
    ratio = np.divide(joint, joint.sum(1, keepdims=True) * experts, out=np.ones(joint.shape), where=joint > 0)
    entropy = -float((experts[experts > 0] * np.log(experts[experts > 0])).sum())
    if entropy < 1e-12:
        return 0.0
    bias = (len(counts) - 1) * (int((experts > 0).sum()) - 1) / (2 * total)
    return float(np.clip(((joint * np.log(ratio)).sum() - bias) / entropy, 0.0, 1.0))


def arrange(by_class: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(order of classes, order of experts) that bring what belongs together side by side.

    Experts lie along the first axis of correspondence analysis (Greenacre, 1984), so that those that share classes are
    neighbours; classes follow the expert that they favour most over its share of everything, the keenest first. Classes
    without a token are left out.
    """
    present = np.flatnonzero(by_class.sum(1) > 0)
    part = shares(by_class[present].astype(np.float64))
    mean = part.mean(0) if len(present) else np.ones(by_class.shape[1])
    scaled = (part - mean) / np.sqrt(np.maximum(mean, 1e-12))
    _, vectors = np.linalg.eigh(scaled.T @ scaled)
    axis = vectors[:, -1] / np.sqrt(np.maximum(mean, 1e-12))
    # The sign of an eigenvector is anybody's: let the lower half of the ids come first.
    half = len(axis) // 2
    experts = np.argsort(axis if axis[:half].sum() <= axis[half:].sum() else -axis, kind="stable")
    lift = part[:, experts] / np.maximum(mean[experts], 1e-12)
    favourite = lift.argmax(1) if len(present) else np.zeros(0, dtype=np.int64)
    keenness = lift[np.arange(len(present)), favourite]
    return present[np.lexsort((-keenness, favourite))], experts


def banded(rows: np.ndarray, most: int) -> list[np.ndarray]:
    """`rows` cut into at most `most` runs of nearly equal length."""
    return [band for band in np.array_split(rows, min(most, len(rows))) if len(band)] if len(rows) else []


def top_classes(by_class: np.ndarray, count: int, least: int) -> list[list[tuple[int, float]]]:
    """For each expert (class, share of its choices that fall there) of the `count` classes that use it most.

    Only classes of at least `least` choices, so that a class seen once does not lead every list.
    """
    labels = np.flatnonzero(by_class.sum(1) >= max(least, 1))
    part = np.ascontiguousarray(shares(by_class[labels].astype(np.float64)).T)
    best = [np.argsort(-share, kind="stable")[:count] for share in part]
    return [[(int(labels[i]), float(share[i])) for i in some if share[i] > 0] for share, some in zip(part, best)]


def named(classes: Sequence[str], labels: Sequence[int], most: int = 3) -> str:
    """Names of the first few classes: what a band of many is called."""
    names = ", ".join(classes[label].split(",")[0] for label in labels[:most])
    return names + (f" and {len(labels) - most} more" if len(labels) > most else "")
