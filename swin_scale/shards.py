"""The contract between the writer of shards and their readers: manifest and index.

A shard set is one directory of WebDataset tars with two files beside them:

- ``manifest.json``: per shard its name, sample count, bytes and xxh3_128; class names and WordNet ids; the source and
  the seed of the stored permutation.
- ``index.npy``: one `INDEX_DTYPE` row per sample in stored order, memory-mapped by readers, so that a tar becomes
  random access and a cursor into it an integer.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from swin_scale.errors import DataError, UserError
from swin_scale.files import write_atomic

FORMAT = "swin_scale.shards/1"
MANIFEST_NAME = "manifest.json"
INDEX_NAME = "index.npy"
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")

INDEX_DTYPE = np.dtype(
    [
        ("shard", "<u4"),  # row of the shard in the manifest
        ("offset", "<u8"),  # byte offset of the image data inside the tar
        ("size", "<u4"),  # bytes of the image data
        ("label", "<i4"),  # position in Manifest.classes, or -1 for an unlabelled sample
        ("digest", "<u8"),  # xxh3_64 of the image data
    ]
)


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether WebDataset or fsspec would take `path` for a URL, and ``pipe:`` for a command to run."""
    return _SCHEME.match(os.fspath(path)) is not None


def local_directory(path: str | os.PathLike[str], what: str) -> Path:
    """`path`, which must not look like a URL; `what` names the config key or the argument. Raises UserError."""
    if is_url(path):
        raise UserError(
            f"{what}: {os.fspath(path)!r} is a URL; only local shard directories are read. "
            f"Copy or mount the shards and name their directory"
        )
    return Path(path)


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar of the set."""

    name: str
    samples: int
    bytes: int
    xxh3_128: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What is in a shard set. `classes` are display names, `wnids` WordNet ids (or None) in the same order."""

    shards: tuple[Shard, ...]
    classes: tuple[str, ...]
    wnids: tuple[str, ...] | None = None
    source: str = ""
    permutation_seed: int | None = None
    """Seed of the stored permutation; None for foreign sets that were indexed in place."""
    left_out: int = 0
    """Source images that could not be read and are listed in ``left_out.jsonl``."""

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write ``manifest.json``, replaced in one rename."""
        body = {"format": FORMAT, "samples": self.samples, **dataclasses.asdict(self)}
        write_atomic(Path(directory) / MANIFEST_NAME, json.dumps(body, indent=1, ensure_ascii=False).encode() + b"\n")

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Manifest:
        """Read and check ``manifest.json``; raises DataError."""
        path = local_directory(directory, "shard directory") / MANIFEST_NAME
        try:
            body = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise DataError(
                f"{path} does not exist; write shards with `swin-scale shards write`, or index a foreign shard set "
                f"with `swin-scale shards index {directory}`"
            ) from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            seen = body.get("format") if isinstance(body, dict) else type(body).__name__
            raise DataError(f"{path}: format is {seen!r}, expected {FORMAT!r}; re-index with `swin-scale shards index`")
        try:
            manifest = cls(
                shards=tuple(Shard(**shard) for shard in body["shards"]),
                classes=tuple(map(str, body["classes"])),
                wnids=tuple(map(str, body["wnids"])) if body.get("wnids") is not None else None,
                source=str(body.get("source", "")),
                permutation_seed=body.get("permutation_seed"),
                left_out=int(body.get("left_out", 0)),
            )
            stated, summed = int(body["samples"]), manifest.samples
        except (KeyError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise DataError(f"{path}: {reason}; re-index with `swin-scale shards index`") from error
        if stated != summed:
            raise DataError(f"{path}: samples is {stated}, but its shards add up to {summed}")
        for shard in manifest.shards:
            if shard.name != os.path.basename(shard.name) or shard.name in ("", ".", "..") or is_url(shard.name):
                raise DataError(f"{path}: shard name {shard.name!r} is not a plain file name")
        return manifest


@dataclass(frozen=True, kw_only=True)
class ShardSet:
    """A directory of shards, opened: manifest and memory-mapped index."""

    directory: Path
    manifest: Manifest
    index: np.ndarray
    """(samples,) of `INDEX_DTYPE`, read-only and memory-mapped."""

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> ShardSet:
        """Open a shard set and check that manifest, index and files agree in size; raises DataError.

        Contents are checked by ``swin-scale shards verify``; opening must stay cheap on every rank.
        """
        directory = Path(directory)
        manifest = Manifest.load(directory)
        index = load_index(directory)
        if len(index) != manifest.samples:
            raise DataError(
                f"{directory / INDEX_NAME} has {len(index)} rows, but {MANIFEST_NAME} counts {manifest.samples} "
                f"samples; rebuild it with `swin-scale shards index {directory}`"
            )
        for shard in manifest.shards:
            path = directory / shard.name
            try:
                size = path.stat().st_size
            except FileNotFoundError:
                raise DataError(
                    f"{path} is named in {MANIFEST_NAME} but missing; restore it, or drop it with "
                    f"`swin-scale shards index {directory}`"
                ) from None
            if size != shard.bytes:
                raise DataError(f"{path} has {size} bytes, {MANIFEST_NAME} says {shard.bytes}; restore the file")
        return cls(directory=directory, manifest=manifest, index=index)

    def path(self, shard: int) -> Path:
        """The file of shard number `shard`."""
        return self.directory / self.manifest.shards[shard].name

    def __len__(self) -> int:
        return len(self.index)


def load_index(directory: str | os.PathLike[str]) -> np.ndarray:
    """Memory-map ``index.npy`` read-only; raises DataError when missing, damaged or of another type."""
    path = Path(directory) / INDEX_NAME
    try:
        index = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; build it with `swin-scale shards index {directory}`") from None
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"{path} is not an index: {error}; rebuild it with `swin-scale shards index`") from error
    if index.dtype != INDEX_DTYPE or index.ndim != 1:
        raise DataError(f"{path} holds {index.dtype} of shape {index.shape}, expected 1-D {INDEX_DTYPE}")
    return index


def save_index(directory: str | os.PathLike[str], rows: np.ndarray) -> None:
    """Write ``index.npy`` from (samples,) rows of `INDEX_DTYPE`, replaced in one rename."""
    assert rows.dtype == INDEX_DTYPE and rows.ndim == 1, rows.dtype
    buffer = io.BytesIO()
    np.save(buffer, rows, allow_pickle=False)
    write_atomic(Path(directory) / INDEX_NAME, buffer.getbuffer())
