"""A checkpoint whose every digest is right may still end the process that loads it. Count, and step back.

``load_attempts.json`` beside the checkpoints says how often each was begun to be loaded without a step done since. It
is written before a load and cleared by the first step, so a kill later in training never counts.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import xxhash

from swin_scale.checkpoint import strictjson
from swin_scale.checkpoint.manifest import MANIFEST_NAME, read_small
from swin_scale.errors import CheckpointError
from swin_scale.files import write_atomic

logger = logging.getLogger(__name__)

ATTEMPTS_NAME = "load_attempts.json"
MAX_ATTEMPTS = 3
"""Loads in a row without a step after which a checkpoint is passed over."""


class LoadAttempts:
    """The counts of one directory of checkpoints; for rank 0."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.path = Path(root) / ATTEMPTS_NAME

    def count(self, checkpoint: Path) -> int:
        """Loads of `checkpoint`, as it is now, that ended without a step."""
        entry = self._load().get(checkpoint.name)
        return entry[1] if entry and entry[0] == _digest(checkpoint) else 0

    def begin(self, checkpoint: Path) -> None:
        """`checkpoint` is about to be loaded."""
        self._save({**self._load(), checkpoint.name: (_digest(checkpoint), self.count(checkpoint) + 1)})

    def clear(self, checkpoint: Path) -> None:
        """A step was done after `checkpoint` was loaded, or it was written anew."""
        table = self._load()
        if table.pop(checkpoint.name, None) is not None:
            self._save(table)

    def _load(self) -> dict[str, tuple[str, int]]:
        """name -> (digest of its manifest, loads); what cannot be read counts nothing."""
        if not self.path.exists():
            return {}
        try:
            table = strictjson.loads(read_small(self.path), self.path)
            return {str(name): (str(digest), int(count)) for name, (digest, count) in table.items()}
        except (CheckpointError, AttributeError, TypeError, ValueError) as error:
            logger.warning("%s is not used: %s", self.path, error)
            return {}

    def _save(self, table: dict[str, tuple[str, int]]) -> None:
        there = {name: entry for name, entry in table.items() if (self.path.parent / name).is_dir()}
        try:
            write_atomic(self.path, strictjson.dumps(there, indent=1) + b"\n")
        except OSError as error:
            logger.warning("%s cannot be written (%s); loads that crash are not counted", self.path, error.strerror)


def _digest(checkpoint: Path) -> str:
    try:
        return xxhash.xxh3_64_hexdigest(read_small(checkpoint / MANIFEST_NAME))
    except CheckpointError:
        return ""
