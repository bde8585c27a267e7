"""Make a damaged shard set usable again: what can be vouched for is kept, what cannot is named, nothing is invented.

Every tar is searched for samples, past damaged headers and up to where it was cut. A sample stays when its image
decodes, its label is known, its key is its own, and its bytes are those that the index knew, where there is an index.
Image bytes are never changed. A tar that loses a sample, or has one mended, is written anew and its original set aside
as ``NAME.damaged``; any other is left alone. Then the set is indexed, and ``lost.jsonl`` says what is gone.

Killed at any moment, the same call goes on: ``.repair/`` holds a record of every tar written anew, so that the old
index is never held against a new tar.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.index import index_shards, shard_paths
from data_prep.pool import Progress, map_jobs
from data_prep.salvage import Note, TarJob, key_digest, survey_tar
from data_prep.tars import ShardWriter, TarReader
from data_prep.write import locked
from swin_scale.errors import DataError, UserError
from swin_scale.files import fsync_directory, write_atomic
from swin_scale.shards import INDEX_DTYPE, Manifest, load_index, local_directory

LOST_NAME = "lost.jsonl"
RECORDS_NAME = ".repair"
DAMAGED = ".damaged"


@dataclass(frozen=True, kw_only=True)
class RepairReport:
    """What was done, or with `dry_run` would be."""

    lost: tuple[Note, ...]
    mended: tuple[Note, ...]
    """Kept although something beside the image was damaged; without a key, damage that cost no sample of itself."""
    rewritten: tuple[str, ...]
    """Tars written anew."""
    samples: int
    """That the set has now."""


@dataclass(frozen=True, kw_only=True)
class _Summary:
    """A `Survey` small enough to hold one of every tar."""

    keys: np.ndarray
    """(samples that stay,) uint64 digests of their keys."""
    images: np.ndarray
    """(samples that stay,) uint64 digests of their images, as in the index."""
    unlabelled: int
    rewrite: bool
    lost: tuple[Note, ...]
    mended: tuple[Note, ...]


def repair_shards(
    directory: str | os.PathLike[str],
    *,
    classes: Sequence[str] | None = None,
    wnids: Sequence[str] | None = None,
    label_key: str = "label",
    decode: bool = True,
    dry_run: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> RepairReport:
    """Make `verify_shards` clean for `directory`, keeping every sample that can be vouched for.

    `classes` and `wnids` name the labels where the manifest that did is lost; `label_key` is the one given to
    `index_shards`; `decode` False takes images for good that are not decoded. `dry_run` changes nothing.

    Raises UserError for a directory without tars, DataError when nothing is left of the set or the disk is full; tars
    written anew are then kept for the next call.
    """
    directory = local_directory(directory, "shard directory")
    records = _records(directory)
    jobs, gone, classes, wnids = _plan(directory, records, classes, wnids, label_key, decode)
    summaries = _summaries(jobs, workers, progress)
    labelled = bool(classes) or any(found.unlabelled < len(found.keys) for found in summaries.values())
    if labelled:
        jobs = [dataclasses.replace(job, labelled=True) for job in jobs]
        summaries |= _summaries([job for job in jobs if summaries[job.name].unlabelled], workers)
    jobs = _settle_keys(jobs, summaries)
    summaries |= _summaries([job for job in jobs if job.taken], workers)

    samples = sum(len(summary.keys) for summary in summaries.values())
    if not samples:
        raise DataError(f"{directory}: no sample in {len(jobs)} tars can be used; restore the set from a copy")
    rewrite = [job for job in jobs if summaries[job.name].rewrite or job.path.name != job.name]
    lost = [Note(**note) for record in records.values() for note in record["lost"]]
    lost += _missing(gone, np.concatenate([summary.images for summary in summaries.values()]))
    lost += [note for job in jobs for note in summaries[job.name].lost]
    report = RepairReport(
        lost=tuple(dict.fromkeys(lost)),
        mended=tuple(note for job in jobs for note in summaries[job.name].mended),
        rewritten=tuple(job.name for job in rewrite),
        samples=samples,
    )
    if dry_run:
        return report
    try:
        with locked(directory):
            (directory / RECORDS_NAME).mkdir(exist_ok=True)
            for path in directory.glob(".*.tar.*.tmp"):
                path.unlink()
            for _ in map_jobs(_rewrite, rewrite, workers):
                continue
            _append_lost(directory / LOST_NAME, report.lost)
            index_shards(directory, classes=classes, wnids=wnids, label_key=label_key, workers=workers)
            shutil.rmtree(directory / RECORDS_NAME)
    except OSError as error:
        raise DataError(f"{error.filename or directory}: {error.strerror}; run the same command again") from error
    return report


def _plan(
    directory: Path,
    records: dict[str, dict],
    classes: Sequence[str] | None,
    wnids: Sequence[str] | None,
    label_key: str,
    decode: bool,
) -> tuple[list[TarJob], dict[str, np.ndarray], Sequence[str] | None, Sequence[str] | None]:
    """(a job per tar, rows of missing tars by name, classes, wnids)."""
    paths = {path.name: path for path in shard_paths(directory)}
    for name, record in records.items():
        if record["samples"] and name not in paths:  # killed between setting the old one aside and naming the new one
            paths[name] = directory / record["original"]
    if not paths:
        raise UserError(f"{directory} holds no .tar file")
    index, digests, rows = np.empty(0, INDEX_DTYPE), {}, {}
    try:
        manifest = Manifest.load(directory)
        if classes is None:
            classes, wnids = manifest.classes, manifest.wnids
        digests = {shard.name: shard.xxh3_128 for shard in manifest.shards}
        index = load_index(directory)
        rows = {shard.name: np.array(index[index["shard"] == i]) for i, shard in enumerate(manifest.shards)}
    except DataError:
        pass  # what could be read is used
    jobs = []
    for name, path in sorted(paths.items()):
        job = TarJob(
            path=path,
            name=name,
            rows=rows.get(name, index[:0]),
            trusted=digests.get(name),
            classes=None if classes is None else len(classes),
            label_key=label_key,
            decode=decode,
        )
        jobs.append(_after_rewrite(job, records[name]) if name in records else job)
    gone = {name: rows[name] for name in sorted(rows.keys() - paths.keys() - records.keys())}
    return jobs, gone, classes, wnids


def _missing(gone: dict[str, np.ndarray], images: np.ndarray) -> list[Note]:
    """The samples of missing tars, less those whose images are in the set under another tar's name."""
    return [
        Note(shard=name, key=None, what=f"the tar is missing: image {row['digest']:016x} of label {row['label']}")
        for name, rows in gone.items()
        for row in rows[~np.isin(rows["digest"], images)]
    ]


