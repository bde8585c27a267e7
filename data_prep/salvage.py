"""What can be saved of one tar, and what is lost of it: the judgement behind ``repair``. Only reads.

The walk goes on at the next header behind anything that is not a shard's. Rows of the index, where there are any, say
which images must be there; they vouch for an image whose header was hit, and for a label.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash

from data_prep.images import MAX_IMAGE_BYTES, BadImageError, check_image, sniff
from data_prep.tars import BLOCK, Sample, TarReader, parse_label, split_name
from swin_scale.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Note:
    """What became of one sample, or of a piece of a tar. `key` is None where the damage took the name too."""

    shard: str
    key: str | None
    what: str

    def __str__(self) -> str:
        return f"{self.shard}: {self.what}" if self.key is None else f"{self.shard}: {self.key}: {self.what}"


@dataclass(frozen=True, kw_only=True)
class TarJob:
    """One tar to look through, and what is known of it."""

    path: Path
    """The tar, or its original set aside when a kill came between two renames."""
    name: str
    rows: np.ndarray
    """This tar's rows of the index, (n,) of INDEX_DTYPE; none when there is no index to go by."""
    trusted: str | None
    """xxh3_128 that the tar was written with: where it still has it, tar is right and index wrong."""
    classes: int | None
    label_key: str
    decode: bool
    labelled: bool = False
    """Whether a sample without a label is a fault."""
    taken: frozenset[int] = frozenset()
    """Digests of keys that earlier tars of the set have."""


@dataclass(kw_only=True)
class Found:
    """One sample of a tar. An offset of -1 means that only its other members were met."""

    key: str
    start: int
    """Byte offset of the data of its first member."""
    offset: int
    size: int = 0
    digest: int = 0
    extension: str = ""
    fields: dict[str, bytes] = field(default_factory=dict)
    label: int | None = None
    faults: list[str] = field(default_factory=list)
    label_fault: str | None = None
    """Kept apart: an index may know better."""

    @property
    def is_unlabelled(self) -> bool:
        return self.label is None or self.label == -1


@dataclass(kw_only=True)
class Survey:
    """What one tar holds."""

    name: str
    broken: bool = False
    kept: list[Found] = field(default_factory=list)
    lost: list[Note] = field(default_factory=list)
    mended: list[Note] = field(default_factory=list)


def survey_tar(tar: TarReader, job: TarJob) -> Survey:
    """What stays of one tar, in stored order, and what does not."""
    found, breaks, is_as_written = _walk(tar, job)
    rows = {} if is_as_written else {int(row["offset"]): row for row in job.rows}
    survey = Survey(name=job.name, broken=bool(breaks))
    # With an index to count the samples a break costs those that miss; without one the break is all that is known.
    notes = survey.mended if rows else survey.lost
    notes.extend(Note(shard=job.name, key=None, what=what) for what in breaks)
    for one in found:
        if (row := rows.pop(one.offset, None)) is not None:
            _compare(one, row, survey)
    found = _rescue(tar, rows, found, job, survey)
    keys = set(job.taken)
    for one in sorted(found, key=lambda one: one.start):
        _check_label(one, job)
        if not one.faults and key_digest(one.key) in keys:
            one.faults.append("another sample has its key")
        if one.faults:
            survey.lost.append(Note(shard=job.name, key=one.key or None, what="; ".join(one.faults)))
        else:
            survey.kept.append(one)
            keys.add(key_digest(one.key))
    return survey


def _walk(tar: TarReader, job: TarJob) -> tuple[list[Found], list[str], bool]:
    """(samples, what broke the walk, whether the tar is byte for byte what was written)."""
    found: list[Found] = []
    breaks: list[str] = []
    while True:
        try:
            found.extend(_look_at(sample, job) for sample in tar.samples())
            end = tar.position
        except DataError as error:
            if isinstance(error.__cause__, OSError):  # the storage itself: no verdict on the content
                raise
            end = tar.position
            breaks.append(str(error))
            if tar.pending is not None:
                found.append(_look_at(tar.pending, job))
        if not breaks and job.trusted is not None and tar.digest() == job.trusted:
            return found, [], True
        if not tar.resync(end):
            return found, breaks, False
        breaks = breaks or ["members lie behind the end-of-archive mark"]


