"""Which sample goes into which slot of which step: pure arithmetic on integers, no file is touched.

The order of an epoch is a function of (seed, epoch, sources, weights, block) alone:

1. every shard is cut into blocks of consecutive stored samples; a source of weight 2.5 brings all its blocks twice, and
   every other epoch the samples that complete the half;
2. all blocks are permuted into one sequence q of N samples;
3. q is cut into L lanes of nearly equal length. The epoch goes round the lanes: round d takes the d-th sample of each,
   in an order drawn per round within groups of `GROUP` lanes, lest two blocks stay neighbours as long as both last.

So a lane reads its shards sequentially, block by block, while neighbours in a batch come from blocks far apart. L does
not depend on the batch size or on the number of ranks and workers. Epochs of at most `SHUFFLED_SAMPLES` samples fit the
page cache and are permuted sample by sample instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from swin_scale.data.keyed import permutation, permutations
from swin_scale.errors import UserError

MAX_LANES = 4096
GROUP = 256
"""Lanes that change places; small, so that a node with this many slots of a batch keeps to the same lanes and files."""
SHUFFLED_SAMPLES = 1 << 17
EMPTY = -1
"""Id of a slot that no sample was meant for: the end of an epoch that the batch size does not divide."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """What the order needs to know of a shard set: samples per shard, and passes over the set per epoch."""

    shard_samples: tuple[int, ...]
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and 0 < self.weight <= 255):
            raise UserError(f"data.weights holds {self.weight}; each must be above 0 and at most 255")

    @property
    def samples(self) -> int:
        return sum(self.shard_samples)

    @property
    def samples_per_epoch(self) -> int:
        return math.floor(self.weight * self.samples + 0.5)

    @property
    def passes(self) -> int:
        """Full passes per epoch; `samples_per_epoch` less these is drawn from the set in turn."""
        return min(math.floor(self.weight), self.samples_per_epoch // max(1, self.samples))


class EpochOrder:
    """The order of one epoch. Memory: 17 bytes a block, 16 MB for 14 million samples in blocks of 16.

    A global sample id is the row of the sample in its source's index plus the samples of the sources before it.
    """

    def __init__(self, sources: Sequence[Source], *, seed: int, epoch: int, block: int = 16) -> None:
        if block < 1:
            raise UserError(f"data.block is {block}; it must be at least 1")
        self.samples = sum(source.samples_per_epoch for source in sources)
        block = used_block(self.samples, block)
        starts, sizes, copies = [], [], []
        first_id = 0
        for number, source in enumerate(sources):
            block_starts, block_sizes = _blocks(source, first_id, block)
            for copy in range(source.passes):
                starts.append(block_starts)
                sizes.append(block_sizes)
                copies.append(np.full(len(block_starts), copy, np.uint8))
            part = source.samples_per_epoch - source.passes * source.samples
            if part:
                turn = permutation(len(block_starts), "order.part", seed, number)
                part_starts, part_sizes = _turn(block_starts[turn], block_sizes[turn], epoch * part, part)
                starts.append(part_starts)
                sizes.append(part_sizes)
                copies.append(np.full(len(part_starts), source.passes, np.uint8))
            first_id += source.samples
        flat_starts = np.concatenate(starts) if starts else np.empty(0, np.int64)
        shuffle = permutation(len(flat_starts), "order", seed, epoch)
        self._starts = flat_starts[shuffle]
        self._ends = np.cumsum(np.concatenate(sizes)[shuffle]) if starts else np.empty(0, np.int64)
        self._copies = np.concatenate(copies)[shuffle] if starts else np.empty(0, np.uint8)
        room = min(MAX_LANES, self.samples // (4 * block))
        # A power of two, so that batch sizes divide it and a rank meets the same few lanes, hence files, every step.
        self.lanes = 1 if block == 1 or room < 1 else 1 << (room.bit_length() - 1)
        self._group = min(GROUP, self.lanes)
        rounds = self.samples // self.lanes if self.lanes > 1 else 0
        self._turns = permutations(rounds, self._group, "order.round", seed, epoch).astype(np.uint8)

    def lookup(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sample ids (int64) and copy numbers (uint8) at epoch positions (int64, 0 to samples - 1)."""
        length, longer = divmod(self.samples, self.lanes)
        depth, lane = np.divmod(positions, self.lanes)
        if self.lanes > 1:
            # The last round, where not every lane has a sample left, keeps its order.
            within = lane % self._group
            turned = self._turns[np.minimum(depth, length - 1), within]
            lane = lane - within + np.where(depth < length, turned, within)
        place = lane * length + np.minimum(lane, longer) + depth
        block = np.searchsorted(self._ends, place, side="right")
        # Counted back from the end of the block, which spares storing its first place.
        begin = np.where(block > 0, self._ends[block - 1], 0)
        return self._starts[block] + (place - begin), self._copies[block]

    def ids(self, start: int, stop: int) -> np.ndarray:
        """(stop - start,) int64 global sample ids at positions start to stop - 1."""
        return self.lookup(np.arange(start, stop, dtype=np.int64))[0]


def used_block(samples: int, block: int) -> int:
    """Consecutive samples that an epoch of `samples` reads together: `block`, or 1 when it all fits the page cache."""
    return 1 if samples <= SHUFFLED_SAMPLES else block


