"""The files of an official Swin-MoE, written for a number of ranks: a new directory, or a zip of the same files.

- ``official``: ``.master`` and ``.rank{r}``, one expert on each rank, as the published models come. The official
  fine-tuning load joins the two; its resume reads ``.rank{r}`` alone and would start with a random backbone.
- ``tutel-epN``: ``.rank{r}`` for N ranks, each the whole state dict of its rank, for both official loads, for Tutel's
  gather tool, and for any model with Tutel's layers.

Shapes are those of present Tutel, which earlier ones view as theirs.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swin_scale.checkpoint.tensorfile import hash_file
from swin_scale.convert import experts, official
from swin_scale.convert.experts import Placing
from swin_scale.convert.plain import replacing, replacing_directory
from swin_scale.convert.weights import Step, Weights, apply_steps
from swin_scale.errors import UserError

TUTEL = "tutel-epN"
_TUTEL = re.compile(r"tutel-ep(\d{1,6})")


def asked_ranks(to: str) -> int | None:
    """N of a format ``tutel-epN``; None for other formats. Raises UserError for one without a number."""
    if to == TUTEL:
        raise UserError(f"--to {to}: put the number of ranks in place of N, as in tutel-ep8")
    found = _TUTEL.fullmatch(to)
    if found and not int(found[1]):
        raise UserError(f"--to {to}: there is at least one rank")
    return int(found[1]) if found else None


def steps(tensors: Mapping[str, Tensor], ranks: int | None) -> list[Step]:
    """Steps to keys ``rank3/KEY`` and ``master/KEY``; `ranks` None makes the official form with a rank per expert.

    Raises UserError, naming the format, where the experts cannot lie on so many ranks.
    """
    made = []
    for key, tensor in tensors.items():
        found = experts.match(key)
        if found is not None:
            placing = Placing(len(tensor), ranks or len(tensor))
            _check(placing, found[1], tensor)
            targets = tuple(f"rank{rank}/{key}" for rank in range(placing.ranks))
            made.append(Step((key,), targets, experts.cutting(found[1], placing), f"cut for {placing.ranks} ranks"))
        elif ranks is None:
            made.append(Step((key,), (f"master/{key}",)))
        else:
            targets = tuple(f"rank{rank}/{key}" for rank in range(ranks))
            made.append(Step((key,), targets, lambda values: list(values) * ranks, "on every rank"))
    return made


def _check(placing: Placing, name: str, tensor: Tensor) -> None:
    hidden, is_padded = tensor.shape[1], name == "batched_fc2_bias"
    if not placing.fits or (hidden % placing.sharing and not is_padded):
        total = placing.experts
        fewer = [ranks for ranks in range(1, total + 1) if total % ranks == 0]
        raise UserError(
            f"--to tutel-ep{placing.ranks}: {total} experts do not lie on {placing.ranks} ranks; "
            f"choose one of {', '.join(map(str, fewer))}, or {total} times a divisor of the hidden units"
        )


def additions(
    tensors: Mapping[str, Tensor], buffers: Mapping[str, Tensor], ranks: int | None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What the files have beside `tensors`, by the same keys, and why: derived buffers, Tutel's count of experts."""
    layers = {found[0]: len(tensor) for key, tensor in tensors.items() if (found := experts.match(key))}
    counts = {f"{prefix}_num_global_experts": torch.tensor(total) for prefix, total in layers.items()}
    labels = ["master"] if ranks is None else [f"rank{rank}" for rank in range(ranks)]
    added = {f"{label}/{key}": tensor for label in labels for key, tensor in {**buffers, **counts}.items()}
    return added, {f"{label}/{key}": "number of experts, expected by Tutel" for label in labels for key in counts}


def write(path: Path, weights: Weights, made: Sequence[Step], added: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write the files in one rename; returns what the receipt says of them.

    Everything is in memory once, and one rank's experts a second time. Raises CheckpointError, UserError.
    """
    tables: dict[str, dict[str, Tensor]] = {}
    for key, tensor in {**apply_steps(weights.load(), made), **added}.items():
        label, _, name = key.partition("/")
        tables.setdefault(label, {})[name] = tensor
    weights.finish()
    stem = path.name.removesuffix(".zip")
    stem = stem if stem.endswith(".pth") else f"{stem}.pth"
    names = {label: f"{stem}.{label}" for label in sorted(tables, key=lambda label: (len(label), label))}
    if path.suffix == ".zip":
        with replacing(path) as temporary:
            _write_zip(temporary, {name: tables[label] for label, name in names.items()})
        size, digest = hash_file(path)
        return {"bytes": size, "xxh3_128": digest, "members": list(names.values())}
    with replacing_directory(path) as directory:
        for label, name in names.items():
            official.save_torch(directory / name, {"model": _own(tables[label])})
    digests = {name: hash_file(path / name) for name in names.values()}
    files = {name: {"bytes": size, "xxh3_128": digest} for name, (size, digest) in digests.items()}
    return {"bytes": sum(size for size, _ in digests.values()), "files": files}


def _write_zip(path: Path, tables: Mapping[str, Mapping[str, Tensor]]) -> None:
    try:
        with open(path, "wb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                for name, table in tables.items():
                    with archive.open(name, "w", force_zip64=True) as member:
                        torch.save({"model": _own(table)}, member)
            file.flush()
            os.fsync(file.fileno())
    except RuntimeError as error:  # what torch makes of a failed write
        raise OSError(str(error)) from error


def _own(table: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor in memory of its own: ``torch.save`` would write all that a view is a part of."""
    return {
        key: tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
        for key, tensor in table.items()
    }
