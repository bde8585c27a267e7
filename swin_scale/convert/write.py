"""`convert`: any weights read here to files of another format, with a receipt that accounts for every key."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from swin_scale.checkpoint import strictjson
from swin_scale.checkpoint.tensorfile import hash_file
from swin_scale.convert import huggingface, layouts, official, plain, write_ranks
from swin_scale.convert.fit import adapted, fit, is_masked
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
    write_ranks.TUTEL: "",
}
"""Format -> usual suffix; ``hf`` is a directory, ``tutel-epN``, for N ranks, a directory or a ``.zip``, and so is
``official`` of a model with experts."""

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
        to: ``official`` (for the official repository: ``.pth``, or with experts a new directory or ``.zip`` of a
            ``.master`` and a ``.rank{r}`` file for each expert), ``tutel-ep8`` and so on (models with experts: a new
            directory or ``.zip`` with the state dicts of that many ranks), ``safetensors`` (one file that `predict`,
            `eval` and `load_weights` rebuild the model from, and stock safetensors loads), ``timm`` (safetensors that
            ``timm.create_model(..., checkpoint_path=)`` loads), ``hf`` (a directory for ``from_pretrained``),
            ``torchvision`` or ``mm`` (``.pth`` for torchvision's and mmpretrain's models).
        model: name of the model, for files that do not tell. To ``safetensors`` weights of unknown models are
            converted as they are; all other formats need to know it.
        buffers: whether ``official`` files carry the derived buffers that the official state dicts have.

    Safetensors are streamed: extra memory is one parameter, or one buffer where the values stay the same. Raises
    CheckpointError, or UserError for an unknown format, a missing directory, or a model the format cannot express.
    """
    destination = Path(destination)
    ranks = write_ranks.asked_ranks(to)
    if to not in FORMATS and ranks is None:
        raise UserError(f"--to is {to!r}; known formats are {', '.join(FORMATS)}")
    may_be_directory = to in ("hf", "official") or ranks is not None
    if not destination.parent.is_dir() or (destination.is_dir() and not may_be_directory):
        raise UserError(f"destination {destination}: give a {'new' if may_be_directory else 'file'} name in an "
                        "existing directory")  # fmt: skip
    with open_weights(source, kind=kind) as weights:
        view, origin = as_official(weights), weights.source
        notes = _notes(view)
        try:
            tidy, report, description = _tidy(view, model)
        except CheckpointError as error:
            if to != "safetensors" or model is not None or origin.model is not None:
                raise
            tidy, report, description = weights, view.from_files(_as_it_is(weights)), None
            notes += (f"the model is not known, the tensors are as they were: {error}",)
        if description is None:
            written = plain.write(destination, tidy, None)
            keys, receipt = list(tidy.tensors), {"bytes": written.bytes, "xxh3_128": written.xxh3_128}
        else:
            v = variant(description["name"], **description["overrides"])
            _check_format(to, ranks, v, description["name"], destination)
            out = _foreign(tidy, to, ranks, v, description, destination, buffers)
            receipt = _write(destination, to, out, description, v)
            report = report.after(out.steps)
            keys = [*(out.weights.tensors if out.ranked is None else out.ranked), *out.created]
            lines = (Line(None, key, out.reasons.get(key, _WHY)) for key in out.created)
            report = dataclasses.replace(report, created=(*report.created, *lines))
            notes += _hints(to, v, description["name"])
        report = dataclasses.replace(report, target=str(destination), notes=notes)
        report.check(view.keys, keys)
    head = {"format": to, "file": destination.name, **receipt}
    _write_receipt(destination, head, origin, description, report)
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
    augment = dict((source.model or {}).get("augment") or {})
    description = {"name": name, "overrides": overrides, "classes": classes, "wnids": wnids, "augment": augment}
    return tidy, view.account(report), description


def _step(source: str, name: str, changes: bool, target: Mapping[str, Tensor], where: str) -> Step:
    if not changes:
        return Step((source,), (name,))
    return Step((source,), (name,), lambda values: [adapted(source, name, values[0], target[name], where)])


