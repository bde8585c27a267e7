"""The tar format of shards: a deterministic writer and a strict, bounded reader.

The reader is our own because the stdlib's keeps every member in memory, follows sparse maps and reads extended headers
of any size; a shard from elsewhere is hostile until shown otherwise. It accepts what shard writers produce (ustar, pax
and GNU long names, regular files, directories) and refuses the rest before reading it. Nothing is ever extracted.
"""

from __future__ import annotations

import json
import os
import re
import stat
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import xxhash

from data_prep.images import MAX_IMAGE_BYTES
from swin_scale.errors import DataError
from swin_scale.shards import IMAGE_EXTENSIONS

BLOCK = tarfile.BLOCKSIZE
MAX_MEMBERS = 1 << 19
"""Most members in one shard; 262,144 samples of an image and a label."""

_MAX_HEADER = 1 << 16  # extended headers: a path, a few times and ids
_MAX_LABEL = 1 << 20  # .cls and .json members
_HASH_CHUNK = 1 << 20


class ShardWriter:
    """Writes samples to one tar whose bytes depend on nothing but the samples; `finish` tells size and digest."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = open(path, "wb")  # noqa: SIM115 - a context manager itself
        self._digest = xxhash.xxh3_128()
        self._position = 0

    def add(self, name: str, data: bytes) -> int:
        """Append one member; returns the byte offset of its data."""
        info = tarfile.TarInfo(name)  # mtime, uid and gid 0, mode 0644 by default
        info.size = len(data)
        # Names that ustar cannot hold: only shards from elsewhere have them.
        long = len(name.encode("utf-8", "surrogateescape")) > tarfile.LENGTH_NAME
        header = info.tobuf(tarfile.GNU_FORMAT if long else tarfile.USTAR_FORMAT)
        offset = self._position + len(header)
        self._write(header)
        self._write(data)
        self._write(bytes(-len(data) % BLOCK))
        return offset

    def finish(self) -> tuple[int, str]:
        """End the archive and fsync it; returns (bytes, xxh3_128 hex)."""
        self._write(bytes(2 * BLOCK))
        self._write(bytes(-self._position % tarfile.RECORDSIZE))
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._position, self._digest.hexdigest()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _write(self, data: bytes) -> None:
        self._digest.update(data)
        self._position += self._file.write(data)


class Member(NamedTuple):
    """One regular file inside a tar, with its data."""

    name: str
    offset: int
    data: bytes


@dataclass(kw_only=True)
class Sample:
    """Members that share a key, as WebDataset groups them."""

    key: str
    offset: int = -1
    """Byte offset of the image data; -1 without an image."""
    start: int = -1
    """Byte offset of the data of its first member."""
    extension: str = ""
    image: bytes = b""
    fields: dict[str, bytes] = field(default_factory=dict)
    """The other members by lower-case extension."""
    faults: list[str] = field(default_factory=list)
    """What is wrong with the grouping: no image, two images, one extension twice."""


class TarReader:
    """Reads one tar from start to end, checking bounds before every read, and digests the whole file.

    Every DataError names the shard and the member.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = 0
        self.pending: Sample | None = None
        """What `samples` was gathering when it raised."""
        self._digest = xxhash.xxh3_128()
        try:
            # O_NONBLOCK: a named pipe must not make us wait for its writer.
            self._file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from error
        status = os.fstat(self._file.fileno())
        if not stat.S_ISREG(status.st_mode):
            self._file.close()
            raise DataError(f"{path}: not a regular file")
        self.size = status.st_size

    def __enter__(self) -> TarReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def digest(self) -> str:
        """xxh3_128 of the whole file, reading what the walk has not."""
        while self._read(_HASH_CHUNK):
            pass
        return self._digest.hexdigest()

    def pread(self, offset: int, size: int) -> bytes:
        """Bytes at `offset`, outside the walk and its digest."""
        try:
            return os.pread(self._file.fileno(), size, offset)
        except OSError as error:
            raise DataError(f"{self.path} cannot be read at byte {offset}: {error.strerror}") from error

    def members(self) -> Iterator[Member]:
        """Every regular file in stored order. Raises DataError at the first thing that is not plainly a shard's."""
        count, long_name = 0, None
        while True:
            header = self._read(BLOCK)
            if len(header) < BLOCK:
                raise self._error("<end>", f"ends at byte {self.size} without an end-of-archive mark: truncated")
            if not header.strip(b"\0"):
                return
            count += 1
            name, size, kind = self._parse(header)
            if long_name is not None and kind not in b"xLg":
                name, long_name = long_name, None
            if count > MAX_MEMBERS:
                raise self._error(name, f"more than {MAX_MEMBERS} members; split the shard")
            if kind in b"xgL":
                extended = self._data(name, size, _MAX_HEADER)
                if kind == b"x":
                    long_name = self._pax_path(name, extended) or long_name
                elif kind == b"L":
                    long_name = _text(extended.rstrip(b"\0"))
                continue
            self._check_name(name)
            if kind == b"5":
                continue
            if kind not in (b"0", b"\0"):
                raise self._error(name, f"is a {_KINDS.get(kind, f'member of type {kind!r}')}, not a regular file")
            limit = MAX_IMAGE_BYTES if split_name(name)[1] in IMAGE_EXTENSIONS else _MAX_LABEL
            offset = self.position
            yield Member(name, offset, self._data(name, size, limit))

    def samples(self) -> Iterator[Sample]:
        """Members grouped by key as WebDataset groups them: a run of equal keys, extension from the first dot on."""
        sample = self.pending = None
        for member in self.members():
            key, extension = split_name(member.name)
            if not key:
                continue
            if sample is None or sample.key != key:
                if sample is not None:
                    yield _finished(sample)
                sample = self.pending = Sample(key=key, start=member.offset)
            if extension in IMAGE_EXTENSIONS:
                if sample.extension:
                    sample.faults.append(f"has two images, .{sample.extension} and .{extension}")
                else:
                    sample.offset, sample.extension, sample.image = member.offset, extension, member.data
            elif extension in sample.fields:
                sample.faults.append(f"has two .{extension} members")
            else:
                sample.fields[extension] = member.data
        self.pending = None
        if sample is not None:
            yield _finished(sample)

    def resync(self, start: int) -> bool:
        """Go to the first block from byte `start` on that is a tar header; False when there is none.

        `members` and `samples` may then be called again; `digest` is no longer that of the file.
        """
        for position in range(-(-start // BLOCK) * BLOCK, self.size, BLOCK):
            header = self.pread(position, BLOCK)
            if header[257:262] == b"ustar" and _is_header(header):
                self._file.seek(position)
                self.position = position
                return True
        return False

    def member_name(self, offset: int) -> str | None:
        """Name of the member whose data begin at `offset`, from its own header; None without a sound one."""
        header = self.pread(offset - BLOCK, BLOCK) if offset >= BLOCK else b""
        if len(header) < BLOCK or not _is_header(header):
            return None
        name = self._parse(header)[0]
        return name if _stays_inside(name) else None

    def _read(self, size: int) -> bytes:
        try:
            data = self._file.read(size)
        except OSError as error:
            raise DataError(f"{self.path} cannot be read at byte {self.position}: {error.strerror}") from error
        self._digest.update(data)
        self.position += len(data)
        return data

    def _data(self, name: str, size: int, limit: int) -> bytes:
        if size > limit:
            raise self._error(name, f"claims {size} bytes, more than the limit of {limit} for its kind")
        padded = -(-size // BLOCK) * BLOCK
        if self.position + padded > self.size:
            raise self._error(
                name, f"needs {size} bytes at offset {self.position}, but the file ends at {self.size}: truncated"
            )
        return self._read(padded)[:size]

    def _parse(self, header: bytes) -> tuple[str, int, bytes]:
        """(name, size, type) of a ustar header block; POSIX.1-1988 with the GNU binary sizes."""
        where = f"<header at byte {self.position - BLOCK}>"
        try:
            stated = _octal(header[148:156])
            size = _octal(header[124:136])
        except ValueError:
            raise self._error(where, "is not a tar header") from None
        if stated != _checksum(header):
            raise self._error(where, "is damaged: its checksum does not match")
        name = _text(header[:100].split(b"\0")[0])
        if header[257:263] == b"ustar\0" and header[345]:
            name = _text(header[345:500].split(b"\0")[0]) + "/" + name
        if size < 0:
            raise self._error(name or where, f"claims {size} bytes")
        return name, size, header[156:157]

    def _pax_path(self, name: str, extended: bytes) -> str | None:
        path, rest = None, extended
        while rest.strip(b"\0"):
            match = re.match(rb"(\d{1,6}) ([^=]+)=", rest)
            length = int(match[1]) if match else 0
            if match is None or not match.end() < length <= len(rest):
                raise self._error(name, "has a damaged pax header")
            key, value = match[2], rest[match.end() : length - 1]
            if key == b"size" or key.startswith(b"GNU.sparse"):
                raise self._error(name, f"is sparse or oversized (pax {_text(key)})")
            if key == b"path":
                path = _text(value)
            rest = rest[length:]
        return path

    def _check_name(self, name: str) -> None:
        if not _stays_inside(name):
            raise self._error(name, "points outside the shard")

    def _error(self, member: str, what: str) -> DataError:
        return DataError(
            f"{self.path}: member {member!r} {what}; fetch or write the shard again, or remove it and re-index"
        )


_KINDS = {b"1": "hard link", b"2": "symbolic link", b"3": "device", b"4": "device", b"6": "pipe", b"S": "sparse file"}


def parse_label(sample: Sample, label_key: str = "label") -> int | None:
    """The label of a sample from ``.cls`` (ASCII integer), else from `label_key` of ``.json``; None when it has none.

    Raises ValueError naming what was seen.
    """
    if (text := sample.fields.get("cls")) is not None:
        if not re.fullmatch(rb"\s*-?\d{1,9}\s*", text):
            raise ValueError(f".cls holds {text[:20]!r}, not an integer")
        return int(text)
    if (text := sample.fields.get("json")) is not None:
        try:
            body = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f".json cannot be read: {error}") from error
        label = body.get(label_key) if isinstance(body, dict) else None
        if label is not None and (type(label) is not int or abs(label) >= 1 << 31):
            raise ValueError(f".json has {label_key}={label!r}, not an integer")
        return label
    return None


def _finished(sample: Sample) -> Sample:
    if not sample.extension:
        sample.faults.append(f"has no image, only {sorted(sample.fields)}")
    return sample


def _stays_inside(name: str) -> bool:
    """Whether a member would be extracted below the target folder, on every system."""
    return not (name.startswith("/") or "\0" in name or "\\" in name or ".." in name.split("/"))


def split_name(name: str) -> tuple[str, str]:
    """(key, lower-case extension) by WebDataset's rule; an empty key for names it passes over."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    return (folder + slash + stem, extension.lower()) if stem and dot else ("", "")


def _checksum(header: bytes) -> int:
    """Of a header block; its own field counts as eight spaces."""
    return sum(header) - sum(header[148:156]) + 8 * 0x20


def _is_header(header: bytes) -> bool:
    """Whether a block is a tar header: its checksum is right and its size a number that is not negative."""
    try:
        return _octal(header[148:156]) == _checksum(header) and _octal(header[124:136]) >= 0
    except ValueError:
        return False


def _octal(raw: bytes) -> int:
    if raw[0] in (0x80, 0xFF):  # GNU: a big-endian two's complement number
        return int.from_bytes(raw[1:], "big", signed=raw[0] == 0xFF)
    return int(raw.strip(b" \0") or b"0", 8)


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")