def _records(directory: Path) -> dict[str, dict]:
    """What a call that did not come to its end has written anew, by name of the tar."""
    paths = sorted((directory / RECORDS_NAME).glob("*.json"))
    return {path.name.removesuffix(".json"): json.loads(path.read_bytes()) for path in paths}


def _after_rewrite(job: TarJob, record: dict) -> TarJob:
    """The job of a tar that may be the new one already: the index tells of the old one then."""
    with TarReader(job.path) as tar:
        is_new = tar.digest() == record["xxh3_128"]
    return dataclasses.replace(job, rows=job.rows[:0], trusted=record["xxh3_128"]) if is_new else job


def _summaries(jobs: Sequence[TarJob], workers: int | None, progress: Progress | None = None) -> dict[str, _Summary]:
    found = {}
    for name, summary in map_jobs(_summarise, jobs, workers):
        found[name] = summary
        if progress is not None:
            progress(len(found), len(jobs))
    return found


def _settle_keys(jobs: list[TarJob], summaries: dict[str, _Summary]) -> list[TarJob]:
    """A key that several tars have stays with the first of them."""
    values, counts = np.unique(np.concatenate([summary.keys for summary in summaries.values()]), return_counts=True)
    shared = set(values[counts > 1].tolist())
    if not shared:
        return jobs
    settled, seen = [], set[int]()
    for job in jobs:
        here = shared.intersection(summaries[job.name].keys.tolist())
        settled.append(dataclasses.replace(job, taken=frozenset(here & seen)))
        seen |= here
    return settled


def _summarise(job: TarJob) -> tuple[str, _Summary]:
    with TarReader(job.path) as tar:
        survey = survey_tar(tar, job)
    return job.name, _Summary(
        keys=np.array([key_digest(one.key) for one in survey.kept], np.uint64),
        images=np.array([one.digest for one in survey.kept], np.uint64),
        unlabelled=sum(one.is_unlabelled for one in survey.kept),
        rewrite=survey.broken or bool(survey.lost or survey.mended),
        lost=tuple(survey.lost),
        mended=tuple(survey.mended),
    )


def _rewrite(job: TarJob) -> None:
    """Write the samples of one tar that stay to a new one, note its digest, and put it in place of the old one."""
    target = job.path.with_name(job.name)
    temporary = target.with_name(f".{job.name}.{os.getpid()}.tmp")
    try:
        with TarReader(job.path) as tar, ShardWriter(temporary) as out:
            survey = survey_tar(tar, job)
            for one in survey.kept:
                out.add(f"{one.key}.{one.extension}", tar.pread(one.offset, one.size))
                for extension, data in one.fields.items():
                    out.add(f"{one.key}.{extension}", data)
            _, digest = out.finish()
        original = _set_aside(target) if job.path == target else job.path
        record = {
            "xxh3_128": digest,
            "samples": len(survey.kept),
            "original": original.name,
            "lost": [dataclasses.asdict(note) for note in survey.lost],
        }
        write_atomic(target.parent / RECORDS_NAME / f"{job.name}.json", json.dumps(record).encode())
        if job.path == target:
            os.rename(target, original)
        if survey.kept:
            os.rename(temporary, target)
        fsync_directory(target.parent)
    except OSError as error:
        raise DataError(f"{target}: {error.strerror}; the original is kept, run the same command again") from error
    finally:
        temporary.unlink(missing_ok=True)


def _set_aside(path: Path) -> Path:
    """A free name beside `path`; a second repair must not replace the original of the first."""
    aside, number = path.with_name(path.name + DAMAGED), 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}{DAMAGED}{number}")
    return aside


def _append_lost(path: Path, lost: Sequence[Note]) -> None:
    """Add to the list what is not in it yet."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    new = [json.dumps(dataclasses.asdict(note), ensure_ascii=True) for note in lost]
    if lines or new:
        write_atomic(path, "".join(f"{line}\n" for line in dict.fromkeys([*lines, *new])).encode())
