"""Which classes and which places of images a trained model sends to which experts, as one page.

weights -> model in evaluation -> images of shards -> counts of each MoE layer -> report/survey_page
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from swin_scale.config import Augment
from swin_scale.convert import model_from_weights
from swin_scale.data import EvalStream, finish, open_shard_sets
from swin_scale.errors import DataError, UserError
from swin_scale.files import write_atomic
from swin_scale.models.swin import Swin
from swin_scale.moe.stats import RoutingStats
from swin_scale.report.survey import BINS, LayerSurvey, Survey
from swin_scale.report.survey_page import survey_page

logger = logging.getLogger(__name__)

PAGE_NAME = "routing.html"


def inspect_routing(
    weights: str,
    data: Sequence[str],
    *,
    out: str | None = None,
    model: str | None = None,
    kind: str = "master",
    images: int = 10_000,
    batch: int = 64,
    workers: int = 2,
) -> Path:
    """Write the page and return its file, by default ``routing.html`` beside where the command is run.

    Args:
        weights, model, kind: see `convert.model_from_weights`: a run, a checkpoint, or a weight file.
        data: shard directories; they must agree on the classes, which need not be those of the model.
        images: at most so many are looked at, in stored order, which our shards keep shuffled.

    Raises UserError for a model without experts or a page that cannot be written, DataError where no image is usable.
    """
    network, info = model_from_weights(weights, model=model, kind=kind)
    if not network.is_moe:
        raise UserError(f"{weights} holds {info.name}, a dense model: it routes nothing; give weights of an MoE model")
    made = survey(
        network, data, images=images, batch=batch, workers=workers, title=info.name, weights=weights,
        view=info.fixed_view(),
    )  # fmt: skip
    target = Path(out or PAGE_NAME)
    try:
        # Class names may hold lone surrogates, which UTF-8 has no place for.
        write_atomic(target, survey_page(made, time.time()).encode("utf-8", errors="replace"))
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror or error}; use --out") from error
    return target


def survey(
    network: Swin,
    data: Sequence[str],
    *,
    images: int,
    batch: int = 64,
    workers: int = 2,
    title: str = "model",
    weights: str = "",
    view: Augment | None = None,
) -> Survey:
    """Count over at most `images` images of `data`, on a GPU where there is one; `network` is left in evaluation.

    `view`: how to look at images; default: cropped.
    """
    if images < 1:
        raise UserError(f"images is {images}; look at 1 or more")
    sources = open_shard_sets(data, key="--data")
    classes = sources[0].manifest.classes
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network.to(device).eval()
    counts: dict[str, _Counts] = {}
    seen = unusable = 0
    for source in sources:
        stream = EvalStream(source, global_batch=batch, img_size=network.variant.img_size, augment=view or Augment())
        with stream.batches(workers=workers) as batches:
            for part in batches:
                # The last batch is cut to the number that is wanted; empty slots are no images.
                wanted = np.flatnonzero(part.valid.numpy())[: images - seen]
                unusable += len(part.skipped)
                if len(wanted):
                    _count(network, finish(part.images[wanted].to(device)), part.labels[wanted], counts, len(classes))
                    seen += len(wanted)
                if seen >= images:
                    break
        if seen >= images:
            break
    if not seen:
        raise DataError(f"none of the samples in {', '.join(data)} is usable")
    moe = network.variant.moe
    assert moe is not None, "survey of a dense model"
    return Survey(
        title=title,
        model=f"{moe.num_experts} experts, {moe.top_k} a token, {moe.router} router",
        weights=weights,
        data=tuple(data),
        images=seen,
        available=sum(len(source) for source in sources),
        unusable=unusable,
        classes=tuple(classes),
        capacity_factor=moe.eval_capacity_factor,
        layers=tuple(one.done(name) for name, one in counts.items()),
    )


@torch.no_grad()
def _count(
    network: Swin, images: torch.Tensor, labels: torch.Tensor, counts: dict[str, _Counts], num_classes: int
) -> None:
    routing: Mapping[str, RoutingStats] = network(images, stats=True)[2]
    for name, stats in routing.items():
        if name not in counts:
            counts[name] = _Counts.like(stats, num_classes)
        counts[name].add(stats, labels.to(images.device))


@dataclass
class _Counts:
    """`LayerSurvey` under way, as tensors on the CPU."""

    top_k: int
    by_class: torch.Tensor
    by_place: torch.Tensor
    dropped: torch.Tensor
    confidence: torch.Tensor
    by_expert: torch.Tensor
    first: torch.Tensor
    tokens: int = 0
    sums: torch.Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))
    """Confidence, entropy."""

    @classmethod
    def like(cls, stats: RoutingStats, num_classes: int) -> _Counts:
        experts, (height, width) = len(stats.kept_E), stats.shape[1:]

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int64)

        return cls(
            top_k=stats.expert_TK.shape[1],
            by_class=zeros(num_classes, experts),
            by_place=zeros(height, width, experts),
            dropped=zeros(height, width),
            confidence=zeros(BINS),
            by_expert=torch.zeros(experts, dtype=torch.float64),
            first=zeros(experts),
        )

    def add(self, stats: RoutingStats, labels: torch.Tensor) -> None:
        B, height, width = stats.shape
        experts = len(self.first)
        expert_TK = stats.expert_TK.cpu()
        confidence_T = stats.confidence_T.double().cpu()
        ones = torch.ones(expert_TK.numel(), dtype=torch.int64)
        label_T = labels.cpu().repeat_interleave(height * width)
        place_T = torch.arange(height * width).repeat(B)
        for row_T, counts in ((label_T, self.by_class), (place_T, self.by_place)):
            counts.view(-1).scatter_add_(0, (row_T[:, None] * experts + expert_TK).flatten(), ones)
        self.dropped += stats.dropped_by_position().cpu()
        bins = (confidence_T * BINS).long().clamp(0, BINS - 1)
        self.confidence += torch.bincount(bins, minlength=BINS)
        self.by_expert += torch.bincount(expert_TK[:, 0], weights=confidence_T, minlength=experts)
        self.first += torch.bincount(expert_TK[:, 0], minlength=experts)
        self.tokens += stats.tokens
        self.sums += torch.stack([confidence_T.sum(), stats.entropy.double().cpu()])

    def done(self, name: str) -> LayerSurvey:
        confidence_sum, entropy_sum = self.sums.tolist()
        return LayerSurvey(
            name=name,
            top_k=self.top_k,
            tokens=self.tokens,
            by_class=self.by_class.numpy(),
            by_place=self.by_place.numpy(),
            dropped=self.dropped.numpy(),
            confidence=self.confidence.numpy(),
            confidence_sum=confidence_sum,
            confidence_by_expert=self.by_expert.numpy(),
            first_choices=self.first.numpy(),
            entropy_sum=entropy_sum,
        )
