"""Small real file systems for tests; needs the right to mount (root in CI's containers often has it not)."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def small_disks(below: Path) -> Iterator[Callable[[str], Path]]:
    """A function from options (``size=64k``, ``nr_inodes=12``) to the root of a new tmpfs; skips where none can be."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        if sys.platform != "linux":
            pytest.skip("needs Linux's tmpfs")
        where = below / f"disk{len(mounted)}"
        where.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", where], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")
        mounted.append(where)
        return where

    try:
        yield mount
    finally:
        for where in mounted:
            subprocess.run(["umount", "--lazy", where], check=True)


def fill(path: Path) -> None:
    """Write to `path` until the file system has no byte left."""
    with open(path, "wb", buffering=0) as file:
        for size in (1 << 16, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))
