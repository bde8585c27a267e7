"""Writing checkpoints: every rank its own file into a temporary directory, one rename by rank 0 commits them all.

The order is ``begin`` (rank 0), ``write_rank_file`` (all ranks, in parallel), ``commit`` (rank 0, with the gathered
`RankFile` summaries), ``prune`` (rank 0). A kill at any moment leaves the committed checkpoints as they were and at
most directories that start with a dot, which nobody reads and the next ``begin`` or ``prune`` removes:

- ``.step_N.tmp``: being written
- ``.step_N.replaced``: whole, moved aside for a new one of the same step; `recover` puts it back when that never came
- ``.step_N.old``: being removed
"""

from __future__ import annotations

import functools
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from swin_scale.checkpoint import strictjson
from swin_scale.checkpoint.manifest import (
    CONFIG_NAME,
    FRAGMENTS_NAME,
    MANIFEST_NAME,
    STATE_NAME,
    FileDigest,
    Fragment,
    Manifest,
    RankFile,
    check_complete,
    fragment_table,
    read_small,
)
from swin_scale.checkpoint.reader import Checkpoint, list_steps, step_directory
from swin_scale.checkpoint.tensorfile import build_header, hash_file, write_tensor_file
from swin_scale.errors import CheckpointError
from swin_scale.files import fsync_directory, write_atomic
from swin_scale.hashed_file import CHUNK_BYTES

logger = logging.getLogger(__name__)

LATEST_NAME = "latest"
_TEMPORARY_FILE = re.compile(r"\.(latest|load_attempts\.json)\.\d+\.tmp")
_LEFTOVER = re.compile(r"\.step_(\d{8,})\.(tmp|old|replaced)")


def temporary_directory(root: str | os.PathLike[str], step: int) -> Path:
    """Where step `step` is written before it is committed; a pure function, so ranks need not exchange it."""
    return Path(root) / f".step_{step:08d}.tmp"


def begin(root: str | os.PathLike[str], step: int) -> Path:
    """Create the empty temporary directory of `step` (rank 0 only); leftovers of an earlier try are removed."""
    temporary = temporary_directory(root, step)
    recover(root)
    try:
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"{temporary} cannot be created: {error.strerror or error}") from error
    return temporary


@dataclass(frozen=True, kw_only=True)
class RankLayout:
    """Where everything lies in the file of one rank, known before a byte of it is written."""

    name: str
    header: bytes
    tensors: tuple[tuple[str, torch.Tensor], ...]
    """(name in the file, 1-D data)."""
    offsets: Mapping[str, int]
    """First byte of each tensor, by its name in the file; a multiple of its item size."""
    rows: tuple[tuple[str, str, int, int, int, str], ...]
    """`RankFile.fragments`."""
    bytes: int

    def written(self, xxh3_128: str) -> RankFile:
        """The summary of the file once it is on the disk."""
        return RankFile(name=self.name, bytes=self.bytes, xxh3_128=xxh3_128, fragments=self.rows)


_METADATA = {"format": "pt", "swin_scale": "fragments/1"}


def rank_layout(rank: int, fragments: Sequence[Fragment]) -> RankLayout:
    """The layout of what `rank` holds: a pure function of the fragments' names, ranges and dtypes.

    Raises CheckpointError for what the format cannot hold.
    """
    name = f"rank{rank:05d}.safetensors"
    kept = [fragment for fragment in fragments if fragment.data.numel()]
    for fragment in kept:
        assert fragment.data.dim() == 1, f"{fragment.name}: data is {fragment.data.dim()}-D"
        numel = math.prod(fragment.shape)
        end = fragment.start + fragment.data.numel()
        assert 0 <= fragment.start < end <= numel, f"{fragment.name}: elements {fragment.start} to {end} of {numel}"
    tensors = tuple((_key(fragment.kind, fragment.name, fragment.start), fragment.data) for fragment in kept)
    header, ordered = build_header(Path(name), tensors, _METADATA)
    entries = {entry.name: entry for entry in ordered}
    rows = []
    for (key, data), fragment in zip(tensors, kept):
        entry = entries[key]
        rows.append((fragment.kind, fragment.name, fragment.start, data.numel(), entry.begin, entry.dtype))
    return RankLayout(
        name=name,
        header=header,
        tensors=tensors,
        offsets={key: entry.begin for key, entry in entries.items()},
        rows=tuple(rows),
        bytes=ordered[-1].end if ordered else len(header),
    )


