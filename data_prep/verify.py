"""Re-read a shard set and report everything that is wrong with it, each finding with shard, key and fix."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from data_prep.images import MAX_IMAGE_BYTES, BadImageError, check_image
from data_prep.pool import Progress, map_jobs
from data_prep.tars import Sample, TarReader, parse_label
from swin_scale.errors import DataError, UserError
from swin_scale.shards import INDEX_NAME, MANIFEST_NAME, Manifest, Shard, load_index, local_directory

_RESTORE = "restore the shard from a copy, or go on without what is lost: `swin-scale shards repair`"
_REINDEX = "re-index with `swin-scale shards index`"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One finding. `key` is None when it concerns the whole shard."""

    shard: str
    key: str | None
    what: str
    fix: str

    def __str__(self) -> str:
        where = self.shard if self.key is None else f"{self.shard}: {self.key}"
        return f"{where}: {self.what}; {self.fix}"


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """Everything found, in shard order, and how much was read."""

    problems: tuple[Problem, ...]
    shards: int
    samples: int
    bytes: int

    @property
    def clean(self) -> bool:
        return not self.problems


@dataclass(frozen=True, kw_only=True)
class _Job:
    number: int
    directory: Path
    shard: Shard
    rows: np.ndarray | None
    """This shard's rows of the index; None when the index cannot be used."""
    classes: int
    decode: bool
    label_key: str


@dataclass(frozen=True, kw_only=True)
class _Finding:
    number: int
    problems: list[Problem]
    keys: np.ndarray
    """(samples,) uint64 digests of the keys, to find those that occur in two shards."""
    bytes: int


