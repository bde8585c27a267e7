"""Classification: labels, mixing, soft targets, cross-entropy, top-1 and top-5."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from swin_scale.config import BatchPlan, Config
from swin_scale.data import Batch, EvalStream, draw_mix, finish, mix_batch
from swin_scale.engine.dist import Dist
from swin_scale.engine.engine import Forward, Losses, MicroBatch
from swin_scale.engine.losses import smooth_targets, soft_target_cross_entropy
from swin_scale.engine.preempt import Attend
from swin_scale.errors import UserError
from swin_scale.evaluate import evaluate
from swin_scale.models import create_model
from swin_scale.models.swin import Swin
from swin_scale.shards import ShardSet
from swin_scale.tasks.task import Task, parts, ready_to_copy


def losses(forward: Forward, micro: MicroBatch) -> Losses:
    """Cross-entropy of each sample against its row of `targets`."""
    output = forward(micro.inputs)
    logits, aux, routing = output if isinstance(output, tuple) else (output, None, {})
    return Losses(samples=soft_target_cross_entropy(logits, micro.targets), aux=aux, routing=routing)


class Classify(Task):
    """One label for each image."""

    @classmethod
    def resolved(cls, config: Config, origin: dict[str, str], sources: Sequence[ShardSet]) -> Config:
        classes = len(sources[0].manifest.classes)
        if config.model.num_classes not in (None, classes):
            raise UserError(
                f"model.num_classes is {config.model.num_classes}, but {config.data.train[0]} has {classes} classes; "
                "leave it out to follow the data"
            )
        if config.model.num_classes is None:
            origin["model.num_classes"] = config.data.train[0]
        return dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=classes))

    def describe(self, sources: Sequence[ShardSet]) -> dict[str, Any]:
        manifest = sources[0].manifest
        return {"classes": list(manifest.classes), "wnids": list(manifest.wnids or ()) or None}

    def create(self, name: str, **options: Any) -> Swin:
        return create_model(name, **options)

    def micro_batches(
        self, batch: Batch, plan: BatchPlan, *, device: torch.device, dtype: torch.dtype
    ) -> Iterator[MicroBatch]:
        """Normalised, erased, mixed, with soft targets."""
        config = self.config
        classes = config.model.num_classes
        assert classes is not None
        height, width = batch.images.shape[2:]
        mix = draw_mix(config.augment, seed=config.run.seed, step=batch.step, height=height, width=width)
        valid = batch.valid
        pixels = ready_to_copy(batch.images, device)
        for part in parts(plan):
            images = finish(
                pixels[part].to(device, non_blocking=True),
                batch.boxes[part],
                batch.noise_keys[part],
                mode=config.augment.remode,
            )
            here = valid[part].to(device, non_blocking=True)
            labels = batch.labels[part].clamp(min=0).to(device, non_blocking=True)
            targets = smooth_targets(labels, classes, config.optim.label_smoothing)
            if config.augment.mixes:
                images, targets = mix_batch(images, targets, here, mix)
            yield MicroBatch(inputs=images.to(dtype), targets=targets, valid=here)

    def losses(self, forward: Forward, micro: MicroBatch) -> Losses:
        return losses(forward, micro)

    def evaluate(
        self,
        module: nn.Module,
        streams: Sequence[EvalStream],
        dist: Dist,
        *,
        dtype: torch.dtype,
        workers: int,
        attend: Attend = iter,
    ) -> dict[str, Any]:
        return evaluate(module, streams, dist, dtype=dtype, workers=workers, attend=attend)
