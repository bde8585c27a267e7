"""On PYTHONPATH of a training run: a disk so slow that a kill can be aimed at the middle of a save.

``SLOW_DISK_S``: seconds of an fsync, 0.05 by default. In later lives of a Slurm job the disk is a quick one.
"""

import os
import time

_fsync = os.fsync
_SECONDS = float(os.environ.get("SLOW_DISK_S", "0.05"))


def fsync(descriptor: int) -> None:
    time.sleep(_SECONDS)
    _fsync(descriptor)


if not os.environ.get("SLURM_RESTART_COUNT"):
    os.fsync = fsync
