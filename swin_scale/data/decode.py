"""Bytes of a stored image to 8-bit RGB, or `BadSample`: nothing hostile or broken gets further, nothing is replaced.

Pillow only: its wheels bring libjpeg-turbo, and simplejpeg measured 0.85x its speed on 500x375 JPEGs, while a second
decoder that may round differently would be one more thing a run depends on. What may be saved is work: a crop needs
no row below it, so a JPEG is decoded as if it ended there, to the same pixels.
"""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image

from swin_scale.data.reader import BadSample

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""What image collections hold. Pillow knows many more, among them some that start other programs."""
MAX_PIXELS = 100_000_000
_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive, all Huffman-coded
_SEGMENTS = frozenset([0xC4, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE])  # tables, application data, comments
_CONTEXT_ROWS = 2  # chroma of the last row is interpolated with the row below it
# What Pillow's readers of these formats are seen to raise on damaged or hostile input.
_BROKEN = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    ArithmeticError,
    struct.error,
    zlib.error,
)


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) of a JPEG of which `decode_rgb` can decode the upper rows alone; None for all other content."""
    at = _frame_size_at(data)
    if at is None:
        return None
    height, width = struct.unpack_from(">HH", data, at)
    return (width, height) if width and height else None


def decode_rgb(data: bytes, *, max_pixels: int = MAX_PIXELS, rows: int | None = None) -> Image.Image:
    """Decode one image to mode RGB. Raises BadSample for anything that is not a whole image of a known format.

    `rows`: that many of the upper rows are needed; where `jpeg_size` answers, the image may come without the others.

    The size is checked from the header, before any pixel is decoded. Alpha is dropped and EXIF orientation ignored, as
    the official code does; 16-bit grey keeps its upper 8 bits.
    """
    if rows is not None and (size := jpeg_size(data)) is not None and size[0] * size[1] <= max_pixels:
        data = _without_rows_below(data, min(rows + _CONTEXT_ROWS, size[1]))
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    # The warning is an error only where the user made warnings errors; our own limit is stricter and comes next.
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadSample(f"too large: {error}") from error
    except _BROKEN as error:
        raise BadSample(f"not a {', '.join(FORMATS)} image: {_reason(error)}") from error
    width, height = image.size
    if width * height > max_pixels:
        raise BadSample(f"{width}x{height} pixels, more than data.max_pixels {max_pixels}")
    try:
        with image:
            image.load()
            return _to_rgb(image)
    except Image.DecompressionBombError as error:
        raise BadSample(f"too large: {error}") from error
    except _BROKEN as error:
        raise BadSample(f"damaged {image.format}: {_reason(error)}") from error


def _frame_size_at(data: bytes) -> int | None:
    """Where a JPEG states its height and width (2 bytes each); None for what is not a JPEG with its end in place.

    A file that was cut must be decoded whole, which tells so, whatever part of it is needed.
    """
    if data[:2] != b"\xff\xd8" or data[-2:] != b"\xff\xd9":
        return None
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker, length = struct.unpack_from(">xBH", data, at)
        if marker in _FRAMES:
            return at + 5
        if marker not in _SEGMENTS or length < 2:
            return None
        at += 2 + length
    return None


def _without_rows_below(data: bytes, rows: int) -> bytes:
    """The JPEG `data` made to end after `rows` rows: the decoder skips the rest of every scan."""
    at = _frame_size_at(data)
    assert at is not None
    return data[:at] + struct.pack(">H", rows) + data[at + 2 :]


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow's own conversion clips 16-bit values at 255, which makes most such images white.
        return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        # The detour Pillow asks for; the colours come out the same.
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def _reason(error: BaseException) -> str:
    """One short line; Pillow prints object addresses, which would differ from run to run."""
    text = str(error).partition("<_io")[0].strip() or type(error).__name__
    return text.splitlines()[0][:200]
