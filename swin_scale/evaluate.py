"""Top-1 and top-5 over shard sets, by sums and counts, so that no rank, remainder or bad image skews the mean."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from swin_scale.convert import model_from_weights
from swin_scale.data import EvalStream, finish
from swin_scale.engine.dist import Dist, init
from swin_scale.engine.kernel_choice import describe_kernels
from swin_scale.engine.layout import Layout
from swin_scale.engine.losses import accuracy_counts
from swin_scale.engine.preempt import Attend
from swin_scale.errors import DataError, UserError
from swin_scale.shards import ShardSet

logger = logging.getLogger(__name__)

COUNTS = ("samples", "top1", "top5", "loss")


def evaluate(
    module: nn.Module,
    streams: Sequence[EvalStream],
    dist: Dist,
    *,
    dtype: torch.dtype,
    workers: int,
    attend: Attend = iter,
) -> dict[str, Any]:
    """Evaluate over all streams; every rank gets the same figures. `attend`: see there.

    Returns ``top1`` and ``top5`` in percent, mean cross-entropy ``loss``, counted ``samples`` and ``unusable`` ones.
    """
    totals = dict.fromkeys(COUNTS, 0.0)
    unusable = 0
    for stream in streams:
        with stream.batches(rank=dist.rank, world=dist.world, workers=workers) as batches:
            for batch in attend(batches):
                images = finish(batch.images.to(dist.device, non_blocking=True), dtype=dtype)
                output = module(images)
                # A model with experts returns their auxiliary loss as well.
                logits = output[0] if isinstance(output, tuple) else output
                counts = accuracy_counts(logits, batch.labels.to(dist.device), batch.valid.to(dist.device), topk=(1, 5))
                for name in COUNTS:
                    totals[name] += float(counts[name])
                unusable += len(batch.skipped)
    *sums, unusable_sum = dist.sum_floats([*totals.values(), float(unusable)])
    figures = dict(zip(COUNTS, sums, strict=True))
    samples = figures["samples"]
    if not samples:
        raise DataError(f"none of the samples in {', '.join(str(s.sources[0].directory) for s in streams)} is usable")
    return {
        "top1": 100 * figures["top1"] / samples,
        "top5": 100 * figures["top5"] / samples,
        "loss": figures["loss"] / samples,
        "samples": int(samples),
        "unusable": int(unusable_sum),
    }


def evaluate_weights(
    weights: str,
    data: Sequence[str],
    *,
    model: str | None = None,
    kind: str = "master",
    img_size: int | None = None,
    crop: bool | None = None,
    batch: int = 64,
    workers: int = 2,
) -> dict[str, Any]:
    """Evaluate a weight file or checkpoint on one process, on a GPU where there is one.

    `crop`: whether to crop the centre or squash images to the size; None: as the run of the weights did.
    """
    overrides = {} if img_size is None else {"img_size": img_size}
    network, info = model_from_weights(weights, model=model, kind=kind, **overrides)
    if not network.variant.num_classes:
        raise UserError(f"{weights} has no classifier, such as an encoder of task simmim; add --probe to make one")
    sources = [ShardSet.open(path) for path in data]
    for source in sources:
        theirs = source.manifest.wnids or source.manifest.classes
        ours = info.wnids if source.manifest.wnids else info.classes
        if ours and tuple(ours) != tuple(theirs):
            raise DataError(
                f"{source.directory} has {len(theirs)} classes ({theirs[0]} ...), {weights} has {len(ours)} "
                f"({ours[0]} ...); labels would not mean the same"
            )
    streams = [
        EvalStream(source, global_batch=batch, img_size=network.variant.img_size, augment=info.fixed_view(crop))
        for source in sources
    ]
    with init(Layout(), timeout_s=60) as dist, torch.no_grad(), network.frozen_position_bias():
        network.to(dist.device).eval()
        choice = describe_kernels(network.variant.kernels, network.variant, dist.device, torch.float32)
        logger.info("kernels: %s", choice.text)
        return evaluate(network, streams, dist, dtype=torch.float32, workers=workers)
