"""What to write: a class-per-folder tree or a list file becomes a `Listing` of paths and labels.

Nothing is opened here; whether a file is an image is judged by the process that writes it. Listing 14 million files
must fit in memory, so paths live in one byte string.
"""

from __future__ import annotations

import json
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from swin_scale.errors import DataError, UserError
from swin_scale.shards import MANIFEST_NAME, Manifest

_WNID = re.compile(r"n\d{8}")
_IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".avif", ".heic", ".heif"),
)
"""Files taken for images by name; any other file (notes, annotations) is none of ours. Content decides later."""


class PathTable:
    """Many relative paths in one byte string: about 50 bytes each, a third of a list of str."""

    def __init__(self, paths: Iterable[str]) -> None:
        blob, ends = bytearray(), array("q", [0])
        for path in paths:
            blob += os.fsencode(path)
            ends.append(len(blob))
        self._blob, self._ends = bytes(blob), ends

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return os.fsdecode(self._blob[self._ends[index] : self._ends[index + 1]])

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    def digest(self) -> int:
        """xxh3_64 of all paths and their boundaries."""
        return xxhash.xxh3_64_intdigest(self._blob, seed=xxhash.xxh3_64_intdigest(self._ends.tobytes()))


@dataclass(frozen=True, kw_only=True)
class Listing:
    """Every image to write, in listing order, before the permutation."""

    root: Path
    paths: PathTable
    """Relative to `root`, or absolute."""
    labels: np.ndarray
    """(samples,) int32, positions in `classes`."""
    classes: tuple[str, ...]
    wnids: tuple[str, ...] | None

    def digest(self) -> str:
        """Fingerprint of names and labels, so that a resumed write notices another input."""
        labels = xxhash.xxh3_64_intdigest(self.labels.tobytes())
        text = json.dumps([self.paths.digest(), labels, self.classes, self.wnids])
        return xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogateescape"))

    def sizes(self) -> np.ndarray:
        """(samples,) int64 file sizes in bytes; 0 for what cannot be read. One stat per file, in threads."""
        with ThreadPoolExecutor(16) as threads:
            chunks = range(0, len(self.paths), 4096)
            found = threads.map(self._sizes, chunks)
            return np.fromiter((size for chunk in found for size in chunk), np.int64, len(self.paths))

    def _sizes(self, start: int) -> list[int]:
        sizes = []
        for position in range(start, min(start + 4096, len(self.paths))):
            try:
                sizes.append(os.stat(os.path.join(self.root, self.paths[position])).st_size)
            except OSError:
                sizes.append(0)
        return sizes


def list_folders(root: Path, *, classes: Sequence[str] | None = None, wnids: Sequence[str] | None = None) -> Listing:
    """List ``<root>/<class>/**/<image>``; the label is the position of the folder in sorted order, as in torchvision.

    `wnids` or `classes` name the folders in label order instead, so that a validation set whose folders are fewer gets
    the labels of its training set. Raises UserError when a folder is in neither, DataError when nothing is found.
    """
    try:
        folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and entry.name[0] != ".")
    except OSError as error:
        raise UserError(f"{root}: {error.strerror}; give a folder with one folder per class") from error
    order, classes, wnids = _label_space(root, folders, classes, wnids)
    position = {name: label for label, name in enumerate(order)}
    with ThreadPoolExecutor(16) as threads:
        found = list(threads.map(lambda folder: list(_images(root, folder)), folders))
    labels = np.repeat(
        np.array([position[folder] for folder in folders], np.int32), np.array([len(names) for names in found], int)
    )
    if not len(labels):
        raise DataError(f"{root} holds no image in any class folder; expected <class>/<image>.jpg")
    return Listing(
        root=root, paths=PathTable(name for names in found for name in names), labels=labels,
        classes=classes, wnids=wnids,
    )  # fmt: skip


def list_file(
    root: Path, file: Path, *, classes: Sequence[str] | None = None, wnids: Sequence[str] | None = None
) -> Listing:
    """List what `file` names: lines of ``path<TAB>label``, or the JSON ``[[path, label], ...]`` of ImageNet-22K.

    Labels are integers, or class names (positions in `classes`, by default in sorted order). Without `wnids`, WordNet
    ids are taken from the paths when every label has exactly one. Raises UserError.
    """
    entries = _read_list(file)
    if not entries:
        raise UserError(f"{file} lists no image")
    paths = PathTable(path for path, _ in entries)
    names = [label for _, label in entries]
    if negative := next((name for name in names if re.fullmatch(r"-\d+", name)), None):
        raise UserError(f"{file}: label {negative} is negative; labels count from 0")
    if all(re.fullmatch(r"\d{1,9}", name) for name in names):
        labels = np.array([int(name) for name in names], np.int32)
        if wnids is None and classes is None:
            wnids = _wnids_of_paths(paths, labels)
        classes = classes or wnids or [str(label) for label in range(labels.max() + 1)]
    else:
        classes = classes or wnids or sorted(set(names))
        order = wnids if wnids is not None and all(map(_WNID.fullmatch, names)) else classes
        position = {name: label for label, name in enumerate(order)}
        if unknown := next((name for name in names if name not in position), None):
            raise UserError(f"{file}: label {unknown!r} is not among the {len(classes)} classes given")
        labels = np.array([position[name] for name in names], np.int32)
    if wnids is not None and len(wnids) != len(classes):
        raise UserError(f"{len(classes)} classes but {len(wnids)} WordNet ids; give as many")
    if labels.max() >= len(classes):
        raise UserError(f"{file}: label {labels.max()} is outside the {len(classes)} classes given")
    return Listing(root=root, paths=paths, labels=labels, classes=tuple(classes), wnids=tuple(wnids) if wnids else None)


