"""A rank without torch that has a watchdog: ``python -m tests.launcher.watched DIR RANK WORLD FAULT``.

It does 5 ms of "forward" and of "optimizer" a step. The last rank meets FAULT in step 9; the others then wait in the
forward section of step 10, as in a collective, until they are ended, or exit with code 6 once the last rank is lost.

Nobody counts as hung before the fault, however long the others take to come to it: until DIR/met exists those that wait
say that they are alive.
"""

import contextlib
import ctypes
import faulthandler
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from launcher import crash, watchdog
from launcher.processes import Process
from swin_scale import heartbeat
from swin_scale.files import anonymous_file, write_atomic
from swin_scale.heartbeat import Pulse, heartbeat_memory
from swin_scale.sections import Section, Sections

STEP = 8
"""Sections are known by then."""
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
            life=heartbeat.life_file(run_dir).read_text(),
            rank=rank,
            world=world,
            local_rank=rank,
            pid=os.getpid(),
            hang_s=60.0 if fault == "none" else HANG_S,  # to stand still for a while is none
            timeout_s=60.0,
            heartbeat=beats,
            stacks=stacks,
        )
    )
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        (run_dir / f"alone{rank}").touch()  # the watchdog is not its child
    write_atomic(run_dir / f"pid{rank}", str(os.getpid()).encode(), durable=False)
    stay(sections, lambda: all((run_dir / f"pid{other}").exists() for other in range(world)))
    for step in range(STEP + 2):
        sections.step = step
        if step == STEP and rank == world - 1:
            meet(fault, sections, run_dir)
        with sections(Section.FORWARD):
            if step > STEP:
                wait_for_the_others(sections, run_dir, world - 1)
            time.sleep(0.005)
        with sections(Section.OPTIMIZER):
            time.sleep(0.005)
    pulse.goodbye()
    time.sleep(3)  # what is done after a goodbye is nobody's business
    while fault == "stall" and not any((run_dir / "crash").glob("*/verdict.txt")):
        time.sleep(0.02)
    return 0


def meet(fault: str, sections: Sections, run_dir: Path) -> None:
    met = run_dir / "met"
    if fault == "stopped":
        with sections(Section.BACKWARD):
            met.touch()
            os.kill(os.getpid(), signal.SIGSTOP)
    elif fault == "killed":
        with sections(Section.CHECKPOINT):
            met.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "gil":
        with sections(Section.OPTIMIZER):
            met.touch()
            while True:
                ctypes.PyDLL(None).sleep(60)  # PyDLL keeps the lock; a signal ends the call
    elif fault == "worker":
        child = subprocess.Popen([sys.executable, "-IS", "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
        (run_dir / "worker").write_text(str(child.pid))
        os.kill(child.pid, signal.SIGSTOP)
        with sections(Section.DATA):
            met.touch()
            child.wait()
    elif fault == "stall":
        with sections(Section.OPTIMIZER):
            stay(sections, met.exists)
            # Until the watchdog of the rank that waits has called the others and said where that rank is.
            while not any((run_dir / "crash").glob("*/rank0.json")):
                time.sleep(0.01)
        (run_dir / "went_on").touch()
    elif fault == "frozen":
        with sections(Section.FORWARD):
            stay(sections, met.exists)
            time.sleep(600)
    else:
        assert fault == "none", fault


def stay(sections: Sections, until: Callable[[], bool]) -> None:
    while not until():
        sections.alive()
        time.sleep(0.01)


def wait_for_the_others(sections: Sections, run_dir: Path, last: int) -> None:
    if sys.argv[4] == "none":
        return
    stay(sections, (run_dir / "met").exists)
    while sys.argv[4] == "stall":
        if (run_dir / "went_on").exists():
            return
        time.sleep(0.02)
    peer, life = Process(int((run_dir / f"pid{last}").read_text())), heartbeat.life_file(run_dir).read_text()
    # It is missed once its watchdog has missed it: who is lost first is blamed.
    while peer.is_alive() or crash.find_alarm(run_dir, life) is None:
        time.sleep(0.02)
    os._exit(6)


def watchdogs(run_dir: Path) -> dict[int, int]:
    """Process ids of the watchdogs of all runs in a directory, by rank."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            arguments = (entry / "cmdline").read_bytes().split(b"\0")
            if b"launcher.watchdog" in arguments and (settings := json.loads(arguments[4]))["run_dir"] == str(run_dir):
                found[settings["rank"]] = int(entry.name)
    return found


if __name__ == "__main__":
    sys.exit(main())
