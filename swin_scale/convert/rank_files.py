"""Where the files of an official Swin-MoE are: ``NAME.rank0``, ``NAME.rank1``, ... and perhaps ``NAME.master``.

They come as a directory or, as published, in one zip. A zip is unpacked member by member to names of our own, so that
no name in it ever becomes a path; one that tries is refused all the same.
"""

from __future__ import annotations

import re
import shutil
import stat
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from swin_scale.errors import CheckpointError
from swin_scale.hashed_file import CHUNK_BYTES

_PART = re.compile(r"(?P<stem>.+)\.(?:rank(?P<rank>\d{1,6})|master)", re.DOTALL)
_DAMAGE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, RuntimeError, ValueError)
"""What ``zipfile`` raises for one that is not as it should be."""
MAX_RATIO = 20
"""Weights hardly shrink in a zip; moments of experts without tokens are zeros. More than this on average is a bomb."""
_SLACK = 16 << 20
"""Bytes that a zip may unpack to whatever its size."""


@dataclass(frozen=True, kw_only=True)
class RankSet:
    """The files of one model. `path` and `stem` name them for people; the paths are where their bytes are."""

    path: Path
    stem: str
    ranks: tuple[Path, ...]
    """By rank, without gaps."""
    master: Path | None
    others: tuple[str, ...] = ()
    """Further members of the zip; nothing is read of them."""

    def name(self, label: str) -> str:
        """What to call the file ``rank3`` or ``master`` in messages, or with no label all of them."""
        return f"{self.path / self.stem}.{label}".removesuffix(".")


