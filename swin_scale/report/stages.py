"""The page of a run in stages: what each came to, and the way to its own page."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from swin_scale.goodput import read
from swin_scale.report.document import date, document
from swin_scale.report.goodput import goodput_section
from swin_scale.report.history import read_history
from swin_scale.report.page import badge, summary
from swin_scale.report.svg import escape


def stages_page(directory: Path, stages: Sequence[Path], home: Path, written: float) -> str:
    """The whole document, to be put into the folder `home`; `written` is the time it shows, in seconds since 1970."""
    name = directory.resolve().name or "run"
    sections = [f"<header><h1>{escape(name)}</h1><p>a run in {len(stages)} stages · {escape(directory.resolve())}</p>"
                "</header>"]  # fmt: skip
    for stage in stages:
        sections.append(_section(stage, home))
    sections.append(goodput_section(read(directory)))
    return document(f"{name}: stages", sections, f"Written {date(written)} from the files in the stages' directories.")


def _section(stage: Path, home: Path) -> str:
    if not stage.is_dir():
        return f'<h2>{escape(stage.name)}</h2><p class="note">Not begun.</p>'
    page, history = stage / "report.html", read_history(stage)
    title = escape(stage.name)
    if page.is_file():
        title = f'<a href="{escape(quote(os.path.relpath(page, home)), 4000)}">{title}</a>'
    model = {key: value for key, value, _ in history.config}.get("model.name", "").strip('"')
    return f"<h2>{title} {badge(history)}</h2><p>{escape(model)}</p>{summary(history)}"