def write_rank_file(
    directory: str | os.PathLike[str], rank: int, fragments: Sequence[Fragment], *, chunk_bytes: int = CHUNK_BYTES
) -> RankFile:
    """Write what `rank` holds to ``rank{rank:05d}.safetensors``, hashed while written, fsynced.

    Extra memory is one buffer of `chunk_bytes` when a fragment is not a contiguous CPU tensor, and none otherwise.
    Raises CheckpointError naming the file when it cannot be written; the part is removed.
    """
    layout = rank_layout(rank, fragments)
    written = write_tensor_file(Path(directory) / layout.name, layout.tensors, _METADATA, chunk_bytes=chunk_bytes)
    assert written.bytes == layout.bytes
    return layout.written(written.xxh3_128)


def _key(kind: str, name: str, start: int) -> str:
    return f"{kind}/{name}@{start}"


def commit(
    temporary: Path,
    *,
    step: int,
    rank_files: Sequence[RankFile],
    state: Mapping[str, Any],
    config_text: str,
    parameters: Mapping[str, Mapping[str, Any]],
    model: Mapping[str, Any],
) -> Path:
    """Make the files in `temporary` the checkpoint of `step` (rank 0 only); returns its directory.

    Checks that the ranks' fragments cover every parameter exactly once per kind, writes ``fragments.npy``,
    ``state.json``, ``config.yaml`` and ``manifest.json``, fsyncs, and renames. An older checkpoint of the same step is
    moved aside first and removed afterwards. `state`, `parameters` and `model` must be JSON without NaN. Raises
    CheckpointError (incomplete fragments, full disk); `temporary` is then removed.
    """
    root = temporary.parent
    target = step_directory(root, step)
    files = tuple(sorted(rank_files, key=lambda file: file.name))
    present = {row[0] for file in files for row in file.fragments}
    kinds = tuple(sorted(present, key=lambda kind: (kind != "master", kind)))
    try:
        table = fragment_table(files, kinds, parameters)
        np.save(temporary / FRAGMENTS_NAME, table, allow_pickle=False)
        (temporary / STATE_NAME).write_bytes(strictjson.dumps(dict(state), indent=1) + b"\n")
        (temporary / CONFIG_NAME).write_bytes(config_text.encode())
        digests = {file.name: FileDigest(bytes=file.bytes, xxh3_128=file.xxh3_128) for file in files}
        for name in (FRAGMENTS_NAME, STATE_NAME, CONFIG_NAME):
            _fsync_file(temporary / name)
            size, digest = hash_file(temporary / name)
            digests[name] = FileDigest(bytes=size, xxh3_128=digest)
        manifest = Manifest(
            step=step,
            files=digests,
            rank_files=tuple(file.name for file in files),
            kinds=kinds,
            parameters=parameters,
            model=model,
        )
        check_complete(table, manifest, str(target))
        write_atomic(temporary / MANIFEST_NAME, manifest.encode())
        if target.exists():
            os.rename(target, _aside(root, step, "replaced"))
        os.rename(temporary, target)
        fsync_directory(root)
    except OSError as error:
        discard(temporary)
        recover(root)
        reason = error.strerror or error
        raise CheckpointError(f"{target} cannot be written: {reason}; free space or fix the path") from error
    except CheckpointError:
        discard(temporary)
        raise
    try:
        write_atomic(root / LATEST_NAME, f"{target.name}\n".encode())
    except OSError as error:
        logger.warning("%s cannot be written (%s); it is only a hint", root / LATEST_NAME, error.strerror or error)
    _remove_leftovers(root, up_to=step)
    return target


def recover(root: str | os.PathLike[str]) -> list[int]:
    """Put back what was moved aside for a replacement that never came (rank 0 only); returns those steps."""
    back = []
    for path, step, what in _dot_directories(Path(root)):
        target = step_directory(root, step)
        if what == "replaced" and not target.exists():
            try:
                os.rename(path, target)
            except OSError as error:
                logger.warning("%s cannot be put back as %s: %s", path, target.name, error.strerror or error)
                continue
            back.append(step)
    return back


def discard(temporary: Path) -> None:
    """Remove a temporary directory after a failed save (rank 0 only); what cannot be removed is logged and left."""
    shutil.rmtree(temporary, ignore_errors=True)
    if temporary.exists():
        logger.warning("%s cannot be removed whole; remove it by hand", temporary)


