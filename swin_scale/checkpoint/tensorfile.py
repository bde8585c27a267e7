"""The safetensors format: a streaming writer that hashes as it writes, and a reader that trusts nothing.

A file is 8 bytes of header length (little-endian), a JSON header ``{name: {dtype, shape, data_offsets}}`` padded with
spaces to a multiple of 8, and the tensors back to back. The format is the one of huggingface/safetensors; files
written here load with that library and the other way round. Its own writer serialises the whole file in memory and
is several times slower than the disk, so this one hands tensor memory to ``write`` piece by piece.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from swin_scale.checkpoint import strictjson
from swin_scale.errors import CheckpointError
from swin_scale.files import fsync_directory
from swin_scale.hashed_file import CHUNK_BYTES, HashedFile, not_writable

MAX_HEADER_BYTES = 8 << 20
"""Longest header read or written: about 70,000 tensors. The JSON parser may need 25 times as much memory."""

METADATA_KEY = "__metadata__"

DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file; `begin` and `end` are byte offsets from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a file holds; `data_start` is where the first tensor begins."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    data_start: int


@dataclass(frozen=True)
class Written:
    """A finished file: its size, its xxh3_128 in hex, and where each tensor lies."""

    bytes: int
    xxh3_128: str
    entries: tuple[Entry, ...]


def write_tensor_file(
    path: Path,
    tensors: Sequence[tuple[str, Tensor]],
    metadata: Mapping[str, str] | None = None,
    *,
    chunk_bytes: int = CHUNK_BYTES,
    pieces: Callable[[Sequence[str]], Iterator[memoryview]] | None = None,
) -> Written:
    """Write `tensors` to `path`, fsynced; extra memory is one staging buffer of `chunk_bytes`.

    Contiguous CPU tensors are written straight from their memory. Others (GPU, strided) pass through the staging
    buffer. With `pieces`, tensors give shape and dtype only and may be on the meta device; ``pieces(names)`` then gives
    the bytes of all, in the order of the file, none of two tensors at once. Raises CheckpointError naming the file on
    any I/O error (a full disk, for one); the part is then removed.
    """
    header, entries = build_header(path, tensors, metadata)
    if pieces is None:
        pieces = partial(_pieces, dict(tensors), chunk_bytes)
    try:
        with open(path, "wb", buffering=0) as file:
            out, source = HashedFile(file.fileno()), pieces([entry.name for entry in entries])
            out.write(memoryview(header))
            for entry in entries:
                while out.bytes < entry.end:
                    out.write(next(source))
                assert out.bytes == entry.end, f"{entry.name} came with another number of bytes"
            os.fsync(file.fileno())
    except OSError as error:
        path.unlink(missing_ok=True)
        raise CheckpointError(not_writable(path, error)) from error
    return Written(bytes=out.bytes, xxh3_128=out.digest.hexdigest(), entries=entries)


def build_header(
    path: Path, tensors: Sequence[tuple[str, Tensor]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, tuple[Entry, ...]]:
    """Header bytes, and entries in file order: widest dtype first, so that every tensor is aligned to its item size.

    Raises CheckpointError naming `path` for what the format, or this reader, cannot hold.
    """
    for name, tensor in tensors:
        if tensor.dtype not in DTYPE_NAMES:
            raise CheckpointError(f"{path}: {name} is {tensor.dtype}, which safetensors cannot hold")
    assert len({name for name, _ in tensors}) == len(tensors), "tensor names occur twice"
    assert METADATA_KEY not in dict(tensors)
    table: dict[str, Any] = {METADATA_KEY: dict(metadata)} if metadata else {}
    placed: list[tuple[str, str, tuple[int, ...], int, int]] = []
    end = 0
    for name, tensor in sorted(tensors, key=lambda item: -item[1].element_size()):
        begin, end = end, end + tensor.numel() * tensor.element_size()
        placed.append((name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), begin, end))
        table[name] = {"dtype": placed[-1][1], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = strictjson.dumps(table)
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path}: {len(tensors)} tensors need a header of {len(text)} bytes, over the limit of {MAX_HEADER_BYTES}"
        )
    start = 8 + len(text)
    entries = tuple(Entry(name, dtype, shape, start + begin, start + end) for name, dtype, shape, begin, end in placed)
    return len(text).to_bytes(8, "little") + text, entries


def _pieces(tensors: Mapping[str, Tensor], chunk_bytes: int, names: Sequence[str]) -> Iterator[memoryview]:
    """The bytes of `names` one behind the other, at most `chunk_bytes` at a time."""
    staging: list[Tensor] = []
    for name in names:
        yield from _pieces_of(tensors[name].detach(), chunk_bytes, staging)


def _pieces_of(tensor: Tensor, chunk_bytes: int, staging: list[Tensor]) -> Iterator[memoryview]:
    """The bytes of `tensor`; `staging` holds the one reused buffer once it is due."""
    if tensor.numel() == 0:
        return
    if tensor.device.type == "cpu" and tensor.is_contiguous():
        view = bytes_of(tensor)
        for start in range(0, len(view), chunk_bytes):
            yield view[start : start + chunk_bytes]
        return
    if not staging:
        staging.append(torch.empty(max(chunk_bytes, 8), dtype=torch.uint8, pin_memory=tensor.is_cuda))
    room = staging[0].numel() // 8 * 8
    step = room // tensor.element_size()
    buffer = staging[0][:room].view(tensor.dtype)
    for part in _rows(tensor, step):
        target = buffer[: part.numel()]
        target.copy_(part)
        yield bytes_of(target)


def _rows(tensor: Tensor, limit: int) -> Iterator[Tensor]:
    """`tensor` in row-major order as 1-D parts of at most `limit` elements, without copying the whole."""
    if tensor.is_contiguous() or tensor.dim() == 1:
        yield from tensor.reshape(-1).split(limit)
    elif tensor.numel() <= limit:
        yield tensor.reshape(-1)
    else:
        for row in tensor:
            yield from _rows(row, limit)


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor as bytes; numpy has no bfloat16 or float8, so it goes through uint8."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def read_header(path: Path) -> Header:
    """Read and check the header of `path`; raises CheckpointError naming the file and what is wrong.

    Everything stated is checked against the size of the file before anything is allocated: header length, dtypes,
    shapes (size x item size must equal the byte range), ranges that overlap, leave holes or end outside the file.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise CheckpointError(f"{path} is damaged: its header states {length} bytes, the file has {size}")
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(f"{path}: a header of {length} bytes is over the limit of {MAX_HEADER_BYTES}")
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    table = strictjson.loads(text, path)
    if not isinstance(table, dict):
        raise CheckpointError(f"{path} is damaged: the header is {type(table).__name__}, not a table of tensors")
    metadata = table.pop(METADATA_KEY, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path} is damaged: {METADATA_KEY} is not a table of text")
    start = 8 + length
    entries = {name: _entry(path, name, row, start, size) for name, row in table.items()}
    expected = start
    for entry in sorted(entries.values(), key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != expected:
            what = "overlaps the one before" if entry.begin < expected else "leaves a hole before it"
            raise CheckpointError(f"{path} is damaged: tensor {entry.name!r} {what}")
        expected = entry.end
    if expected != size:
        raise CheckpointError(f"{path} is damaged: its tensors end at byte {expected}, the file at {size}")
    return Header(entries=entries, metadata=metadata, data_start=start)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _entry(path: Path, name: str, row: Any, start: int, size: int) -> Entry:
    def damaged(what: str) -> CheckpointError:
        return CheckpointError(f"{path} is damaged: tensor {name!r} {what}")

    if not isinstance(row, dict) or row.keys() != {"dtype", "shape", "data_offsets"}:
        raise damaged("is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = row["dtype"], row["shape"], row["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise damaged(f"has dtype {dtype!r}; known are {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > 64 or not all(map(_is_size, shape)):
        raise damaged(f"has shape {str(shape)[:80]}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise damaged(f"has data_offsets {str(offsets)[:80]}")
    begin, end = start + offsets[0], start + offsets[1]
    if not begin <= end <= size:
        raise damaged(f"lies at bytes {begin} to {end} of a file of {size}")
    if math.prod(shape) * DTYPES[dtype].itemsize != end - begin:
        raise damaged(f"of shape {shape} and dtype {dtype} does not take {end - begin} bytes")
    return Entry(name, dtype, tuple(shape), begin, end)


def read_range(descriptor: int, path: Path, offset: int, out: Tensor) -> None:
    """Fill the contiguous CPU tensor `out` from `offset` of an open file; no memory map, so a shrinking file raises
    CheckpointError instead of ending the process with SIGBUS."""
    if out.numel() == 0:
        return
    view = bytes_of(out)
    while view:
        try:
            count = os.preadv(descriptor, [view[: 1 << 30]], offset)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
        if count == 0:
            raise CheckpointError(f"{path} is damaged: it ends at byte {offset}, {len(view)} bytes short")
        view, offset = view[count:], offset + count


def save_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Written:
    """Write `tensors` to one safetensors file, replaced in one rename; shapes and dtypes as they are.

    Raises CheckpointError when the file cannot be written; an older file of that name then stays as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    written = write_tensor_file(temporary, list(tensors.items()), {"format": "pt", **(metadata or {})})
    try:
        os.replace(temporary, path)
        fsync_directory(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}") from error
    return written


def load_safetensors(
    path: str | os.PathLike[str], wanted: Callable[[str], bool] | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (CPU) and metadata of a safetensors file; `wanted(name)` may leave tensors out.

    Raises CheckpointError for a file that is damaged, hostile or not safetensors.
    """
    path = Path(path)
    header = read_header(path)
    tensors: dict[str, Tensor] = {}
    try:
        with open(path, "rb", buffering=0) as file:
            for name, entry in header.entries.items():
                if wanted is None or wanted(name):
                    tensors[name] = _allocate(path, entry)
                    read_range(file.fileno(), path, entry.begin, tensors[name])
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    return tensors, dict(header.metadata)


def _allocate(path: Path, entry: Entry) -> Tensor:
    try:
        return torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
    except RuntimeError as error:
        size = entry.end - entry.begin
        raise CheckpointError(f"{path}: tensor {entry.name!r} of {size} bytes does not fit in memory") from error


def hash_file(path: Path, *, chunk_bytes: int = CHUNK_BYTES) -> tuple[int, str]:
    """Size and xxh3_128 (hex) of a file, read in chunks; raises OSError."""
    digest, size = xxhash.xxh3_128(), 0
    buffer = memoryview(bytearray(chunk_bytes))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            size += count
    return size, digest.hexdigest()
