"""A process beside a rank that writes its staging buffer to the disk, so that training goes on meanwhile.

``python -m swin_scale.disk_writer DESCRIPTOR BYTES PARENT``: the buffer is memory shared through DESCRIPTOR. A line on
standard input, ``{"path": ..., "bytes": n, "since": s}``, asks for a file: the first n bytes of the buffer, fsynced, at
a path where there is none yet. It is answered by one line: ``{"bytes", "xxh3_128", "seconds"}``, which are counted from
`since`, a reading of the monotonic clock, or ``{"problem"}`` when the disk refused it; the part is then removed.

No torch here: it starts in a blink and takes a few megabytes. It ends with its rank, however that ends; a request to
end that a scheduler sends to all processes of a job is the rank's business, so it is ignored.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swin_scale.hashed_file import CHUNK_BYTES, HashedFile, not_writable

IGNORED = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
)
"""Blocked by whoever starts this process until it ignores them, so that there is no moment at which one ends it."""
NICENESS = 10
"""Training goes first where there are no idle cores."""
_PR_SET_PDEATHSIG = 1


def main(argv: Sequence[str]) -> int:
    """Write what is asked for until standard input ends."""
    descriptor, size, parent = map(int, argv)
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED)
    if not _end_with(parent):
        return 0
    with contextlib.suppress(OSError):
        os.nice(NICENESS)
    with mmap.mmap(descriptor, size, mmap.MAP_SHARED, mmap.PROT_READ) as shared, memoryview(shared) as memory:
        for line in sys.stdin.buffer:
            job = json.loads(line)
            with memory[: job["bytes"]] as data:
                answer = write(Path(job["path"]), data, job["since"])
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()
    return 0


def write(path: Path, data: memoryview, since: float) -> dict[str, Any]:
    """Write `data` to `path`, a new file, fsynced; what the module says is answered."""
    try:
        # Never over a file that is there: it would be that of a run which took this one's place.
        with open(path, "xb", buffering=0) as file:
            try:
                out = HashedFile(file.fileno())
                for start in range(0, len(data), CHUNK_BYTES):
                    with data[start : start + CHUNK_BYTES] as chunk:
                        out.write(chunk)
                os.fsync(file.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
                raise
    except OSError as error:
        return {"problem": not_writable(path, error)}
    return {"bytes": out.bytes, "xxh3_128": out.digest.hexdigest(), "seconds": time.monotonic() - since}


def _end_with(parent: int) -> bool:
    """Have the kernel kill this process when the rank ends, where it can; false when that has ended already.

    Elsewhere the end of standard input ends it, once what it is writing is written.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    return os.getppid() == parent


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
