"""Storages of many torch files read piece by piece, with their checksums followed along the way."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path

from zlib_ng import zlib_ng

from swin_scale.convert.torchfile import Extent
from swin_scale.errors import CheckpointError
from swin_scale.hashed_file import CHUNK_BYTES

MAX_OPEN = 64
"""Files held open at a time: a checkpoint of 1,024 ranks would exceed the usual limit of a process."""


class Descriptors:
    """The most recently used files, open for reading."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, int] = OrderedDict()

    def get(self, path: Path) -> int:
        """A descriptor of `path`, valid until the next call; raises OSError."""
        if path not in self._open:
            if len(self._open) >= MAX_OPEN:
                os.close(self._open.popitem(last=False)[1])
            self._open[path] = os.open(path, os.O_RDONLY)
        self._open.move_to_end(path)
        return self._open[path]

    def close(self) -> None:
        """Close them all."""
        while self._open:
            os.close(self._open.popitem()[1])


class Stream:
    """One storage. Reading it from front to back checks its CRC for free; otherwise `finish` reads it once more."""

    def __init__(self, files: Descriptors, extent: Extent) -> None:
        self._files, self.extent = files, extent
        self._position = 0
        """Bytes from the start that `_crc` covers."""
        self._crc = 0
        self._used = False

    def read_into(self, view: memoryview, start: int) -> None:
        """Fill `view` from byte `start` of the storage; raises CheckpointError naming the file."""
        self._used = True
        self._read(view, start)
        if start <= self._position < start + len(view):
            self._follow(view[self._position - start :])

    def finish(self) -> None:
        """Raise CheckpointError unless the storage, if any of it was read, has the checksum its file states."""
        if not self._used or self.extent.crc is None:
            return
        buffer = memoryview(bytearray(min(CHUNK_BYTES, self.extent.size - self._position)))
        while self._position < self.extent.size:
            view = buffer[: self.extent.size - self._position]
            self._read(view, self._position)
            self._follow(view)

    def _follow(self, view: memoryview) -> None:
        self._crc = zlib_ng.crc32(view, self._crc)  # five times the speed of zlib's, and the same
        self._position += len(view)
        if self._position == self.extent.size and self.extent.crc not in (None, self._crc):
            raise CheckpointError(f"{self.extent.path} is damaged: a storage at byte {self.extent.offset} has CRC "
                                  f"{self._crc:08x}, the file states {self.extent.crc:08x}")  # fmt: skip

    def _read(self, view: memoryview, start: int) -> None:
        path, offset = self.extent.path, self.extent.offset + start
        assert start + len(view) <= self.extent.size
        try:
            descriptor = self._files.get(path)
            while view:
                count = os.preadv(descriptor, [view], offset)
                if not count:
                    raise CheckpointError(f"{path} is damaged: it ends at byte {offset}, {len(view)} bytes short")
                view, offset = view[count:], offset + count
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
