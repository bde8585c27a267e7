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
from swin_scale.convert import official, plain
from swin_scale.convert.fit import fit
from swin_scale.convert.load import describe_model, label_names
from swin_scale.convert.report import Report
from swin_scale.convert.source import Source, read_state_dict
from swin_scale.errors import UserError
from swin_scale.files import write_atomic
from swin_scale.models import create_model

Format = Literal["official", "safetensors"]
FORMATS: Mapping[str, str] = {"official": official.SUFFIX, "safetensors": plain.SUFFIX}
"""Format -> usual suffix."""


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
        source, kind: see `read_state_dict`.
        destination: the file; its directory must exist.
        to: ``official`` (``.pth`` for the official repository) or ``safetensors`` (one file that `predict`, `eval` and
            `load_weights` rebuild the model from, and stock safetensors loads).
        model: name of the model, for files that do not tell.
        buffers: whether ``official`` files carry the derived buffers that the official state dicts have.

    Raises CheckpointError, or UserError for an unknown format or a missing directory.
    """
    destination = Path(destination)
    if to not in FORMATS:
        raise UserError(f"--to is {to!r}; known formats are {', '.join(FORMATS)}")
    if not destination.parent.is_dir() or destination.is_dir():
        raise UserError(f"destination {destination}: give a file name in an existing directory")
    loaded, origin = read_state_dict(source, kind=kind)
    name, overrides = describe_model(loaded, origin, model)
    state, report = _tidy(loaded, origin, name, overrides)
    classes, wnids = label_names(origin, len(state["head.weight"]) if "head.weight" in state else 0)
    description = {"name": name, "overrides": overrides, "classes": classes, "wnids": wnids}
    if to == "official":
        keys, created = official.write(destination, state, description, buffers=buffers)
    else:
        keys, created = plain.write(destination, state, description, kind=origin.kind, step=origin.step)
    report = dataclasses.replace(
        report, target=str(destination), created=(*report.created, *created), notes=_notes(origin)
    )
    report.check(loaded, keys)
    _write_receipt(destination, to, origin, description, report)
    return report


def _tidy(
    loaded: Mapping[str, Tensor], origin: Source, name: str, overrides: Mapping[str, Any]
) -> tuple[dict[str, Tensor], Report]:
    """The parameters of the model alone, in fp32 and official order."""
    with torch.device("meta"):
        target = create_model(name, **overrides).state_dict()
    return fit(loaded, target, where=str(origin.path), into=name, head="keep")


def _notes(origin: Source) -> tuple[str, ...]:
    notes = [f"{origin.kind} weights" + (f" of step {origin.step}" if origin.step is not None else "")]
    if origin.beside:
        notes.append(f"left out, beside the weights in the file: {', '.join(origin.beside)}")
    return tuple(notes)


def _write_receipt(destination: Path, to: str, origin: Source, description: Mapping[str, Any], report: Report) -> None:
    size, digest = hash_file(destination)
    receipt = {
        "format": to,
        "file": destination.name,
        "bytes": size,
        "xxh3_128": digest,
        "source": str(origin.path),
        "source_format": origin.format,
        "kind": origin.kind,
        "step": origin.step,
        "model": {"name": description["name"], "overrides": description["overrides"]},
        **report.as_dict(),
    }
    write_atomic(destination.with_name(f"{destination.name}.receipt.json"), strictjson.dumps(receipt, indent=1) + b"\n")
