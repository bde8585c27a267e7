"""What a loader process does: turn sample ids into pixels, a chunk at a time. Runs in the training process too.

Started by `loader` as a process of its own that runs `main`, with one end of a socket pair. Messages, in order:
a `Recipe`; then ("memory", number, bytes), followed by a file descriptor; `Chunk`s, each answered by a `ChunkResult` or
by the error that ends the run. End of file means that the training process is gone, whatever the reason: the worker
ends too, so nothing is left behind. No torch is imported here: a worker starts in a fraction of a second.
"""

from __future__ import annotations

import mmap
import os
import signal
import sys
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from pathlib import Path
from typing import Any

import numpy as np

from swin_scale.data.augment import EvalTransform, TrainTransform
from swin_scale.data.decode import decode_rgb, jpeg_size
from swin_scale.data.keyed import key64, scalar_rng
from swin_scale.data.masking import Masking
from swin_scale.data.order import EMPTY, as_bad
from swin_scale.data.reader import BadSample, ImageReader
from swin_scale.errors import SwinScaleError
from swin_scale.shards import Manifest, ShardSet, load_index

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""What schedulers send to every process of a job: the training process acts on them, workers go on until it is done."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that shapes the pixels of a sample, given its id."""

    directories: tuple[str, ...]
    manifests: tuple[Manifest, ...]
    transform: TrainTransform | EvalTransform
    seed: int
    max_pixels: int
    block: int
    masking: Masking | None = None

    @property
    def mask_shape(self) -> tuple[int, int]:
        """(rows, columns) of a sample's mask; (0, 0) without masks."""
        return (0, 0) if self.masking is None else self.masking.shape(self.transform.height, self.transform.width)


@dataclass(frozen=True)
class Chunk:
    """Some neighbouring slots of one batch. `row` is their first row in memory number `memory`.

    `reasons`: why the samples whose ids are coded by `as_bad` are left out, by sample id.
    """

    epoch: int
    ids: np.ndarray
    copies: np.ndarray
    memory: int
    row: int
    reasons: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Skipped:
    """A sample whose slot stayed empty, and why."""

    id: int
    source: str
    shard: str
    key: str
    reason: str
    excluded: bool = False
    """Left out on purpose: nothing is known to be wrong with its content."""

    def row(self) -> dict[str, Any]:
        """As one line of ``skipped.jsonl``."""
        return {key: value for key, value in asdict(self).items() if key != "excluded" or value}


@dataclass(frozen=True)
class ChunkResult:
    """ids: (n,) as asked, bad samples coded by `as_bad`; labels: (n,) int64, -1 in empty slots; boxes: (n, k, 4) int16;
    noise_keys: (n,) int64; masks: (n, *mask_shape) uint8, zeros in empty slots."""

    ids: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray
    noise_keys: np.ndarray
    masks: np.ndarray
    skipped: list[Skipped]


class Producer:
    """Reads, decodes and augments samples by id."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        # Sizes of the shards were checked when the run opened the sets; workers need not look at every file again.
        sources = [
            ShardSet(directory=Path(directory), manifest=manifest, index=load_index(directory))
            for directory, manifest in zip(recipe.directories, recipe.manifests)
        ]
        self.reader = ImageReader(sources, block=recipe.block)

    def fill(self, chunk: Chunk, out: np.ndarray) -> ChunkResult:
        """Write the images of `chunk` to out, (n, 3, H, W) uint8; empty slots become zeros. Raises DataError."""
        seed, transform, masking = self.recipe.seed, self.recipe.transform, self.recipe.masking
        count = len(chunk.ids)
        result = ChunkResult(
            ids=chunk.ids.copy(),
            labels=np.full(count, -1, np.int64),
            boxes=np.zeros((count, transform.boxes, 4), np.int16),
            noise_keys=np.zeros(count, np.int64),
            masks=np.zeros((count, *self.recipe.mask_shape), np.uint8),
            skipped=[],
        )
        self.reader.read_ahead(chunk.ids[chunk.ids >= 0])
        for slot, (sample_id, copy) in enumerate(zip(chunk.ids.tolist(), chunk.copies.tolist())):
            if sample_id < 0:
                out[slot] = 0
                if sample_id != EMPTY:
                    left_out = int(as_bad(sample_id))
                    place = self.reader.describe(left_out)
                    result.skipped.append(Skipped(left_out, *place, chunk.reasons[left_out], excluded=True))
                continue
            key = (seed, chunk.epoch, sample_id, copy)
            rng = scalar_rng("augment", *key)
            try:
                encoded = self.reader.read(sample_id)
                size = jpeg_size(encoded.data)
                box = transform.crop_box(*size, rng) if size else None
                rows = box[0] + box[2] if box else None
                image = decode_rgb(encoded.data, max_pixels=self.recipe.max_pixels, rows=rows)
            except BadSample as error:
                out[slot] = 0
                result.ids[slot] = as_bad(sample_id)
                result.skipped.append(Skipped(sample_id, *self.reader.describe(sample_id), str(error)))
                continue
            pixels, boxes = transform(image, rng, box)
            out[slot] = pixels.transpose(2, 0, 1)
            result.labels[slot] = encoded.label
            result.boxes[slot, : len(boxes)] = np.asarray(boxes, np.int16).reshape(-1, 4)
            result.noise_keys[slot] = np.uint64(key64("erase", *key)).astype(np.int64)
            if masking is not None:
                size = transform.height, transform.width
                result.masks[slot] = masking.draw(*size, epoch=chunk.epoch, sample=sample_id, copy=copy)
        return result

    def close(self) -> None:
        """Close the files of the reader."""
        self.reader.close()


def serve(connection: Connection) -> None:
    """Answer chunks until the other end closes."""
    recipe = connection.recv()
    shape = (3, recipe.transform.height, recipe.transform.width)
    memories: dict[int, np.ndarray] = {}
    try:
        producer = Producer(recipe)
        while True:
            message = connection.recv()
            if isinstance(message, Chunk):
                out = memories[message.memory][message.row : message.row + len(message.ids)]
                connection.send(producer.fill(message, out))
            else:
                _, number, size = message
                descriptor = recv_handle(connection)
                memories[number] = np.frombuffer(mmap.mmap(descriptor, size), np.uint8).reshape(-1, *shape)
                os.close(descriptor)
    except SwinScaleError as error:
        connection.send(error)


def main() -> int:
    """Entry of a loader process; the parent blocked `SIGNALS` so that none could arrive before this line."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        serve(Connection(int(sys.argv[1])))
    except (EOFError, ConnectionError):
        # The training process closed its end or died.
        return 0
    return 0
