"""The processes that write checkpoints for a rank."""

from __future__ import annotations

import contextlib
import glob
import os
import time
from pathlib import Path


def is_writer(pid: int) -> bool:
    """Whether `pid` lives and is one.

    A process that has just been started has no command line for a moment, after its parent was told that it runs.
    """
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return False
        if command or state in "ZX":
            return b"swin_scale.disk_writer" in command
        time.sleep(0.001)
    return False


def writers(pid: int | None = None) -> list[int]:
    """Those of process `pid`; default: of this one."""
    found = []
    for task in glob.iglob(f"/proc/{pid or os.getpid()}/task/*/children"):
        with contextlib.suppress(OSError):
            found += [child for child in map(int, Path(task).read_text().split()) if is_writer(child)]
    return found
