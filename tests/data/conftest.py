"""Tiny shard sets, written with the stdlib and the public contract only."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import xxhash
from PIL import Image

from swin_scale.shards import INDEX_DTYPE, Manifest, Shard, ShardSet, save_index


def photo(seed: int, width: int = 48, height: int = 40) -> Image.Image:
    """A smooth random RGB picture with some texture, so that every operation changes it."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    noise = rng.integers(-12, 13, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8))


def encode(image: Image.Image, format: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def write_shards(
    directory: Path,
    images: Sequence[bytes],
    labels: Sequence[int],
    *,
    per_shard: int = 10,
    classes: int | None = None,
    keys: Sequence[str] | None = None,
    format: int = tarfile.USTAR_FORMAT,
) -> ShardSet:
    """A shard set as data_prep writes them: tars of {key}.jpg and {key}.cls, manifest and index."""
    directory.mkdir(parents=True, exist_ok=True)
    rows = np.zeros(len(images), INDEX_DTYPE)
    shards = []
    for number, first in enumerate(range(0, len(images), per_shard)):
        path = directory / f"train-{number:06d}.tar"
        members = range(first, min(first + per_shard, len(images)))
        with tarfile.open(path, "w", format=format) as tar:
            for i in members:
                key = keys[i] if keys else f"{i:08d}"
                for suffix, data in (("jpg", images[i]), ("cls", str(labels[i]).encode())):
                    info = tarfile.TarInfo(f"{key}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                    if suffix == "jpg":
                        offset = tar.offset - -(-len(data) // 512) * 512
                        rows[i] = (number, offset, len(data), labels[i], xxhash.xxh3_64_intdigest(data))
        digest = xxhash.xxh3_128_hexdigest(path.read_bytes())
        shards.append(Shard(name=path.name, samples=len(members), bytes=path.stat().st_size, xxh3_128=digest))
    count = classes if classes is not None else max(labels) + 1
    Manifest(shards=tuple(shards), classes=tuple(f"class {i}" for i in range(count))).save(directory)
    save_index(directory, rows)
    return ShardSet.open(directory)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """53 JPEGs of 5 classes in 6 shards."""
    images = [encode(photo(seed)) for seed in range(53)]
    return write_shards(tmp_path_factory.mktemp("shards"), images, [i % 5 for i in range(53)])


@pytest.fixture(scope="session")
def other_shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """17 more images of the same classes in 2 shards."""
    images = [encode(photo(seed)) for seed in range(100, 117)]
    return write_shards(tmp_path_factory.mktemp("other"), images, [i % 5 for i in range(17)], per_shard=9)
