"""Weights from all this project reads: runs, checkpoints, DeepSpeed ZeRO, safetensors, ``.pth``, Swin-MoE ranks."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swin_scale.checkpoint import Checkpoint, list_steps, newest_good
from swin_scale.checkpoint.manifest import MANIFEST_NAME
from swin_scale.checkpoint.tensorfile import DTYPES, read_header, read_range
from swin_scale.config import Augment
from swin_scale.convert import hub, rank_files, zero_files
from swin_scale.convert.ranks import RankWeights
from swin_scale.convert.torch_weights import TorchWeights
from swin_scale.convert.torchfile import TorchFile, is_torch_file
from swin_scale.convert.weights import Several, Source, Weights
from swin_scale.convert.zero import ZeroWeights
from swin_scale.errors import CheckpointError
from swin_scale.run_dir import read_stages

logger = logging.getLogger(__name__)

METADATA_KEY = "swin_scale"
"""Key of the JSON object in the metadata of safetensors files written here."""
EVAL_AUGMENT: Mapping[str, tuple[Any, ...]] = {
    "crop": (None, "resized", "pad"),
    "eval_crop": (True, False),
    "interpolation": ("bicubic", "bilinear"),
}
"""Keys of `Augment` that say how an evaluation looks at images, which a model is described with, and their values."""


def open_weights(path: str | Path, *, kind: str = "master") -> Weights:
    """Weights that are read on demand; close them, or use them in a ``with``.

    Args:
        path: a run directory or its ``checkpoints`` (the newest good step is taken), that of a run in stages (its last
            stage), a step directory, a directory
            written by DeepSpeed's ``save_checkpoint`` (ZeRO 0 to 3, any number of ranks) or by Hugging Face or timm
            (``config.json`` beside the weights, which may be several files with an index), or a file written by
            safetensors or ``torch.save`` with the weights at the top, or under ``model``, ``state_dict`` or
            ``module``. The ``.rank0``, ``.rank1``, ... and ``.master`` files of an official Swin-MoE are given as
            their directory, as the published zip, as one of them, or as what their names begin with.
        kind: ``master``, or ``ema`` where a checkpoint or one of our files holds it, or a ``.pth`` has it under
            ``model_ema``, ``state_dict_ema`` or ``ema``.

    Raises CheckpointError naming the file. No code of a file runs; there is no setting that would allow it.
    """
    path = last_stage(Path(path))
    try:
        if path.is_dir():
            return _open_directory(path, kind)
        if rank_files.present(path):
            return RankWeights(path, kind)
        return _open_file(path, kind)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def last_stage(path: Path) -> Path:
    """Of a run in stages the directory of the last one; of anything else the path itself.

    Raises CheckpointError, naming the stages that could be meant, when the last one has no checkpoint.
    """
    stages = read_stages(path)
    if not stages or list_steps(stages[-1] / "checkpoints"):
        return stages[-1] if stages else path
    begun = [str(stage) for stage in stages if list_steps(stage / "checkpoints")]
    raise CheckpointError(
        f"{path} is a run in stages, and the last, {stages[-1].name}, has no checkpoint yet; "
        + (f"name a stage of its own: {', '.join(begun)}" if begun else "no stage has one")
    )


def _open_file(path: Path, kind: str) -> Weights:
    return TorchWeights(path, kind) if is_torch_file(path) else SafetensorsWeights(path, kind)


def _open_index(path: Path, kind: str) -> Weights:
    """Weights in several files; every tensor is where the index says, and no file has more."""
    home = hub.index(path)
    with ExitStack() as stack:
        files: dict[str, Weights] = {}
        for name in dict.fromkeys(home.values()):
            files[name] = _open_file(path.parent / name, kind)
            stack.callback(files[name].close)
            stated = {key for key, file in home.items() if file == name}
            if odd := sorted(stated ^ files[name].tensors.keys()):
                raise CheckpointError(
                    f"{path.parent / name} and {path.name} do not agree on {odd[0]}; fetch them again"
                )
        stack.pop_all()
        first = next(iter(files.values())).source
        note = f"{len(files)} files, as {path.name} names them"
        return Several(files, home, dataclasses.replace(first, path=path.parent, notes=(*first.notes, note)))


def read_state_dict(path: str | Path, *, kind: str = "master") -> tuple[dict[str, Tensor], Source]:
    """Weights (CPU, dtype as stored) and where they came from; see `open_weights`."""
    with open_weights(path, kind=kind) as weights:
        return weights.load(), weights.source


def _open_directory(path: Path, kind: str) -> Weights:
    if (path / MANIFEST_NAME).exists() and not list_steps(path):
        return CheckpointWeights(Checkpoint.open(path), kind)
    root = path / "checkpoints" if list_steps(path / "checkpoints") else path
    checkpoint = newest_good(root, lambda bad, what: logger.warning("%s is not used: %s", bad.name, what))
    if checkpoint is not None:
        return CheckpointWeights(checkpoint, kind)
    steps = list_steps(root)
    if not steps and (file := hub.weight_file(path) or hub.index_file(path)) is not None:
        weights = _open_index(file, kind) if file.name.endswith(".json") else _open_file(file, kind)
        try:
            weights.source = hub.describe(path, weights.source)
        except CheckpointError:
            weights.close()
            raise
        return weights
    if not steps and (directory := zero_files.find(path)) is not None:
        _refuse_ema(directory, kind)
        return _open_without_zero(directory) or ZeroWeights(directory)
    if not steps and rank_files.present(path):
        return RankWeights(path, kind)
    what = f"its {len(steps)} checkpoints are all damaged" if steps else "it holds no checkpoint"
    raise CheckpointError(f"{path}: {what}; give a run directory, a step_XXXXXXXX directory or a weight file")


def _open_without_zero(directory: Path) -> Weights | None:
    """A DeepSpeed checkpoint of stage 0, whose model file has all weights, in the training precision; else None."""
    (file, *others) = sorted(directory.glob("*mp_rank_*_states.pt"))
    if others or file.name != "mp_rank_00_model_states.pt":
        return None
    with TorchFile(file) as opened:
        content = opened.content
    if not isinstance(content, dict) or content.get("param_shapes") is not None:
        return None  # of a ZeRO checkpoint whose other files are missing
    weights, step = TorchWeights(file, "master"), content.get("global_steps")
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in weights.tensors.values() if t.is_floating_point()})
    weights.source = dataclasses.replace(
        weights.source,
        path=directory,
        format="deepspeed",
        step=step if type(step) is int else None,
        notes=(f"without ZeRO, weights as they were trained with, in {' and '.join(dtypes)}",),
    )
    return weights


class CheckpointWeights(Weights):
    """One kind of weights of a checkpoint."""

    def __init__(self, checkpoint: Checkpoint, kind: str) -> None:
        self._checkpoint = checkpoint
        if kind not in checkpoint.kinds():
            checkpoint.close()
            raise CheckpointError(f"{checkpoint.path} holds {', '.join(checkpoint.kinds())}, but no {kind}")
        model = dict(checkpoint.model) if {"name", "overrides"} <= checkpoint.model.keys() else None
        self.source = Source(path=checkpoint.path, format="checkpoint", kind=kind, step=checkpoint.step, model=model)
        self.tensors = {
            name: torch.empty(row["shape"], dtype=checkpoint.read(kind, name, 0, 0).dtype, device="meta")
            for name, row in checkpoint.parameters.items()
        }

    def read(self, name: str) -> Tensor:
        return self._checkpoint.read(self.source.kind, name).view(self.tensors[name].shape)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        shape = self.tensors[name].shape[1:]
        row = math.prod(shape)
        return self._checkpoint.read(self.source.kind, name, start * row, (stop - start) * row).view(-1, *shape)

    def close(self) -> None:
        self._checkpoint.close()


class SafetensorsWeights(Weights):
    """A safetensors file."""

    def __init__(self, path: Path, kind: str) -> None:
        header = read_header(path)
        self._entries, self._path = header.entries, path
        self.tensors = {
            name: torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="meta")
            for name, entry in header.entries.items()
        }
        if METADATA_KEY not in header.metadata:
            _refuse_ema(path, kind)
            self.source = Source(path=path, format="safetensors", kind=kind)
        else:
            model, step, stored = parse_metadata(path, header.metadata[METADATA_KEY])
            if stored != kind and kind != "master":
                raise CheckpointError(f"{path} holds {stored} weights, not {kind}; convert again from the checkpoint")
            self.source = Source(path=path, format="safetensors", kind=stored, step=step, model=model)
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error

    def read(self, name: str) -> Tensor:
        return self._read(name, self.tensors[name], 0)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        meta = self.tensors[name]
        return self._read(name, meta[start:stop], start * math.prod(meta.shape[1:]) * meta.element_size())

    def _read(self, name: str, meta: Tensor, offset: int) -> Tensor:
        try:
            out = torch.empty(meta.shape, dtype=meta.dtype)
        except RuntimeError as error:
            size = math.prod(meta.shape) * meta.element_size()
            raise CheckpointError(f"{self._path}: tensor {name!r} of {size} bytes does not fit in memory") from error
        read_range(self._descriptor, self._path, self._entries[name].begin + offset, out)
        return out

    def close(self) -> None:
        os.close(self._descriptor)


def parse_metadata(path: Path, text: str) -> tuple[dict[str, Any] | None, int | None, str]:
    """(model, step, kind) from the metadata of one of our safetensors files; raises CheckpointError.

    The model is None in files converted from a source whose model was not known.
    """
    try:
        body = json.loads(text)
        model = body["model"] and {
            "name": str(body["model"]["name"]),
            "overrides": dict(body["model"]["overrides"]),
            "classes": body["model"].get("classes"),
            "wnids": body["model"].get("wnids"),
            "augment": dict(body["model"].get("augment") or {}),
        }
        return model, body.get("step"), str(body["kind"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path}: its {METADATA_KEY} metadata is damaged: {reason}") from error


def eval_augment(source: Source) -> Augment:
    """How the run behind `source` looked at the images it was evaluated on; raises CheckpointError.

    The defaults where nothing tells: foreign files, and those written before this was.
    """
    stored = (source.model or {}).get("augment") or {}
    for key, known in EVAL_AUGMENT.items():
        if stored.get(key, known[0]) not in known:
            raise CheckpointError(f"{source.path}: its augment.{key} is {str(stored[key])[:80]!r}, not one of {known}")
    return Augment(**{key: stored[key] for key in EVAL_AUGMENT if key in stored})


def _refuse_ema(path: Path, kind: str) -> None:
    if kind != "master":
        raise CheckpointError(f"{path} holds one set of weights and does not say that it is {kind}; leave {kind} out")
