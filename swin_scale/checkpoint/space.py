"""Whether the disk will hold what a run is going to save."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SMALL_FILES = 4
"""fragments.npy, state.json, config.yaml, manifest.json."""


def checkpoint_bytes(parameters: Mapping[str, Mapping[str, Any]], *, moments: int, ema: bool) -> int:
    """Predicted bytes of one checkpoint: fp32 masters, `moments` per trained parameter, averages, headers and tables.

    `parameters`: name to ``shape`` and ``trained``, as in the manifest.
    """
    total = 0
    for name, row in parameters.items():
        kinds = 1 + ema + (moments if row.get("trained", True) else 0)
        # Per tensor about 150 bytes of header, table and manifest beside the name.
        total += kinds * (4 * math.prod(row["shape"]) + 150 + len(name))
    return total


def shortage(root: str | os.PathLike[str], *, size: int, files: int, checkpoints: int) -> str | None:
    """What `checkpoints` more of `size` bytes and `files` files each lack below `root`; None when they fit.

    File systems that make inodes as they need them report none, and lack none.
    """
    place = Path(root)
    disk = os.statvfs(place)
    free = disk.f_bavail * disk.f_frsize
    needed = checkpoints * size
    if needed > free:
        return (
            f"{checkpoints} checkpoints of {_gib(size)} need {_gib(needed)}, but {place} has {_gib(free)} free; free "
            "space, lower checkpoint.keep, or set another run.dir"
        )
    inodes = checkpoints * (files + 1)
    if disk.f_files and inodes > disk.f_favail:
        return (
            f"{checkpoints} checkpoints of {files} files need {inodes} inodes, but {place} has {disk.f_favail} free; "
            "remove files, lower checkpoint.keep, or set another run.dir"
        )
    return None


def _gib(count: int) -> str:
    return f"{count / (1 << 30):.2f} GiB" if count >= 1 << 28 else f"{count / (1 << 20):.1f} MiB"
