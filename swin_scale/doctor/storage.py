"""The file system of the run directory: writable, fast enough, with room for the checkpoints that are kept."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from swin_scale.checkpoint import list_steps
from swin_scale.checkpoint.space import SMALL_FILES, shortage
from swin_scale.doctor.finding import Finding, ok, refuse, warn

PROBE_BYTES = 64 << 20
SLOW_SAVE_S = 300.0
"""A save that takes longer is worth a warning: a cluster gives minutes at most between its signal and the end."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Bytes/s of one process on one file."""

    write: float
    fsync_s: float
    read: float
    """After the page cache was asked to forget the file; of a cache that did not, if that is faster than any disk."""


def measure_storage(directory: Path, size: int = PROBE_BYTES) -> Speed:
    """Write, sync and read a file below `directory`, which is removed again; raises OSError."""
    path = directory / f".doctor.{os.getpid()}.tmp"
    block = os.urandom(1 << 20)
    try:
        with open(path, "wb", buffering=0) as file:
            start = time.perf_counter()
            for _ in range(size // len(block)):
                file.write(block)
            written = time.perf_counter()
            os.fsync(file.fileno())
            synced = time.perf_counter()
        with open(path, "rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            begin = time.perf_counter()
            while file.read(len(block)):
                pass
            read = time.perf_counter() - begin
    finally:
        path.unlink(missing_ok=True)
    return Speed(write=size / (synced - start), fsync_s=synced - written, read=size / read)


def existing_parent(path: Path) -> Path:
    """`path`, or the nearest directory above it that exists: where it will be made."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.is_dir())


def check_storage(
    run_dir: Path, *, size: float | None, keep: int, ranks: int = 1, nodes: int = 1, probe: int = PROBE_BYTES
) -> list[Finding]:
    """Speed, space and inodes for run.dir.

    Args:
        size: bytes of one checkpoint; None: not known.
        keep: checkpoints kept; one more is written before the oldest goes.
        ranks, nodes: that write one, each node its part.
        probe: bytes of the file by which speed is measured.
    """
    place = existing_parent(run_dir)
    try:
        speed = measure_storage(place, probe)
    except OSError as error:
        reason = error.strerror or str(error)
        return [refuse("storage", f"{place} cannot be written: {reason}", "make it writable, or set another run.dir")]
    text = (
        f"{place}: writes {speed.write / 1e6:,.0f} MB/s with fsync ({speed.fsync_s:.2f} s), "
        f"reads {speed.read / 1e6:,.0f} MB/s"
    )
    if size is None:
        return [ok("storage", text)]
    seconds = size / (speed.write * nodes)
    text += f"; a checkpoint of {_size(size)} takes about {seconds:.1f} s"
    fix = "take a faster file system for run.dir, and a signal lead time above this"
    found = [warn("storage", text, fix) if seconds > SLOW_SAVE_S else ok("storage", text)]
    there = len(list_steps(run_dir / "checkpoints")) if run_dir.is_dir() else 0
    more = max(1, keep + 1 - there)
    lack = shortage(place, size=round(size), files=ranks + SMALL_FILES, checkpoints=more)
    if lack is not None:
        what, _, fix = lack.partition("; ")
        # One that fits is enough to begin with; none is not.
        one = shortage(place, size=round(size), files=ranks + SMALL_FILES, checkpoints=1)
        found.append((warn if one is None else refuse)("space", what, fix))
    else:
        found.append(ok("space", f"for {more} checkpoints of {_size(size)} and {ranks + SMALL_FILES} files"))
    return found


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
