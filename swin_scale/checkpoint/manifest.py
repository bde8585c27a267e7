"""What a checkpoint directory says about itself.

- ``rank00000.safetensors``, ...: fragments, each under ``kind/name@start``
- ``fragments.npy``: one `FRAGMENT_DTYPE` row per fragment, sorted by kind, parameter and start
- ``state.json``: step, schedule, loss scale, data cursor; ``config.yaml``: the resolved config
- ``manifest.json``: size and xxh3_128 of every file above, parameters with their shapes, the model's description. It
  carries a digest of its own body, so a flipped bit anywhere in the directory is found and named.

The fragment table is binary because ZeRO-3 on hundreds of ranks makes millions of rows, which as JSON would take
seconds and a gigabyte on every rank.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from swin_scale.checkpoint import strictjson
from swin_scale.checkpoint.tensorfile import DTYPES
from swin_scale.errors import CheckpointError

FORMAT = "swin_scale.checkpoint/1"
MANIFEST_NAME = "manifest.json"
FRAGMENTS_NAME = "fragments.npy"
STATE_NAME = "state.json"
CONFIG_NAME = "config.yaml"
MAX_JSON_BYTES = 8 << 20
"""Largest manifest or state read: 50,000 parameters. The JSON parser may need 25 times as much memory."""
MAX_NUMEL = 1 << 62

FRAGMENT_DTYPE = np.dtype(
    [
        ("kind", "<u2"),  # position in Manifest.kinds
        ("name", "<u4"),  # position in Manifest.parameters
        ("start", "<u8"),  # first element of the flattened parameter
        ("length", "<u8"),  # elements
        ("file", "<u4"),  # position in Manifest.rank_files
        ("offset", "<u8"),  # byte offset of the first element from the start of the file
        ("dtype", "<u2"),  # position in tensorfile.DTYPES
    ]
)

EVERY_PARAMETER = ("master", "ema")
"""Kinds that cover every parameter; the others (moments) cover the trained ones."""


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """A contiguous range of one flattened parameter (or of its moment), as one rank holds it."""

    name: str
    """Official parameter name, global over ranks and experts."""
    kind: str
    """``master`` (fp32 weights), ``exp_avg``, ``exp_avg_sq``, ``momentum``, ``ema``, ..."""
    shape: tuple[int, ...]
    """Full shape of the parameter."""
    start: int
    """First element of the flattened parameter that `data` covers."""
    data: torch.Tensor
    """1-D, any device and dtype; never copied as a whole."""


@dataclass(frozen=True, kw_only=True)
class RankFile:
    """Summary of one written file, small enough to gather on rank 0."""

    name: str
    bytes: int
    xxh3_128: str
    fragments: tuple[tuple[str, str, int, int, int, str], ...]
    """(kind, parameter, start, length, byte offset, safetensors dtype name)."""


@dataclass(frozen=True, kw_only=True)
class FileDigest:
    """Size and xxh3_128 (hex) of one file."""

    bytes: int
    xxh3_128: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of ``manifest.json``; `files` has every other file of the directory by name."""

    step: int
    files: Mapping[str, FileDigest]
    rank_files: tuple[str, ...]
    kinds: tuple[str, ...]
    parameters: Mapping[str, Mapping[str, Any]]
    """Per parameter ``shape`` (list), ``dtype`` (text) and ``trained`` (true when left out)."""
    model: Mapping[str, Any]

    def encode(self) -> bytes:
        """The bytes of ``manifest.json``: format, digest of the body, body."""
        body = strictjson.dumps(
            {
                "step": self.step,
                "files": {name: [digest.bytes, digest.xxh3_128] for name, digest in self.files.items()},
                "rank_files": list(self.rank_files),
                "kinds": list(self.kinds),
                "dtypes": list(DTYPES),
                "parameters": self.parameters,
                "model": self.model,
            },
            indent=1,
        )
        text = _prefix(body) + body + b"}\n"
        if len(text) > MAX_JSON_BYTES:
            raise CheckpointError(f"{MANIFEST_NAME} would have {len(text)} bytes, over the limit of {MAX_JSON_BYTES}")
        return text

    @classmethod
    def load(cls, directory: Path) -> Manifest:
        """Read and check ``manifest.json``; raises CheckpointError."""
        path = directory / MANIFEST_NAME
        raw = read_small(path)
        start = len(_prefix(b""))
        body = raw[start:-2]
        if raw != _prefix(body) + body + b"}\n":
            raise CheckpointError(f"{path} is damaged: format or digest do not match its content")
        table = strictjson.loads(body, path)
        try:
            if table["dtypes"] != list(DTYPES):
                raise CheckpointError(f"{path}: its dtype table is not the one of this version")
            manifest = cls(
                step=int(table["step"]),
                files={name: FileDigest(bytes=int(b), xxh3_128=str(d)) for name, (b, d) in table["files"].items()},
                rank_files=tuple(map(str, table["rank_files"])),
                kinds=tuple(map(str, table["kinds"])),
                parameters=dict(table["parameters"]),
                model=dict(table["model"]),
            )
            for name, row in manifest.parameters.items():
                if not all(type(size) is int and size >= 0 for size in row["shape"]):
                    raise CheckpointError(f"{path}: parameter {name!r} has shape {str(row['shape'])[:80]}")
                if len(row["shape"]) > 64 or math.prod(row["shape"]) >= MAX_NUMEL:
                    raise CheckpointError(f"{path}: parameter {name!r} has shape {str(row['shape'])[:80]}")
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {str(error)[:200]}") from error
        for name in (*manifest.files, *manifest.rank_files):
            if name != os.path.basename(name) or name in ("", ".", "..") or "\0" in name or name not in manifest.files:
                raise CheckpointError(f"{path}: {name[:80]!r} is not one of its files")
        return manifest

    def numel(self, name: str) -> int:
        """Elements of parameter `name`."""
        return math.prod(self.parameters[name]["shape"])

    def trained(self, name: str) -> bool:
        """Whether the optimizer updates parameter `name`."""
        return bool(self.parameters[name].get("trained", True))


