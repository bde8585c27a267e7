"""Files of ``torch.save``, zip and legacy, read without unpickling (see `pickles`) and without running anything.

Tensor bytes are read on demand, so the optimizer half of a training checkpoint costs nothing.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from swin_scale.convert.pickles import MAX_PICKLE_BYTES, LazyTensor, Storage, read_pickle
from swin_scale.errors import CheckpointError
from swin_scale.hashed_file import CHUNK_BYTES

ZIP_MAGIC = b"PK\x03\x04"
MAX_EXPANSION = 4
"""Tied weights are read once for each name; more than this many times the file is an attack."""
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LOCAL_HEADER = struct.Struct("<26xHH")
"""A zip member's own header: only the lengths of its name and of its extra field matter here."""

_STORAGES: Mapping[str, torch.dtype] = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
_TYPED: Mapping[str, torch.dtype] = {
    f"torch.{name}": getattr(torch, name)
    for name in ("float32", "float64", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "uint16", "uint32")
}


@dataclass(frozen=True)
class Extent:
    """Bytes [offset, offset + size) of a file, and their CRC-32 where the file states one."""

    path: Path
    offset: int
    size: int
    crc: int | None


def is_torch_file(path: Path) -> bool:
    """Whether `path` starts like a file of ``torch.save``; raises OSError.

    A legacy file starts with a pickle of protocol 2 (long integer) or above (frame). As a safetensors header those
    bytes would state a length beyond what is read.
    """
    with open(path, "rb") as file:
        start = file.read(4)
    return start == ZIP_MAGIC or (start[:1] == b"\x80" and start[2:3] in (b"\x8a", b"\x95"))


