"""Write a shard set: listing, seeded permutation, plan of shards, one tar per job, then index and manifest.

Which sample goes into which shard is decided from the listing alone. An image found to be unreadable while its shard is
written only makes that shard shorter, so the bytes of every shard depend on the input, the seed and the shard size,
and on nothing else: not on the number of processes, nor on how often the write was killed and started again.

In the output folder, while writing: ``plan.json`` (fingerprint of input and settings), ``.records/`` (one file per
finished shard: index rows, digest, left-out images). A tar gets its name only when complete; the record follows it;
the manifest comes last and is the mark of a complete set.
"""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from data_prep.images import BadImageError, check_image, read_image_file
from data_prep.pool import Progress, map_jobs
from data_prep.sources import Listing, list_file, list_folders
from data_prep.tars import MAX_MEMBERS, ShardWriter
from swin_scale.errors import DataError, UserError
from swin_scale.files import fsync_directory, write_atomic
from swin_scale.shards import INDEX_DTYPE, MANIFEST_NAME, Manifest, Shard, ShardSet, local_directory, save_index

DEFAULT_SHARD_BYTES = 256 << 20
LEFT_OUT_NAME = "left_out.jsonl"
PLAN_NAME = "plan.json"
RECORDS_NAME = ".records"

_RESUME = "finished shards are kept, run the same command again once this is solved"
_MAX_SAMPLES = MAX_MEMBERS // 2
_STEM_LENGTH = 60  # with position and extension well below the 100 bytes of a ustar name


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One shard to write. `start` is the stored position of its first sample."""

    number: int
    start: int
    root: Path
    out: Path
    paths: tuple[str, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Record:
    """What is known of one finished shard."""

    number: int
    bytes: int
    xxh3_128: str
    rows: np.ndarray
    """(samples,) of INDEX_DTYPE; the shard column is filled in when the set is complete."""
    left_out: tuple[tuple[str, str], ...]
    """(path, reason) of the images that could not be read."""

    def save(self, records: Path) -> None:
        body = {"bytes": self.bytes, "xxh3_128": self.xxh3_128, "left_out": self.left_out}
        buffer = io.BytesIO()
        np.savez(buffer, rows=self.rows, body=np.frombuffer(json.dumps(body).encode(), np.uint8))
        write_atomic(records / f"{self.number:06d}.npz", buffer.getbuffer())

    @classmethod
    def load(cls, records: Path, number: int) -> Record | None:
        """The record of a finished shard; None when there is none, or none that can be read."""
        try:
            with np.load(records / f"{number:06d}.npz", allow_pickle=False) as file:
                rows, body = file["rows"], json.loads(file["body"].tobytes())
        except (FileNotFoundError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
            return None
        left_out = tuple((path, reason) for path, reason in body["left_out"])
        return cls(number=number, rows=rows, bytes=body["bytes"], xxh3_128=body["xxh3_128"], left_out=left_out)


def write_shards(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    list_path: str | os.PathLike[str] | None = None,
    shard_bytes: int | None = None,
    samples_per_shard: int | None = None,
    seed: int = 0,
    workers: int | None = None,
    classes: Sequence[str] | None = None,
    wnids: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Write the images below `source` as a shard set in `out`; the same call goes on where a killed one stopped.

    `source` holds one folder per class; with `list_path` it is the root of the paths in that list
    (`sources.list_file`). `shard_bytes` (default 256 MiB) or `samples_per_shard` sets the shard size. `classes` and
    `wnids` fix the label order (`sources.list_folders`). Image bytes are stored untouched; images that
    cannot be decoded are listed with path and reason in ``left_out.jsonl``. `workers` defaults to the processors at
    hand.

    Raises UserError for arguments that make no sense and for an `out` that holds something else, DataError when
    nothing is readable, the disk is full or the storage fails; finished shards are then kept for the next call.
    """
    source, out = local_directory(source, "source"), local_directory(out, "out")
    _check_sizes(shard_bytes, samples_per_shard, seed)
    if list_path is None:
        if out.resolve().is_relative_to(source.resolve()):
            raise UserError(f"{out} lies inside {source} and would become a class of it; write to another folder")
        listing = list_folders(source, classes=classes, wnids=wnids)
    else:
        listing = list_file(source, Path(list_path), classes=classes, wnids=wnids)
    settings = {"shard_bytes": shard_bytes, "samples_per_shard": samples_per_shard, "seed": seed}
    try:
        out.mkdir(parents=True, exist_ok=True)
        with locked(out):
            _claim(
                out,
                {
                    "source": os.path.abspath(source),
                    "images": len(listing.paths),
                    "listing": listing.digest(),
                    **settings,
                },
            )
            if (out / MANIFEST_NAME).exists():
                shutil.rmtree(out / RECORDS_NAME, ignore_errors=True)
                return ShardSet.open(out).manifest
            order = permutation(len(listing.paths), seed)
            starts = _shard_starts(listing, order, shard_bytes, samples_per_shard)
            _write_missing(listing, order, starts, out, workers, progress)
            return _finish(listing, len(starts), out, str(source), seed)
    except OSError as error:
        raise DataError(f"{error.filename or out}: {error.strerror or error}; {_RESUME}") from error


