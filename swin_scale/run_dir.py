"""A run's own directory: taken by one process, its config written, and how the run ended."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from pathlib import Path
from types import TracebackType

from swin_scale.errors import SwinScaleError, UserError
from swin_scale.files import write_atomic
from swin_scale.run_lock import claim

logger = logging.getLogger(__name__)


def take(run_dir: Path, stack: contextlib.ExitStack) -> str | None:
    """Make `run_dir` this process's own until `stack` closes (rank 0 only); the reason when that cannot be."""
    try:
        stack.enter_context(claim(run_dir))
        (run_dir / "checkpoints").mkdir(exist_ok=True)
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


class ExitRecord:
    """``exit.json``: how the run ended, written by the rank that failed first, or by rank 0 when all is done.

    Nothing is touched before `start`: the directory may be another run's.
    """

    def __init__(self, run_dir: Path, rank: int) -> None:
        self._path, self._rank, self._started = run_dir / "exit.json", rank, False

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
        body = {"code": code, "rank": self._rank, "cause": f"{kind.__name__}: {error}" if kind else "done"}
        if error is not None:
            logger.error("%s", body["cause"], exc_info=not isinstance(error, SwinScaleError))
        try:
            with open(self._path, "x", encoding="utf-8") as file:
                json.dump({**body, "time": time.time()}, file)
        except FileExistsError:
            logger.debug("another rank recorded the first cause")
        except OSError as trouble:  # such as a full disk, which must not hide the cause
            logger.error("%s cannot be written: %s", self._path, trouble.strerror)