def is_zip(path: Path) -> bool:
    """Whether `path` is a zip with files of ranks in it, which one of ``torch.save`` never is."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(_PART.fullmatch(name) for name in archive.namelist())
    except (OSError, *_DAMAGE):
        return False  # whoever reads it as something else says what is wrong


def find(path: Path, stack: ExitStack) -> RankSet | None:
    """The files that `path` names; None when it names none of the kind.

    Args:
        path: a directory that holds one set, a zip, one file of a set, or what its names begin with (``NAME.pth``).
        stack: removes what a zip is unpacked to when it is closed.

    Raises CheckpointError for sets with missing ranks, several sets, and hostile zips; OSError.
    """
    if path.is_dir():
        return _one(path, _parts(path, _files(path)))
    if path.is_file() and is_zip(path):
        return _unpack(path, stack)
    found = _PART.fullmatch(path.name)
    stem = found["stem"] if found else path.name
    if not path.parent.is_dir() or (found is None and path.exists()):
        return None
    names = [name for name in _files(path.parent) if (part := _PART.fullmatch(name)) and part["stem"] == stem]
    return _one(path.parent, _parts(path.parent, names))


def present(path: Path) -> bool:
    """Whether `path` names such files, without unpacking or checking them; raises OSError."""
    if path.is_dir():
        return any(map(_PART.fullmatch, _files(path)))
    if path.is_file():
        return _PART.fullmatch(path.name) is not None or is_zip(path)
    return path.parent.is_dir() and any(
        (part := _PART.fullmatch(name)) and part["stem"] == path.name for name in _files(path.parent)
    )


def _files(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir() if entry.is_file())


@dataclass
class _Parts:
    """What was found of one set: names of files by rank."""

    ranks: dict[int, str]
    master: str | None = None


def _parts(path: Path, names: Iterable[str]) -> dict[str, _Parts]:
    """Sets by stem; `names` may have folders, which do not count."""
    sets: dict[str, _Parts] = {}
    for name in names:
        found = _PART.fullmatch(PurePosixPath(name).name)
        if found is None:
            continue
        parts = sets.setdefault(found["stem"], _Parts({}))
        before = parts.master if found["rank"] is None else parts.ranks.get(int(found["rank"]))
        if before is not None:
            what = "the master file" if found["rank"] is None else f"rank {int(found['rank'])} and so the same experts"
            raise CheckpointError(f"{path}: {before} and {name} both claim to be {what}; remove one of them")
        if found["rank"] is None:
            parts.master = name
        else:
            parts.ranks[int(found["rank"])] = name
    return sets


def _one(path: Path, sets: dict[str, _Parts]) -> RankSet | None:
    if not sets:
        return None
    stem, parts = _only(path, sets)
    return RankSet(
        path=path,
        stem=stem,
        ranks=tuple(path / parts.ranks[rank] for rank in sorted(parts.ranks)),
        master=None if parts.master is None else path / parts.master,
    )


def _only(path: Path, sets: dict[str, _Parts]) -> tuple[str, _Parts]:
    """The only set there is, with all ranks up to its highest."""
    if len(sets) > 1:
        raise CheckpointError(f"{path} holds the files of {len(sets)} models, {', '.join(sorted(sets)[:4])}; give one, "
                              f"such as {path / min(sets)}")  # fmt: skip
    ((stem, parts),) = sets.items()
    if not parts.ranks:
        raise CheckpointError(f"{path}: there is {stem}.master, but the .rank files with the experts are missing")
    last = max(parts.ranks)
    if missing := [rank for rank in range(min(last, 1 << 16)) if rank not in parts.ranks]:
        raise CheckpointError(f"{path}: {stem}.rank{missing[0]} is missing, there are ranks up to {last}; add it")
    return stem, parts


def _unpack(path: Path, stack: ExitStack) -> RankSet:
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist() if not info.is_dir()}
            _refuse_hostile(path, archive.infolist())
            stem, parts = _only(path, _parts(path, members))
            wanted = {f"rank{rank}": members[name] for rank, name in parts.ranks.items()}
            if parts.master is not None:
                wanted["master"] = members[parts.master]
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="swin_scale-")))
            size, free = sum(info.file_size for info in wanted.values()), shutil.disk_usage(directory).free
            if size > free:
                raise CheckpointError(f"{path} unpacks to {size} bytes, {directory.parent} has {free} free; free some, "
                                      "point TMPDIR elsewhere, or unpack it and give the directory")  # fmt: skip
            for name, info in wanted.items():
                _extract(archive, info, directory / name)
    except _DAMAGE as error:
        raise CheckpointError(f"{path} is damaged: {error}; fetch it again") from error
    used = {info.filename for info in wanted.values()}
    return RankSet(
        path=path,
        stem=stem,
        ranks=tuple(directory / f"rank{rank}" for rank in sorted(parts.ranks)),
        master=directory / "master" if parts.master is not None else None,
        others=tuple(name for name in members if name not in used),
    )


def _refuse_hostile(path: Path, members: list[zipfile.ZipInfo]) -> None:
    seen: set[str] = set()
    for info in members:
        name = info.filename
        if name.startswith("/") or "\\" in name or ".." in PurePosixPath(name).parts or re.match(r"[A-Za-z]:", name):
            raise CheckpointError(f"{path}: member {name!r} would lie outside of it; refused, fetch it from elsewhere")
        if stat.S_ISLNK(info.external_attr >> 16):
            raise CheckpointError(f"{path}: member {name!r} is a link; refused, pack the file itself")
        if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise CheckpointError(f"{path}: member {name!r} is encrypted or compressed in an unusual way; unpack it "
                                  "and give the directory")  # fmt: skip
        if name in seen:
            raise CheckpointError(f"{path} has two members {name!r}; refused, remove one of them")
        seen.add(name)
    size, limit = sum(info.file_size for info in members), MAX_RATIO * path.stat().st_size + _SLACK
    if size > limit:
        raise CheckpointError(f"{path} would unpack to {size} bytes, over {limit} for a zip of its size; refused, or "
                              "unpack it yourself and give the directory")  # fmt: skip


def _extract(archive: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path) -> None:
    """No more than the stated size is ever written; a checksum that is not the stated one is BadZipFile."""
    with archive.open(info) as member, open(target, "wb") as file:
        shutil.copyfileobj(member, file, CHUNK_BYTES)
    if target.stat().st_size != info.file_size:
        raise zipfile.BadZipFile(f"{info.filename} ends early")
