"""The public face: training and evaluation streams over shard sets, and the ledger of skipped samples."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from swin_scale.config import Augment
from swin_scale.data.augment import EvalTransform, TrainTransform
from swin_scale.data.decode import MAX_PIXELS
from swin_scale.data.exclusions import Exclusions, LeftOut
from swin_scale.data.loader import Batches, Request
from swin_scale.data.masking import Masking
from swin_scale.data.order import BatchOrder, Source, StoredOrder, rank_slots, used_block
from swin_scale.data.reader import check_index
from swin_scale.data.resample import why_not_vectorised
from swin_scale.data.worker import Recipe, Skipped
from swin_scale.errors import DataError, UserError
from swin_scale.log import JsonLines
from swin_scale.shards import ShardSet

_log = logging.getLogger(__name__)

TIMEOUT_S = 600.0
"""Silence after which loader workers count as hung; longer than any retry of the reader."""


class _Stream:
    """What both streams share: an order of sample ids, and the recipe that turns an id into pixels."""

    def __init__(
        self, sources: Sequence[ShardSet], order: BatchOrder | StoredOrder, recipe: Recipe, labelled: bool
    ) -> None:
        for source in sources:
            check_index(source, labelled=labelled)
        if (why := why_not_vectorised()) is not None:
            _log.info("images are resized by Pillow, to the same pixels but slower: %s", why)
        self.sources = tuple(sources)
        self.order = order
        self.recipe = recipe

    @property
    def samples(self) -> int:
        """Samples per epoch."""
        return self.order.samples

    @property
    def steps_per_epoch(self) -> int:
        return self.order.steps_per_epoch

    @property
    def num_classes(self) -> int:
        return len(self.sources[0].manifest.classes)

    def _batches(
        self,
        start: int,
        stop: int | None,
        rank: int,
        world: int,
        workers: int,
        prefetch: int,
        timeout_s: float,
        left_out: Iterable[LeftOut] = (),
    ) -> Batches:
        slots = rank_slots(self.order.global_batch, rank, world)
        exclusions = Exclusions(left_out)

        def requests() -> Iterator[Request]:
            step = start
            while stop is None or step < stop:
                ids, copies = self.order.batch(step, slots)
                ids, reasons = exclusions.apply(step, ids)
                yield Request(step, self.order.epoch_of(step), ids, copies, reasons)
                step += 1

        rows = slots.stop - slots.start
        return Batches(self.recipe, requests(), rows=rows, workers=workers, prefetch=prefetch, timeout_s=timeout_s)


class TrainStream(_Stream):
    """An endless stream of augmented batches in an order fixed by (seed, sources, weights, global_batch, block)."""

    def __init__(
        self,
        sources: Sequence[ShardSet],
        *,
        seed: int,
        global_batch: int,
        img_size: int | tuple[int, int],
        augment: Augment,
        weights: Sequence[float] = (),
        drop_last: bool = False,
        block: int = 16,
        max_pixels: int = MAX_PIXELS,
        masking: Masking | None = None,
        labelled: bool = True,
        exclude: Sequence[int] = (),
    ) -> None:
        """`exclude`: ids of samples that are left out. Raises UserError for a recipe that cannot work, DataError for
        labels outside the manifest, if `labelled`.
        """
        if weights and len(weights) != len(sources):
            raise UserError(f"data.weights has {len(weights)} numbers for {len(sources)} directories in data.train")
        order = BatchOrder(
            [
                Source(shard_samples=tuple(shard.samples for shard in source.manifest.shards), weight=weight)
                for source, weight in zip(sources, weights or [1.0] * len(sources))
            ],
            seed=seed,
            global_batch=global_batch,
            drop_last=drop_last,
            block=block,
        )
        transform = TrainTransform.create(augment, img_size)
        recipe = _recipe(sources, transform, seed, max_pixels, used_block(order.samples, block), masking)
        super().__init__(sources, order, recipe, labelled)
        stored = sum(map(len, sources))
        if exclude and max(exclude) >= stored:
            raise UserError(f"data.exclude holds {max(exclude)}, but data.train has {stored} samples, numbered from 0")
        self._excluded = (LeftOut(step=0, ids=tuple(exclude), reason="left out by data.exclude"),) if exclude else ()

    def batches(
        self,
        start_step: int = 0,
        *,
        stop_step: int | None = None,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        prefetch: int = 2,
        timeout_s: float = TIMEOUT_S,
        left_out: Sequence[LeftOut] = (),
    ) -> Batches:
        """This rank's part of global steps start_step to stop_step - 1 (None: for ever), counted from 0 over the run.

        Starting late reads nothing that came before. `left_out`: what stays empty besides the samples that the stream
        excludes. UserError when `world` does not divide the global batch.
        """
        left_out = (*self._excluded, *left_out)
        return self._batches(start_step, stop_step, rank, world, workers, prefetch, timeout_s, left_out)


class EvalStream(_Stream):
    """Every sample once, in stored order, in the fixed view; all ranks see equally many batches."""

    def __init__(
        self,
        source: ShardSet,
        *,
        global_batch: int,
        img_size: int | tuple[int, int],
        augment: Augment,
        max_pixels: int = MAX_PIXELS,
        masking: Masking | None = None,
        labelled: bool = True,
    ) -> None:
        order = StoredOrder(len(source), global_batch=global_batch)
        transform = EvalTransform.create(augment, img_size)
        super().__init__([source], order, _recipe([source], transform, 0, max_pixels, 1, masking), labelled)

    def batches(
        self, *, rank: int = 0, world: int = 1, workers: int = 0, prefetch: int = 2, timeout_s: float = TIMEOUT_S
    ) -> Batches:
        """This rank's part of every batch; slots past the last sample are empty and must not be counted."""
        return self._batches(0, self.steps_per_epoch, rank, world, workers, prefetch, timeout_s)


