"""The files of a DeepSpeed ZeRO checkpoint, read as data and checked to belong together.

``latest`` names a directory with a file of optimizer state for each rank and, at stages 1 and 2, one file of model
state; at stage 3, one for each rank. The pickles contain DeepSpeed objects (loss scalers, enums), which stay inert
records (see `pickles`). Nothing is read of the tensors but where they lie.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swin_scale.convert.pickles import LazyTensor, Placeholder
from swin_scale.convert.stream import Descriptors, Stream
from swin_scale.convert.torchfile import TorchFile, sizes
from swin_scale.errors import CheckpointError

LATEST = "latest"
_OPTIMIZER = re.compile(r"((?:bf16_|fp16_)?zero_pp_rank_)(\d+)(_mp_rank_\d+_optim_states\.pt)")
_MODEL = re.compile(r"(?:zero_pp_rank_\d+_)?mp_rank_(\d+)_model_states\.pt")
_PARTITIONS = ("single_partition_of_fp32_groups", "fp32_flat_groups")

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Piece:
    """Bytes [start, start + size) of a storage."""

    stream: Stream
    start: int
    size: int


class Vector:
    """Pieces one behind the other; `size` in bytes."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces = pieces
        self._ends = list(accumulate(piece.size for piece in pieces))
        self.size = self._ends[-1] if pieces else 0

    def cut(self, start: int, size: int) -> Iterator[Piece]:
        """The pieces that make up bytes [start, start + size)."""
        index = bisect_right(self._ends, start)
        while size > 0:
            piece = self._pieces[index]
            skipped = start - (self._ends[index] - piece.size)
            taken = min(size, piece.size - skipped)
            yield Piece(piece.stream, piece.start + skipped, taken)
            start, size, index = start + taken, size - taken, index + 1


@dataclass(frozen=True, eq=False)
class Stored:
    """A tensor as stored: `pieces` make up its elements in order, or it is `loaded` (when it was strided)."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]
    loaded: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Partition:
    """What one rank's optimizer file says: its part of each group's flat fp32 vector."""

    path: Path
    stage: int
    ranks: int
    dtype: torch.dtype
    groups: tuple[tuple[Piece, ...], ...]
    paddings: Any
    """Elements of padding after each parameter, by group; None in files of older versions."""


@dataclass(frozen=True, kw_only=True)
class ModelState:
    """What a model file says."""

    path: Path
    groups: tuple[Shapes, ...]
    """Names and shapes of the optimizer's parameters, group by group, in the order of the flat vectors."""
    buffers: frozenset[str]
    shared: Mapping[str, str]
    """Name -> the name under which the same parameter is stored."""
    frozen: Shapes
    fragments: Mapping[str, Stored]
    """This rank's part of the frozen parameters."""
    module: Mapping[str, Stored]
    """Buffers, and at stages 1 and 2 the parameters in the training precision."""
    step: int | None
    version: str


def find(path: Path) -> Path | None:
    """The directory with DeepSpeed's files for `path`, which is it or holds it; None when there is none.

    Raises CheckpointError when ``latest`` names something that is not there.
    """
    if _files(path):
        return path
    latest = path / LATEST
    if not latest.is_file():
        return None
    with open(latest, "rb") as file:
        tag = file.read(256).decode(errors="replace").strip()
    directory = path / tag
    if not tag or Path(tag).name != tag or not directory.is_dir():
        raise CheckpointError(f"{latest} names {tag!r}, which is no directory beside it; give the directory itself")
    return directory if _files(directory) else None


def _files(directory: Path) -> list[str]:
    names = (entry.name for entry in directory.iterdir())
    return sorted(name for name in names if _OPTIMIZER.fullmatch(name) or _MODEL.fullmatch(name))


