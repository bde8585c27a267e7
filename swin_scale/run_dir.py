"""A run's own directory: taken by one process, its config written, and how the run ended."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from swin_scale.errors import SwinScaleError, UserError
from swin_scale.files import write_atomic
from swin_scale.run_lock import claim

logger = logging.getLogger(__name__)

LOOKED = "SWIN_SCALE_LOOKED"
"""Variable that a batch script sets for the ranks: it has looked for requests to end, and forgotten older ones."""
STAGES_NAME = "stages.json"
"""Says that a directory holds a run in stages, and which they are."""


def stop_file(run_dir: Path) -> Path:
    """Exists while somebody wants the run to save and end; its ranks and its batch script look for it."""
    return run_dir / "stop"


def deadline_file(run_dir: Path) -> Path:
    """Says, once a run was asked to end, when its processes will be killed; see `write_deadline`."""
    return run_dir / "deadline.json"


def write_deadline(run_dir: Path, when: float, why: str) -> None:
    """Tell the ranks that at `when`, in seconds since 1970, their processes are killed; raises OSError.

    The launcher writes it before it passes a warning on, and removes it before the ranks start.
    """
    write_atomic(deadline_file(run_dir), json.dumps({"time": round(when, 3), "why": why}).encode() + b"\n")


def read_deadline(run_dir: Path) -> tuple[float, str] | None:
    """When the processes of a run that was asked to end are killed, in seconds since 1970, and why; None if unknown."""
    try:
        told = json.loads(deadline_file(run_dir).read_bytes())
        return float(told["time"]), str(told["why"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def forget_requests(run_dir: Path, began: float | None) -> None:
    """Remove what asked an earlier life of the run to end (rank 0 only, which has claimed it); raises OSError.

    What came after `began`, a reading of `time.monotonic` (None: now), is meant for this life. Times are compared by
    the file system's clock, which may be another machine's: that of the claim's record, which has just been written.
    Under a batch script everything is: that has looked before it started this process.
    """
    if LOOKED in os.environ:
        return
    age_s = 0.0 if began is None else time.monotonic() - began
    since = max(filter(None, map(_written, (run_dir / "lock").glob("*.json"))), default=time.time()) - age_s
    for request in (stop_file(run_dir), deadline_file(run_dir)):
        written = _written(request)
        if written is not None and written < since:
            request.unlink(missing_ok=True)


def _written(path: Path) -> float | None:
    """When, in seconds since 1970; None where there is no such file."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None


def take(run_dir: Path, stack: contextlib.ExitStack, began: float | None = None) -> str | None:
    """Make `run_dir` this process's own until `stack` closes (rank 0 only); the reason when that cannot be.

    `began`: see `forget_requests`.
    """
    try:
        stack.enter_context(claim(run_dir))
        if read_stages(run_dir):
            return f"run.dir {run_dir} holds a run in stages; set another run.dir"
        (run_dir / "checkpoints").mkdir(exist_ok=True)
        forget_requests(run_dir, began)  # whoever starts a run wants it to go on
        for leftover in run_dir.glob(".*.tmp"):  # of a kill while config.yaml was written
            leftover.unlink(missing_ok=True)
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"run.dir {run_dir} cannot be written: {error.strerror}; make it writable, or set another run.dir"
    return None


def write_config(run_dir: Path, text: str) -> None:
    """Write ``config.yaml`` (rank 0 only); raises UserError."""
    path = run_dir / "config.yaml"
    try:
        write_atomic(path, text.encode())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; free space, or set another run.dir") from error


def write_stages(run_dir: Path, names: Sequence[str]) -> None:
    """Write that `run_dir` holds a run in stages, whose own directories have these names, in order; raises OSError."""
    write_atomic(run_dir / STAGES_NAME, json.dumps({"stages": list(names)}, indent=1).encode() + b"\n")


def read_stages(run_dir: Path) -> list[Path]:
    """The run directories of a run in stages, in order; empty for any other directory. Raises UserError if damaged."""
    path = run_dir / STAGES_NAME
    try:
        names = json.loads(path.read_bytes())["stages"]
        return [run_dir / Path(name).name for name in names]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); name one of the stages' own directories instead") from error


class ExitRecord:
    """``exit.json``: how the run ended, written by the rank that failed first, or by rank 0 when all is done.

    Nothing is touched before `start`: the directory may be another run's.
    """

    def __init__(self, run_dir: Path, rank: int, *, quiet: bool = False) -> None:
        """`quiet`: the error is in the log already."""
        self._path, self._rank, self._started, self._quiet = run_dir / "exit.json", rank, False, quiet

    def start(self) -> None:
        """The directory is this run's; rank 0 removes the record of the run before, once."""
        if self._rank == 0 and not self._started:
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)
        self._started = True

    def __enter__(self) -> ExitRecord:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        code = error.exit_code if isinstance(error, SwinScaleError) else int(error is not None)
        if not self._started or (error is None and self._rank != 0):
            return
        cause = f"{kind.__name__}: {error}" if kind else "done"
        if error is not None and not self._quiet:
            logger.error("%s", cause, exc_info=not isinstance(error, SwinScaleError))
        try:
            if error is None:
                # Over what a rank may have left that lives on where Slurm lost its node, and has lost its own rank 0.
                write_atomic(self._path, _exit_text(code, self._rank, cause).encode())
            else:
                record_failure(self._path.parent, code=code, rank=self._rank, cause=cause)
        except OSError as trouble:  # such as a full disk, which must not hide the cause
            logger.error("%s cannot be written: %s", self._path, trouble.strerror)


def record_failure(run_dir: Path, *, code: int, rank: int, cause: str) -> None:
    """Write ``exit.json`` unless there is one: the first who tells is the one to be believed. Raises OSError."""
    try:
        with open(run_dir / "exit.json", "x", encoding="utf-8") as file:
            file.write(_exit_text(code, rank, cause))
    except FileExistsError:
        logger.debug("another rank recorded the first cause")


def _exit_text(code: int, rank: int, cause: str) -> str:
    return json.dumps({"code": code, "rank": rank, "cause": cause, "time": time.time()})
