"""What every page is made of: the document around its sections, rows of facts, tables.

The document may run one script, its own, by digest, and may fetch nothing: should an escape ever be missing, a browser
still runs and loads none of what the files of a run hold.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Iterable, Sequence

from swin_scale.report.style import CSS, SCRIPT
from swin_scale.report.svg import escape

Cells = Sequence[object]


def document(title: str, sections: Iterable[str], foot: str) -> str:
    """The whole page; `title` and `foot` are plain text, sections are HTML, empty ones left out."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="referrer" content="no-referrer">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head>\n<body>\n"
        + "\n".join(section for section in sections if section)
        + f"\n<footer>{escape(foot)}</footer>\n<script>{SCRIPT}</script></body></html>\n"
    )


def facts(found: Iterable[tuple[str, str, str]]) -> str:
    """(name, value, note) side by side; a note may be empty."""
    cells = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}{f'<small>{escape(note)}</small>' if note else ''}</dd></div>"
        for name, value, note in found
    )
    return f'<dl class="facts">{cells}</dl>'


def table(heads: Sequence[str], rows: Iterable[Cells], *, numeric: Iterable[int] = (), key: bool = False) -> str:
    """A table in its frame; columns in `numeric` are set to the right, with `key` the first is never broken."""
    kinds = dict.fromkeys(numeric, ' class="n"') | ({0: ' class="k"'} if key else {})

    def row(cells: Cells, tag: str) -> str:
        return "".join(f"<{tag}{kinds.get(at, '')}>{escape(cell)}</{tag}>" for at, cell in enumerate(cells))

    body = "".join(f"<tr>{row(cells, 'td')}</tr>" for cells in rows)
    return f'<div class="table"><table><thead><tr>{row(heads, "th")}</tr></thead><tbody>{body}</tbody></table></div>'


def date(seconds: float) -> str:
    """A moment as text; times of other machines' clocks may be anything."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(min(max(seconds, 0.0), 4e9)))
