"""The vector code gives Pillow's pixels, or is not used."""

import importlib.util
import random
import types

import numpy as np
import pytest
from PIL import Image

from swin_scale.data import resample as module
from swin_scale.data.resample import crop_resize, why_not_vectorised

FILTERS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
needs_vectors = pytest.mark.skipif(why_not_vectorised() is not None, reason=f"{why_not_vectorised()}")


def noise(seed: int, width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def pillow(image, box, size, filter):
    top, left, height, width = box
    return np.asarray(image.crop((left, top, left + width, top + height)).resize(size, filter))


def same(image, box, size, filter) -> bool:
    pixels = crop_resize(image, box, size, filter)
    assert pixels.dtype == np.uint8 and pixels.shape == (size[1], size[0], 3)
    return np.array_equal(pixels, pillow(image, box, size, filter))


@needs_vectors
@pytest.mark.parametrize("seed", range(4))
def test_equal_to_pillow_bit_for_bit_at_odd_sizes(seed):
    rng = random.Random(seed)
    for number in range(100):
        width, height = rng.randint(1, 200), rng.randint(1, 200)
        image = noise(number, width, height)
        top, left = rng.randint(0, height - 1), rng.randint(0, width - 1)
        box = top, left, rng.randint(1, height - top), rng.randint(1, width - left)
        size = rng.randint(1, 130), rng.randint(1, 130)
        assert same(image, box, size, rng.choice(FILTERS)), (width, height, box, size)


@needs_vectors
@pytest.mark.parametrize("filter", FILTERS)
def test_extremes(filter):
    """Overshoot of the cubic on black and white, one pixel, one line, the last pixel of the image, no change at all."""
    checks = Image.fromarray(
        np.kron(np.indices((12, 12)).sum(0) % 2, np.ones((5, 7)))[..., None].repeat(3, 2).astype(np.uint8) * 255
    )
    for size in ((100, 90), (30, 90), (90, 30), (84, 60), (1, 1)):
        assert same(checks, (0, 0, 60, 84), size, filter)
    image = noise(0, 37, 41)
    for box in ((40, 36, 1, 1), (0, 0, 1, 37), (0, 36, 41, 1), (0, 0, 41, 37)):
        for size in ((37, 41), (5, 3), (64, 64)):
            assert same(image, box, size, filter)


def test_where_it_cannot_be_used_pillow_does_it(monkeypatch):
    image, box = noise(1, 50, 40), (3, 4, 30, 40)
    assert same(image, box, (20, 20), Image.Resampling.LANCZOS)
    monkeypatch.setattr(module, "_library", lambda: None)
    assert same(image, box, (20, 20), Image.Resampling.BICUBIC)


@needs_vectors
def test_large_images_in_several_pieces_of_memory_are_left_to_pillow():
    image = noise(2, 2500, 2000)  # 20 MB of pixels, in blocks of 16 MB
    with pytest.raises(ValueError):
        image.__arrow_c_array__()
    assert same(image, (10, 10, 1900, 2400), (64, 64), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    ("found", "why"),
    [(None, "was not built"), (types.SimpleNamespace(origin="/dev/null"), "cannot be loaded")],
)
def test_why_not(monkeypatch, found, why):
    module._load.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: found)
        assert why in why_not_vectorised()
        assert same(noise(3, 9, 9), (0, 0, 9, 9), (4, 4), Image.Resampling.BICUBIC)
    module._load.cache_clear()


@needs_vectors
def test_code_that_disagrees_with_pillow_is_not_used(monkeypatch):
    """As where another Pillow rounds differently: one wrong pixel in the trial is enough."""
    real = module._resample

    def off_by_one(*arguments):
        pixels = real(*arguments)
        pixels[0, 0, 0] ^= 1
        return pixels

    module._load.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(module, "_resample", off_by_one)
        assert why_not_vectorised() == "its pixels are not those of this Pillow"
        assert same(noise(4, 30, 30), (0, 0, 30, 30), (8, 8), Image.Resampling.BICUBIC)
    module._load.cache_clear()
