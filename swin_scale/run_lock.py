"""One run per directory: announce yourself, then look who else is there.

Every run puts a record of itself (host, process, start time, boot) below ``lock/`` and then reads the others. It goes
on when all of them are provably dead, and removes those; otherwise it withdraws. Of two that start together at least
one sees the other, on any file system that shows a new file to the next reader of its directory, so two never both go
on; a record can not be torn, since it is renamed into place.

On one machine ``lock/held`` decides first: a POSIX record lock, which its process's end releases however that comes,
and which children do not inherit. Where the file system carries such locks between machines, it decides there too.

Slurm may lose a node, but not its processes, and start the job again elsewhere. The new generation then removes the
record of the old one, whose owner looks for its own every second and ends when it is gone; the new one waits for that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from launcher.processes import start_time
from launcher.slurm import is_ended
from swin_scale.errors import PeerLostError, UserError
from swin_scale.files import write_atomic

logger = logging.getLogger(__name__)

Verdict = Literal["alive", "dead", "replaced", "unknown"]
"""`replaced`: by Slurm's word its time is over, but its process may live on where Slurm does not reach it."""
MAX_RECORD_BYTES = 1 << 16
_ANYBODY = ("", "localhost", "localhost.localdomain")
"""Host names that many machines share."""
WATCH_S = 1.0
"""How often an owner looks whether it was replaced."""
FENCE_S = 5.0
"""How long a new generation waits until one that it replaced has noticed."""
EVICT_S = 30.0
"""How long it waits for a lock that one holds."""


@dataclass(frozen=True, kw_only=True)
class Owner:
    """A process, so described that another one can tell whether it still lives."""

    host: str
    pid: int
    start: int
    """Clock ticks between boot and the start of the process: a reused process id has another one."""
    boot: str
    """Identifies the running kernel; empty where there is no /proc."""
    namespace: str
    """Within which `pid` counts: containers on one machine have their own."""
    job: str
    """Slurm's job, or empty."""
    restart: int
    """How often Slurm requeued the job; it starts the next one when the one before has ended."""


def this_process() -> Owner:
    """The record of the calling process."""
    return Owner(
        host=socket.gethostname(),
        pid=os.getpid(),
        start=start_time(os.getpid()) or 0,
        boot=_text("/proc/sys/kernel/random/boot_id"),
        namespace=_namespace(),
        job=os.environ.get("SLURM_JOB_ID", ""),
        restart=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
    )


def judge(other: Owner, me: Owner, *, lock_is_ours: bool | None, job_is_over: bool | None = None) -> Verdict:
    """Whether `other` still runs.

    `lock_is_ours` is None where the file system has no locks, or nobody tried; `job_is_over` is Slurm's word on the
    job of `other`, None when it is unknown.
    """
    replaced = bool(other.job) and (job_is_over is True or (other.job == me.job and other.restart < me.restart))
    same_kernel = other.boot == me.boot if me.boot else other.host == me.host
    if same_kernel and other.namespace == me.namespace:
        lives = start_time(other.pid) == other.start
        return ("replaced" if replaced else "alive") if lives else "dead"
    if same_kernel and lock_is_ours:
        return "dead"  # another container: its processes are out of sight, but it would hold the lock
    if replaced:
        return "replaced"
    if not same_kernel and other.host == me.host and me.host not in _ANYBODY:
        return "dead"  # the machine was booted since
    return "alive" if other.job and job_is_over is False else "unknown"


def owners(run_dir: Path) -> list[Owner]:
    """Who announced itself in `run_dir` and did not withdraw, dead or alive."""
    return [owner for path in sorted((run_dir / "lock").glob("*.json")) if (owner := _read(path))]


@contextlib.contextmanager
def claim(run_dir: Path) -> Iterator[None]:
    """Hold `run_dir` for this process; raises UserError when another run has it, or it cannot be written.

    Call it on rank 0 only, which alone commits checkpoints; the ranks of a dead rank 0 end by themselves.
    """
    directory = run_dir / "lock"
    me = this_process()
    mine = directory / f"{me.host}-{me.pid}-{uuid.uuid4().hex[:8]}.json"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        held = open(directory / "held", "ab")  # noqa: SIM115 - closed below; closing any copy of it would unlock
    except OSError as error:
        raise _not_writable(run_dir, error) from error
    with held:
        ours = _lock(held.fileno())
        if ours is False and _evict(directory, me):
            ours = _lock_within(held.fileno(), EVICT_S)
            if ours is False:
                raise PeerLostError(
                    f"run.dir {run_dir} is still locked by a process that Slurm started this one in place of; a frozen "
                    "machine may hold it, so start the same command again"
                )
        if ours is False:
            raise UserError(f"run.dir {run_dir} is in use by {_names(run_dir)}; wait for it, or set another run.dir")
        try:
            write_atomic(mine, json.dumps(dataclasses.asdict(me)).encode())
        except OSError as error:
            raise _not_writable(run_dir, error) from error
        try:
            _look_around(run_dir, mine, me, ours)
            with _watched(mine):
                yield
        finally:
            _remove([mine])


