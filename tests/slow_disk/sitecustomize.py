"""On PYTHONPATH of a training run: a disk so slow that a kill can be aimed at the middle of a save."""

import os
import time

_fsync = os.fsync


def fsync(descriptor: int) -> None:
    time.sleep(0.05)
    _fsync(descriptor)


os.fsync = fsync
