"""Weight files written here: safetensors, streamed from the source, in one rename.

Files of the format ``safetensors`` keep our own (= official) names and have all that is needed to rebuild the model in
their metadata; those for timm and Hugging Face carry the same metadata beside their own names.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from swin_scale.checkpoint import strictjson
from swin_scale.checkpoint.tensorfile import Written, write_tensor_file
from swin_scale.convert.source import METADATA_KEY
from swin_scale.convert.weights import Weights
from swin_scale.errors import CheckpointError, UserError
from swin_scale.files import fsync_directory

FORMAT = "swin_scale.weights/1"


def write(path: Path, weights: Weights, model: Mapping[str, Any] | None) -> Written:
    """Write `weights` to `path`, one tensor at a time; `model` (name, overrides, classes, wnids) may be unknown.

    Raises CheckpointError when the file cannot be written, or the source turns out to be damaged; an older file of
    that name then stays as it was.
    """
    body = {
        "format": FORMAT,
        "model": None if model is None else dict(model),
        "kind": weights.source.kind,
        "step": weights.source.step,
    }
    metadata = {"format": "pt", METADATA_KEY: strictjson.dumps(body).decode()}
    with replacing(path) as temporary:
        written = write_tensor_file(temporary, list(weights.tensors.items()), metadata, pieces=weights.pieces)
        weights.finish()
    return written


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, renamed to it at the end, or removed after an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
        fsync_directory(path.parent)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written: {error.strerror or error}; free space or fix the path"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_directory(path: Path) -> Iterator[Path]:
    """A temporary directory beside `path`, renamed to it at the end, or removed with its files after an error.

    Raises UserError where `path` is a directory with files in it.
    """
    if path.is_dir() and any(path.iterdir()):
        raise UserError(f"destination {path} is a directory with files in it; give a new name")
    with replacing(path) as temporary:
        temporary.mkdir()
        try:
            yield temporary
            fsync_directory(temporary)
        except (OSError, CheckpointError):
            for file in temporary.iterdir():
                file.unlink()
            temporary.rmdir()
            raise
