"""One safetensors file under our own (= official) names, with all that is needed to rebuild the model beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from swin_scale.checkpoint import save_safetensors, strictjson
from swin_scale.convert.report import Line
from swin_scale.convert.source import METADATA_KEY

SUFFIX = ".safetensors"
FORMAT = "swin_scale.weights/1"


def metadata(model: Mapping[str, Any], *, kind: str, step: int | None) -> dict[str, str]:
    """The metadata of a weight file: one JSON object under `METADATA_KEY`."""
    body = {"format": FORMAT, "model": dict(model), "kind": kind, "step": step}
    return {METADATA_KEY: strictjson.dumps(body).decode()}


def write(
    path: Path, state: Mapping[str, Tensor], model: Mapping[str, Any], *, kind: str, step: int | None
) -> tuple[list[str], list[Line]]:
    """Write the file in one rename; returns the keys written and those created (none)."""
    save_safetensors(path, state, metadata(model, kind=kind, step=step))
    return list(state), []
