"""Weights of DeepSpeed ZeRO checkpoints, put together one parameter at a time from the ranks' flat fp32 vectors.

At stages 1 and 2 all parameters of an optimizer group follow each other, each with the alignment padding that the file
states, and the ranks hold consecutive parts of that vector; what is left at its end is padding. At stage 3 every rank
holds ceil(n / ranks) elements of each parameter of n elements, the last ones padded, one parameter after the other
through all its vectors (ZeRO, section 5; the model file names the parameters and their shapes in that order).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from swin_scale.checkpoint.tensorfile import bytes_of
from swin_scale.convert.torchfile import MAX_EXPANSION
from swin_scale.convert.weights import Source, Weights
from swin_scale.convert.zero_files import Piece, Stored, Vector, ZeroFiles
from swin_scale.errors import CheckpointError
from swin_scale.hashed_file import CHUNK_BYTES

AHEAD = 2
"""Pieces that are read ahead of the one that is being written."""


class ZeroWeights(Weights):
    """The fp32 weights of a ZeRO checkpoint of any number of ranks.

    Extra memory is one parameter, or three small buffers when read in pieces. Buffers and frozen parameters, which are
    stored in the training precision, are given as fp32 too. Raises CheckpointError naming the file for missing ranks,
    files of another run, damage, and code in a pickle.
    """

    def __init__(self, directory: Path) -> None:
        self._files = files = ZeroFiles(directory)
        self._reader = ThreadPoolExecutor(max_workers=1)
        first, model = files.partitions[0], files.models[0]
        self._stored = assemble(files)
        if sum(map(_bytes, self._stored.values())) > MAX_EXPANSION * files.bytes:
            raise CheckpointError(f"{directory}: its tensors share bytes, many times the size of the files; refused")
        self.tensors = {
            name: torch.empty(t.shape, dtype=torch.float32 if t.dtype.is_floating_point else t.dtype, device="meta")
            for name, t in self._stored.items()
        }
        self.source = Source(
            path=directory,
            format="deepspeed",
            kind="master",
            step=model.step,
            mentioned=tuple(sorted(files.mentioned)),
            notes=(f"ZeRO stage {first.stage}, {first.ranks} ranks, DeepSpeed {model.version}",),
        )

    def read(self, name: str) -> Tensor:
        stored = self._stored[name]
        out = torch.empty(stored.shape, dtype=stored.dtype) if stored.loaded is None else stored.loaded
        position = 0
        for piece in stored.pieces:
            piece.stream.read_into(bytes_of(out)[position : position + piece.size], piece.start)
            position += piece.size
        return out.to(self.tensors[name].dtype)

    def pieces(self, names: Sequence[str], chunk_bytes: int = CHUNK_BYTES) -> Iterator[memoryview]:
        step = max(8, chunk_bytes // 8 * 8)  # cuts no element of any dtype
        buffers = [torch.empty(step, dtype=torch.uint8) for _ in range(AHEAD + 1)]
        coming: deque[Future[memoryview]] = deque()
        # The next pieces are read, and their checksums followed, while the caller hashes and writes this one.
        for index, (name, piece) in enumerate(self._cut(names, step)):
            coming.append(self._reader.submit(self._fill, name, piece, buffers[index % len(buffers)]))
            if len(coming) > AHEAD:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()

    def _cut(self, names: Sequence[str], step: int) -> Iterator[tuple[str, Piece | None]]:
        """Pieces of at most `step` bytes; None for all of a tensor that is in memory."""
        for name in names:
            if self._stored[name].loaded is not None:
                yield name, None
            for piece in self._stored[name].pieces:
                for at in range(0, piece.size, step):
                    yield name, Piece(piece.stream, piece.start + at, min(step, piece.size - at))

    def _fill(self, name: str, piece: Piece | None, buffer: Tensor) -> memoryview:
        if piece is None:
            return bytes_of(self.read(name).contiguous())
        stored, wanted = self._stored[name].dtype, self.tensors[name].dtype
        part = buffer[: piece.size]
        piece.stream.read_into(bytes_of(part), piece.start)
        return bytes_of(part if wanted == stored else part.view(stored).to(wanted))

    def finish(self) -> None:
        for stream in self._files.streams.values():
            stream.finish()

    def close(self) -> None:
        self._reader.shutdown()
        self._files.descriptors.close()


def _bytes(stored: Stored) -> int:
    return math.prod(stored.shape) * stored.dtype.itemsize


def assemble(files: ZeroFiles) -> dict[str, Stored]:
    """Where every tensor of the model lies: buffers, frozen and trained parameters, and shared names.

    Raises CheckpointError naming the file when the flat vectors do not have room for the parameters, or too much.
    """
    model, stage = files.models[0], files.partitions[0].stage
    found = {name: tensor for name, tensor in model.module.items() if name in model.buffers}
    found.update({name: _join(files, name, shape) for name, shape in model.frozen.items()})
    found.update(_assemble_split(files) if stage == 3 else _assemble_flat(files))
    for name, holder in model.shared.items():
        if holder in found:
            found[name] = found[holder]
    if stage < 3:  # stage 1 lists frozen parameters nowhere, but the module has them
        found.update({name: tensor for name, tensor in model.module.items() if name not in found})
    return found


def _join(files: ZeroFiles, name: str, shape: tuple[int, ...]) -> Stored:
    """A frozen parameter from the fragments of all model files."""
    parts = []
    for model in files.models:
        if name not in model.fragments:
            raise CheckpointError(f"{model.path} has no fragment of the frozen parameter {name}")
        parts.append(model.fragments[name])
    dtype, size = parts[0].dtype, math.prod(shape) * parts[0].dtype.itemsize
    if len(parts) == 1 and parts[0].shape == shape:
        return parts[0]
    vector = Vector([piece for part in parts for piece in part.pieces])
    if vector.size < size or any(part.dtype != dtype for part in parts):
        raise CheckpointError(f"{files.models[0].path}: the fragments of {name} do not make up shape {list(shape)}")
    return Stored(shape, dtype, tuple(vector.cut(0, size)))


def _assemble_flat(files: ZeroFiles) -> dict[str, Stored]:
    """Stages 1 and 2."""
    model, first = files.models[0], files.partitions[0]
    if len(first.groups) != len(model.groups):
        raise CheckpointError(f"{first.path} has {len(first.groups)} groups of parameters, {model.path.name} names "
                              f"{len(model.groups)}")  # fmt: skip
    found, item = {}, first.dtype.itemsize
    for index, shapes in enumerate(model.groups):
        vector = Vector([piece for partition in files.partitions for piece in partition.groups[index]])
        paddings, start = _paddings(files, index, len(shapes)), 0
        for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
            size = math.prod(shape) * item
            if start + size > vector.size:
                raise CheckpointError(f"{first.path.parent}: the flat weights of group {index} end before {name}")
            found[name] = Stored(shape, first.dtype, tuple(vector.cut(start, size)))
            start += size + padding * item
        # The whole is padded to a multiple of twice the ranks; newer versions leave that padding out.
        if vector.size - start >= 2 * first.ranks * item:
            raise CheckpointError(f"{first.path.parent}: group {index} has {vector.size - start} bytes more than the "
                                  f"parameters that {model.path.name} names")  # fmt: skip
    return found


def _paddings(files: ZeroFiles, index: int, count: int) -> list[int]:
    """Elements of padding after each of the `count` parameters of a group."""
    first = files.partitions[0]
    if first.paddings is None:
        return [0] * count
    group = first.paddings[index] if isinstance(first.paddings, list) and index < len(first.paddings) else None
    if not isinstance(group, list) or len(group) != count or not all(type(n) is int and 0 <= n < 64 for n in group):
        raise CheckpointError(f"{first.path}: param_alignment_paddings of group {index} do not fit {count} parameters")
    return group


def _assemble_split(files: ZeroFiles) -> dict[str, Stored]:
    """Stage 3."""
    model, first = files.models[0], files.partitions[0]
    vectors = [Vector([piece for group in partition.groups for piece in group]) for partition in files.partitions]
    found, start = {}, 0
    for name, shape in (item for shapes in model.groups for item in shapes.items()):
        total = math.prod(shape) * first.dtype.itemsize
        share = math.ceil(math.prod(shape) / first.ranks) * first.dtype.itemsize
        pieces: list[Piece] = []
        for rank, vector in enumerate(vectors):
            if vector.size < start + share:
                raise CheckpointError(f"{files.partitions[rank].path}: its flat weights end before {name}")
            pieces += vector.cut(start, min(share, total - rank * share))
        found[name] = Stored(shape, first.dtype, tuple(pieces))
        start += share
    for partition, vector in zip(files.partitions, vectors):
        if vector.size != start:
            raise CheckpointError(
                f"{partition.path} has {vector.size} bytes of weights, {model.path.name} names {start}"
            )
    return found
