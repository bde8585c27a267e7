"""Weights from anything this project reads: checkpoint and run directories, ``.safetensors``, ``.pth``."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from swin_scale.checkpoint import Checkpoint, list_steps, load_safetensors, newest_good
from swin_scale.checkpoint.manifest import MANIFEST_NAME
from swin_scale.convert.pickles import LazyTensor, Placeholder
from swin_scale.convert.torchfile import TorchFile, is_torch_file
from swin_scale.errors import CheckpointError

logger = logging.getLogger(__name__)

METADATA_KEY = "swin_scale"
"""Key of the JSON object in the metadata of safetensors files written here."""

_STATE_DICTS = ("model", "state_dict")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where weights came from and what is known about the model they belong to."""

    path: Path
    format: str
    """``checkpoint``, ``safetensors`` or ``torch``."""
    kind: str
    """``master`` or ``ema``."""
    step: int | None = None
    model: Mapping[str, Any] | None = None
    """``name``, ``overrides``, ``classes``, ``wnids``; None for foreign files."""
    beside: tuple[str, ...] = ()
    """Other top-level entries of a ``.pth``: optimizer, config, ..."""
    mentioned: tuple[str, ...] = ()
    """Classes that a ``.pth`` mentions; none of them was imported."""


def read_state_dict(path: str | Path, *, kind: str = "master") -> tuple[dict[str, Tensor], Source]:
    """Weights (CPU, dtype as stored) and where they came from.

    Args:
        path: a run directory or its ``checkpoints`` (the newest good step is taken), a step directory, or a file
            written by safetensors or ``torch.save`` with the weights at the top, or under ``model`` or ``state_dict``.
        kind: ``master``, or ``ema`` where a checkpoint or one of our files holds it.

    Raises CheckpointError naming the file. No code of a file runs; there is no setting that would allow it.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return _from_checkpoint(_open_directory(path), kind)
        if is_torch_file(path):
            return _from_torch(path, kind)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    return _from_safetensors(path, kind)


def _open_directory(path: Path) -> Checkpoint:
    if (path / MANIFEST_NAME).exists() and not list_steps(path):
        return Checkpoint.open(path)
    root = path / "checkpoints" if list_steps(path / "checkpoints") else path
    checkpoint = newest_good(root, lambda bad, what: logger.warning("%s is not used: %s", bad.name, what))
    if checkpoint is None:
        steps = list_steps(root)
        what = f"its {len(steps)} checkpoints are all damaged" if steps else "it holds no checkpoint"
        raise CheckpointError(f"{path}: {what}; give a run directory, a step_XXXXXXXX directory or a weight file")
    return checkpoint


def _from_checkpoint(checkpoint: Checkpoint, kind: str) -> tuple[dict[str, Tensor], Source]:
    with checkpoint:
        if kind not in checkpoint.kinds():
            raise CheckpointError(f"{checkpoint.path} holds {', '.join(checkpoint.kinds())}, but no {kind}")
        tensors = checkpoint.load_full(kind)
        model = dict(checkpoint.model) if {"name", "overrides"} <= checkpoint.model.keys() else None
        source = Source(path=checkpoint.path, format="checkpoint", kind=kind, step=checkpoint.step, model=model)
    return tensors, source


def _from_safetensors(path: Path, kind: str) -> tuple[dict[str, Tensor], Source]:
    tensors, metadata = load_safetensors(path)
    if METADATA_KEY not in metadata:
        _refuse_ema(path, kind)
        return tensors, Source(path=path, format="safetensors", kind=kind)
    model, step, stored = parse_metadata(path, metadata[METADATA_KEY])
    if stored != kind and kind != "master":
        raise CheckpointError(f"{path} holds {stored} weights, not {kind}; convert again from the checkpoint")
    return tensors, Source(path=path, format="safetensors", kind=stored, step=step, model=model)


def parse_metadata(path: Path, text: str) -> tuple[dict[str, Any], int | None, str]:
    """(model, step, kind) from the metadata of one of our safetensors files; raises CheckpointError."""
    try:
        body = json.loads(text)
        model = {
            "name": str(body["model"]["name"]),
            "overrides": dict(body["model"]["overrides"]),
            "classes": body["model"].get("classes"),
            "wnids": body["model"].get("wnids"),
        }
        return model, body.get("step"), str(body["kind"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path}: its {METADATA_KEY} metadata is damaged: {reason}") from error


def _from_torch(path: Path, kind: str) -> tuple[dict[str, Tensor], Source]:
    _refuse_ema(path, kind)
    with TorchFile(path) as file:
        top = _table(file.content)
        if top is None:
            raise CheckpointError(f"{path} holds a {type(file.content).__name__}, not a table of tensors")
        named = [_table(top[name]) for name in _STATE_DICTS if name in top]
        table = next((table for table in named if table), top)
        wrong = [
            name for name, value in table.items() if not isinstance(value, LazyTensor) or not isinstance(name, str)
        ]
        if wrong or not table:
            raise CheckpointError(
                f"{path}: no table of tensors found at the top or under {' or '.join(_STATE_DICTS)}; "
                f"at the top are {', '.join(map(str, list(top)[:8])) or 'no entries'}"
            )
        beside = () if table is top else tuple(str(name) for name in top if _table(top[name]) is not table)
        tensors = {name: file.read(lazy) for name, lazy in table.items()}
        source = Source(path=path, format="torch", kind=kind, beside=beside, mentioned=tuple(sorted(file.mentioned)))
    return tensors, source


def _table(content: Any) -> dict[Any, Any] | None:
    if isinstance(content, Placeholder):
        content = content.items
    return content if isinstance(content, dict) else None


def _refuse_ema(path: Path, kind: str) -> None:
    if kind != "master":
        raise CheckpointError(f"{path} holds one set of weights and does not say that it is {kind}; leave {kind} out")
