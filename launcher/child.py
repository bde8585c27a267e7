"""First step of every started process: a guard that ends it and its descendants when the launcher is gone.

``python child.py FD MODULE ARGUMENT...`` forks a guard and becomes ``python -m MODULE ARGUMENT...``. The guard
blocks on FD, the read end of a pipe that the launcher holds open and never writes to: it reads an end of file exactly
when the launcher ended, however that happened, and then kills its process group, loader workers included. Works
without a race, and wherever there are pipes and process groups.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence


def main(argv: Sequence[str]) -> None:
    """Fork the guard and replace this process; returns only in error."""
    descriptor, module, arguments = int(argv[0]), argv[1], argv[2:]
    middle = os.fork()
    if middle == 0:
        # Forked twice, so that the guard is nobody's child and no `wait` of the training process meets it.
        if os.fork() == 0:
            _guard(descriptor)
        os._exit(0)
    os.waitpid(middle, 0)
    os.close(descriptor)
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])


def _guard(descriptor: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(null, standard)  # or a reader of our output would wait for the guard as well
    os.read(descriptor, 1)
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1:])
