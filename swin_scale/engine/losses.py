"""Losses per sample, so that the caller can leave out empty slots and divide by the valid samples of the global batch.

Everything is computed in fp32 whatever the model's precision.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def smooth_targets(labels: torch.Tensor, num_classes: int, smoothing: float) -> torch.Tensor:
    """Label-smoothed one-hot rows (Szegedy et al., 2016, section 7).

    Args:
        labels: (B,) integer classes; a negative label (an empty slot) gives the uniform part only.
        num_classes: classes C.
        smoothing: mass spread evenly over all classes, the true one included; 0 gives one-hot rows.

    Returns:
        (B, C) fp32; rows of valid labels sum to 1.
    """
    off = smoothing / num_classes
    targets = torch.full((len(labels), num_classes), off, dtype=torch.float32, device=labels.device)
    valid = (labels >= 0).to(torch.float32).unsqueeze(1)
    return targets.scatter_add_(1, labels.clamp(min=0).long().unsqueeze(1), valid * (1.0 - smoothing))


def soft_target_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross entropy against probability rows: -sum(targets * log_softmax(logits)).

    Args:
        logits: (B, C) of any floating dtype.
        targets: (B, C) probabilities; mixed and smoothed targets are such rows.

    Returns:
        (B,) fp32 loss of each sample.
    """
    return F.cross_entropy(logits.float(), targets.float(), reduction="none")


def accuracy_counts(
    logits: torch.Tensor, labels: torch.Tensor, valid: torch.Tensor, topk: Sequence[int] = (1, 5)
) -> dict[str, torch.Tensor]:
    """Sums of one evaluation batch; adding them over batches and ranks gives exact totals for any layout.

    A label counts as found in the top k when fewer than k classes score strictly higher or score the same with a
    lower index, so ties do not depend on a sort. A sample with a non-finite logit at its label is never found.

    Args:
        logits: (B, C).
        labels: (B,) integer classes.
        valid: (B,) bool; empty slots and padding count nowhere.
        topk: values of k; k above C finds every label.

    Returns:
        0-d tensors on the device of `logits`: ``samples`` and ``top{k}`` int64, ``loss`` float64 (sum of the plain
        cross entropy).
    """
    scores = logits.float()
    index = labels.clamp(min=0).long().unsqueeze(1)
    own = scores.gather(1, index)
    earlier = torch.arange(scores.shape[1], device=scores.device) < index
    # `not (score <= own)` rather than `score > own`: a NaN elsewhere ranks ahead.
    ahead = (~(scores <= own) | ((scores == own) & earlier)).sum(1)
    losses = F.cross_entropy(scores, index.squeeze(1), reduction="none")
    countable = valid & own.squeeze(1).isfinite()
    counts = {f"top{k}": ((ahead < k) & countable).sum() for k in topk}
    loss = torch.where(valid, losses, 0.0).double().sum()
    return {"samples": valid.sum(), **counts, "loss": loss}
