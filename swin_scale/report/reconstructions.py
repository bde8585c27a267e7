"""Pictures that a run kept of what its model makes of a few images, put into the page itself."""

from __future__ import annotations

import base64
import re
from pathlib import Path

from swin_scale.report.svg import escape

DIRECTORY = "pictures"
SHOWN = 6
"""Pictures at most: the first, the last, and some between."""
MAX_BYTES = 1 << 20
"""Of a file; larger ones are left out, so that a page stays below 10 MB."""

_NAME = re.compile(r"step_(\d{8,12})\.(?:webp|png)")
_KINDS = ((re.compile(rb"RIFF....WEBP", re.DOTALL), "image/webp"), (re.compile(rb"\x89PNG\r\n\x1a\n"), "image/png"))


def reconstructions(directory: Path) -> str:
    """The section with the pictures of a run directory, empty where it has none; raises OSError as reading does."""
    found = sorted(_files(directory / DIRECTORY).items())
    if not found:
        return ""
    count = min(SHOWN, len(found))
    chosen = [found[round(at * (len(found) - 1) / max(count - 1, 1))] for at in range(count)]
    figures = "".join(
        f"<figure><figcaption><h3>Step {step:,}</h3></figcaption>"
        f'<img alt="images, what the model sees of them, and what it draws, after {step} steps" src="{source}">'
        "</figure>"
        for step, path in chosen
        if (source := _source(path)) is not None
    )
    note = "Above each other: the images; what the model sees of them; with what it draws where it sees nothing."
    more = f" {count} of {len(found)}; all are in <code>{DIRECTORY}/</code>." if len(found) > count else ""
    if not figures:
        return ""
    return f'<h2>Reconstructions</h2><p class="note">{escape(note)}{more}</p><div class="drawn">{figures}</div>'


def _files(directory: Path) -> dict[int, Path]:
    """Step -> file."""
    try:
        entries = sorted(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    names = ((_NAME.fullmatch(path.name), path) for path in entries)
    return {int(match[1]): path for match, path in names if match is not None and not path.is_symlink()}


def _source(path: Path) -> str | None:
    """The file as a URL that holds it; None for what is no picture, or too large."""
    if not path.is_file() or path.stat().st_size > MAX_BYTES:
        return None
    data = path.read_bytes()
    kind = next((kind for magic, kind in _KINDS if magic.match(data)), None)
    return None if kind is None else f"data:{kind};base64,{base64.b64encode(data).decode()}"