def _prefix(body: bytes) -> bytes:
    return f'{{"format": "{FORMAT}", "xxh3_128": "{xxhash.xxh3_128(body).hexdigest()}", "body": '.encode()


def file_size(path: Path) -> int:
    """Bytes of a plain file; raises CheckpointError for links and devices, which a checkpoint never holds, and OSError.

    A link could lead anywhere, and opening a pipe waits for ever.
    """
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path} is not a plain file; checkpoints hold no links, pipes or devices")
    return found.st_size


def read_small(path: Path) -> bytes:
    """Bytes of a file that must be small; raises CheckpointError."""
    try:
        size = file_size(path)
        if size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} has {size} bytes, over the limit of {MAX_JSON_BYTES}")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def fragment_table(
    rank_files: tuple[RankFile, ...], kinds: tuple[str, ...], parameters: Mapping[str, Mapping[str, Any]]
) -> np.ndarray:
    """(fragments,) of `FRAGMENT_DTYPE` sorted by kind, parameter and start, from the summaries of all ranks."""
    kind_id = {kind: i for i, kind in enumerate(kinds)}
    name_id = {name: i for i, name in enumerate(parameters)}
    dtype_id = {dtype: i for i, dtype in enumerate(DTYPES)}
    rows = []
    for file_id, file in enumerate(rank_files):
        for kind, name, start, length, offset, dtype in file.fragments:
            if name not in name_id:
                raise CheckpointError(f"{file.name} holds {kind} of {name!r}, which is not a parameter of the model")
            rows.append((kind_id[kind], name_id[name], start, length, file_id, offset, dtype_id[dtype]))
    table = np.array(rows, dtype=FRAGMENT_DTYPE)
    return table[np.lexsort((table["start"], table["name"], table["kind"]))]


def check_complete(table: np.ndarray, manifest: Manifest, where: str) -> None:
    """Every element of every parameter is covered exactly once per kind, in one dtype; else CheckpointError.

    `table` must be sorted. ``master`` and ``ema`` cover every parameter, the moments every trained one.
    """
    sizes = np.array([manifest.numel(name) for name in manifest.parameters], dtype=np.uint64)
    names = list(manifest.parameters)

    def fail(row: int, what: str) -> None:
        kind, name = manifest.kinds[table["kind"][row]], names[table["name"][row]]
        raise CheckpointError(f"{where}: {kind} of {name} (shape {manifest.parameters[name]['shape']}) {what}")

    if len(table):
        bounds = ("kind", len(manifest.kinds)), ("name", len(names)), ("file", len(manifest.rank_files))
        for column, limit in (*bounds, ("dtype", len(DTYPES))):
            if int(table[column].max()) >= limit:
                raise CheckpointError(f"{where}: fragment table has {column} {table[column].max()} of {limit}")
        key = table["kind"].astype(np.int64) * len(names) + table["name"]
        if (np.diff(key) < 0).any():
            raise CheckpointError(f"{where}: fragment table is not sorted")
        if int(max(table["start"].max(), table["length"].max(), table["offset"].max())) >= 1 << 62:
            raise CheckpointError(f"{where}: fragment table has numbers beyond any file")
        start, end = table["start"], table["start"] + table["length"]
        first = np.r_[True, key[1:] != key[:-1]]
        last = np.r_[first[1:], True]
        due = np.where(first, np.uint64(0), np.r_[end[:1], end[:-1]])
        for row in np.flatnonzero(start != due)[:1]:
            seen, expected = int(start[row]), int(due[row])
            if seen > expected:
                fail(row, f"lacks elements {expected} to {seen - 1}")
            fail(row, f"covers elements from {seen} to {expected - 1} twice")
        for row in np.flatnonzero(last & (end != sizes[table["name"]]))[:1]:
            fail(row, f"ends at element {int(end[row])} of {int(sizes[table['name'][row]])}")
        for row in np.flatnonzero(~first & (table["dtype"] != np.r_[table["dtype"][:1], table["dtype"][:-1]]))[:1]:
            fail(row, "has fragments of several dtypes")
    present = set(zip(table["kind"].tolist(), table["name"].tolist()))
    for kind_id, kind in enumerate(manifest.kinds):
        for name_id, name in enumerate(names):
            needed = manifest.numel(name) > 0 and (kind in EVERY_PARAMETER or manifest.trained(name))
            if needed and (kind_id, name_id) not in present:
                raise CheckpointError(f"{where}: {kind} of {name} is missing altogether")
    if "master" not in manifest.kinds:
        raise CheckpointError(f"{where}: holds {', '.join(manifest.kinds) or 'nothing'}, but no master weights")
