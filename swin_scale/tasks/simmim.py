"""SimMIM (Xie et al., 2022): no labels, masks, an absolute error per image, validation loss, pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from swin_scale.config import BatchPlan, Config
from swin_scale.data import Batch, EvalStream, Masking, finish
from swin_scale.data.augment import size_pair
from swin_scale.data.device import MEAN, STD
from swin_scale.data.masking import hidden_cells
from swin_scale.engine.dist import Dist
from swin_scale.engine.engine import Forward, Losses, MicroBatch
from swin_scale.engine.metrics import image_grid
from swin_scale.engine.preempt import Attend
from swin_scale.errors import DataError, UserError
from swin_scale.models import Variant, create_simmim, flops, variant
from swin_scale.models.simmim import COUNT_FLOOR, SimMIM
from swin_scale.shards import ShardSet
from swin_scale.tasks.task import Task, parts, ready_to_copy

GREY = 128
"""Of what is hidden, on pictures."""
LEAST_SIDE, MOST_SIDE = 96, 256
"""Pixels of the longer side of an image on a picture, as far as whole factors allow."""


class MaskedImages(Task):
    """Draw the hidden cells of an image from those that are seen."""

    labelled: ClassVar[bool] = False

    @classmethod
    def resolved(cls, config: Config, origin: dict[str, str], sources: Sequence[ShardSet]) -> Config:
        """Nothing follows from the data; cells must fit the decoder and leave something to see."""
        simmim, name, img_size = config.simmim, config.model.name, config.data.img_size
        assert img_size is not None
        network, cell = variant(name), simmim.mask_patch_size
        stages = len(config.model.depths or network.depths)
        # Of one token of the last map, which the decoder draws whole.
        stride = network.patch_size << (stages - 1)
        if cell % stride:
            below = max(cell // stride * stride, stride)
            raise UserError(
                f"simmim.mask_patch_size is {cell}, which is not a multiple of {stride}, the pixels of a token of the "
                f"last map of {name}; set it to {below} or {below + stride}"
            )
        height, width = size_pair(img_size)
        hidden, cells = hidden_cells(height, width, ratio=simmim.mask_ratio, cell=cell)
        if hidden == cells:
            raise UserError(
                f"simmim.mask_ratio {simmim.mask_ratio} of the {cells} cells of {cell} pixels in {height} x {width} "
                f"hides them all; lower simmim.mask_patch_size (a multiple of {stride}) or simmim.mask_ratio"
            )
        return config

    def masking(self, *, fixed: bool) -> Masking:
        """Evaluation masks depend on the sample alone, so that runs of any seed can be compared."""
        config = self.config
        return Masking(
            ratio=config.simmim.mask_ratio,
            cell=config.simmim.mask_patch_size,
            patch=variant(config.model.name).patch_size,
            seed=0 if fixed else config.run.seed,
            fixed=fixed,
        )

    def create(self, name: str, **options: Any) -> SimMIM:
        headless = {key: value for key, value in options.items() if key != "num_classes"}
        simmim = self.config.simmim
        return create_simmim(name, mask_patch_size=simmim.mask_patch_size, norm_target=simmim.norm_target, **headless)

    def flops(self, network: Variant) -> int:
        """The encoder's and the decoder's: each pixel is one product with the channels of a token of the last map."""
        height, width = size_pair(network.img_size)
        last = network.embed_dim << (len(network.depths) - 1)
        return flops(network) + height * width * network.in_chans * last

    def micro_batches(
        self, batch: Batch, plan: BatchPlan, *, device: torch.device, dtype: torch.dtype
    ) -> Iterator[MicroBatch]:
        """Normalised images, in fp32 for the loss, which the encoder rounds to its own dtype, and their masks."""
        pixels, masks = ready_to_copy(batch.images, device), ready_to_copy(batch.masks, device)
        for part in parts(plan):
            yield MicroBatch(
                inputs=finish(pixels[part].to(device, non_blocking=True)),
                targets=masks[part].to(device, non_blocking=True),
                valid=batch.valid[part].to(device, non_blocking=True),
            )

    def losses(self, forward: Forward, micro: MicroBatch) -> Losses:
        """The mean absolute error over the hidden pixels of each image."""
        output = forward(micro.inputs, micro.targets, output="losses")
        samples, aux, routing = output if isinstance(output, tuple) else (output, None, {})
        return Losses(samples=samples, aux=aux, routing=routing)

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
        """``loss``, the mean absolute error over all hidden pixels of all usable images, ``samples``, ``unusable``."""
        patch = variant(self.config.model.name).patch_size
        error = pixels = 0.0
        samples = unusable = 0
        for stream in streams:
            with stream.batches(rank=dist.rank, world=dist.world, workers=workers) as batches:
                for batch in attend(batches):
                    masks = batch.masks.to(dist.device, non_blocking=True)
                    output = module(finish(batch.images.to(dist.device, non_blocking=True)), masks, output="losses")
                    # With experts, their auxiliary loss comes as well.
                    losses = output[0] if isinstance(output, tuple) else output
                    hidden = masks.sum((1, 2)).double() * patch**2
                    valid = batch.valid.to(dist.device)
                    error += float(torch.where(valid, losses.double() * (hidden + COUNT_FLOOR), 0.0).sum())
                    pixels += float(torch.where(valid, hidden, 0.0).sum())
                    samples += int(batch.valid.sum())
                    unusable += len(batch.skipped)
        error, pixels, found, bad = dist.sum_floats([error, pixels, float(samples), float(unusable)])
        if not found:
            directories = ", ".join(str(s.sources[0].directory) for s in streams)
            raise DataError(f"none of the samples in {directories} is usable")
        return {"loss": error / pixels, "samples": int(found), "unusable": int(bad)}

    def shown(self, train: Sequence[ShardSet], val: Sequence[ShardSet]) -> EvalStream | None:
        count = self.config.simmim.pictures
        return self.eval_stream((*val, *train)[0], count) if count else None

    def picture_is_due(self, step: int) -> bool:
        every = self.config.simmim.picture_every_steps
        return every is not None and step % every == 0

    def draw(self, module: nn.Module, batch: Batch, device: torch.device) -> Tensor:
        """Above each other: the images; what the model sees of them; with what it draws where it sees nothing."""
        images, masks = batch.images.to(device), batch.masks.to(device)
        drawn = module(finish(images), masks, output="drawing")
        usable = batch.valid.to(device)
        patch = images.shape[-1] // masks.shape[-1]
        hidden = masks.bool().repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, None]
        seen = torch.where(hidden, torch.full_like(images, GREY), images)
        rows = torch.stack([images, seen, torch.where(hidden, to_pixels(drawn), images)])[:, usable]
        return image_grid(fitted(rows.flatten(0, 1)), columns=max(1, rows.shape[1]))


def to_pixels(images: Tensor) -> Tensor:
    """Normalised images as (B, 3, H, W) uint8, cut to what a pixel can be; the reverse of `data.finish`."""
    centre, scale = (torch.tensor(values, device=images.device).view(-1, 1, 1) for values in (MEAN, STD))
    return ((images.float() * scale + centre) * 255).nan_to_num().round().clamp(0, 255).to(torch.uint8)


def fitted(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) uint8 enlarged pixel by pixel, or reduced, to a fair size for a picture."""
    side = max(images.shape[-2:])
    if side < LEAST_SIDE:
        factor = -(-LEAST_SIDE // side)
        return images.repeat_interleave(factor, -2).repeat_interleave(factor, -1)
    if side > MOST_SIDE:
        return nn.functional.avg_pool2d(images.float(), -(-side // MOST_SIDE)).round().to(torch.uint8)
    return images