def _as_it_is(weights: Weights) -> Report:
    copied = tuple(Line(name, name) for name in weights.tensors)
    return Report(source=str(weights.source.path), target="", copied=copied)


@dataclass(frozen=True, kw_only=True)
class _Out:
    """What is to be written."""

    weights: Weights
    """Under the names of the format, or, for ranks, still under our own."""
    steps: Sequence[Step] = ()
    """From our names to those of the format."""
    created: Mapping[str, Tensor] = field(default_factory=dict)
    """What the format has beside the weights: derived buffers and the like."""
    reasons: Mapping[str, str] = field(default_factory=dict)
    """Why something is created, where it is not `_WHY`."""
    ranked: Sequence[str] | None = None
    """Names over the files of all ranks; None for one file."""


def _check_format(to: str, ranks: int | None, v: Variant, name: str, destination: Path) -> None:
    """Raise UserError where the format has no way to say what the model is, or the destination cannot take it."""
    if to == "official" and v.family == "swinv2_moe":
        raise UserError(f"the official code has no model like {name}; convert to safetensors or tutel-epN instead")
    if ranks is not None and v.moe is None:
        raise UserError(f"--to {to}: {name} has no experts; convert to official instead")
    if to == "official" and v.moe is None and destination.is_dir():
        raise UserError(f"destination {destination}: give a file name in an existing directory")
    if (to == "official" or ranks is not None) and v.moe is not None and destination.suffix in (".pth", ".pt"):
        raise UserError(
            f"destination {destination}: a model with experts becomes several files, NAME.pth.rank0 and so on; give a "
            "new directory, or a name that ends in .zip"
        )


def _foreign(
    tidy: Weights,
    to: str,
    ranks: int | None,
    v: Variant,
    description: Mapping[str, Any],
    destination: Path,
    buffers: bool,
) -> _Out:
    """`tidy` under the names of `to`, and the derived buffers to add."""
    if to == "safetensors":
        return _Out(weights=tidy)
    derived = official.derived_buffers(description["name"], description["overrides"])
    if to == "official" or ranks is not None:
        official.check(tidy.tensors, destination)
        derived = derived if buffers else {}
        if v.moe is None:
            return _Out(weights=tidy, created=derived)
        steps = write_ranks.steps(tidy.tensors, ranks)
        created, reasons = write_ranks.additions(tidy.tensors, derived, ranks)
        ranked = [target for step in steps for target in step.targets]
        return _Out(weights=tidy, steps=steps, created=created, reasons=reasons, ranked=ranked)
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
    return _Out(weights=Renamed(tidy, steps), steps=steps, created=created)


def _write(path: Path, to: str, out: _Out, model: Mapping[str, Any], v: Variant) -> dict[str, Any]:
    """Write one format; returns size and digest of the file, or files, with the weights."""
    if out.ranked is not None:
        return write_ranks.write(path, out.weights, out.steps, out.created)
    if to in ("safetensors", "timm"):
        written = plain.write(path, out.weights, model)
    elif to == "hf":
        written = huggingface.write(path, out.weights, model, v)
    else:
        table = {**out.weights.load(), **out.created}
        official.save_torch(path, {"official": {"model": table}, "mm": {"state_dict": table}}.get(to, table))
        size, digest = hash_file(path)
        return {"bytes": size, "xxh3_128": digest}
    return {"bytes": written.bytes, "xxh3_128": written.xxh3_128}


def _notes(view: View) -> tuple[str, ...]:
    origin = view.weights.source
    notes = [f"{origin.kind} weights" + (f" of step {origin.step}" if origin.step is not None else ""), *origin.notes]
    if view.layout != "official":
        notes.append(f"recognised as a model of {layouts.NAMES[view.layout]}")
    if any(map(is_masked, view.clues)):
        # Nothing in the file will tell, and the tables of Swin V1 then grow by another rule (`tables.resized`).
        notes.append(
            "the encoder of a SimMIM model; a Swin V1 with other windows had better start from the whole model"
        )
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
