"""JSON from files that may be damaged or hostile: strict where the stdlib is lenient."""

from __future__ import annotations

import json
import os
from typing import Any

from swin_scale.errors import CheckpointError


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for name, value in pairs:
        if name in table:
            raise ValueError(f"key {name[:80]!r} occurs twice")
        table[name] = value
    return table


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def loads(data: bytes, path: str | os.PathLike[str]) -> Any:
    """Parse UTF-8 JSON; duplicate keys, NaN and infinities raise CheckpointError naming `path`.

    The parser needs up to about 25 bytes of memory per byte of input, so callers bound `data` first.
    """
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise CheckpointError(f"{path} is damaged: {error}") from error


def dumps(body: Any, *, indent: int | None = None) -> bytes:
    """UTF-8 JSON of `body`; non-finite numbers raise ValueError because readers would refuse them."""
    separators = None if indent else (",", ":")
    return json.dumps(body, ensure_ascii=False, allow_nan=False, indent=indent, separators=separators).encode()
