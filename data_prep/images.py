"""Is this file an image we can train on? Judged by content, never by name; every size is bounded before it is used."""

from __future__ import annotations

import io
import os
import stat
import struct
import warnings
import zlib
from typing import NamedTuple

from PIL import Image

MAX_IMAGE_BYTES = 1 << 28
"""Largest image file accepted, 256 MiB; checked before a byte is read."""

MAX_IMAGE_PIXELS = 1024**3 // 12
"""Largest image accepted, 89.5 megapixels: from here on Pillow itself warns of a decompression bomb."""

_SIGNATURES = (
    (b"\xff\xd8\xff", 0, "jpg"),
    (b"\x89PNG\r\n\x1a\n", 0, "png"),
    (b"WEBP", 8, "webp"),
    (b"GIF8", 0, "gif"),
    (b"BM", 0, "bmp"),
    (b"II*\x00", 0, "tiff"),
    (b"MM\x00*", 0, "tiff"),
    (b"ftypavif", 4, "avif"),
    (b"ftypheic", 4, "heic"),
)
_PILLOW_FORMAT = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}

# What Pillow's decoders raise on damaged input. A blanket `except Exception` would also swallow our own slips.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


class BadImageError(Exception):
    """The content is not an image we can train on; the message is the reason, without a path."""


class ImageInfo(NamedTuple):
    """What the header says. `extension` is ``jpg``, ``png`` or ``webp``, by content."""

    extension: str
    width: int
    height: int


def check_image(data: bytes, *, decode: bool = True) -> ImageInfo:
    """Check that `data` is a complete jpg, png or webp; `decode=False` reads the header only.

    JPEGs are decoded at one eighth of their size: the whole entropy-coded stream is still read, so that truncation
    shows, but most of the inverse DCT and all of the memory are saved. Raises BadImageError.
    """
    extension = sniff(data)
    try:
        with warnings.catch_warnings():
            # Other warnings concern metadata (broken EXIF, odd transparency) and say nothing about the pixels.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=(_PILLOW_FORMAT[extension],)) as image:
                width, height = image.size
                if width * height > MAX_IMAGE_PIXELS:
                    raise BadImageError(f"{width}x{height} pixels, more than the limit of {MAX_IMAGE_PIXELS}")
                if decode:
                    image.draft("RGB", (1, 1))
                    image.load()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImageError(f"decompression bomb: {error}") from error
    except _DECODER_ERRORS as error:
        raise BadImageError(f"cannot be decoded as {extension}: {error}") from error
    return ImageInfo(extension, width, height)


def sniff(data: bytes) -> str:
    """The extension that the first bytes call for: ``jpg``, ``png`` or ``webp``. Raises BadImageError otherwise."""
    if not data:
        raise BadImageError("the file is empty")
    for signature, offset, name in _SIGNATURES:
        if data[offset : offset + len(signature)] == signature:
            if name not in _PILLOW_FORMAT:
                raise BadImageError(f"content is {name}; jpg, png and webp are supported")
            return name
    head = data[:256].lstrip().lower()
    if head.startswith((b"<!doctype", b"<html", b"<?xml", b"<svg")):
        raise BadImageError("content is HTML or XML, not an image")
    raise BadImageError(f"content is no known image format: it starts with {data[:8].hex(' ')}")


def read_image_file(path: str | os.PathLike[str]) -> bytes:
    """Read a regular file of at most `MAX_IMAGE_BYTES`.

    Raises BadImageError for anything that is not such a file (pipe, directory, dangling link, no permission), and
    OSError for failures of the storage, which say nothing about the image.
    """
    try:
        # O_NONBLOCK: opening a named pipe must not wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except (FileNotFoundError, PermissionError) as error:
        raise BadImageError(error.strerror or str(error)) from error
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise BadImageError("not a regular file")
        if status.st_size > MAX_IMAGE_BYTES:
            raise BadImageError(f"{status.st_size} bytes, more than the limit of {MAX_IMAGE_BYTES}")
        return file.read(MAX_IMAGE_BYTES)