def _recipe(
    sources: Sequence[ShardSet],
    transform: TrainTransform | EvalTransform,
    seed: int,
    max_pixels: int,
    block: int,
    masking: Masking | None,
) -> Recipe:
    return Recipe(
        directories=tuple(os.path.abspath(source.directory) for source in sources),
        manifests=tuple(source.manifest for source in sources),
        transform=transform,
        seed=seed,
        max_pixels=max_pixels,
        block=block,
        masking=masking,
    )


class SkipLedger:
    """``skipped.jsonl``: one line per empty slot of a sample, and the rate of bad content past which the run stops."""

    def __init__(self, path: str | os.PathLike[str], *, max_rate: float = 0.01, tolerated: int = 16) -> None:
        """`tolerated`: bad samples that never stop a run, so that a rate over few samples means nothing."""
        self.path = Path(path)
        self.max_rate, self.tolerated = max_rate, tolerated
        self.seen = self.bad = 0
        self.by_shard: Counter[tuple[str, str]] = Counter()
        """Bad samples by (source directory, shard name)."""
        self._lines: JsonLines | None = None

    def add(self, step: int, epoch: int, seen: int, skipped: Sequence[Skipped]) -> None:
        """Record a global step: `seen` samples were due, `skipped` of all ranks were not used. DataError past the rate.

        Those left out on purpose are listed, and do not count.
        """
        bad = [record for record in skipped if not record.excluded]
        self.seen += seen
        self.bad += len(bad)
        self.by_shard.update((record.source, record.shard) for record in bad)
        if not skipped:
            return
        lines = [{"step": step, "epoch": epoch, **record.row()} for record in skipped]
        if self._lines is None:  # most runs have no bad sample, and most ranks keep no ledger
            self._lines = JsonLines(self.path)
        self._lines.write(lines)
        if bad and self.bad > self.tolerated and self.bad > self.max_rate * self.seen:
            last = bad[-1]
            (source, shard), most = self.by_shard.most_common(1)[0]
            raise DataError(
                f"{self.bad} of {self.seen} samples are unusable, more than data.max_bad_rate {self.max_rate}; the "
                f"last was {last.key} in {last.source}/{last.shard}: {last.reason}. Most, {most}, are in "
                f"{source}/{shard}; all are in {self.path}; find "
                f"the damage with `swin-scale shards verify`, or raise data.max_bad_rate"
            )

    def close(self) -> None:
        """Write what had no room before, and close the file."""
        if self._lines is not None:
            self._lines.close()