def read_classes(path: Path) -> tuple[list[str], list[str] | None]:
    """(classes, wnids) in label order from a shard set, its manifest, or a text file with one class a line.

    A line is a name, a WordNet id, or a WordNet id and a name. Raises UserError, or DataError for a damaged manifest.
    """
    if path.is_dir() or path.name == MANIFEST_NAME:
        manifest = Manifest.load(path if path.is_dir() else path.parent)
        return list(manifest.classes), list(manifest.wnids) if manifest.wnids else None
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}; give a text file with one class a line") from error
    lines = [line for line in lines if line]
    if not lines:
        raise UserError(f"{path} names no class")
    pairs = [re.fullmatch(r"(n\d{8})(?:\s+(.+))?", line) for line in lines]
    if all(pairs):
        return [pair[2] or pair[1] for pair in pairs if pair], [pair[1] for pair in pairs if pair]
    return lines, None


def _label_space(
    root: Path, folders: list[str], classes: Sequence[str] | None, wnids: Sequence[str] | None
) -> tuple[Sequence[str], tuple[str, ...], tuple[str, ...] | None]:
    """(folder names in label order, display names, WordNet ids)."""
    for folder in folders:
        try:
            folder.encode()
        except UnicodeEncodeError:
            raise DataError(f"{root}: class folder {folder!r} is not valid UTF-8; rename it") from None
    if not folders:
        raise DataError(f"{root} holds no class folder; expected <class>/<image>.jpg")
    by_wnid = all(map(_WNID.fullmatch, folders))
    if wnids is None and by_wnid and not (classes and set(folders) <= set(classes)):
        wnids = folders
    names = tuple(classes if classes is not None else wnids if wnids is not None else folders)
    order = wnids if wnids is not None and by_wnid else names
    if wnids is not None and len(wnids) != len(names):
        raise UserError(f"{root}: {len(wnids)} WordNet ids but {len(names)} class names; give as many")
    if len(set(order)) != len(order):
        raise UserError(f"{root}: the classes given name {next(n for n in order if list(order).count(n) > 1)!r} twice")
    if unknown := sorted(set(folders) - set(order)):
        raise UserError(
            f"{root}: folder {unknown[0]!r} (of {len(unknown)} such) is not among the {len(order)} classes given; "
            "remove it or give its class"
        )
    return order, names, tuple(wnids) if wnids is not None else None


def _images(root: Path, folder: str) -> list[str]:
    """Relative paths of the images below one class folder, sorted. Links to files are followed, to folders not."""
    found, folders = [], [folder]
    while folders:
        current = folders.pop()
        try:
            entries = list(os.scandir(root / current))
        except OSError as error:
            raise DataError(f"{root / current}: {error.strerror}; make the folder readable or remove it") from error
        for entry in entries:
            path = f"{current}/{entry.name}"
            if entry.is_dir(follow_symlinks=False):
                folders.append(path)
            elif os.path.splitext(entry.name)[1].lower() in _IMAGE_SUFFIXES and entry.name[0] != ".":
                found.append(path)
    return sorted(found)


def _read_list(file: Path) -> list[tuple[str, str]]:
    fix = "expected lines of <path><TAB><label>, or JSON [[path, label], ...]"
    try:
        text = file.read_text(encoding="utf-8")
        if text.lstrip()[:1] == "[":
            return [(str(path), str(label)) for path, label in json.loads(text)]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{file}: {error}; {fix}") from error
    entries = []
    for number, line in enumerate(text.splitlines(), 1):
        path, tab, label = line.rpartition("\t")
        if line.strip():
            if not (tab and path and label.strip()):
                raise UserError(f"{file}, line {number}: {line[:80]!r} has no tab; {fix}")
            entries.append((path, label.strip()))
    return entries


def _wnids_of_paths(paths: PathTable, labels: np.ndarray) -> list[str] | None:
    """WordNet ids by label when every label's images lie in one folder of that name, and every label has images."""
    found: dict[int, str] = {}
    for path, label in zip(paths, labels.tolist(), strict=True):
        wnid = os.path.basename(os.path.dirname(path))
        if not _WNID.fullmatch(wnid) or found.setdefault(label, wnid) != wnid:
            return None
    return [found[label] for label in range(len(found))] if sorted(found) == list(range(len(found))) else None
