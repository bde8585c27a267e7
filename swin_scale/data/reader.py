"""Bytes of images by sample id, through the memory-mapped index: one `pread` per image, no tar is walked.

I/O errors are retried and then end the run (DataError); content that cannot be an image raises `BadSample`, which costs
the sample its slot and nothing else.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import os
import re
import tarfile
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import xxhash

from swin_scale.errors import DataError, UserError
from swin_scale.shards import ShardSet, local_directory

MAX_OPEN_FILES = 256
"""Per process; login shells commonly allow 1024."""
MAX_IMAGE_BYTES = 256 << 20
RETRY_DELAYS_S = (0.1, 0.5, 2.0)
_BLOCK = tarfile.BLOCKSIZE
T = TypeVar("T")


class BadSample(Exception):
    """The content of one sample cannot be used; `str(error)` is the reason, for ``skipped.jsonl``."""


@dataclass(frozen=True)
class Encoded:
    """One stored image: its bytes and its class number (-1 when unlabelled)."""

    data: bytes
    label: int


def open_shard_sets(
    paths: Sequence[str | os.PathLike[str]], key: str = "data.train", *, labelled: bool = True
) -> list[ShardSet]:
    """Open local shard directories that share one label space. UserError for URLs, DataError for damaged sets.

    `key` is the config key that the paths come from, for messages. Where labels are not used (not `labelled`), the
    classes may differ.
    """
    if not paths:
        raise UserError(f"{key} is empty; name at least one shard directory")
    sets = [ShardSet.open(path) for path in [local_directory(path, key) for path in paths]]
    first = sets[0]
    for other in sets[1:] if labelled else ():
        comparable = first.manifest.wnids is not None and other.manifest.wnids is not None
        field = "wnids" if comparable else "classes"
        if getattr(first.manifest, field) != getattr(other.manifest, field):
            raise DataError(
                f"{key}: {first.directory} and {other.directory} have different {field} "
                f"({len(first.manifest.classes)} and {len(other.manifest.classes)}), so their labels cannot be mixed"
            )
    return sets


def check_index(shards: ShardSet, *, labelled: bool = True) -> None:
    """Rows lie shard by shard as the manifest lists them, and if `labelled` every label names a class; else DataError.

    Reads the index once; a few seconds for 14 million rows that are not cached.
    """
    numbers, first = shards.index["shard"], 0
    for number, shard in enumerate(shards.manifest.shards):
        last = first + shard.samples - 1
        if shard.samples and (numbers[first] != number or numbers[last] != number):
            raise DataError(
                f"{shards.directory}: the index does not list the {shard.samples} samples of {shard.name} where the "
                f"manifest has them; rebuild it with `swin-scale shards index {shards.directory}`"
            )
        first = last + 1
    labels = shards.index["label"]
    classes = len(shards.manifest.classes)
    if len(labels) == 0:
        raise DataError(f"{shards.directory} holds no samples")
    if not labelled:
        return
    low, high = int(labels.min()), int(labels.max())
    if low < 0:
        missing = int((labels < 0).sum())
        raise DataError(f"{shards.directory}: {missing} samples have no label; classification needs one each")
    if high >= classes:
        raise DataError(f"{shards.directory}: label {high} is out of range, the manifest names {classes} classes")


class ImageReader:
    """Random access to the images of several shard sets by global sample id. One per process; not thread-safe."""

    def __init__(
        self, sources: Sequence[ShardSet], *, block: int = 1, retry_delays_s: Sequence[float] = RETRY_DELAYS_S
    ) -> None:
        """`block` above 1 asks the kernel to read a whole block of the sample order ahead when its first is due."""
        self.sources = tuple(sources)
        self.block = block
        self.retry_delays_s = tuple(retry_delays_s)
        self._first_ids = list(itertools.accumulate((len(source) for source in sources), initial=0))
        self._shard_rows = [
            list(itertools.accumulate((shard.samples for shard in source.manifest.shards), initial=0))
            for source in self.sources
        ]
        self._open: OrderedDict[tuple[int, int], int] = OrderedDict()

    def locate(self, sample_id: int) -> tuple[int, int]:
        """(source number, index row) of a global sample id."""
        source = bisect.bisect_right(self._first_ids, sample_id) - 1
        assert 0 <= source < len(self.sources), sample_id
        return source, sample_id - self._first_ids[source]

    def read(self, sample_id: int) -> Encoded:
        """The stored bytes, checked against the index digest. Raises BadSample, or DataError when I/O keeps failing."""
        source, number = self.locate(sample_id)
        row = self.sources[source].index[number]
        size = int(row["size"])
        if size == 0:
            raise BadSample("zero bytes")
        if size > MAX_IMAGE_BYTES:
            raise BadSample(f"{size} bytes, more than the {MAX_IMAGE_BYTES} that are read")
        shard, offset = int(row["shard"]), int(row["offset"])
        shards = self.sources[source].manifest.shards
        if shard >= len(shards) or offset + size > shards[shard].bytes:
            directory = self.sources[source].directory
            raise DataError(
                f"{directory}: row {number} of the index points outside its shard; rebuild it with "
                f"`swin-scale shards index {directory}`"
            )
        data = self._pread(source, shard, offset, size)
        if xxhash.xxh3_64_intdigest(data) != int(row["digest"]):
            raise BadSample("bytes differ from the digest in the index")
        return Encoded(data, int(row["label"]))

    def read_ahead(self, sample_ids: np.ndarray) -> None:
        """Ask the kernel for the bytes of these samples, and for the rest of each block that one of them opens."""
        if not hasattr(os, "posix_fadvise"):
            return
        for sample_id in sample_ids.tolist():
            source, number = self.locate(sample_id)
            index = self.sources[source].index
            row = index[number]
            shard, begin = int(row["shard"]), int(row["offset"])
            if shard >= len(self.sources[source].manifest.shards):
                continue
            last = row
            rows = self._shard_rows[source]
            if self.block > 1 and (number - rows[shard]) % self.block == 0:
                last = index[min(number + self.block, rows[shard + 1]) - 1]
            end = int(last["offset"]) + int(last["size"])
            descriptor = self._descriptor(source, shard)
            # Only advice: what is wrong with the file is for `read` to say.
            with contextlib.suppress(OSError, OverflowError):
                os.posix_fadvise(descriptor, begin, end - begin, os.POSIX_FADV_WILLNEED)

    def describe(self, sample_id: int) -> tuple[str, str, str]:
        """(source directory, shard name, key) of a sample, for ``skipped.jsonl``."""
        source, number = self.locate(sample_id)
        shards = self.sources[source]
        row = shards.index[number]
        name = shards.manifest.shards[int(row["shard"])].name
        return str(shards.directory), name, self.read_key(sample_id)

    def read_key(self, sample_id: int) -> str:
        """The key of a sample from the tar header before its data; ``row N`` when there is no plausible header."""
        source, number = self.locate(sample_id)
        row = self.sources[source].index[number]
        offset = int(row["offset"])
        begin = max(0, offset - 10 * _BLOCK)
        before = self._pread(source, int(row["shard"]), begin, offset - begin) if offset >= _BLOCK else b""
        name = _member_name(before, int(row["size"]))
        if name is None:
            return f"row {number}"
        directory, _, base = name.removeprefix("./").rpartition("/")
        stem = base.partition(".")[0]
        return f"{directory}/{stem}" if directory else stem

    def close(self) -> None:
        """Close all files."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _descriptor(self, source: int, shard: int) -> int:
        """Descriptor of an open shard, the least recently used one closed when there are too many."""
        key = (source, shard)
        if key in self._open:
            self._open.move_to_end(key)
            return self._open[key]
        path = self.sources[source].path(shard)
        descriptor = self._retry(source, shard, 0, lambda: os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        self._open[key] = descriptor
        if len(self._open) > MAX_OPEN_FILES:
            os.close(self._open.popitem(last=False)[1])
        return descriptor

    def _pread(self, source: int, shard: int, offset: int, size: int) -> bytes:
        """`size` bytes at `offset` of a shard; a file that ends before them is damaged (DataError)."""

        def attempt() -> bytes:
            descriptor = self._descriptor(source, shard)
            try:
                data = os.pread(descriptor, size, offset)
                while 0 < len(data) < size:
                    more = os.pread(descriptor, size - len(data), offset + len(data))
                    if not more:
                        break
                    data += more
            except OSError:
                # A stale handle of a network file system never recovers; a fresh one may.
                with contextlib.suppress(OSError):
                    os.close(self._open.pop((source, shard)))
                raise
            return data

        data = self._retry(source, shard, offset, attempt)
        if len(data) < size:
            path = self.sources[source].path(shard)
            raise DataError(
                f"{path} ends before byte {offset + size}, where the index expects an image; restore the file, or find "
                f"all damage with `swin-scale shards verify`"
            )
        return data

    def _retry(self, source: int, shard: int, offset: int, attempt: Callable[[], T]) -> T:
        """`attempt()`, repeated after OSError with growing pauses; DataError when they are used up."""
        for delay in self.retry_delays_s:
            try:
                return attempt()
            except OSError:
                time.sleep(delay)
        try:
            return attempt()
        except OSError as error:
            path = self.sources[source].path(shard)
            raise DataError(
                f"{path}, byte {offset}: {error.strerror or error} ({len(self.retry_delays_s) + 1} attempts); check "
                f"that the file exists and its file system is healthy, then start the same command again"
            ) from error


def _member_name(before: bytes, size: int) -> str | None:
    """Name of the tar member whose data follow the bytes `before`, or None. Knows GNU and pax long names."""
    header = _header(before, len(before) - _BLOCK)
    if header is None or header.size != size:
        return None
    # A long name is the data of an extra member (GNU type L, pax type x) of a few blocks right before the header.
    for blocks in range(1, len(before) // _BLOCK - 1):
        begin = len(before) - (blocks + 2) * _BLOCK
        extra = _header(before, begin)
        if extra is None or extra.type not in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
            continue
        if -(-extra.size // _BLOCK) != blocks:
            continue
        content = before[begin + _BLOCK : begin + _BLOCK + extra.size]
        if extra.type == tarfile.GNUTYPE_LONGNAME:
            return content.rstrip(b"\0").decode("utf-8", "replace")
        found = re.search(rb"\d+ path=([^\n]*)\n", content)
        return found[1].decode("utf-8", "replace") if found else header.name
    return header.name


def _header(data: bytes, begin: int) -> tarfile.TarInfo | None:
    """The tar header at `begin`, or None when its checksum says that there is none."""
    if begin < 0:
        return None
    try:
        return tarfile.TarInfo.frombuf(data[begin : begin + _BLOCK], "utf-8", "replace")
    except tarfile.HeaderError:
        return None