class TorchFile(AbstractContextManager["TorchFile"]):
    """An opened file of ``torch.save``: `content` is its object as data, `read` turns a `LazyTensor` into a tensor.

    Raises CheckpointError naming the file when it is damaged, wants to run code, or holds compressed members.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: Any = None
        self.mentioned: set[str] = set()
        """Classes the file refers to."""
        self._file: BinaryIO = open(path, "rb")  # noqa: SIM115 - closed by __exit__
        self._size = path.stat().st_size
        self._read_bytes = 0
        self._archive: zipfile.ZipFile | None = None
        self._prefix = ""
        self._offsets: dict[str, tuple[int, int]] = {}
        self._cache: dict[str, Tensor] = {}
        try:
            if self._file.read(4) == ZIP_MAGIC:
                self._open_zip()
            else:
                self._file.seek(0)
                self._open_legacy()
        except (
            zipfile.BadZipFile,
            OSError,
            EOFError,
            NotImplementedError,
            RuntimeError,
            ValueError,
            struct.error,
        ) as error:
            self._file.close()
            raise CheckpointError(f"{path} is damaged: {error}") from error
        except CheckpointError:
            self._file.close()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def _open_zip(self) -> None:
        self._archive = archive = zipfile.ZipFile(self._file)
        members = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise CheckpointError(f"{self.path} is a zip, but not one of torch.save: it has no single data.pkl")
        self._prefix = pickles[0].removesuffix("data.pkl")
        for name, info in members.items():
            if info.compress_type != zipfile.ZIP_STORED or info.file_size > self._size:
                raise CheckpointError(f"{self.path}: member {name!r} is compressed or larger than the file; refused")
        order = members.get(f"{self._prefix}byteorder")
        if order is not None and order.file_size < 16 and archive.read(order) != b"little":
            raise CheckpointError(f"{self.path} was written on a big-endian machine; convert it there")
        if members[pickles[0]].file_size > MAX_PICKLE_BYTES:
            raise CheckpointError(f"{self.path}: data.pkl is longer than {MAX_PICKLE_BYTES} bytes; refused")
        self.content, self.mentioned = read_pickle(io.BytesIO(archive.read(pickles[0])), self.path)

    def _open_legacy(self) -> None:
        magic, _ = read_pickle(self._file, self.path)
        if magic != LEGACY_MAGIC:
            raise CheckpointError(f"{self.path} is a pickle, but not one of torch.save; refused")
        read_pickle(self._file, self.path)
        system, _ = read_pickle(self._file, self.path)
        if not (isinstance(system, dict) and system.get("little_endian", True) is True):
            raise CheckpointError(f"{self.path} was written on a big-endian machine; convert it there")
        self.content, self.mentioned = read_pickle(self._file, self.path)
        keys, _ = read_pickle(self._file, self.path)
        storages = {tensor.storage.key: tensor.storage for tensor in _tensors(self.content)}
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise CheckpointError(f"{self.path} is damaged: its list of storages is missing")
        for key in keys:
            numel = int.from_bytes(self._file.read(8), "little")
            storage = storages.get(key)
            if storage is None:
                raise CheckpointError(f"{self.path}: storage {key!r} belongs to no tensor; its size is unknown")
            size = numel * _dtype(self.path, storage).itemsize
            self._offsets[key] = (self._file.tell(), size)
            if self._file.tell() + size > self._size:
                raise CheckpointError(f"{self.path} is damaged: storage {key!r} ends outside the file")
            self._file.seek(size, io.SEEK_CUR)

    def read(self, lazy: LazyTensor) -> Tensor:
        """The tensor on the CPU, contiguous. Bounds are checked before anything is allocated."""
        shape, stride, dtype = self._geometry(lazy)
        elements = math.prod(shape)
        if not elements:
            return torch.empty(shape, dtype=dtype)
        self._read_bytes += elements * dtype.itemsize
        if self._read_bytes > MAX_EXPANSION * self._size:
            raise CheckpointError(f"{self.path}: its tensors are views of each other, many times its size; refused")
        return (
            self._storage(lazy.storage)
            .view(dtype)
            .as_strided(shape, stride, lazy.offset)
            .clone(memory_format=torch.contiguous_format)
        )

    def meta(self, lazy: LazyTensor) -> Tensor:
        """Shape and dtype of the tensor, on the meta device, checked as by `read`."""
        shape, _, dtype = self._geometry(lazy)
        return torch.empty(shape, dtype=dtype, device="meta")

    def extent(self, lazy: LazyTensor) -> tuple[Extent, int] | None:
        """The storage of a contiguous tensor, as bytes of the file, and where in it the tensor starts (bytes).

        None for a tensor that is strided or empty. The CRC of the storage is for the reader of its bytes to check.
        """
        shape, stride, dtype = self._geometry(lazy)
        steps = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        if not math.prod(shape) or any(size > 1 and step != own for size, step, own in zip(shape, steps, stride)):
            return None
        storage = lazy.storage
        size = storage.numel * _dtype(self.path, storage).itemsize
        if self._archive is None:
            offset, stored = self._offsets.get(storage.key, (0, -1))
            crc = None
        else:
            offset, stored, crc = self._member(storage)
        if stored != size or offset + size > self._size:
            raise CheckpointError(f"{self.path} is damaged: storage {storage.key!r} does not have {size} bytes")
        return Extent(self.path, offset, size, crc), lazy.offset * dtype.itemsize

    def _member(self, storage: Storage) -> tuple[int, int, int]:
        """Where in the file the bytes of a storage begin, how many there are, and their CRC."""
        assert self._archive is not None
        try:
            info = self._archive.getinfo(f"{self._prefix}data/{storage.key}")
        except KeyError:
            raise CheckpointError(f"{self.path} is damaged: storage {storage.key!r} is missing") from None
        self._file.seek(info.header_offset)
        header = self._file.read(_LOCAL_HEADER.size)
        if len(header) < _LOCAL_HEADER.size or not header.startswith(ZIP_MAGIC):
            raise CheckpointError(f"{self.path} is damaged: storage {storage.key!r} is not where the zip says")
        name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
        return info.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes, info.file_size, info.CRC

    def _geometry(self, lazy: LazyTensor) -> tuple[tuple[int, ...], tuple[int, ...], torch.dtype]:
        """Shape, stride and dtype; raises CheckpointError unless the tensor lies inside its storage."""
        dtype = _dtype(self.path, lazy.storage) if lazy.dtype is None else _TYPED.get(lazy.dtype)
        if dtype is None:
            raise CheckpointError(f"{self.path}: tensors of {lazy.dtype} are not supported")
        shape, stride = sizes(lazy.shape), sizes(lazy.stride)
        numbers = (lazy.offset, *shape, *stride)
        if len(numbers) > 64 or not all(type(number) is int and 0 <= number < 1 << 62 for number in numbers):
            raise CheckpointError(f"{self.path} is damaged: a tensor has impossible sizes")
        total = lazy.storage.numel * _dtype(self.path, lazy.storage).itemsize // dtype.itemsize
        last = lazy.offset + sum((size - 1) * step for size, step in zip(shape, stride))
        elements = math.prod(shape)
        if len(shape) != len(stride) or (elements and (last >= total or elements > total)):
            raise CheckpointError(f"{self.path} is damaged: a tensor of shape {list(shape)} lies outside its storage")
        return shape, stride, dtype

    def _storage(self, storage: Storage) -> Tensor:
        if storage.key not in self._cache:
            size = storage.numel * _dtype(self.path, storage).itemsize
            if size > self._size:
                raise CheckpointError(f"{self.path} is damaged: storage {storage.key!r} is larger than the file")
            self._cache.clear()  # one at a time: only tied tensors share one, and those follow each other
            self._cache[storage.key] = self._load(storage, size)
        return self._cache[storage.key]

    def _load(self, storage: Storage, size: int) -> Tensor:
        out = torch.empty(size, dtype=torch.uint8)
        view = out.numpy().data
        try:
            if self._archive is None:
                offset, stored = self._offsets.get(storage.key, (0, -1))
                self._file.seek(offset)
                complete = stored == size and self._file.readinto(view) == size  # type: ignore[attr-defined]
            else:
                info = self._archive.getinfo(f"{self._prefix}data/{storage.key}")
                with self._archive.open(info) as member:
                    done = 0
                    while done < size and (chunk := member.read(min(CHUNK_BYTES, size - done))):
                        view[done : done + len(chunk)] = chunk
                        done += len(chunk)
                    # Reading on to the end makes zipfile check the CRC.
                    complete = done == size == info.file_size and not member.read(1)
        except KeyError:
            raise CheckpointError(f"{self.path} is damaged: storage {storage.key!r} is missing") from None
        except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{self.path} is damaged: storage {storage.key!r}: {error}") from error
        if not complete:
            raise CheckpointError(f"{self.path} is damaged: storage {storage.key!r} does not have {size} bytes")
        return out


def _dtype(path: Path, storage: Storage) -> torch.dtype:
    if storage.type not in _STORAGES:
        raise CheckpointError(f"{path}: storages of type {storage.type} are not supported")
    return _STORAGES[storage.type]


def sizes(value: Any) -> tuple[Any, ...]:
    """Numbers of a ``torch.Size``, tuple or list; a None among them where it is something else."""
    args = getattr(value, "args", value)  # torch.Size is kept as a placeholder with its arguments
    if isinstance(args, tuple) and len(args) == 1 and isinstance(args[0], (tuple, list)):
        args = args[0]
    return tuple(args) if isinstance(args, (tuple, list)) else (None,)


def _tensors(content: Any) -> list[LazyTensor]:
    """Every tensor reachable from `content`, each visited once."""
    found: list[LazyTensor] = []
    seen: set[int] = set()
    stack = [content]
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, LazyTensor):
            found.append(item)
        elif isinstance(item, dict):
            stack.extend(item.values())
        elif isinstance(item, (list, tuple)):
            stack.extend(item)
        elif hasattr(item, "elements"):
            stack.extend((item.args, item.state, item.items, item.elements))
    return found