def _blocks(source: Source, first_id: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """First ids and sizes of the blocks of a source, in stored order; no block crosses a shard."""
    counts = np.asarray(source.shard_samples, dtype=np.int64)
    blocks = -(-counts // block)
    shard = np.repeat(np.arange(len(counts)), blocks)
    within = np.arange(len(shard)) - np.repeat(np.cumsum(blocks) - blocks, blocks)
    starts = (first_id + np.cumsum(counts) - counts)[shard] + within * block
    return starts, np.minimum(block, counts[shard] - within * block)


def _turn(starts: np.ndarray, sizes: np.ndarray, begin: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The blocks, cut at both ends, of samples begin to begin + count - 1 of an endless repetition of the sequence.

    Fractional passes walk through a fixed permutation of the source this way: no sample comes again before all came.
    """
    ends = np.cumsum(sizes)
    total = int(ends[-1])
    begin %= total
    cut_starts, cut_sizes = [], []
    for low, high in ((begin, min(begin + count, total)), (0, begin + count - total)):
        if high <= low:
            continue
        first, last = np.searchsorted(ends, low, side="right"), np.searchsorted(ends, high, side="left")
        part = slice(first, last + 1)
        front = np.maximum(low - (ends[part] - sizes[part]), 0)
        back = np.maximum(ends[part] - high, 0)
        cut_starts.append(starts[part] + front)
        cut_sizes.append(sizes[part] - front - back)
    return np.concatenate(cut_starts), np.concatenate(cut_sizes)


class BatchOrder:
    """The samples of every global step of a run.

    Step k, counted from 0 over the run, is batch k mod steps_per_epoch of epoch k div steps_per_epoch; that integer is
    the whole cursor.
    """

    def __init__(
        self, sources: Sequence[Source], *, seed: int, global_batch: int, drop_last: bool = False, block: int = 16
    ) -> None:
        self.sources, self.seed, self.block = tuple(sources), seed, block
        self.global_batch = global_batch
        self.samples = sum(source.samples_per_epoch for source in self.sources)
        if self.samples == 0:
            raise UserError("data.train holds no samples, or data.weights rounds all of them away")
        self.steps_per_epoch = self.samples // global_batch if drop_last else -(-self.samples // global_batch)
        if self.steps_per_epoch == 0:
            raise UserError(
                f"train.global_batch is {global_batch}, but an epoch has {self.samples} samples and data.drop_last is "
                f"set; lower train.global_batch or unset data.drop_last"
            )
        self._epoch: EpochOrder | None = None
        self._epoch_number = -1

    def epoch_of(self, step: int) -> int:
        return step // self.steps_per_epoch

    def batch(self, step: int, slots: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """Ids (int64, `EMPTY` past the end of the epoch) and copy numbers (uint8) of the slots of a global step."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        if self._epoch is None or self._epoch_number != epoch:
            self._epoch = EpochOrder(self.sources, seed=self.seed, epoch=epoch, block=self.block)
            self._epoch_number = epoch
        positions = np.arange(self.global_batch, dtype=np.int64)[slots] + batch * self.global_batch
        inside = positions < self.samples
        ids, copies = self._epoch.lookup(np.minimum(positions, self.samples - 1))
        return np.where(inside, ids, EMPTY), np.where(inside, copies, 0).astype(np.uint8)


class StoredOrder:
    """Stored order, once through, for evaluation: each sample in one slot, the last batch filled with empty slots."""

    def __init__(self, samples: int, *, global_batch: int) -> None:
        self.samples, self.global_batch = samples, global_batch
        self.steps_per_epoch = -(-samples // global_batch)

    def epoch_of(self, step: int) -> int:
        assert 0 <= step < self.steps_per_epoch, step
        return 0

    def batch(self, step: int, slots: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """As `BatchOrder.batch`; copy numbers are 0."""
        ids = np.arange(self.global_batch, dtype=np.int64)[slots] + step * self.global_batch
        return np.where(ids < self.samples, ids, EMPTY), np.zeros(len(ids), np.uint8)


def rank_slots(global_batch: int, rank: int, world: int) -> slice:
    """The contiguous slots of the global batch that belong to `rank`; UserError when ranks do not divide the batch."""
    assert 0 <= rank < world, (rank, world)
    if global_batch % world:
        fitting = [count for count in range(1, global_batch + 1) if global_batch % count == 0]
        below = max(count for count in fitting if count < world or count == 1)
        above = min((count for count in fitting if count > world), default=below)
        raise UserError(
            f"train.global_batch {global_batch} cannot be split over {world} ranks; the nearest rank counts that "
            f"divide it are {below} and {above}"
        )
    share = global_batch // world
    return slice(rank * share, (rank + 1) * share)


def as_bad(ids: np.ndarray | int) -> np.ndarray | int:
    """Code of a slot whose sample could not be used, -(id + 2); its own inverse, so it also recovers the id."""
    return -(ids + 2)


def batch_digest(ids: np.ndarray) -> str:
    """xxh3_64 (16 hex digits) of the slot ids of a global batch, in global order, as little-endian int64."""
    return xxhash.xxh3_64_hexdigest(np.ascontiguousarray(ids, dtype="<i8").tobytes())