def _look_around(run_dir: Path, mine: Path, me: Owner, lock_is_ours: bool | None) -> None:
    if lock_is_ours:  # nobody else is about to write a record here
        _remove(mine.parent.glob(".*.tmp"))
    replaced = False
    for path in sorted(mine.parent.glob("*.json")):
        if path == mine:
            continue
        other = _read(path)
        verdict = _verdict(other, me, lock_is_ours) if other else "unknown"
        if verdict == "alive":
            assert other is not None
            raise UserError(
                f"run.dir {run_dir} is in use by process {other.pid} on {other.host}; wait for it, or set another "
                "run.dir"
            )
        if verdict == "unknown":
            who = f"process {other.pid} on {other.host}" if other else "a process that left no readable record"
            raise UserError(
                f"run.dir {run_dir} was in use by {who}, and from {me.host} it cannot be seen whether that still runs; "
                f"if it does not, remove {path} and start again"
            )
        logger.info("process %d on %s, which had %s, is %s", other.pid if other else 0, path.name, run_dir, verdict)
        _remove([path])
        replaced = replaced or verdict == "replaced"
    if replaced:
        time.sleep(FENCE_S)


def _verdict(other: Owner, me: Owner, lock_is_ours: bool | None) -> Verdict:
    """`judge`, asking Slurm where nothing nearer can tell."""
    verdict = judge(other, me, lock_is_ours=lock_is_ours)
    if verdict == "unknown" and other.job and other.job != me.job:
        verdict = judge(other, me, lock_is_ours=lock_is_ours, job_is_over=is_ended(other.job))
    return verdict


def _evict(directory: Path, me: Owner) -> bool:
    """Remove the records of those who hold the lock, when all of them are replaced; whether that was so."""
    found = {path: _read(path) for path in directory.glob("*.json")}
    verdicts = [_verdict(owner, me, False) if owner else "unknown" for owner in found.values()]
    if not verdicts or any(verdict not in ("dead", "replaced") for verdict in verdicts):
        return False
    logger.warning("waiting for %d processes that this one replaces to let go of %s", len(verdicts), directory.parent)
    _remove(found)
    return True


def _lock_within(descriptor: int, seconds: float) -> bool | None:
    deadline = time.monotonic() + seconds
    while (ours := _lock(descriptor)) is False and time.monotonic() < deadline:
        time.sleep(0.1)
    return ours


@contextlib.contextmanager
def _watched(mine: Path) -> Iterator[None]:
    """End this process, whatever it is doing, once its record was removed by the one that replaced it."""
    left = threading.Event()

    def watch() -> None:
        while not left.wait(WATCH_S):
            try:
                open(mine, "rb").close()  # opening asks a network file system anew, as stat may not
            except FileNotFoundError:
                if left.is_set():
                    return
                logger.critical("this run was started again elsewhere, and %s is taken; ending at once", mine.parent)
                os._exit(PeerLostError.exit_code)
            except OSError as error:
                logger.debug("cannot look for %s: %s", mine, error)

    thread = threading.Thread(target=watch, name="run-lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        left.set()
        thread.join()


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _lock(descriptor: int) -> bool | None:
    """Take the lock; false when another process has it, None where there are no locks."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        logger.debug("no file locks here: %s", error)
        return None
    return True


def _names(run_dir: Path) -> str:
    return " or ".join(f"process {one.pid} on {one.host}" for one in owners(run_dir)) or "another process"


def _read(path: Path) -> Owner | None:
    try:
        if path.stat().st_size > MAX_RECORD_BYTES:
            return None
        fields = json.loads(path.read_bytes())
        owner = Owner(**fields)
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    kinds = {spec.name: int if spec.name in ("pid", "start", "restart") else str for spec in dataclasses.fields(Owner)}
    return owner if all(type(getattr(owner, name)) is kind for name, kind in kinds.items()) else None


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _not_writable(run_dir: Path, error: OSError) -> UserError:
    return UserError(
        f"run.dir {run_dir} cannot be written: {error.strerror or error}; make it writable, free space, or set another "
        "run.dir"
    )
