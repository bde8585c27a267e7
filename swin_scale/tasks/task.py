"""What every task answers, in the order in which a run asks: data, model, micro-batches, losses, evaluation, pictures.

A task is a value: the resolved config, and methods that keep no state. All ranks call them alike.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from swin_scale.config import BatchPlan, Config
from swin_scale.data import Batch, EvalStream, Masking, TrainStream
from swin_scale.engine.dist import Dist
from swin_scale.engine.engine import Forward, Losses, MicroBatch
from swin_scale.engine.preempt import Attend
from swin_scale.models import Variant, flops
from swin_scale.models.simmim import SimMIM
from swin_scale.models.swin import Swin
from swin_scale.shards import ShardSet


class Task(ABC):
    """One task, set up as its run's config says."""

    labelled: ClassVar[bool] = True
    """Whether images need labels."""

    def __init__(self, config: Config) -> None:
        """`config`: resolved, as `resolved` returns it and with an image size."""
        self.config = config

    # -- before anything starts ----------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def resolved(cls, config: Config, origin: dict[str, str], sources: Sequence[ShardSet]) -> Config:
        """`config` with what follows from the data for this task, whose origin is noted; raises UserError or DataError.

        `sources` are the opened `data.train`; the image size is set.
        """

    def describe(self, sources: Sequence[ShardSet]) -> dict[str, Any]:
        """What a checkpoint says of its model beyond name and overrides: ``classes`` and ``wnids``."""
        return {"classes": [], "wnids": None}

    def masking(self, *, fixed: bool) -> Masking | None:
        """How images are masked; `fixed`: the same way each time, for evaluation. None: not at all."""
        return None

    def train_stream(self, sources: Sequence[ShardSet], plan: BatchPlan) -> TrainStream:
        """The stream of augmented images of `data.train`."""
        config, img_size = self.config, self.config.data.img_size
        assert img_size is not None
        return TrainStream(
            sources,
            seed=config.run.seed,
            global_batch=plan.global_batch,
            img_size=img_size,
            augment=config.augment,
            weights=config.data.weights,
            drop_last=config.data.drop_last,
            block=config.data.block,
            max_pixels=config.data.max_pixels,
            exclude=config.data.exclude,
            masking=self.masking(fixed=False),
            labelled=self.labelled,
        )

    def eval_stream(self, source: ShardSet, global_batch: int) -> EvalStream:
        """Every image of `source` once, in its fixed view."""
        config, img_size = self.config, self.config.data.img_size
        assert img_size is not None
        return EvalStream(
            source,
            global_batch=global_batch,
            img_size=img_size,
            augment=config.augment,
            max_pixels=config.data.max_pixels,
            masking=self.masking(fixed=True),
            labelled=self.labelled,
        )

    # -- the model and its step ----------------------------------------------------------------------------------------

    @abstractmethod
    def create(self, name: str, **options: Any) -> Swin | SimMIM:
        """The model, as `create_model` makes it of the options, which have `num_classes`: 0 where there is no head."""

    def flops(self, network: Variant) -> int:
        """Multiply-adds of one image's forward."""
        return flops(network)

    @abstractmethod
    def micro_batches(
        self, batch: Batch, plan: BatchPlan, *, device: torch.device, dtype: torch.dtype
    ) -> Iterator[MicroBatch]:
        """Cut a rank's batch into micro-batches on `device`, one at a time; `dtype` is the engine's."""

    @abstractmethod
    def losses(self, forward: Forward, micro: MicroBatch) -> Losses:
        """Call the model on a micro-batch. A loss per sample, so that empty slots weigh nothing however it is cut."""

    # -- what is seen of it --------------------------------------------------------------------------------------------

    @abstractmethod
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
        """Figures over all streams, the same on every rank and for any number of them; ``loss`` is one of them.

        `attend` is given the batches of each stream.
        """

    def shown(self, train: Sequence[ShardSet], val: Sequence[ShardSet]) -> EvalStream | None:
        """The images that `draw` is given the first batch of; None for a task without pictures."""
        return None

    def picture_is_due(self, step: int) -> bool:
        """Whether `draw` is wanted after so many steps; the end of a run aside, when it always is."""
        return False

    def draw(self, module: nn.Module, batch: Batch, device: torch.device) -> Tensor:
        """A picture, (3, H, W) uint8, of what the model makes of `batch`.

        All ranks take part, as parameters and experts may be spread over them.
        """
        raise NotImplementedError(f"task {self.config.task} has no pictures")


def parts(plan: BatchPlan) -> Iterator[slice]:
    """The slots of each micro-batch of a rank."""
    return (slice(start, start + plan.micro) for start in range(0, plan.per_rank, plan.micro))


def ready_to_copy(images: Tensor, device: torch.device) -> Tensor:
    """`images` where a copy to `device` need not wait for it: from pageable memory it would."""
    return images.pin_memory() if device.type == "cuda" else images
