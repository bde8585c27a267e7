"""Writing a large file once: hashed as it is written, handed to the disk early, so that the sync at the end is short.

Without torch, since `disk_writer` does it in a process of its own.
"""

from __future__ import annotations

import os
from pathlib import Path

import xxhash

CHUNK_BYTES = 1 << 20
"""Bytes hashed and written at a time.

Longer writes get huge pages in the page cache, which virtual machines may have to fetch from their host: on one of
them, writing 2 MiB at a time took eight times as long as 1 MiB.
"""

FLUSH_BYTES = 32 << 20
"""Bytes after which the disk is asked to begin with what was written, so that the sync at the end finds little left."""


class HashedFile:
    """A file that is hashed as it is written."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._flushed = descriptor, 0
        self.digest = xxhash.xxh3_128()
        self.bytes = 0

    def write(self, view: memoryview) -> None:
        """Append `view`; raises OSError."""
        self.digest.update(view)
        while view:
            count = os.write(self._descriptor, view)
            view, self.bytes = view[count:], self.bytes + count
        if self.bytes - self._flushed >= FLUSH_BYTES and hasattr(os, "posix_fadvise"):
            # Told to drop pages, Linux begins to write the dirty ones, waits for nothing, and keeps them.
            os.posix_fadvise(self._descriptor, self._flushed, self.bytes - self._flushed, os.POSIX_FADV_DONTNEED)
            self._flushed = self.bytes


def not_writable(path: Path, error: OSError) -> str:
    """What is said of a file that could not be written."""
    return f"{path} cannot be written: {error.strerror or error}; free space or fix the path"
