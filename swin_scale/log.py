"""Logging set-up, and JSON lines that survive a kill: at most the last line of a file is torn, and readers skip it."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

LINE = "%(asctime)s %(levelname).1s rank{rank} %(name)s: %(message)s"
CONSOLE_LINE = "%(asctime)s %(message)s"
TIME = "%Y-%m-%d %H:%M:%S"

Row = dict[str, Any]

MAX_UNWRITTEN = 64 << 20
"""Bytes of rows kept while their file cannot be written: about 180,000 steps. Older ones are dropped then."""

logger = logging.getLogger(__name__)


def setup_logging(run_dir: Path | None, rank: int, *, console: bool) -> None:
    """Send the log to ``logs/rank{rank}.log`` of the run, and to stderr on the rank a person watches.

    The file is appended to, since a run is resumed in its directory. Without `run_dir` there is no file. Calling again
    replaces what the last call set up. Other libraries' messages are kept from warnings up.
    """
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _OwnFile | _OwnConsole)]:
        root.removeHandler(handler)
        handler.close()
    if run_dir is not None:
        directory = run_dir / "logs"
        directory.mkdir(parents=True, exist_ok=True)
        to_file = _OwnFile(directory / f"rank{rank}.log", encoding="utf-8")
        to_file.setFormatter(logging.Formatter(LINE.format(rank=rank), TIME))
        root.addHandler(to_file)
    if console:
        to_console = _OwnConsole(sys.stderr)
        to_console.setFormatter(logging.Formatter(CONSOLE_LINE, "%H:%M:%S"))
        root.addHandler(to_console)
    root.setLevel(logging.WARNING)
    for name in ("swin_scale", "launcher", "data_prep"):
        logging.getLogger(name).setLevel(logging.INFO)


class _OwnFile(logging.FileHandler):
    """The handler that `setup_logging` may replace. Where it cannot write it says so once, without a traceback."""

    _failing = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._failing:
            self._failing = True
            sys.stderr.write(f"{self.baseFilename} cannot be written ({error.strerror}); its lines are lost\n")


class _OwnConsole(logging.StreamHandler):
    """The handler that `setup_logging` may replace."""


class JsonLines:
    """Append-only file of JSON objects, one a line.

    Rows that cannot be written, because the disk is full for instance, are kept and written with the next ones: a run
    that has computed for days does not end for want of a line in its diary.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: io.FileIO | None = None
        self._unwritten = bytearray()
        self._failing = False
        self._drain()

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append `rows` in one write. Numbers that JSON does not have (NaN, infinities) are written as null."""
        for row in rows:
            self._unwritten += json.dumps(finite(row), ensure_ascii=False, allow_nan=False).encode() + b"\n"
        self._drain()

    def close(self) -> None:
        """Try once more to write what is left, and say how much is lost."""
        self._drain()
        if self._unwritten:
            logger.error("%s lacks its last %d bytes: there was no room for them", self.path, len(self._unwritten))
            self._unwritten.clear()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _drain(self) -> None:
        try:
            if self._file is None:
                self._file = self._open()
            while self._unwritten:  # a raw write may be short, on a disk that is full for instance
                del self._unwritten[: self._file.write(self._unwritten)]
        except OSError as error:
            if not self._failing:
                reason = error.strerror or error
                logger.error("%s cannot be written (%s); rows wait in memory until it can", self.path, reason)
            self._failing = True
            if len(self._unwritten) > MAX_UNWRITTEN:
                # From a line's end on; the first one left may be half written.
                cut = self._unwritten.find(b"\n", len(self._unwritten) - MAX_UNWRITTEN // 2)
                del self._unwritten[:cut]
        else:
            if self._failing:
                logger.warning("%s is written again", self.path)
            self._failing = False

    def _open(self) -> io.FileIO:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered: each batch of rows is one write, so that a kill can tear only the last line written.
        file: io.FileIO = open(self.path, "ab+", buffering=0)  # noqa: SIM115 - closed in close()
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":
                # A killed run left half a line. Close it, and let readers skip it.
                self._unwritten[:0] = b"\n"
        return file

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()


def finite(value: Any) -> Any:
    """`value` with every NaN and infinity replaced by None, in nested mappings and sequences too."""
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def iter_jsonl(path: Path, *, wanted: Callable[[bytes], bool] | None = None) -> Iterator[Row]:
    """The JSON objects of a file, in order; a missing file is empty. Torn lines, which kills leave, are skipped.

    `wanted`: which lines to parse at all, for files of millions; None: all.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed below, once the last line is read
    except FileNotFoundError:
        return
    with file:
        for line in file:
            if wanted is not None and not wanted(line):
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict):
                yield row


def read_jsonl(path: Path) -> list[Row]:
    """All that `iter_jsonl` finds."""
    return list(iter_jsonl(path))


def read_metrics(path: Path) -> dict[int, Row]:
    """The step rows of a ``metrics.jsonl`` by step, rising; the last row of a step wins, since resumes repeat steps."""
    rows = {row["step"]: row for row in read_jsonl(path) if "event" not in row and "step" in row}
    return dict(sorted(rows.items()))


def read_events(path: Path) -> list[Row]:
    """The event rows of a ``metrics.jsonl``, in the order in which they happened."""
    return [row for row in read_jsonl(path) if "event" in row]
