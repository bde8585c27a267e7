"""From a run directory to its page."""

from __future__ import annotations

import time
from pathlib import Path

from swin_scale.errors import UserError
from swin_scale.files import write_atomic
from swin_scale.report.history import read_history
from swin_scale.report.page import page
from swin_scale.report.stages import stages_page
from swin_scale.run_dir import read_stages

REPORT_NAME = "report.html"
_FILES = ("metrics.jsonl", "config.yaml", "exit.json")


def write_report(run_dir: str | Path, out: str | Path | None = None) -> Path:
    """Write the page of a run, whatever its state, to `out` or ``report.html`` in it; returns the file.

    Of a run in stages it is a page that leads to theirs. The file is replaced in one rename. Raises UserError for a
    directory that is no run's, OSError when a file cannot be read or written.
    """
    directory = Path(run_dir)
    stages = read_stages(directory)
    if not stages and not any((directory / name).is_file() for name in _FILES):
        raise UserError(f"{directory} is not a run directory: it holds none of {', '.join(_FILES)}")
    target = directory / REPORT_NAME if out is None else Path(out)
    now = time.time()
    text = stages_page(directory, stages, target.parent, now) if stages else page(read_history(directory), now)
    # Lone surrogates may come out of JSON; UTF-8 has no place for them.
    write_atomic(target, text.encode("utf-8", errors="replace"))
    return target
