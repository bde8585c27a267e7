"""Index a shard set in place: manifest and index for tars that others wrote, or anew for ours. Tars are only read."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from data_prep.pool import Progress, map_jobs
from data_prep.tars import TarReader, parse_label
from swin_scale.errors import DataError, UserError
from swin_scale.shards import INDEX_DTYPE, Manifest, Shard, is_url, local_directory, save_index

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Job:
    number: int
    path: Path
    label_key: str


def index_shards(
    directory: str | os.PathLike[str],
    *,
    classes: Sequence[str] | None = None,
    wnids: Sequence[str] | None = None,
    label_key: str = "label",
    workers: int | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Read every ``*.tar`` of `directory` and write ``index.npy`` and ``manifest.json`` beside them.

    Every tar is read once, whole, for digests and labels. The label of a sample is its ``.cls``, else `label_key` of
    its ``.json``; a set without any is indexed with label -1. `classes` and `wnids` name the labels; without them an
    earlier manifest of the same set is asked, and failing that classes are named by number.

    Raises UserError for a directory without tars, DataError naming shard and member for anything that is not plainly a
    shard, for duplicate keys inside a shard, and for labels that are malformed or outside the classes.
    """
    directory = local_directory(directory, "shard directory")
    paths = shard_paths(directory)
    if not paths:
        raise UserError(f"{directory} holds no .tar file")
    earlier = _earlier_manifest(directory)
    if classes is None and wnids is not None:
        classes = wnids
    if classes is None and earlier is not None:
        classes, wnids = earlier.classes, earlier.wnids
    if wnids is not None and classes is not None and len(wnids) != len(classes):
        raise UserError(f"{len(classes)} classes but {len(wnids)} WordNet ids; give as many")

    found: list[tuple[Shard, np.ndarray] | None] = [None] * len(paths)
    jobs = (_Job(number=number, path=path, label_key=label_key) for number, path in enumerate(paths))
    for done, (number, shard, rows) in enumerate(map_jobs(_read_shard, jobs, workers), 1):
        found[number] = (shard, rows)
        if progress is not None:
            progress(done, len(paths))
    pairs = [entry for entry in found if entry is not None]
    for number, (_, rows) in enumerate(pairs):
        rows["shard"] = number
    index = np.concatenate([rows for _, rows in pairs])
    shards = tuple(shard for shard, _ in pairs)
    if classes is None:
        classes = [str(label) for label in range(index["label"].max() + 1)]
    _check_labels(directory, shards, index, len(classes))

    manifest = Manifest(
        shards=shards,
        classes=tuple(classes),
        wnids=tuple(wnids) if wnids is not None else None,
        source=earlier.source if earlier else str(directory),
        permutation_seed=earlier.permutation_seed if earlier else None,
        left_out=earlier.left_out if earlier else 0,
    )
    try:
        save_index(directory, index)
        manifest.save(directory)
    except OSError as error:
        raise DataError(f"{directory}: {error.strerror}; the index must be written beside the shards") from error
    return manifest


def shard_paths(directory: Path) -> list[Path]:
    """The tars of `directory` by name, less hidden ones. Raises UserError when it cannot be listed, DataError for a
    name that other readers would take for a URL."""
    try:
        names = [entry.name for entry in os.scandir(directory)]
    except OSError as error:
        raise UserError(f"{directory}: {error.strerror}; give a directory of .tar shards") from error
    tars = [name for name in sorted(names) if name.endswith(".tar") and not name.startswith(".")]
    if url := next(filter(is_url, tars), None):
        raise DataError(f"{directory / url}: WebDataset would take the name for a URL or a command; rename the file")
    return [directory / name for name in tars]


def _earlier_manifest(directory: Path) -> Manifest | None:
    """What a manifest already there says about classes and source; a damaged one is no reason to stop."""
    try:
        return Manifest.load(directory)
    except DataError as error:
        _log.info("no earlier class names: %s", error)
        return None


def _read_shard(job: _Job) -> tuple[int, Shard, np.ndarray]:
    rows, keys = [], set()
    with TarReader(job.path) as tar:
        for sample in tar.samples():
            faults = list(sample.faults)
            if sample.key in keys:
                faults.append("occurs twice")
            keys.add(sample.key)
            try:
                label = parse_label(sample, job.label_key)
            except ValueError as error:
                faults.append(str(error))
            if faults:
                raise DataError(f"{job.path}: sample {sample.key!r} {'; '.join(faults)}; write the shard again")
            digest = xxhash.xxh3_64_intdigest(sample.image)
            rows.append((0, sample.offset, len(sample.image), -1 if label is None else label, digest))
        if not rows:
            raise DataError(f"{job.path} holds no sample; remove it and re-index")
        shard = Shard(name=job.path.name, samples=len(rows), bytes=tar.size, xxh3_128=tar.digest())
    return job.number, shard, np.array(rows, INDEX_DTYPE)


def _check_labels(directory: Path, shards: tuple[Shard, ...], index: np.ndarray, classes: int) -> None:
    labels = index["label"]
    unlabelled = labels == -1
    wrong = unlabelled if not unlabelled.all() else np.zeros(len(labels), bool)
    wrong = wrong | (labels < -1) | (labels >= classes)
    if wrong.any():
        first = int(wrong.argmax())
        shard = shards[index["shard"][first]]
        raise DataError(
            f"{directory / shard.name}: {int(wrong.sum())} samples have no label, or one outside {classes} classes; "
            f"the first has {labels[first]}; name every class with --classes, or write the shards again"
        )
