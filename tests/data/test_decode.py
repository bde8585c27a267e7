import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from swin_scale.data.decode import decode_rgb, jpeg_size
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


@pytest.mark.fault(20, "bombs and other bad content, refused by the decoder")
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


JPEGS = {
    "4:2:0": {"subsampling": "4:2:0"},
    "4:2:2": {"subsampling": "4:2:2"},
    "4:4:4": {"subsampling": "4:4:4"},
    "4:1:1": {"subsampling": "4:1:1"},
    "progressive": {"progressive": True},
    "restart": {"restart_marker_rows": 1},
    "restart, progressive": {"restart_marker_blocks": 3, "progressive": True},
    "grey": {"mode": "L"},
    "CMYK": {"mode": "CMYK"},
    "EXIF and ICC": {"exif": b"Exif\0\0" + bytes(500), "icc_profile": bytes(range(256)) * 300, "comment": b"x" * 99},
}


@pytest.mark.parametrize("kind", JPEGS)
def test_upper_rows_alone_are_those_of_the_whole(kind):
    options = dict(JPEGS[kind])
    data = encode(photo(4, 100, 83).convert(options.pop("mode", "RGB")), quality=80, **options)
    assert jpeg_size(data) == (100, 83)
    whole = pixels(data)
    for rows in (1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 64, 80, 81, 82, 83):
        image = decode_rgb(data, rows=rows)
        assert image.width == 100 and rows <= image.height <= min(rows + 2, 83)
        assert (np.asarray(image)[:rows] == whole[:rows]).all(), rows


@pytest.mark.parametrize(
    "data",
    [
        encode(photo(5), "PNG"),
        encode(photo(5))[:-2],
        encode(photo(5)) + b"\0",
        b"",
        b"\xff\xd8\xff\xd9",
        b"\xff\xd8\xff\xe0\xff\xff\xff\xd9",
        b"\xff\xd8\xff\xe0\x00\x00" + encode(photo(5))[2:],
        encode(photo(5)).replace(b"\xff\xc0", b"\xff\xc3"),
    ],
)
def test_all_else_is_decoded_whole(data):
    assert jpeg_size(data) is None
    try:
        assert decode_rgb(data, rows=3).size == (48, 40)
    except BadSample:
        with pytest.raises(BadSample):
            decode_rgb(data)


def test_a_cut_file_is_bad_whatever_part_of_it_is_needed():
    data = encode(photo(6, 200, 200), quality=95)
    with pytest.raises(BadSample, match="damaged JPEG"):
        decode_rgb(data[:-300], rows=1)


def test_a_huge_claim_is_refused_though_few_rows_are_needed():
    data = bytearray(WHOLE)
    at = data.index(b"\xff\xc0") + 5
    struct.pack_into(">HH", data, at, 20_000, 20_000)
    with pytest.raises(BadSample, match=r"20000x20000 pixels|too large"):
        decode_rgb(bytes(data), rows=1)
