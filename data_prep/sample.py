"""Take a few images out of a shard set, to look at them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import xxhash

from data_prep.images import MAX_IMAGE_BYTES, BadImageError, sniff
from swin_scale.errors import DataError, UserError
from swin_scale.files import write_atomic
from swin_scale.shards import ShardSet


def sample(directory: str | os.PathLike[str], n: int, out: str | os.PathLike[str], *, seed: int = 0) -> list[Path]:
    """Write `n` images drawn by `seed` to the folder `out`; returns their paths.

    A name is made of the index row, the label and the class, never of what a tar says. Raises UserError for n below 1,
    DataError for a damaged set.
    """
    if n < 1:
        raise UserError(f"n is {n}; give 1 or more")
    shards, out = ShardSet.open(directory), Path(out)
    written = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        for row, image in read_images(shards, n, seed):
            label = int(shards.index["label"][row])
            known = 0 <= label < len(shards.manifest.classes)
            name = re.sub(r"[^A-Za-z0-9-]+", "_", shards.manifest.classes[label])[:60] if known else "unknown"
            try:
                extension = sniff(image)
            except BadImageError:
                extension = "bin"
            written.append(out / f"{row:08d}_{label}_{name}.{extension}")
            write_atomic(written[-1], image)
    except OSError as error:
        raise DataError(f"{error.filename or out}: {error.strerror}") from error
    return written


def read_images(shards: ShardSet, n: int, seed: int) -> Iterator[tuple[int, bytes]]:
    """(row, image bytes) of `n` rows drawn without repetition, in stored order, digests checked. Raises DataError."""
    drawn = np.random.default_rng(seed).choice(len(shards), min(n, len(shards)), replace=False)
    for row in np.sort(drawn).tolist():
        entry = shards.index[row]
        if entry["shard"] >= len(shards.manifest.shards) or entry["size"] > MAX_IMAGE_BYTES:
            raise DataError(f"{shards.directory}: index row {row} is out of bounds; run `swin-scale shards verify`")
        path = shards.path(int(entry["shard"]))
        with open(path, "rb") as file:
            image = os.pread(file.fileno(), int(entry["size"]), int(entry["offset"]))
        if xxhash.xxh3_64_intdigest(image) != entry["digest"]:
            raise DataError(f"{path}: the image of index row {row} is damaged; run `swin-scale shards verify`")
        yield row, image
