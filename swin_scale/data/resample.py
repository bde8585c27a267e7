"""Crop and resize in one step: Pillow's pixels, from vector code where it was built.

Pillow is the specification. ``_resample.c`` computes the same integers with SIMD, which its sums allow without a
difference in any pixel, and is used in a process only after it gave Pillow's pixels there; so it is no part of what
makes a run reproducible, and ranks with and without it agree.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util

import numpy as np
from PIL import Image

Box = tuple[int, int, int, int]
"""(top, left, height, width) in pixels."""
_CUBIC = {Image.Resampling.BILINEAR: 0, Image.Resampling.BICUBIC: 1}


def crop_resize(image: Image.Image, box: Box, size: tuple[int, int], filter: Image.Resampling) -> np.ndarray:
    """Cut `box` out of an RGB `image` and resize it to `size` (width, height).

    Returns (size[1], size[0], 3) uint8, equal to ``image.crop(...).resize(size, filter)``: what lies outside the box
    takes no part in it.
    """
    top, left, height, width = box
    resample = _library()
    if resample is not None and filter in _CUBIC and image.mode == "RGB":
        assert left >= 0 and top >= 0 and 0 < height <= image.height - top and 0 < width <= image.width - left, box
        pixels = _resample(resample, image, box, size, _CUBIC[filter])
        if pixels is not None:
            return pixels
    return np.asarray(image.crop((left, top, left + width, top + height)).resize(size, filter))


def why_not_vectorised() -> str | None:
    """Why Pillow resizes in this process; None where the vector code does."""
    return None if _library() is not None else _load()[1]


def _resample(
    resample: ctypes._NamedFuncPointer,
    image: Image.Image,
    box: Box,
    size: tuple[int, int],
    cubic: int,
) -> np.ndarray | None:
    """`crop_resize` by the vector code; None when the image is not in one piece of memory, or there is none left."""
    top, left, height, width = box
    try:
        # The capsule owns the pixels: it must outlive the call.
        _, capsule = image.__arrow_c_array__()
    except ValueError:
        return None
    out = np.empty(size[1] * size[0] * 3 + 1, np.uint8)
    first = _pixels(capsule) + 4 * (top * image.width + left)
    failed = resample(first, image.width, height, width, out.ctypes.data, size[1], size[0], cubic)
    return None if failed else out[:-1].reshape(size[1], size[0], 3)


class _ArrowArray(ctypes.Structure):
    """The C data interface of Apache Arrow, as far as it is read here."""


_ArrowArray._fields_ = [
    *((name, ctypes.c_int64) for name in ("length", "null_count", "offset", "n_buffers", "n_children")),
    ("buffers", ctypes.POINTER(ctypes.c_void_p)),
    ("children", ctypes.POINTER(ctypes.POINTER(_ArrowArray))),
    ("dictionary", ctypes.c_void_p),
    ("release", ctypes.c_void_p),
    ("private_data", ctypes.c_void_p),
]
_capsule_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def _pixels(capsule: object) -> int:
    """Address of the first byte of an image of 4-byte pixels: a list of fixed size 4 whose child holds the bytes."""
    array = _ArrowArray.from_address(_capsule_pointer(capsule, b"arrow_array"))
    return array.children[0].contents.buffers[1]


def _library() -> ctypes._NamedFuncPointer | None:
    return _load()[0]


@functools.cache
def _load() -> tuple[ctypes._NamedFuncPointer | None, str | None]:
    """(the function, None), or (None, why it is not used)."""
    spec = importlib.util.find_spec("swin_scale.data._resample")
    if spec is None or spec.origin is None:
        return None, "it was not built: installing swin_scale needs a C compiler for it"
    try:
        resample = ctypes.CDLL(spec.origin).swin_scale_resample
    except (OSError, AttributeError) as error:
        return None, f"it cannot be loaded: {error}"
    pointer, number = ctypes.c_void_p, ctypes.c_int32
    resample.argtypes = [pointer, ctypes.c_int64, number, number, pointer, number, number, number]
    resample.restype = ctypes.c_int
    if not hasattr(Image.Image, "__arrow_c_array__"):
        return None, "this Pillow cannot lend its pixels; 11.3 and later can"
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (61, 83, 3), np.uint8))
    for filter, cubic in _CUBIC.items():
        # Wider and lower by a little and by much, at both sides of where Pillow changes the order of its passes.
        for size in ((20, 90), (100, 15), (70, 40), (70, 39), (90, 59), (90, 60)):
            ours = _resample(resample, noise, (1, 2, 60, 80), size, cubic)
            if ours is None or not np.array_equal(ours, np.asarray(noise.crop((2, 1, 82, 61)).resize(size, filter))):
                return None, "its pixels are not those of this Pillow"
    return resample, None