class ZeroFiles:
    """The files of one directory. `partitions` and `models` are by rank (stages 1 and 2: one model file)."""

    def __init__(self, directory: Path) -> None:
        self.descriptors = Descriptors()
        self.streams: dict[Any, Stream] = {}
        self.bytes = 0
        self.mentioned: set[str] = set()
        names = _files(directory)
        if others := [name for name in names if not re.search(r"mp_rank_0+_", name)]:
            raise CheckpointError(f"{directory / others[0]}: the model is split over ranks; DeepSpeed can join it")
        optimizer = {int(match[2]): match for name in names if (match := _OPTIMIZER.fullmatch(name))}
        if not optimizer:
            raise CheckpointError(f"{directory / names[0]}: the *_optim_states.pt with the fp32 weights are missing")
        self.partitions: list[Partition] = []
        for rank in sorted(optimizer):
            self.partitions.append(self._partition(directory / optimizer[rank][0]))
            self._check_partition(optimizer)
        first = self.partitions[0]
        wanted = ["mp_rank_00_model_states.pt"]
        if first.stage == 3:
            wanted = [f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(first.ranks)]
        self.models: list[ModelState] = []
        for name in wanted:
            if name not in names:
                raise CheckpointError(f"{directory / name} is missing: ZeRO stage {first.stage}, {first.ranks} ranks")
            self.models.append(self._model(directory / name))
            if self.models[-1].step != self.models[0].step:
                raise CheckpointError(f"{directory / name} is of step {self.models[-1].step}, {wanted[0]} of step "
                                      f"{self.models[0].step}")  # fmt: skip

    def _check_partition(self, names: Mapping[int, re.Match[str]]) -> None:
        """The newest partition belongs to the same run as the first, and no rank is missing."""
        first, last = self.partitions[0], self.partitions[-1]
        if (last.stage, last.ranks, len(last.groups)) != (first.stage, first.ranks, len(first.groups)):
            raise CheckpointError(
                f"{last.path} is of a run at stage {last.stage} on {last.ranks} ranks, {first.path.name} of one at "
                f"stage {first.stage} on {first.ranks}: saved over each other; remove the files of the older one"
            )
        for rank in range(first.ranks):
            if rank not in names:
                match = names[min(names)]
                missing = first.path.with_name(f"{match[1]}{rank}{match[3]}")
                raise CheckpointError(f"{missing} is missing: the checkpoint is of {first.ranks} ranks")
        if extra := [rank for rank in names if rank >= first.ranks]:
            path = first.path.with_name(names[extra[0]][0])
            raise CheckpointError(f"{path} is of another run: {first.path.name} is of one on {first.ranks} ranks; "
                                  "remove the files of the older one")  # fmt: skip

    def _open(self, path: Path) -> TorchFile:
        try:
            file = TorchFile(path)
            self.bytes += path.stat().st_size
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
        self.mentioned |= file.mentioned
        return file

    def _partition(self, path: Path) -> Partition:
        with self._open(path) as file:
            content = _table(file.content, path, "the file").get("optimizer_state_dict")
            state = _table(content, path, "optimizer_state_dict")
            key = next((key for key in _PARTITIONS if key in state), None)
            if key is None:
                raise CheckpointError(f"{path} has no fp32 weights of ZeRO ({' or '.join(_PARTITIONS)})")
            stage, tensors = _integer(state.get("zero_stage")), state[key]
            if stage not in (1, 2, 3):
                raise CheckpointError(f"{path} is of ZeRO stage {stage}; known are 1, 2 and 3")
            if not isinstance(tensors, list) or not all(isinstance(tensor, LazyTensor) for tensor in tensors):
                raise CheckpointError(f"{path} is damaged: {key} is not a list of tensors")
            groups = [self._stored(file, tensor) for tensor in tensors]
            dtypes = {group.dtype for group in groups} or {torch.float32}
            if len(dtypes) > 1 or any(group.loaded is not None for group in groups):
                raise CheckpointError(f"{path} is damaged: {key} are not vectors of one dtype")
            return Partition(
                path=path,
                stage=stage,
                ranks=_ranks(state.get("partition_count"), path),
                dtype=dtypes.pop(),
                groups=tuple(group.pieces for group in groups),
                paddings=state.get("param_alignment_paddings"),
            )

    def _model(self, path: Path) -> ModelState:
        with self._open(path) as file:
            content = _table(file.content, path, "the file")
            groups, buffers = content.get("param_shapes"), content.get("buffer_names")
            if not isinstance(groups, (list, dict)) or not isinstance(buffers, list):
                raise CheckpointError(
                    f"{path} has no param_shapes and buffer_names: nothing says which weights lie where"
                )
            return ModelState(
                path=path,
                groups=tuple(_shapes(group, path) for group in (groups if isinstance(groups, list) else [groups])),
                buffers=frozenset(str(name) for name in buffers),
                shared={str(k): str(v) for k, v in _table(content.get("shared_params"), path, "shared_params").items()},
                frozen=_shapes(content.get("frozen_param_shapes"), path),
                fragments=self._tensors(file, content.get("frozen_param_fragments"), "frozen_param_fragments"),
                module=self._tensors(file, content.get("module"), "module"),
                step=_integer(content.get("global_steps")),
                version=str(content.get("ds_version", "unknown"))[:40],
            )

    def _tensors(self, file: TorchFile, table: Any, what: str) -> dict[str, Stored]:
        items = _table(table, file.path, what).items()
        return {str(name): self._stored(file, lazy) for name, lazy in items if isinstance(lazy, LazyTensor)}

    def _stored(self, file: TorchFile, lazy: LazyTensor) -> Stored:
        meta, extent = file.meta(lazy), file.extent(lazy)
        if extent is None:
            loaded = file.read(lazy) if meta.numel() else None
            return Stored(tuple(meta.shape), meta.dtype, (), loaded)
        stream = self.streams.setdefault(extent[0], Stream(self.descriptors, extent[0]))
        return Stored(tuple(meta.shape), meta.dtype, (Piece(stream, extent[1], meta.numel() * meta.element_size()),))


def _integer(value: Any) -> int | None:
    """An integer, or the value of an enum member kept as a placeholder."""
    if isinstance(value, Placeholder) and isinstance(value.args, tuple) and len(value.args) == 1:
        value = value.args[0]
    return value if type(value) is int else None


def _ranks(value: Any, path: Path) -> int:
    counts = value if isinstance(value, list) and value else [value]
    if not all(type(count) is int and 0 < count < 1 << 20 for count in counts):
        raise CheckpointError(f"{path} does not say how many ranks share the weights (partition_count)")
    if len(set(counts)) > 1:
        raise CheckpointError(f"{path}: groups are split over {sorted(set(counts))} ranks, as expert parallelism does; "
                              "DeepSpeed does not say which rank holds which part")  # fmt: skip
    return counts[0]


def _table(value: Any, path: Path, what: str) -> dict[Any, Any]:
    if not isinstance(value, (dict, type(None))):
        raise CheckpointError(f"{path}: {what} is not a table; it is damaged or no file of DeepSpeed")
    return value or {}


def _shapes(value: Any, path: Path) -> dict[str, tuple[int, ...]]:
    shapes = {str(name): sizes(shape) for name, shape in _table(value, path, "a list of shapes").items()}
    for name, shape in shapes.items():
        if len(shape) > 64 or not all(type(size) is int and 0 <= size < 1 << 40 for size in shape):
            raise CheckpointError(f"{path} is damaged: {name} has no possible shape")
    return shapes
