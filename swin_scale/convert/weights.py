"""Weights that are read when they are asked for: what every source looks like to `convert`, `load_weights`, `inspect`.

A source lists names, shapes and dtypes at once (tensors on the meta device) and reads values one tensor at a time, so
that a conversion holds one tensor, not the model. `Renamed` puts other names and small changes on top of a source.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import torch
from torch import Tensor

from swin_scale.checkpoint.tensorfile import bytes_of
from swin_scale.hashed_file import CHUNK_BYTES

Change = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""Values of a step's sources to values of its targets; also takes tensors on the meta device."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where weights came from and what is known about the model they belong to."""

    path: Path
    format: str
    """``checkpoint``, ``safetensors``, ``torch``, ``deepspeed`` or ``ranks`` (the files of an official Swin-MoE)."""
    kind: str
    """``master`` or ``ema``."""
    step: int | None = None
    model: Mapping[str, Any] | None = None
    """``name``, ``overrides``, ``classes``, ``wnids``; None for foreign files."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `Variant` that a foreign file states beside its tensors, such as ``img_size``."""
    classes: tuple[str, ...] | None = None
    """Label names that a foreign file states."""
    beside: tuple[str, ...] = ()
    """Other top-level entries of a ``.pth``: optimizer, config, ..."""
    mentioned: tuple[str, ...] = ()
    """Classes that a pickle mentions; none of them was imported."""
    notes: tuple[str, ...] = ()
    """What else a receipt should say."""


class Weights(AbstractContextManager["Weights"], ABC):
    """Named tensors of one source. `tensors` are on the meta device; close it, or use it in a ``with``."""

    source: Source
    tensors: Mapping[str, Tensor]
    steps: Sequence[Step] = ()
    """How the tensors come from the keys of several files; empty where there is one table of keys."""
    left_out: Mapping[str, str] = MappingProxyType({})
    """Keys of the files that are in no tensor, and why."""

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU and contiguous; raises CheckpointError naming the file."""

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor; sources that can do so read nothing else."""
        return self.read(name)[start:stop].clone()

    def pieces(self, names: Sequence[str], chunk_bytes: int = CHUNK_BYTES) -> Iterator[memoryview]:
        """The bytes of `names` one behind the other; a piece is of one tensor, valid until the next is asked for."""
        for name in names:
            view = bytes_of(self.read(name).contiguous())
            yield from (view[start : start + chunk_bytes] for start in range(0, len(view), chunk_bytes))
            del view  # before the next one is read

    def finish(self) -> None:
        """Check what reading in pieces could not; to be called before what was read is relied on."""

    def close(self) -> None:
        """Let go of open files."""

    def load(self) -> dict[str, Tensor]:
        """Every tensor, checked."""
        tensors = {name: self.read(name) for name in self.tensors}
        self.finish()
        return tensors

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True, eq=False)
class Step:
    """`targets` get the values of `sources`: the same ones, or what `change` makes of them, for the stated reason."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    change: Change | None = None
    reason: str = ""

    def apply(self, values: Sequence[Tensor]) -> Sequence[Tensor]:
        """One value for each target."""
        return values if self.change is None else self.change(values)


class Renamed(Weights):
    """The weights of `inner` after `steps`; a source may be used by none of them."""

    def __init__(self, inner: Weights, steps: Sequence[Step]) -> None:
        self.inner, self.source = inner, inner.source
        self._step = {target: step for step in steps for target in step.targets}
        self._last: tuple[Step, Sequence[Tensor]] | None = None
        self.tensors = apply_steps(inner.tensors, steps)

    def read(self, name: str) -> Tensor:
        step = self._step[name]
        if self._last is None or self._last[0] is not step:
            self._last = None  # first, so that two parameters are never held at once
            self._last = step, step.apply([self.inner.read(source) for source in step.sources])
        return self._last[1][step.targets.index(name)].contiguous()

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        step = self._step[name]
        if step.change is None:
            return self.inner.rows(step.sources[step.targets.index(name)], start, stop)
        return super().rows(name, start, stop)

    def pieces(self, names: Sequence[str], chunk_bytes: int = CHUNK_BYTES) -> Iterator[memoryview]:
        # Runs of unchanged tensors are asked for together: the source may read ahead.
        for unchanged, run in groupby(names, lambda name: self._step[name].change is None):
            if unchanged:
                steps = [(self._step[name], name) for name in run]
                yield from self.inner.pieces([s.sources[s.targets.index(name)] for s, name in steps], chunk_bytes)
            else:
                yield from super().pieces(list(run), chunk_bytes)

    def finish(self) -> None:
        self.inner.finish()


class Several(Weights):
    """The tensors of several files: `home` says which of `files` has a tensor. They are closed with this."""

    def __init__(self, files: Mapping[str, Weights], home: Mapping[str, str], source: Source) -> None:
        self.files, self.home, self.source = files, home, source
        self.tensors = {name: files[file].tensors[name] for name, file in home.items()}

    def read(self, name: str) -> Tensor:
        return self.files[self.home[name]].read(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.files[self.home[name]].rows(name, start, stop)

    def finish(self) -> None:
        for file in self.files.values():
            file.finish()

    def close(self) -> None:
        for file in self.files.values():
            file.close()


class Loaded(Weights):
    """Tensors that are in memory already."""

    def __init__(self, tensors: Mapping[str, Tensor], source: Source) -> None:
        self.source = source
        self._tensors = tensors
        self.tensors = {name: on_meta(tensor) for name, tensor in tensors.items()}

    def read(self, name: str) -> Tensor:
        return self._tensors[name]


def apply_steps(tensors: Mapping[str, Tensor], steps: Sequence[Step]) -> dict[str, Tensor]:
    """What `steps` make of a state dict."""
    made: dict[str, Tensor] = {}
    for step in steps:
        made.update(zip(step.targets, step.apply([tensors[name] for name in step.sources]), strict=True))
    return made


def plain_name(key: str) -> str:
    """A key without the prefixes of DistributedDataParallel and of a SimMIM encoder, under its public name."""
    return key.removeprefix("module.").removeprefix("encoder.").replace(".rpe_mlp.", ".cpb_mlp.")


def on_meta(tensor: Tensor) -> Tensor:
    """Shape and dtype of a tensor, without its values."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
