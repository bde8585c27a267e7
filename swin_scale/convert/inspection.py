"""What is in a checkpoint, a run, a weight file or a shard set, for people to read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from swin_scale.checkpoint import Checkpoint, list_steps, step_directory
from swin_scale.checkpoint.manifest import MANIFEST_NAME
from swin_scale.checkpoint.tensorfile import DTYPES, read_header
from swin_scale.convert import hub, rank_files, zero_files
from swin_scale.convert.layouts import NAMES
from swin_scale.convert.load import describe_model
from swin_scale.convert.ranks import RankWeights
from swin_scale.convert.source import METADATA_KEY, open_weights, parse_metadata
from swin_scale.convert.torchfile import is_torch_file
from swin_scale.convert.translate import as_official
from swin_scale.errors import CheckpointError, UserError
from swin_scale.run_dir import read_stages
from swin_scale.shards import INDEX_NAME, Manifest

_FORMATS = {"torch": "torch.save", "safetensors": "safetensors", "deepspeed": "DeepSpeed ZeRO checkpoint",
            "ranks": "official Swin-MoE files"}  # fmt: skip


def inspect_path(path: str | Path, *, verify: bool = False) -> str:
    """A few lines on what `path` holds.

    Args:
        path: run directory, ``checkpoints``, step directory, shard directory, ``.pth`` or ``.safetensors``.
        verify: also read checkpoints whole and compare the digests; nothing else has any.

    Raises UserError for a path that is none of these, or has nothing to verify, CheckpointError or DataError for
    damaged ones.
    """
    path = Path(path)
    if path.is_dir() and (lines := _ours(path, verify)):
        return "\n".join(lines)
    if verify and path.exists():
        raise UserError(f"{path} is no run or checkpoint of one, and has no digests to verify; leave --verify out")
    if rank_files.present(path):
        return "\n".join(_weights(path))
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if path.is_file():
        return "\n".join(_weights(path) if is_torch_file(path) else _safetensors(path))
    if (path / INDEX_NAME).exists():
        return "\n".join(_shards(path))
    if (directory := zero_files.find(path)) is not None or (hub.weight_file(path) or hub.index_file(path)):
        return "\n".join(_weights(directory or path))
    raise UserError(f"{path} is not a run, a checkpoint, a shard set or a weight file")


def _ours(path: Path, verify: bool) -> list[str]:
    """A directory with checkpoints of ours; empty for any other."""
    if stages := read_stages(path):
        return _stages(path, stages, verify)
    for root in (path, path / "checkpoints"):
        if list_steps(root):
            return _run(root, verify)
    return _checkpoint(path, verify) if (path / MANIFEST_NAME).exists() else []


def _stages(path: Path, stages: Sequence[Path], verify: bool) -> list[str]:
    """All stages by their newest checkpoint, and more of the last one that has any."""
    lines, begun = [f"{path}: a run in {len(stages)} stages"], None
    for stage in stages:
        steps = list_steps(stage / "checkpoints")
        begun = stage if steps else begun
        lines.append(f"  {stage.name}  {f'step {steps[-1]}' if steps else 'no checkpoint'}")
    return lines if begun is None else [*lines, *_run(begun / "checkpoints", verify)]


def _run(root: Path, verify: bool) -> list[str]:
    lines = [f"{root}: {len(list_steps(root))} checkpoints"]
    newest: list[str] = []
    for step in list_steps(root):
        directory = step_directory(root, step)
        try:
            newest = _checkpoint(directory, verify)
            lines.append(f"  {directory.name}  {_bytes(_size(directory))}  {'digests match' if verify else 'complete'}")
        except CheckpointError as error:
            lines.append(f"  {directory.name}  DAMAGED: {error}")
    return lines + newest


def _checkpoint(directory: Path, verify: bool) -> list[str]:
    with Checkpoint.open(directory, verify=verify) as checkpoint:
        shapes = [row["shape"] for row in checkpoint.parameters.values()]
        files = len(checkpoint.manifest.rank_files)
        return [
            f"{directory}: checkpoint of step {checkpoint.step}",
            f"  {_parameters(shapes)}, kept as {', '.join(checkpoint.kinds())}",
            f"  {files} rank file{'s' if files > 1 else ''}, {_bytes(_size(directory))}",
            *_model(checkpoint.model),
            f"  state: {', '.join(sorted(checkpoint.state))}",
        ]


def _safetensors(path: Path) -> list[str]:
    header = read_header(path)
    lines = [f"{path}: safetensors, {_bytes(path.stat().st_size)}", f"  {_tensors(header.entries.values())}"]
    if METADATA_KEY in header.metadata:
        model, step, kind = parse_metadata(path, header.metadata[METADATA_KEY])
        lines.append(f"  {kind} weights" + ("" if step is None else f" of step {step}"))
        lines += _model(model or {})
    return lines


def _weights(path: Path) -> list[str]:
    """A foreign file or directory."""
    with open_weights(path) as weights:
        view, source = as_official(weights), weights.source
        size = weights.bytes if isinstance(weights, RankWeights) else _size(path)
    lines = [
        f"{path}: {_FORMATS[source.format]}, {_bytes(size)}",
        f"  {_parameters(tensor.shape for tensor in weights.tensors.values())} (buffers included)",
        *(f"  {note}" for note in source.notes),
    ]
    if source.step is not None:
        lines.append(f"  step {source.step}")
    if view.layout != "official":
        lines.append(f"  names of {NAMES[view.layout]}")
    try:
        name, overrides = describe_model(view, None)
        lines += _model({"name": name, "overrides": overrides, "classes": source.classes})
    except CheckpointError as error:
        lines.append(f"  model: unknown ({error})")
    if source.kind != "master":
        lines.append(f"  {source.kind} weights")
    if source.beside:
        lines.append(f"  beside the weights: {', '.join(source.beside)}")
    classes = [name for name in source.mentioned if not name.startswith(("torch.", "torch._utils", "collections."))]
    if classes:
        lines.append(f"  classes mentioned, none was loaded: {', '.join(classes)}")
    return lines


def _shards(path: Path) -> list[str]:
    manifest = Manifest.load(path)
    names = manifest.classes
    shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    return [
        f"{path}: shard set, {manifest.samples} samples in {len(manifest.shards)} shards, "
        f"{_bytes(sum(shard.bytes for shard in manifest.shards))}",
        f"  {len(names)} classes: {shown}",
        f"  source: {manifest.source or 'unknown'}; left out: {manifest.left_out}",
    ]


def _model(model: Mapping[str, Any]) -> list[str]:
    lines = [f"  model: {model.get('name', 'unknown')}"]
    if overrides := model.get("overrides"):
        lines.append("  " + ", ".join(f"{key}={value}" for key, value in overrides.items()))
    if augment := model.get("augment"):
        lines.append("  evaluated with " + ", ".join(f"augment.{key}={value}" for key, value in augment.items()))
    if classes := model.get("classes"):
        lines.append(f"  {len(classes)} classes: {', '.join(classes[:4])}{', ...' if len(classes) > 4 else ''}")
    return lines


def _parameters(shapes: Iterable[Iterable[int]]) -> str:
    sizes = [math.prod(shape) for shape in shapes]
    return f"{sum(sizes):,} parameters in {len(sizes)} tensors"


def _tensors(entries: Iterable[Any]) -> str:
    entries = list(entries)
    dtypes = sorted({str(DTYPES[entry.dtype]).removeprefix("torch.") for entry in entries})
    return f"{_parameters(entry.shape for entry in entries)}, {' and '.join(dtypes)}"


def _size(path: Path) -> int:
    """Of a file, or of the files of a directory."""
    return path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.iterdir())


def _bytes(count: int) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000  # type: ignore[assignment]
    return f"{count:.1f} GB"
