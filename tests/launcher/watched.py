"""A rank without torch that has a watchdog: ``python -m tests.launcher.watched DIR RANK WORLD FAULT``.

It does 5 ms of "forward" and of "optimizer" a step. The last rank meets FAULT in step 31; the others then wait in the
forward section of step 32, as in a collective, until they are ended, or exit with code 6 once DIR/lost exists.
"""

import ctypes
import faulthandler
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from launcher import watchdog
from swin_scale.files import anonymous_file
from swin_scale.heartbeat import Pulse, heartbeat_memory
from swin_scale.sections import Section, Sections

STEP = 30
HANG_S = 2.0


def main() -> int:
    run_dir, rank, world, fault = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    sections = Sections()
    beats, stacks = heartbeat_memory(), anonymous_file("stacks")
    pulse = Pulse(beats, sections)
    faulthandler.register(watchdog.STACK_SIGNAL, file=stacks, all_threads=True, chain=False)
    watchdog.start(
        watchdog.Settings(
            run_dir=str(run_dir),
            life=(run_dir / "heartbeat" / "life").read_text(),
            rank=rank,
            world=world,
            local_rank=rank,
            pid=os.getpid(),
            hang_s=HANG_S,
            timeout_s=60.0,
            heartbeat=beats,
            stacks=stacks,
        )
    )
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        (run_dir / f"alone{rank}").touch()  # the watchdog is not its child
    (run_dir / f"pid{rank}").write_text(str(os.getpid()))
    for step in range(STEP + 2):
        sections.step = step
        if step == STEP and rank == world - 1:
            meet(fault, sections, run_dir)
        with sections(Section.FORWARD):
            if step > STEP:
                wait_for_the_others(run_dir)
            time.sleep(0.005)
        with sections(Section.OPTIMIZER):
            time.sleep(0.005)
    pulse.goodbye()
    time.sleep(3)  # what is done after a goodbye is nobody's business
    return 0


def meet(fault: str, sections: Sections, run_dir: Path) -> None:
    if fault == "stopped":
        with sections(Section.BACKWARD):
            os.kill(os.getpid(), signal.SIGSTOP)
    elif fault == "killed":
        with sections(Section.CHECKPOINT):
            os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "gil":
        with sections(Section.OPTIMIZER):
            while True:
                ctypes.PyDLL(None).sleep(60)  # PyDLL keeps the lock; a signal ends the call
    elif fault == "worker":
        child = subprocess.Popen([sys.executable, "-IS", "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
        (run_dir / "worker").write_text(str(child.pid))
        os.kill(child.pid, signal.SIGSTOP)
        with sections(Section.DATA):
            child.wait()
    elif fault == "stall":
        with sections(Section.OPTIMIZER):
            deadline = time.monotonic() + 120
            # Until the others' watchdogs were called, and a moment longer.
            while not (run_dir / "heartbeat" / "alarm").exists() and time.monotonic() < deadline:
                time.sleep(0.01)
        (run_dir / "went_on").touch()
    elif fault == "frozen":
        with sections(Section.FORWARD):
            time.sleep(600)
    else:
        assert fault == "none", fault


def wait_for_the_others(run_dir: Path) -> None:
    if sys.argv[4] == "none":
        return
    while sys.argv[4] == "stall":
        if (run_dir / "went_on").exists():
            return
        time.sleep(0.02)
    while not (run_dir / "lost").exists():
        time.sleep(0.02)
    os._exit(6)


if __name__ == "__main__":
    sys.exit(main())
