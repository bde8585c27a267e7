"""Small real images and shard sets for the tests of data_prep."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.write import write_shards

CLASSES = ("n00000003", "n00000010", "n00000200")


def image_bytes(seed: int, kind: str = "JPEG", side: int = 24) -> bytes:
    """A picture that is different for every seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 images in three class folders: names with dots, spaces and umlauts, extensions that lie."""
    root = tmp_path_factory.mktemp("tree")
    names = ["{0}_{1}.JPEG", "im.age {1}.jpg", "bild-ä{1}.PNG", "{1}.webp"]
    kinds = ["JPEG", "PNG", "PNG", "WEBP"]
    for number in range(60):
        wnid = CLASSES[number % 3]
        (root / wnid).mkdir(exist_ok=True)
        path = root / wnid / names[number % 4].format(wnid, number)
        path.write_bytes(image_bytes(number, kinds[number % 4]))
    (root / "notes.txt").write_text("not a class")
    (root / CLASSES[0] / "notes.txt").write_text("not an image")
    return root


@pytest.fixture(scope="session")
def written(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tree` as a shard set of 5 shards; do not change it, copy it."""
    out = tmp_path_factory.mktemp("written") / "shards"
    write_shards(tree, out, samples_per_shard=12, workers=1)
    return out


def contents(directory: Path) -> dict[str, bytes]:
    """Every file of a shard set by name."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}
