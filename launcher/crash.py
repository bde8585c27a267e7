"""The bundle that a hung or lost rank leaves behind: ``crash/<when>/`` of the run directory.

``heartbeat/alarm`` names the bundle of this life of the run, and calls all watchdogs to it. Each adds ``rank{r}.json``
(its `Sign`) and ``rank{r}.txt``: stacks of all threads, the last collective, what /proc says of the rank and its loader
workers, the GPUs. One of them then writes ``verdict.json`` and ``verdict.txt``, with the run's config and newest rows
beside, and the verdict as the cause in ``exit.json``.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from launcher.processes import Process, children, describe, holding, output_of, state
from launcher.verdict import Sign, Verdict
from swin_scale import heartbeat
from swin_scale.errors import PeerLostError
from swin_scale.files import write_atomic
from swin_scale.log import JsonLines
from swin_scale.run_dir import record_failure

ROWS = 200
"""Newest lines of ``metrics.jsonl`` in a bundle."""
ROW_BYTES = 16 << 10
STACK_S = 3.0
"""A process that can answer a signal does so within this time; on a busy machine too."""
GPU_S = 5.0
_GPU_QUERY = (
    "index,name,uuid,temperature.gpu,utilization.gpu,memory.used,memory.total,power.draw,"
    "ecc.errors.uncorrected.volatile.total"
)
# Where a thread's innermost frame is when it waits for other ranks.
_WAITS = ("/torch/distributed/", "/deepspeed/comm/", "/swin_scale/moe/comm.py", "/swin_scale/engine/dist.py")


def find_alarm(run_dir: Path, life: str) -> Path | None:
    """The bundle that the watchdogs of this life are called to; None when all is well."""
    try:
        found = json.loads(_alarm_file(run_dir).read_bytes())
        return run_dir / "crash" / Path(found["bundle"]).name if found["life"] == life else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def raise_alarm(run_dir: Path, life: str) -> bool:
    """Open a bundle and call all watchdogs; false when somebody else has. Raises OSError."""
    when = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    names = itertools.chain([when], (f"{when}-{number}" for number in itertools.count(2)))
    (run_dir / "crash").mkdir(exist_ok=True)
    for name in names:
        with contextlib.suppress(FileExistsError):
            (run_dir / "crash" / name).mkdir()
            break
    try:
        with open(_alarm_file(run_dir), "x", encoding="utf-8") as file:
            file.write(json.dumps({"life": life, "bundle": name}))
    except FileExistsError:
        (run_dir / "crash" / name).rmdir()
        return False
    return True


def withdraw_alarm(run_dir: Path) -> None:
    with contextlib.suppress(OSError):
        _alarm_file(run_dir).unlink(missing_ok=True)


def read_signs(bundle: Path, *, fresh: bool = False) -> dict[int, Sign]:
    """What the ranks' watchdogs have said so far, by rank.

    `fresh`: also by what a network file system would show half a minute later, which reads a directory anew where this
    machine has changed it.
    """
    if fresh:
        with tempfile.NamedTemporaryFile(dir=bundle):
            pass
    found = [sign for path in bundle.glob("rank*.json") if (sign := Sign.parse(_bytes(path))) is not None]
    return {sign.rank: sign for sign in found}


def write_sign(bundle: Path, sign: Sign) -> None:
    """Raises OSError."""
    write_atomic(bundle / f"rank{sign.rank}.json", sign.dump(), durable=False)


def last_seen(run_dir: Path, life: str) -> dict[int, Sign]:
    """What the run directory says of all ranks, with its age."""
    now = time.time()
    return {
        status.rank: Sign(
            rank=status.rank,
            host=status.host,
            pid=status.pid,
            section=status.section,
            step=status.step,
            quiet_s=max(0.0, now - status.time),
            ended=status.ended,
        )
        for status in heartbeat.read_statuses(run_dir, life).values()
    }


def read_verdict(bundle: Path) -> Verdict | None:
    return Verdict.parse(_bytes(bundle / "verdict.json"))


def decide(run_dir: Path, bundle: Path, verdict: Verdict) -> bool:
    """Write the verdict, the cause of the run's end, and what the bundle has for all ranks; false if there was one.

    Raises OSError.
    """
    try:
        file = open(bundle / "verdict.json", "xb", buffering=0)  # noqa: SIM115 - closed below
    except FileExistsError:
        return False
    with file:
        if verdict.fatal:
            rank = verdict.ranks[0] if verdict.ranks else 0
            cause = f"{PeerLostError.__name__}: {verdict.text}"
            record_failure(run_dir, code=PeerLostError.exit_code, rank=rank, cause=cause)
        (bundle / "verdict.txt").write_text(f"{verdict.text}\n", encoding="utf-8")
        file.write(verdict.dump())
    with contextlib.suppress(OSError):
        shutil.copyfile(run_dir / "config.yaml", bundle / "config.yaml")
    with contextlib.suppress(OSError):
        (bundle / "metrics.jsonl").write_bytes(_tail(run_dir / "metrics.jsonl"))
    return True


def write_event(run_dir: Path, bundle: Path, verdict: Verdict) -> None:
    """A row of ``metrics.jsonl``; only where rank 0 runs, which alone writes that file."""
    place = f"{bundle.parent.name}/{bundle.name}"
    facts = {"ranks": list(verdict.ranks), "host": verdict.host, "section": verdict.section}
    with JsonLines(run_dir / "metrics.jsonl") as lines:
        lines.write(
            [
                {
                    "event": "hang" if verdict.fatal else "stall",
                    "step": verdict.step,
                    "time": time.time(),
                    "problem": verdict.text,
                    **facts,
                    "bundle": place,
                }
            ]
        )


def stacks(process: Process, signal_number: int, descriptor: int) -> tuple[str, bool]:
    """Stacks of all threads of `process`, or why there are none, and whether one of them waits for other ranks.

    Args:
        signal_number: on which the process writes its stacks.
        descriptor: of the file that it writes them to, from wherever this process leaves its position.
    """
    if not process.is_alive():
        return "none: the process is gone", False
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.ftruncate(descriptor, 0)
    held = holding(process.pid, signal_number)
    process.signal(signal_number)
    deadline, size = time.monotonic() + STACK_S, 0
    while time.monotonic() < deadline:
        time.sleep(0.05)
        before, size = size, os.fstat(descriptor).st_size
        # On a busy machine one that writes may stand still between two lines, and half a stack tells another story.
        if 0 < size == before and holding(process.pid, signal_number) <= held:
            break
    text = os.pread(descriptor, 1 << 20, 0).decode(errors="replace")
    if text:
        return text, _waits_for_others(text)
    letter = state(process.pid)
    why = {
        "T": "it is stopped, and a stopped process runs nothing",
        "t": "a debugger has stopped it",
        "D": "it is in uninterruptible sleep, in a driver or a file system",
    }.get(letter, "its signals are blocked")
    return f"none within {STACK_S:.0f} s: {why} (state {letter or 'gone'}); see what /proc says below", False


def processes(pid: int) -> str:
    """What /proc says of a rank and of the processes below it, its loader workers."""
    return "\n".join(describe(one) for one in (pid, *children(pid)))


def stopped_children(pid: int) -> tuple[int, ...]:
    return tuple(child for child in children(pid) if state(child) in ("T", "t"))


def gpus() -> str:
    """What nvidia-smi says, or why it says nothing."""
    if shutil.which("nvidia-smi") is None:
        return "no nvidia-smi on this machine"
    said = []
    for arguments in ([f"--query-gpu={_GPU_QUERY}", "--format=csv"], ["-q", "-d", "ECC,PAGE_RETIREMENT,PERFORMANCE"]):
        try:
            said.append(output_of(["nvidia-smi", *arguments], GPU_S))
        except TimeoutError as error:
            said.append(f"{error}: the driver may hang")
            break
        except OSError as error:
            said.append(f"nvidia-smi: {error.strerror}")
            break
    return "\n".join(said)


def write_report(bundle: Path, rank: int, parts: Mapping[str, str]) -> None:
    """``rank{r}.txt``: parts by title. Raises OSError."""
    text = "\n".join(f"== {title}\n{body.rstrip()}\n" for title, body in parts.items())
    (bundle / f"rank{rank}.txt").write_text(text, encoding="utf-8")


def _alarm_file(run_dir: Path) -> Path:
    return heartbeat.directory(run_dir) / "alarm"


def _waits_for_others(text: str) -> bool:
    """Whether the innermost frame of some thread is one in which a rank waits for others."""
    lines = text.splitlines()
    tops = [after for line, after in itertools.pairwise(lines) if "hread 0x" in line]
    return any(place in top for top in tops for place in _WAITS)


def _tail(path: Path) -> bytes:
    """The last `ROWS` lines, of `ROW_BYTES` each at most on average."""
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - ROWS * ROW_BYTES))
        return b"".join(deque(file, maxlen=ROWS))


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
