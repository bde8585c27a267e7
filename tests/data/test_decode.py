import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from swin_scale.data.decode import decode_rgb
from swin_scale.data.reader import BadSample
from tests.data.conftest import encode, photo


def pixels(data: bytes) -> np.ndarray:
    image = decode_rgb(data)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_equals_the_official_conversion(format):
    data = encode(photo(1), format)
    assert (pixels(data) == np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))).all()


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK"])
def test_modes(mode):
    original = photo(2).convert(mode)
    data = encode(original, "JPEG" if mode == "CMYK" else "PNG")
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert (pixels(data) == expected).all()
    assert expected.std() > 20


def test_sixteen_bit_grey_keeps_its_upper_half():
    values = np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16)
    out = pixels(encode(Image.fromarray(values), "PNG"))
    assert (out == (values >> 8).astype(np.uint8)[..., None]).all()


def test_palette_with_transparency_and_exif_orientation():
    palette = photo(3).convert("P")
    data = encode(palette, "PNG", transparency=bytes(range(256)))
    assert (pixels(data) == np.asarray(palette.convert("RGB"))).all()
    exif = Image.Exif()
    exif[0x0112] = 6
    assert pixels(encode(photo(3), exif=exif)).shape == (40, 48, 3)


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    out = b"\x89PNG\r\n\x1a\n"
    for name, body in ((b"IHDR", header), *chunks, (b"IEND", b"")):
        out += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return out


BOMB_TEXT = (b"zTXt", b"k\0\0" + zlib.compress(bytes(8 << 20), 1))
WHOLE = encode(photo(6))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not a JPEG"),
        (b"<!DOCTYPE html><html>404</html>", "not a JPEG"),
        (WHOLE[:-100], "damaged JPEG"),
        (WHOLE[:30], "not a JPEG|damaged JPEG"),
        (encode(photo(7), "PNG")[:300], "damaged PNG"),
        (encode(photo(7), "WEBP")[:200], "WEBP"),
        (png(65_000, 65_000, (b"IDAT", b"x")), "too large"),
        (png(12_000, 12_000, (b"IDAT", b"x")), "12000x12000 pixels, more than data.max_pixels"),
        (png(8, 8, BOMB_TEXT), "not a JPEG|damaged PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a JPEG"),
        (encode(photo(8), "TIFF"), "not a JPEG"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_content_is_named(data, reason):
    with pytest.raises(BadSample, match=reason) as caught:
        decode_rgb(data)
    assert " at 0x" not in str(caught.value) and "\n" not in str(caught.value)


def test_random_damage_is_an_image_or_a_bad_sample():
    rng = np.random.default_rng(0)
    for format in ("JPEG", "PNG", "WEBP", "GIF", "BMP"):
        whole = encode(photo(9), format)
        for _ in range(150):
            data = bytearray(whole)
            for position in rng.integers(0, len(data), rng.integers(1, 12)):
                data[position] = rng.integers(256)
            try:
                decode_rgb(bytes(data), max_pixels=1_000_000)
            except BadSample:
                continue