def verify_shards(
    directory: str | os.PathLike[str],
    *,
    decode: bool = True,
    label_key: str = "label",
    workers: int | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Check manifest, index and every byte of a shard set; `decode` also decodes every image, and
    `label_key` is the one given to `index_shards`.

    Bad content never raises: all of it is in the report. Raises UserError when `directory` is none.
    """
    directory = local_directory(directory, "shard directory")
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory; give a shard set")
    try:
        manifest = Manifest.load(directory)
    except DataError as error:
        problem = Problem(shard=MANIFEST_NAME, key=None, what=str(error), fix=_REINDEX)
        return VerifyReport(problems=(problem,), shards=0, samples=0, bytes=0)
    problems, index = _check_index(directory, manifest)
    named = {shard.name for shard in manifest.shards}
    for name in sorted(entry.name for entry in os.scandir(directory) if entry.name.endswith(".tar")):
        if name not in named and not name.startswith("."):
            problems.append(_problem(name, None, f"is not in {MANIFEST_NAME}", f"remove it, or {_REINDEX}"))
    for name, count in Counter(shard.name for shard in manifest.shards).items():
        if count > 1:
            problems.append(_problem(name, None, f"is named {count} times in {MANIFEST_NAME}", _REINDEX))

    jobs = _jobs(directory, manifest, index, decode, label_key)
    findings = []
    for finding in map_jobs(_verify_shard, jobs, workers):
        findings.append(finding)
        if progress is not None:
            progress(len(findings), len(manifest.shards))
    findings.sort(key=lambda finding: finding.number)
    for finding in findings:
        problems.extend(finding.problems)
    problems.extend(_shared_keys(directory, manifest, findings))
    return VerifyReport(
        problems=tuple(problems),
        shards=len(manifest.shards),
        samples=sum(len(finding.keys) for finding in findings),
        bytes=sum(finding.bytes for finding in findings),
    )


def _problem(shard: str, key: str | None, what: str, fix: str) -> Problem:
    return Problem(shard=shard, key=key, what=what, fix=fix)


def _check_index(directory: Path, manifest: Manifest) -> tuple[list[Problem], np.ndarray | None]:
    """Problems of the index as a whole; the index is None when its rows cannot be told apart by shard."""
    try:
        index = load_index(directory)
    except DataError as error:
        return [_problem(INDEX_NAME, None, str(error), _REINDEX)], None
    if len(index) != manifest.samples:
        what = f"has {len(index)} rows, {MANIFEST_NAME} counts {manifest.samples} samples"
        return [_problem(INDEX_NAME, None, what, _REINDEX)], None
    expected = np.repeat(np.arange(len(manifest.shards)), [shard.samples for shard in manifest.shards])
    if not np.array_equal(index["shard"], expected):
        row = int((index["shard"] != expected).argmax())
        what = f"row {row} belongs to shard {index['shard'][row]}, {MANIFEST_NAME} says {expected[row]}"
        return [_problem(INDEX_NAME, None, what, _REINDEX)], None
    return [], index


def _jobs(
    directory: Path, manifest: Manifest, index: np.ndarray | None, decode: bool, label_key: str
) -> Iterator[_Job]:
    start = 0
    for number, shard in enumerate(manifest.shards):
        yield _Job(
            number=number,
            directory=directory,
            shard=shard,
            rows=None if index is None else np.array(index[start : start + shard.samples]),
            classes=len(manifest.classes),
            decode=decode,
            label_key=label_key,
        )
        start += shard.samples


def _verify_shard(job: _Job) -> _Finding:
    """Walk one tar against its rows. Where the walk ends early, the rows left are checked at their stated offsets."""
    path, name = job.directory / job.shard.name, job.shard.name
    problems: list[Problem] = []
    keys: list[str] = []
    rows = {} if job.rows is None else {int(row["offset"]): row for row in job.rows}
    if job.rows is not None and len(rows) < len(job.rows):
        problems.append(
            _problem(INDEX_NAME, None, f"{len(job.rows) - len(rows)} rows repeat an offset in {name}", _REINDEX)
        )
    try:
        tar = TarReader(path)
    except DataError as error:
        problems.append(_problem(name, None, f"is named in {MANIFEST_NAME} but cannot be opened: {error}", _RESTORE))
        return _Finding(number=job.number, problems=problems, keys=np.empty(0, np.uint64), bytes=0)
    with tar:
        try:
            for sample in tar.samples():
                row = rows.pop(sample.offset, None)
                keys.append(sample.key)
                problems.extend(_problem(name, sample.key, *fault) for fault in _sample_faults(sample, row, job))
        except DataError as error:
            problems.append(_problem(name, None, str(error), _RESTORE))
        try:
            for row in rows.values():
                problems.extend(_problem(name, *fault) for fault in _row_faults(tar, row, job))
            problems.extend(_problem(name, None, what, _RESTORE) for what in _shard_faults(tar, len(keys), job.shard))
        except DataError as error:  # the storage itself
            problems.append(_problem(name, None, str(error), _RESTORE))
    problems.extend(
        _problem(name, key, f"key occurs {count} times in this shard", "write the set again")
        for key, count in Counter(keys).items()
        if count > 1
    )
    digests = np.array([_key_digest(key) for key in set(keys)], np.uint64)
    return _Finding(number=job.number, problems=problems, keys=digests, bytes=tar.size)


def _shard_faults(tar: TarReader, samples: int, shard: Shard) -> Iterator[str]:
    """How the file as a whole departs from the manifest."""
    if tar.size != shard.bytes:
        yield f"has {tar.size} bytes, {MANIFEST_NAME} says {shard.bytes}"
    if (digest := tar.digest()) != shard.xxh3_128:
        yield f"xxh3_128 is {digest}, {MANIFEST_NAME} says {shard.xxh3_128}"
    if samples != shard.samples:
        yield f"{samples} samples can be walked, {MANIFEST_NAME} says {shard.samples}"


def _sample_faults(sample: Sample, row: np.void | None, job: _Job) -> Iterator[tuple[str, str]]:
    """(what, fix) for everything wrong with one sample of the tar."""
    for fault in sample.faults:
        yield fault, "write the set again"
    label = None
    try:
        label = parse_label(sample, job.label_key)
    except ValueError as error:
        yield str(error), _RESTORE
    else:
        if label is not None and not 0 <= label < job.classes and (row is None or label != row["label"]):
            yield f"label {label} is outside the {job.classes} classes", _RESTORE
    if row is not None:
        if label is not None and label != row["label"]:
            yield f"label is {label}, {INDEX_NAME} says {row['label']}", _RESTORE
        if label is None and row["label"] != -1 and "cls" not in sample.fields and "json" not in sample.fields:
            yield f"has no label, {INDEX_NAME} says {row['label']}", _RESTORE
        if len(sample.image) != row["size"]:
            yield f"image has {len(sample.image)} bytes, {INDEX_NAME} says {row['size']}", _RESTORE
        yield from _content_faults(sample.image, row, job)
    elif sample.offset >= 0:
        if job.rows is not None:
            yield f"image at byte {sample.offset} has no row in {INDEX_NAME}", _REINDEX
        yield from _decode_faults(sample.image, job)


def _row_faults(tar: TarReader, row: np.void, job: _Job) -> Iterator[tuple[str | None, str, str]]:
    """(key, what, fix) for a row that the walk did not meet."""
    offset, size = int(row["offset"]), int(row["size"])
    where = f"{INDEX_NAME} row at byte {offset}"
    if offset + size > tar.size or size > MAX_IMAGE_BYTES:
        yield where, f"{size} bytes reach past the end of the file at {tar.size}: the sample is lost", _RESTORE
        return
    for what, fix in _content_faults(tar.pread(offset, size), row, job):
        yield where, what, fix


def _content_faults(image: bytes, row: np.void, job: _Job) -> Iterator[tuple[str, str]]:
    digest = xxhash.xxh3_64_intdigest(image)
    if digest != row["digest"]:
        yield f"image digest is {digest:016x}, {INDEX_NAME} says {int(row['digest']):016x}", _RESTORE
    if not -1 <= row["label"] < job.classes:
        yield f"label {row['label']} in {INDEX_NAME} is outside the {job.classes} classes", _REINDEX
    yield from _decode_faults(image, job)


def _decode_faults(image: bytes, job: _Job) -> Iterator[tuple[str, str]]:
    if job.decode:
        try:
            check_image(image)
        except BadImageError as error:
            yield f"image: {error}", "remove it from the source and write the set again"


def _key_digest(key: str) -> int:
    return xxhash.xxh3_64_intdigest(key.encode("utf-8", "surrogateescape"))


def _shared_keys(directory: Path, manifest: Manifest, findings: list[_Finding]) -> Iterator[Problem]:
    """Keys that occur in more than one shard. Only digests were kept, so the shards concerned are walked again."""
    if not findings:
        return
    digests = np.concatenate([finding.keys for finding in findings])
    values, counts = np.unique(digests, return_counts=True)
    shared = set(values[counts > 1].tolist())
    if not shared:
        return
    first_seen: dict[str, str] = {}
    for finding in findings:
        if shared.isdisjoint(finding.keys.tolist()):
            continue
        name = manifest.shards[finding.number].name
        for key in sorted(_walkable_keys(directory / name)):
            if _key_digest(key) in shared and (other := first_seen.setdefault(key, name)) != name:
                yield _problem(name, key, f"key occurs in {other} too", "write the set again")


def _walkable_keys(path: Path) -> set[str]:
    keys: set[str] = set()
    try:
        with TarReader(path) as tar:
            for sample in tar.samples():
                keys.add(sample.key)
    except DataError:
        return keys  # already in the report
    return keys
