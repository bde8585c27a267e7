"""Durable writes: a crash leaves the old file or the new one, never a part."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path


def write_atomic(path: Path, data: bytes | memoryview, *, durable: bool = True) -> None:
    """Write `data` to `path` so that a crash leaves the old file or the new one, never a part.

    Unless `durable`, that holds for the process's end, not for the machine's, and nothing waits for the disk.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    if durable:
        fsync_directory(path.parent)


def anonymous_file(name: str) -> int:
    """Descriptor of a file without a path, in memory where the system can; it ends with the last process that has it.

    `name` is for those who list a process's descriptors.
    """
    if hasattr(os, "memfd_create"):
        return os.memfd_create(name, os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def fsync_directory(directory: str | os.PathLike[str]) -> None:
    """Make renames inside `directory` durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def shipped(room: str) -> Path:
    """The directory ``configs`` or ``slurm``: at the top of a checkout, within the package where it was installed."""
    package = Path(__file__).resolve().parent
    installed = package / "shipped" / room
    return installed if installed.is_dir() else package.parent / room
