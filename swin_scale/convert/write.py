"""`convert`: any weights read here to one file of another format, with a receipt that accounts for every key."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from swin_scale.checkpoint import strictjson
from swin_scale.checkpoint.tensorfile import hash_file
from swin_scale.convert import huggingface, layouts, official, plain
from swin_scale.convert.fit import adapted, fit
from swin_scale.convert.load import describe_model, label_names
from swin_scale.convert.report import Line, Report
from swin_scale.convert.source import open_weights
from swin_scale.convert.translate import View, as_official
from swin_scale.convert.weights import Renamed, Source, Step, Weights
from swin_scale.errors import CheckpointError, UserError
from swin_scale.files import write_atomic
from swin_scale.models import Variant, create_model, variant

Format = Literal["official", "safetensors", "timm", "hf", "torchvision", "mm"]
FORMATS: Mapping[str, str] = {
    "official": ".pth",
    "safetensors": ".safetensors",
    "timm": ".safetensors",
    "hf": "",
    "torchvision": ".pth",
    "mm": ".pth",
}
"""Format -> usual suffix; ``hf`` is a directory."""

_BUFFERS = {"torchvision": ("relative_position_index", "relative_coords_table")}
_BUFFERS["mm"] = _BUFFERS["torchvision"]
"""Derived buffers that are persistent in the format."""


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    to: Format | str,
    kind: str = "master",
    model: str | None = None,
    buffers: bool = True,
) -> Report:
    """Write the weights at `source` to `destination`, replaced in one rename, and ``<destination>.receipt.json``.

    Args:
        source, kind: see `open_weights`.
        destination: the file (a new directory for ``hf``); its parent must exist.
        to: ``official`` (``.pth`` for the official repository), ``safetensors`` (one file that `predict`, `eval` and
            `load_weights` rebuild the model from, and stock safetensors loads), ``timm`` (safetensors that
            ``timm.create_model(..., checkpoint_path=)`` loads), ``hf`` (a directory for ``from_pretrained``),
            ``torchvision`` or ``mm`` (``.pth`` for torchvision's and mmpretrain's models).
        model: name of the model, for files that do not tell. To ``safetensors`` weights of unknown models are
            converted as they are; all other formats need to know it.
        buffers: whether ``official`` files carry the derived buffers that the official state dicts have.

    Safetensors are streamed: extra memory is one parameter, or one buffer where the values stay the same. Raises
    CheckpointError, or UserError for an unknown format, a missing directory, or a model the format cannot express.
    """
    destination = Path(destination)
    if to not in FORMATS:
        raise UserError(f"--to is {to!r}; known formats are {', '.join(FORMATS)}")
    if not destination.parent.is_dir() or (destination.is_dir() and to != "hf"):
        raise UserError(f"destination {destination}: give a {'new' if to == 'hf' else 'file'} name in an existing "
                        "directory")  # fmt: skip
    with open_weights(source, kind=kind) as weights:
        view, origin = as_official(weights), weights.source
        notes = _notes(view)
        try:
            tidy, report, description = _tidy(view, model)
        except CheckpointError as error:
            if to != "safetensors" or model is not None or origin.model is not None:
                raise
            tidy, report, description = weights, _as_it_is(weights), None
            notes += (f"the model is not known, the tensors are as they were: {error}",)
        if description is None:
            written = plain.write(destination, tidy, None)
            keys, size, digest = list(tidy.tensors), written.bytes, written.xxh3_128
        else:
            v = variant(description["name"], **description["overrides"])
            out, steps, created = _foreign(tidy, to, v, description, destination, buffers)
            size, digest = _write(destination, to, out, created, description, v)
            report, keys = report.after(steps), [*out.tensors, *created]
            report = dataclasses.replace(report, created=(*report.created, *(Line(None, k, _WHY) for k in created)))
            notes += _hints(to, v, description["name"])
        report = dataclasses.replace(report, target=str(destination), notes=notes)
        report.check(weights.tensors, keys)
    receipt = {"format": to, "file": destination.name, "bytes": size, "xxh3_128": digest}
    _write_receipt(destination, receipt, origin, description, report)
    return report


_WHY = "derived from sizes, expected by the format"


def _tidy(view: View, model: str | None) -> tuple[Weights, Report, dict[str, Any]]:
    """The parameters of the model alone, in fp32 and official order; how they came about; and the model."""
    source = view.weights.source
    name, overrides = describe_model(view, model)
    with torch.device("meta"):
        target = create_model(name, **overrides).state_dict()
    where = str(source.path)
    _, report = fit(view.weights.tensors, target, where=where, into=name, head="keep")
    steps = [_step(line.source, line.target, line in report.converted, target, where)
             for line in (*report.copied, *report.converted) if line.source and line.target]  # fmt: skip
    by_name = {step.targets[0]: step for step in steps}
    tidy = Renamed(view.weights, [by_name[key] for key in target])
    classes, wnids = label_names(source, len(target["head.weight"]) if "head.weight" in target else 0)
    description = {"name": name, "overrides": overrides, "classes": classes, "wnids": wnids}
    return tidy, report.before(view.steps, view.dropped), description


def _step(source: str, name: str, changes: bool, target: Mapping[str, Tensor], where: str) -> Step:
    if not changes:
        return Step((source,), (name,))
    return Step((source,), (name,), lambda values: [adapted(name, values[0], target[name], where)])


def _as_it_is(weights: Weights) -> Report:
    copied = tuple(Line(name, name) for name in weights.tensors)
    return Report(source=str(weights.source.path), target="", copied=copied)


def _foreign(
    tidy: Weights, to: str, v: Variant, description: Mapping[str, Any], destination: Path, buffers: bool
) -> tuple[Weights, list[Step], dict[str, Tensor]]:
    """`tidy` under the names of `to`, the steps to them, and derived buffers to add."""
    if to == "safetensors":
        return tidy, [], {}
    derived = official.derived_buffers(description["name"], description["overrides"])
    if to == "official":
        official.check(tidy.tensors, destination)
        return tidy, [], derived if buffers else {}
    layouts.check(to, v)
    layout = layouts.LAYOUTS[to][v.family]
    steps, homeless = layout.outbound(list(tidy.tensors))
    if homeless:
        raise UserError(f"{to} has no place for {', '.join(homeless[:4])}; convert to safetensors instead")
    wanted = {key: tensor for key, tensor in derived.items() if key.endswith(_BUFFERS.get(to, ("?",)))}
    renames, _ = layout.outbound(list(wanted))
    created = {step.targets[0]: wanted[step.sources[0]] for step in renames}
    if to == "torchvision":
        created = {k: t.reshape(-1) if k.endswith("relative_position_index") else t for k, t in created.items()}
    return Renamed(tidy, steps), steps, created


def _write(
    path: Path, to: str, weights: Weights, created: Mapping[str, Tensor], model: Mapping[str, Any], v: Variant
) -> tuple[int, str]:
    """Write one format; returns size and digest of the file with the weights."""
    if to in ("safetensors", "timm"):
        written = plain.write(path, weights, model)
    elif to == "hf":
        written = huggingface.write(path, weights, model, v)
    else:
        table = {**weights.load(), **created}
        official.save_torch(path, {"official": {"model": table}, "mm": {"state_dict": table}}.get(to, table))
        return hash_file(path)
    return written.bytes, written.xxh3_128


def _notes(view: View) -> tuple[str, ...]:
    origin = view.weights.source
    notes = [f"{origin.kind} weights" + (f" of step {origin.step}" if origin.step is not None else ""), *origin.notes]
    if view.layout != "official":
        notes.append(f"recognised as a model of {layouts.NAMES[view.layout]}")
    if origin.beside:
        notes.append(f"left out, beside the weights in the file: {', '.join(origin.beside)}")
    return tuple(notes)


def _hints(to: str, v: Variant, name: str) -> tuple[str, ...]:
    """How to build the model the file is for, where that takes more than its name."""
    if to != "timm":
        return ()
    entry, arguments = layouts.timm_model(name, v)
    shown = "".join(f", {key}={value!r}" for key, value in arguments.items())
    return (f"timm.create_model({entry!r}{shown}, checkpoint_path=...)",)


def _write_receipt(
    destination: Path, head: Mapping[str, Any], origin: Source, model: Mapping[str, Any] | None, report: Report
) -> None:
    receipt = {
        **head,
        "source": str(origin.path),
        "source_format": origin.format,
        "kind": origin.kind,
        "step": origin.step,
        "model": None if model is None else {"name": model["name"], "overrides": model["overrides"]},
        **report.as_dict(),
    }
    write_atomic(destination.with_name(f"{destination.name}.receipt.json"), strictjson.dumps(receipt, indent=1) + b"\n")
