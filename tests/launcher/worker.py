"""What the launcher's tests start instead of a training run: ``python -m tests.launcher.worker DIR MODE...``.

Each rank acts by its MODE (the last one counts for all further ranks) and leaves its pid, and its worker's, in DIR.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def main() -> int:
    directory, modes = Path(sys.argv[1]), sys.argv[2:]
    rank = int(os.environ["RANK"])
    mode = modes[min(rank, len(modes) - 1)]
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
    pids = [os.getpid()]
    if mode == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        # A loader worker that ignores its parent's end.
        pids.append(subprocess.Popen([sys.executable, "-IS", "-c", "import time; time.sleep(60)"]).pid)
    if mode == "graceful":
        signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    sys.stdout.write(f"rank {rank} says {mode}\n")
    sys.stdout.flush()
    body = {"pids": pids, "environment": {name: os.environ.get(name) for name in names}, "argv": sys.argv}
    path = directory / f"rank{rank}.json"
    path.with_suffix(".tmp").write_text(json.dumps(body))
    path.with_suffix(".tmp").rename(path)
    if mode.startswith("exit"):
        while len(list(directory.glob("*.json"))) < int(os.environ["WORLD_SIZE"]):
            time.sleep(0.01)
        return int(mode.removeprefix("exit"))
    if mode == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
    return 1


if __name__ == "__main__":
    sys.exit(main())