def _fsync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _aside(root: Path, step: int, what: str) -> Path:
    """A free name that nobody takes for a checkpoint, so that no kill leaves half of one under a committed name."""
    aside = root / f".step_{step:08d}.{what}"
    if aside.exists():
        discard(aside)
    return aside


def _dot_directories(root: Path) -> list[tuple[Path, int, str]]:
    """(path, step, tmp | old | replaced) of what saves and removals leave when they are killed."""
    try:
        found = [(entry, _LEFTOVER.fullmatch(entry.name)) for entry in root.iterdir()]
    except FileNotFoundError:
        return []
    return sorted((entry, int(match[1]), match[2]) for entry, match in found if match)


def _remove(path: Path, step: int) -> None:
    """Remove a whole checkpoint of `step`: renamed first, so that half of it is never taken for one."""
    aside = _aside(path.parent, step, "old")
    os.rename(path, aside)
    discard(aside)


def _remove_leftovers(root: Path, *, up_to: int) -> None:
    """Remove what killed saves and removals left, for steps `up_to` and below; a save in progress is above."""
    recover(root)
    for path, step, what in _dot_directories(root):
        if step > up_to:
            continue
        if what != "replaced":
            discard(path)
        elif step_directory(root, step).exists():
            _try(functools.partial(_remove, path, step))
    for path in root.iterdir():
        if _TEMPORARY_FILE.fullmatch(path.name):
            _try(path.unlink)


def _try(action: Callable[[], object]) -> bool:
    """Whether `action` worked; a removal that fails costs room and no checkpoint, so it is only logged."""
    try:
        action()
    except OSError as error:
        logger.warning("%s: %s", error.filename or "removal", error.strerror or error)
        return False
    return True


def prune(
    root: str | os.PathLike[str],
    keep: int,
    *,
    every_hours: float | None = None,
    best: Collection[int] = (),
    verify: bool = True,
) -> list[int]:
    """Delete all but the newest `keep` checkpoints and the pinned ones (rank 0 only); returns the deleted steps.

    Those of the steps `best` are pinned. With `every_hours` the first checkpoint past every multiple of that many hours
    of training is pinned too (`pinned`).
    Before anything is deleted one of the kept must verify; when none does, the newest good one among the older is kept
    too. ``verify=False`` trusts sizes and the small files and does not read the tensors back: for large runs whose
    ranks verify their own files in parallel. Also removes what killed saves left. What cannot be deleted is logged.
    """
    assert keep >= 1, keep
    root = Path(root)
    recover(root)
    steps = list_steps(root)
    if not steps:
        return []
    kept, doomed = steps[-keep:], [step for step in steps[:-keep] if step not in best]
    if every_hours is not None and doomed:
        spared = pinned(root, steps, every_hours)
        doomed = [step for step in doomed if step not in spared]
    if doomed and not any(_is_good(root, step, verify) for step in reversed(kept)):
        saved = next((step for step in reversed(doomed) if _is_good(root, step, verify)), None)
        doomed = [step for step in doomed if step != saved]
    removed = [step for step in doomed if _try(functools.partial(_remove, step_directory(root, step), step))]
    if removed:
        _try(functools.partial(fsync_directory, root))
    _remove_leftovers(root, up_to=steps[-1])
    return removed


def pinned(root: str | os.PathLike[str], steps: Sequence[int], every_hours: float) -> set[int]:
    """Of the committed `steps`, rising, the first past every multiple of `every_hours` of training time.

    Training time is ``elapsed_s`` of ``state.json``: seconds by a clock that never jumps, summed over restarts. It
    depends on nothing but the checkpoints, so every call finds the same ones.
    """
    first: dict[int, int] = {}
    for step in steps:
        path = step_directory(root, step) / STATE_NAME
        try:
            elapsed = strictjson.loads(read_small(path), path).get("elapsed_s")
        except (CheckpointError, AttributeError):
            continue
        if type(elapsed) in (int, float) and elapsed >= 0:
            first.setdefault(int(elapsed / 3600 // every_hours), step)
    return {step for mark, step in first.items() if mark > 0}


def best_of(steps: Sequence[int], figures: Mapping[int, float], count: int) -> set[int]:
    """Of the committed `steps`, the `count` with the highest `figures`; of equal ones the earlier."""
    known = sorted((-figures[step], step) for step in steps if step in figures)
    return {step for _, step in known[:count]}


def _is_good(root: Path, step: int, verify: bool) -> bool:
    try:
        Checkpoint.open(step_directory(root, step), verify=verify).close()
    except CheckpointError as error:
        logger.warning("%s", error)
        return False
    return True
