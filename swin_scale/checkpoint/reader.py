"""Reading checkpoints: which are there, which are whole, and any range of any parameter from the files that hold it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swin_scale.checkpoint import strictjson
from swin_scale.checkpoint.manifest import (
    CONFIG_NAME,
    FRAGMENT_DTYPE,
    FRAGMENTS_NAME,
    MANIFEST_NAME,
    STATE_NAME,
    Manifest,
    check_complete,
    file_size,
    read_small,
)
from swin_scale.checkpoint.tensorfile import DTYPES, hash_file, read_range
from swin_scale.errors import CheckpointError
from swin_scale.hashed_file import CHUNK_BYTES

_STEP = re.compile(r"step_(\d{8,})")
_DESCR = re.escape(repr(np.lib.format.dtype_to_descr(FRAGMENT_DTYPE)))
_TABLE = re.compile(
    rf"\x93NUMPY\x01\x00(..)\{{'descr': {_DESCR}, 'fortran_order': False, 'shape': \((\d{{1,18}}),\), \}} *\n".encode(
        "latin-1"
    ),
    re.DOTALL,
)
_OPEN_FILES = 64
_DTYPES = tuple(DTYPES.values())


def step_directory(root: str | os.PathLike[str], step: int) -> Path:
    """The directory of a committed step."""
    return Path(root) / f"step_{step:08d}"


def list_steps(root: str | os.PathLike[str]) -> list[int]:
    """Committed steps, oldest first; whether they are whole is for `newest_good` to say."""
    try:
        entries = [entry.name for entry in os.scandir(root) if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []
    return sorted(int(match[1]) for name in entries if (match := _STEP.fullmatch(name)))


def verify(path: str | os.PathLike[str], files: Iterable[str] | None = None) -> list[str]:
    """Compare size and digest of `files` (default: all in the manifest) with the manifest; returns what is wrong.

    One message per damaged file, each naming it; an empty list means good. Ranks can share the work by passing
    slices of ``sorted(Manifest.files)``. Files are hashed in parallel threads. Raises CheckpointError when the
    manifest itself is damaged or does not know a name.
    """
    directory = Path(path)
    manifest = Manifest.load(directory)
    names = sorted(manifest.files) if files is None else list(files)
    if unknown := [name for name in names if name not in manifest.files]:
        raise CheckpointError(f"{directory / MANIFEST_NAME} has no file {unknown[0]!r}")
    with ThreadPoolExecutor(max_workers=max(1, min(len(names), os.cpu_count() or 1, 8))) as pool:
        problems = list(pool.map(lambda name: _problem(directory / name, manifest, digest=True), names))
    return [problem for problem in problems if problem]


def _problem(path: Path, manifest: Manifest, *, digest: bool) -> str | None:
    stated = manifest.files[path.name]
    try:
        size = file_size(path)
        if size != stated.bytes:
            return f"{path} is damaged: {size} bytes, the manifest says {stated.bytes}"
        if digest and (seen := hash_file(path)[1]) != stated.xxh3_128:
            return f"{path} is damaged: xxh3_128 is {seen}, the manifest says {stated.xxh3_128}"
    except CheckpointError as error:
        return str(error)
    except OSError as error:
        return f"{path} cannot be read: {error.strerror or error}"
    return None


class Checkpoint:
    """A committed checkpoint, opened. Use `Checkpoint.open`; close it, or use it in a ``with``."""

    def __init__(self, path: Path, manifest: Manifest, table: np.ndarray) -> None:
        self.path = path
        self.manifest = manifest
        self.step: int = manifest.step
        self.parameters = manifest.parameters
        self.model = manifest.model
        self.state: dict[str, Any] = _load_state(path / STATE_NAME)
        self.config_text: str = _load_text(path / CONFIG_NAME)
        self._table = table
        self._name_id = {name: i for i, name in enumerate(manifest.parameters)}
        self._kind_id = {kind: i for i, kind in enumerate(manifest.kinds)}
        self._key = table["kind"].astype(np.int64) * max(1, len(self._name_id)) + table["name"]
        self._starts = table["start"].astype(np.int64)
        self._descriptors: dict[int, int] = {}

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: bool = True) -> Checkpoint:
        """Open one step directory; raises CheckpointError naming every damaged file.

        The manifest, the fragment table, state and config are always checked against their digests, and tensor files
        against their size; ``verify=True`` also reads the tensor files and checks their digests.
        """
        directory = Path(path)
        manifest = Manifest.load(directory)
        needed = {FRAGMENTS_NAME, STATE_NAME, CONFIG_NAME}
        if missing := needed - manifest.files.keys():
            raise CheckpointError(f"{directory / MANIFEST_NAME} does not list {', '.join(sorted(missing))}")
        if verify:
            problems = _verify(directory)
        else:
            found = [_problem(directory / name, manifest, digest=name in needed) for name in manifest.files]
            problems = [problem for problem in found if problem]
        if problems:
            raise CheckpointError("; ".join(problems))
        table = _load_table(directory / FRAGMENTS_NAME)
        check_complete(table, manifest, str(directory))
        _check_ranges(table, manifest, directory)
        return cls(directory, manifest, table)

    def kinds(self) -> tuple[str, ...]:
        """What is stored per parameter: ``master`` first, then the others by name."""
        return self.manifest.kinds

    def read(
        self, kind: str, name: str, start: int = 0, length: int | None = None, out: Tensor | None = None
    ) -> Tensor:
        """Elements [start, start + length) of the flattened parameter, assembled from the files that hold them.

        `length` defaults to the rest. `out`: 1-D of that length, any device and dtype, filled and returned; otherwise
        a new CPU tensor of the stored dtype. Raises CheckpointError for an unknown kind or name, or a damaged file.
        """
        if kind not in self._kind_id or name not in self._name_id:
            has = f"{', '.join(self.kinds())} of {len(self._name_id)} parameters"
            raise CheckpointError(f"{self.path} has no {kind} of {name!r}; it has {has}")
        numel = self.manifest.numel(name)
        length = numel - start if length is None else length
        assert 0 <= start <= start + length <= numel, f"{name}: elements {start} to {start + length} of {numel}"
        key = self._kind_id[kind] * len(self._name_id) + self._name_id[name]
        low, high = np.searchsorted(self._key, [key, key + 1])
        if low == high and numel:
            raise CheckpointError(f"{self.path} has no {kind} of {name!r}: it is not trained")
        dtype = _DTYPES[self._table["dtype"][low]] if low < high else torch.float32
        if out is None:
            out = torch.empty(length, dtype=dtype)
        assert out.shape == (length,), f"{name}: out is {tuple(out.shape)}, expected ({length},)"
        stop = start + length
        starts = self._starts[low:high]
        first = low + max(0, int(np.searchsorted(starts, start, side="right")) - 1)
        last = low + int(np.searchsorted(starts, stop, side="left"))
        for _, _, at, count, file, offset, _ in self._table[first:last].tolist():
            begin, end = max(start, at), min(stop, at + count)
            if begin < end:
                self._fill(file, offset + (begin - at) * dtype.itemsize, dtype, out[begin - start : end - start])
        return out

    def _fill(self, file: int, offset: int, dtype: torch.dtype, out: Tensor) -> None:
        """Read straight into `out` where its memory allows, else through one chunk."""
        path = self.path / self.manifest.rank_files[file]
        descriptor = self._descriptor(file, path)
        if out.device.type == "cpu" and out.dtype == dtype and out.is_contiguous():
            read_range(descriptor, path, offset, out.detach())
            return
        for part in out.detach().split(CHUNK_BYTES // dtype.itemsize):
            staging = torch.empty(part.numel(), dtype=dtype)
            read_range(descriptor, path, offset, staging)
            part.copy_(staging)
            offset += part.numel() * dtype.itemsize

    def _descriptor(self, file: int, path: Path) -> int:
        if file not in self._descriptors:
            if len(self._descriptors) >= _OPEN_FILES:
                os.close(self._descriptors.pop(next(iter(self._descriptors))))
            try:
                self._descriptors[file] = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
        return self._descriptors[file]

    def load_full(self, kind: str = "master") -> dict[str, Tensor]:
        """Every parameter of `kind` in full shape on the CPU, in model order."""
        covered = self.parameters if kind in ("master", "ema") else filter(self.manifest.trained, self.parameters)
        return {name: self.read(kind, name).view(tuple(self.parameters[name]["shape"])) for name in covered}

    def close(self) -> None:
        """Close the files; reading again reopens them."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