def _look_at(sample: Sample, job: TarJob) -> Found:
    """Judge what the sample alone shows, and let go of its image."""
    one = Found(
        key=sample.key,
        start=sample.start,
        offset=sample.offset,
        size=len(sample.image),
        digest=xxhash.xxh3_64_intdigest(sample.image),
        extension=sample.extension,
        fields=sample.fields,
        faults=sample.faults,
    )
    try:
        one.label = parse_label(sample, job.label_key)
    except ValueError as error:
        one.label_fault = str(error)
    if one.offset >= 0:
        one.faults += _image_faults(sample.image, job)
    return one


def _image_faults(image: bytes, job: TarJob) -> list[str]:
    try:
        if job.decode:
            check_image(image)
        else:
            sniff(image)
    except BadImageError as error:
        return [f"image: {error}"]
    return []


def _compare(one: Found, row: np.void, survey: Survey) -> None:
    """A sample against what the index knew of it: another image is a fault, another label is mended."""
    if (one.size, one.digest) != (row["size"], row["digest"]):
        one.faults.append("the image is not the one that the index knew")
    elif (-1 if one.label is None else one.label) != row["label"] and row["label"] >= 0:
        what = one.label_fault or f"label was {one.label}"
        survey.mended.append(Note(shard=survey.name, key=one.key, what=f"{what}; the index knew {row['label']}"))
        _set_label(one, int(row["label"]))


def _set_label(one: Found, label: int) -> None:
    one.label, one.label_fault = label, None
    one.fields = {**one.fields, "cls": b"%d" % label}


def _check_label(one: Found, job: TarJob) -> None:
    if one.label_fault is not None:
        one.faults.append(one.label_fault)
    elif one.label is None or one.label == -1:
        if job.labelled and one.offset >= 0:
            one.faults.append("has no label")
    elif one.label < 0 or (job.classes is not None and one.label >= job.classes):
        one.faults.append(f"label {one.label} is outside the {job.classes} classes")


def _rescue(tar: TarReader, rows: dict[int, np.void], found: list[Found], job: TarJob, survey: Survey) -> list[Found]:
    """`found`, and the samples that the walk missed but the index vouches for: a header was hit, not the image."""
    met = {one.digest for one in found if one.offset >= 0}
    without_image = {one.start: one for one in found if one.offset < 0}
    for offset, row in rows.items():
        size, label = int(row["size"]), int(row["label"])
        # The label follows the image, behind a header of its own.
        rest = without_image.pop(offset + -(-size // BLOCK) * BLOCK + BLOCK, None)
        name = tar.member_name(offset) if offset <= tar.size else None
        image, faults = _known_image(tar, row, job)
        key = (rest.key if rest else "") or (split_name(name)[0] if name else "") or ("" if faults else f"at_{offset}")
        if faults and int(row["digest"]) in met:
            continue  # it is the row that is wrong: its image was met elsewhere
        one = Found(key=key, start=offset, offset=offset, size=size, faults=faults)
        if rest is not None:
            found.remove(rest)
            one.fields, one.label, one.label_fault = rest.fields, rest.label, rest.label_fault
        if not faults:
            one.extension = sniff(image)
            survey.mended.append(Note(shard=job.name, key=key, what="the tar hid it; the index vouches for it"))
        if label >= 0:
            _set_label(one, label)
        found.append(one)
    return found


def _known_image(tar: TarReader, row: np.void, job: TarJob) -> tuple[bytes, list[str]]:
    """(the image that a row of the index tells of, what is wrong with it)."""
    offset, size = int(row["offset"]), int(row["size"])
    if offset + size > tar.size or size > MAX_IMAGE_BYTES:
        what = f"image {row['digest']:016x} of label {row['label']}, {size} bytes at byte {offset}"
        return b"", [f"{what}, lies past the end of the tar at byte {tar.size}"]
    image = tar.pread(offset, size)
    if xxhash.xxh3_64_intdigest(image) != row["digest"]:
        return image, [f"the image at byte {offset} is not the one that the index knew"]
    return image, _image_faults(image, job)


def key_digest(key: str) -> int:
    return xxhash.xxh3_64_intdigest(key.encode("utf-8", "surrogateescape"))