def permutation(samples: int, seed: int) -> np.ndarray:
    """(samples,) int64 stored order: the ranks of PCG64's raw output, the only part NumPy promises never to change."""
    return np.argsort(np.random.PCG64(seed).random_raw(samples), kind="stable")


def shard_name(number: int) -> str:
    """File name of shard `number`."""
    return f"shard-{number:06d}.tar"


def _check_sizes(shard_bytes: int | None, samples_per_shard: int | None, seed: int) -> None:
    if shard_bytes is not None and samples_per_shard is not None:
        raise UserError("shard_bytes and samples_per_shard are both set; give one of them")
    if shard_bytes is not None and shard_bytes < 1:
        raise UserError(f"shard_bytes is {shard_bytes}; give the bytes of one shard, such as {DEFAULT_SHARD_BYTES}")
    if samples_per_shard is not None and not 1 <= samples_per_shard <= _MAX_SAMPLES:
        raise UserError(f"samples_per_shard is {samples_per_shard}; give 1 to {_MAX_SAMPLES}")
    if seed < 0:
        raise UserError(f"seed is {seed}; give 0 or more")


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the folder against a second writer; the kernel lets go when the process ends, however it ends."""
    with open(out / ".lock", "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{out} is being written by another process; wait for it or stop it") from None
        except OSError as error:
            # Lustre mounted without -o flock: a second writer would do the same work twice, but break nothing.
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
        yield


def _claim(out: Path, plan: dict[str, object]) -> None:
    """Make `out` ours for this plan, or go on with the same plan; refuse a folder that holds anything else."""
    path = out / PLAN_NAME
    if path.exists():
        try:
            held = json.loads(path.read_bytes())
        except ValueError as error:
            raise DataError(f"{path} is damaged: {error}; write to another folder") from error
        changed = [f"{key} was {held.get(key)!r}, is {plan[key]!r}" for key in plan if held.get(key) != plan[key]]
        if changed:
            raise UserError(f"{out} holds shards of another write: {'; '.join(changed)}; write to another folder")
    else:
        if strangers := sorted(entry.name for entry in os.scandir(out) if entry.name[0] != "."):
            raise UserError(f"{out} is not empty: it holds {strangers[0]!r}; write to another folder")
        write_atomic(path, json.dumps(plan, indent=1).encode() + b"\n")
    (out / RECORDS_NAME).mkdir(exist_ok=True)
    for folder in (out, out / RECORDS_NAME):
        for entry in os.scandir(folder):
            if re.fullmatch(r"\..+\.tmp", entry.name):
                os.unlink(entry.path)


def _shard_starts(
    listing: Listing, order: np.ndarray, shard_bytes: int | None, samples_per_shard: int | None
) -> list[int]:
    """Stored positions at which shards begin. By bytes the shards come out equally large, at most one sample over."""
    samples = len(order)
    if samples_per_shard is not None:
        return list(range(0, samples, samples_per_shard))
    # In the tar a sample takes a header and its data, rounded up to blocks, and as much as two blocks for its label.
    stored = 1536 + -(-listing.sizes()[order] // 512) * 512
    before = np.cumsum(stored) - stored
    total = int(stored.sum())
    shards = -(-total // (shard_bytes or DEFAULT_SHARD_BYTES))
    cuts = np.searchsorted(before, np.arange(shards) * total // shards)
    starts = [int(start) for start in np.unique(cuts) if start < samples]
    ends = [*starts[1:], samples]
    return [part for start, end in zip(starts, ends, strict=True) for part in range(start, end, _MAX_SAMPLES)]


def _write_missing(
    listing: Listing, order: np.ndarray, starts: list[int], out: Path, workers: int | None, progress: Progress | None
) -> None:
    """Write every shard that has no record, or whose file has not the size on record."""
    ends = [*starts[1:], len(order)]
    missing = [number for number in range(len(starts)) if not _is_finished(out, number)]

    def jobs() -> Iterator[_Job]:
        for number in missing:
            members = order[starts[number] : ends[number]].tolist()
            yield _Job(
                number=number,
                start=starts[number],
                root=listing.root,
                out=out,
                paths=tuple(listing.paths[member] for member in members),
                labels=tuple(listing.labels[members].tolist()),
            )

    done = len(starts) - len(missing)
    for _ in map_jobs(_write_shard, jobs(), workers):
        done += 1
        if progress is not None:
            progress(done, len(starts))


def _is_finished(out: Path, number: int) -> bool:
    record = Record.load(out / RECORDS_NAME, number)
    if record is None or not len(record.rows):
        return record is not None
    path = out / shard_name(number)
    return path.exists() and path.stat().st_size == record.bytes


def _write_shard(job: _Job) -> int:
    """Write one tar, then its record; a shard without a single readable image leaves only the record."""
    path = job.out / shard_name(job.number)
    temporary = job.out / f".{path.name}.{os.getpid()}.tmp"
    rows: list[tuple[int, int, int, int, int]] = []
    left_out: list[tuple[str, str]] = []
    try:
        with ShardWriter(temporary) as tar:
            for position, (source, label) in enumerate(zip(job.paths, job.labels, strict=True), job.start):
                try:
                    data, extension = _read_source(job.root / source)
                except BadImageError as error:
                    left_out.append((source, str(error)))
                    continue
                key = sample_key(position, source)
                offset = tar.add(f"{key}.{extension}", data)
                tar.add(f"{key}.cls", b"%d" % label)
                rows.append((0, offset, len(data), label, xxhash.xxh3_64_intdigest(data)))
            size, digest = tar.finish()
        if rows:
            os.replace(temporary, path)
            fsync_directory(job.out)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror}; {_RESUME}") from error
    finally:
        temporary.unlink(missing_ok=True)
    record = Record(
        number=job.number,
        bytes=size,
        xxh3_128=digest,
        rows=np.array(rows, INDEX_DTYPE),
        left_out=tuple(left_out),
    )
    record.save(job.out / RECORDS_NAME)
    return job.number


def _read_source(path: Path) -> tuple[bytes, str]:
    """(bytes, extension by content) of one image. Raises BadImageError for what it is, DataError for the storage."""
    try:
        data = read_image_file(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; {_RESUME}") from error
    return data, check_image(data).extension


def sample_key(position: int, source: str) -> str:
    """Key of a sample: its stored position, which makes it unique, and its file name, for the eye.

    Only letters, digits, ``_`` and ``-``: a dot would end the key, a slash would make folders.
    """
    stem = os.path.splitext(os.path.basename(source))[0]
    return f"{position:09d}_{re.sub(r'[^A-Za-z0-9_-]', '_', stem)[:_STEM_LENGTH]}"


def _finish(listing: Listing, shards: int, out: Path, source: str, seed: int) -> Manifest:
    """Join the records into index, left-out list and manifest, in this order, and remove them."""
    entries: list[Shard] = []
    tables: list[np.ndarray] = []
    left_out: list[tuple[str, str]] = []
    for number in range(shards):
        record = Record.load(out / RECORDS_NAME, number)
        assert record is not None, number
        left_out.extend(record.left_out)
        if len(record.rows):
            record.rows["shard"] = len(entries)
            tables.append(record.rows)
            entries.append(
                Shard(name=shard_name(number), samples=len(record.rows), bytes=record.bytes, xxh3_128=record.xxh3_128)
            )
    lines = [json.dumps({"path": path, "reason": reason}) + "\n" for path, reason in left_out]
    write_atomic(out / LEFT_OUT_NAME, "".join(lines).encode())
    if not entries:
        shutil.rmtree(out / RECORDS_NAME)
        path, reason = left_out[0]
        raise DataError(f"{source}: none of {len(left_out)} images can be read; the first, {path}: {reason}")
    save_index(out, np.concatenate(tables))
    manifest = Manifest(
        shards=tuple(entries),
        classes=listing.classes,
        wnids=listing.wnids,
        source=source,
        permutation_seed=seed,
        left_out=len(left_out),
    )
    manifest.save(out)
    shutil.rmtree(out / RECORDS_NAME)
    return manifest