_verify = verify  # `Checkpoint.open` has a parameter of the same name


def _load_state(path: Path) -> dict[str, Any]:
    state = strictjson.loads(read_small(path), path)
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} is damaged: it holds {type(state).__name__}, not a table")
    return state


def _load_text(path: Path) -> str:
    try:
        return read_small(path).decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def _load_table(path: Path) -> np.ndarray:
    """The table as `np.save` wrote it.

    `np.load` would also open archives and pickles, and evaluates headers: this knows the one header there can be.
    """
    try:
        with open(path, "rb") as file:
            found = _TABLE.match(file.read(10 + 0xFFFF))
            size = os.fstat(file.fileno()).st_size
            if found is None or found.end() != 10 + int.from_bytes(found[1], "little"):
                raise CheckpointError(f"{path} is not a fragment table: its header is another one")
            rows = int(found[2])
            if found.end() + rows * FRAGMENT_DTYPE.itemsize != size:
                raise CheckpointError(f"{path} is not a fragment table: {rows} rows do not fill its {size} bytes")
            file.seek(found.end())
            return np.fromfile(file, FRAGMENT_DTYPE, rows)
    except (OSError, MemoryError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _check_ranges(table: np.ndarray, manifest: Manifest, directory: Path) -> None:
    """Every fragment ends inside its file, and before the next one of the file begins."""
    itemsize = np.array([dtype.itemsize for dtype in DTYPES.values()], dtype=np.uint64)
    sizes = np.array([manifest.files[name].bytes for name in manifest.rank_files], dtype=np.uint64)
    end = table["offset"] + table["length"] * itemsize[table["dtype"]]

    def fail(row: int, what: str) -> None:
        raise CheckpointError(f"{directory / manifest.rank_files[table['file'][row]]}: a fragment {what}")

    for row in np.flatnonzero(end > sizes[table["file"]])[:1]:
        fail(row, f"ends at byte {int(end[row])} of {int(sizes[table['file'][row]])}")
    order = np.lexsort((table["offset"], table["file"]))
    here, after = order[:-1], order[1:]
    overlap = (table["file"][here] == table["file"][after]) & (end[here] > table["offset"][after])
    for row in after[np.flatnonzero(overlap)[:1]]:
        fail(row, f"at byte {int(table['offset'][row])} overlaps the one before")


def newest_good(
    root: str | os.PathLike[str], on_bad: Callable[[Path, str], None] = lambda path, what: None
) -> Checkpoint | None:
    """The newest checkpoint under `root` whose files all match their digests, or None.

    Every newer one that does not is passed to ``on_bad(directory, message)``; the message names the damaged files.
    The ``latest`` file is only a hint for people and is not read.
    """
    for step in reversed(list_steps(root)):
        directory = step_directory(root, step)
        try:
            return Checkpoint.open(directory)
        except CheckpointError as error:
            on_bad(directory, str(error))
    return None
