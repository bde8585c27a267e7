"""From a run directory to its page."""

from __future__ import annotations

import time
from pathlib import Path

from swin_scale.errors import UserError
from swin_scale.files import write_atomic
from swin_scale.report.history import read_history
from swin_scale.report.page import page

REPORT_NAME = "report.html"
_FILES = ("metrics.jsonl", "config.yaml", "exit.json")


def write_report(run_dir: str | Path, out: str | Path | None = None) -> Path:
    """Write the page of a run, whatever its state, to `out` or ``report.html`` in it; returns the file.

    The file is replaced in one rename. Raises UserError for a directory that is no run's, OSError when a file cannot
    be read or written.
    """
    directory = Path(run_dir)
    if not any((directory / name).is_file() for name in _FILES):
        raise UserError(f"{directory} is not a run directory: it holds none of {', '.join(_FILES)}")
    target = directory / REPORT_NAME if out is None else Path(out)
    # Lone surrogates may come out of JSON; UTF-8 has no place for them.
    write_atomic(target, page(read_history(directory), time.time()).encode("utf-8", errors="replace"))
    return target
