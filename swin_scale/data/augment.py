"""The random view of a training image, and the fixed one for evaluation: the official transforms of Swin and timm.

A view is a pure function of the image and one generator, which the caller keys by (seed, epoch, sample id). Pixels stay
8-bit; normalisation and the noise of random erasing happen on the device (`device`).
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from swin_scale.config import Augment
from swin_scale.data.randaugment import RandAugment
from swin_scale.data.resample import Box, crop_resize
from swin_scale.errors import UserError

SMALL = 32
"""Up to this size (pixels) images are padded and cropped, not resized, as in the official CIFAR-like path."""
PADDING = 4


def resized_crop_box(
    width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float], rng: random.Random
) -> Box:
    """The region of RandomResizedCrop (Szegedy et al., arXiv 1409.4842): `scale` of the area at aspect `ratio`.

    After ten misses the largest central region whose aspect ratio is allowed.
    """
    area = width * height
    log_ratio = (math.log(ratio[0]), math.log(ratio[1]))
    for _ in range(10):
        target = rng.uniform(*scale) * area
        aspect = math.exp(rng.uniform(*log_ratio))
        crop_width, crop_height = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if crop_width <= width and crop_height <= height:
            top = rng.randint(0, height - crop_height)
            return top, rng.randint(0, width - crop_width), crop_height, crop_width
    crop_width, crop_height = width, height
    if width / height < min(ratio):
        crop_height = round(width / min(ratio))
    elif width / height > max(ratio):
        crop_width = round(height * max(ratio))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def erase_boxes(height: int, width: int, prob: float, most: int, rng: random.Random) -> list[Box]:
    """Rectangles of random erasing (Zhong et al., arXiv 1708.04896): 2 % to 1/3 of the area, aspect 0.3 to 1/0.3."""
    if rng.random() > prob:
        return []
    count = 1 if most == 1 else rng.randint(1, most)
    log_ratio = (math.log(0.3), math.log(1 / 0.3))
    boxes = []
    for _ in range(count):
        for _ in range(10):
            target = rng.uniform(0.02, 1 / 3) * height * width / count
            aspect = math.exp(rng.uniform(*log_ratio))
            box_height, box_width = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
            if box_width < width and box_height < height:
                top = rng.randint(0, height - box_height)
                boxes.append((top, rng.randint(0, width - box_width), box_height, box_width))
                break
    return boxes


def color_jitter(image: Image.Image, strength: float, rng: random.Random) -> Image.Image:
    """Brightness, contrast and saturation, each by a factor in 1 +- strength, in random order."""
    changes = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
    rng.shuffle(changes)
    for change in changes:
        image = change(image).enhance(rng.uniform(max(0.0, 1 - strength), 1 + strength))
    return image


def pad_to(image: Image.Image, width: int, height: int) -> Image.Image:
    """Centre the image on black so that it has at least this size."""
    across, down = max(0, width - image.width), max(0, height - image.height)
    if not across and not down:
        return image
    return ImageOps.expand(image, (across // 2, down // 2, (across + 1) // 2, (down + 1) // 2))


def centre_crop(image: Image.Image, width: int, height: int) -> Image.Image:
    """The middle of the image, padded with black where it is smaller; rounds as torchvision does."""
    image = pad_to(image, width, height)
    left, top = round((image.width - width) / 2.0), round((image.height - height) / 2.0)
    return image.crop((left, top, left + width, top + height))


def _pads(config: Augment, height: int, width: int) -> bool:
    return config.crop == "pad" or (config.crop is None and max(height, width) <= SMALL)


def size_pair(img_size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of an image size given as one number or two."""
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    if height < 1 or width < 1:
        raise UserError(f"data.img_size is {img_size}; give one positive number or [height, width]")
    return height, width


@dataclass(frozen=True)
class TrainTransform:
    """Crop, flip, RandAugment (or colour jitter when that is off), and the boxes to erase later."""

    height: int
    width: int
    config: Augment
    rand_augment: RandAugment | None
    resample: Image.Resampling

    @classmethod
    def create(cls, config: Augment, img_size: int | tuple[int, int]) -> TrainTransform:
        """Read the recipe once; raises UserError."""
        resample = Image.Resampling[config.interpolation.upper()]
        recipe = config.auto_augment
        rand_augment = None if recipe == "none" else RandAugment.parse(recipe, resample)
        return cls(*size_pair(img_size), config, rand_augment, resample)

    @property
    def boxes(self) -> int:
        """Boxes per image that `__call__` may return."""
        return self.config.recount if self.config.reprob > 0 else 0

    def crop_box(self, width: int, height: int, rng: random.Random) -> Box | None:
        """The region that `__call__` would draw first for an image of this size; None where it takes all of it."""
        if _pads(self.config, self.height, self.width):
            return None
        return resized_crop_box(width, height, self.config.crop_scale, self.config.crop_ratio, rng)

    def __call__(self, image: Image.Image, rng: random.Random, box: Box | None = None) -> tuple[np.ndarray, list[Box]]:
        """image: RGB of any size; rows below `box` may be missing from it where the caller drew that by `crop_box`.

        Returns (height, width, 3) uint8 and at most `boxes` boxes to erase.
        """
        height, width = self.height, self.width
        box = box or self.crop_box(image.width, image.height, rng)
        if box is None:
            image = pad_to(ImageOps.expand(image, PADDING), width, height)
            top, left = rng.randint(0, image.height - height), rng.randint(0, image.width - width)
            image = image.crop((left, top, left + width, top + height))
        else:
            # Cropping first, not `resize(box=...)`, whose filter would look over the edge of the crop.
            image = Image.fromarray(crop_resize(image, box, (width, height), self.resample))
        return self.vary(image, rng)

    def vary(self, image: Image.Image, rng: random.Random) -> tuple[np.ndarray, list[Box]]:
        """All that follows the crop; image: RGB of height x width. Returns what `__call__` does."""
        config = self.config
        if config.hflip > 0 and rng.random() < config.hflip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.rand_augment is not None:
            image = self.rand_augment(image, rng)
        elif config.color_jitter > 0:
            image = color_jitter(image, config.color_jitter, rng)
        boxes = erase_boxes(self.height, self.width, config.reprob, config.recount, rng) if config.reprob > 0 else []
        return np.asarray(image), boxes


@dataclass(frozen=True)
class EvalTransform:
    """Shorter side to 256/224 of the size and the middle cut out, or squashed to the size; padded when small."""

    height: int
    width: int
    crop: bool
    pad: bool
    resample: Image.Resampling
    boxes: int = 0

    @classmethod
    def create(cls, config: Augment, img_size: int | tuple[int, int]) -> EvalTransform:
        height, width = size_pair(img_size)
        resample = Image.Resampling[config.interpolation.upper()]
        return cls(height, width, config.eval_crop, _pads(config, height, width), resample)

    def __call__(
        self, image: Image.Image, rng: random.Random | None = None, box: Box | None = None
    ) -> tuple[np.ndarray, list[Box]]:
        """image: RGB of any size. Returns (height, width, 3) uint8 and no boxes; the rest is not used."""
        if self.pad:
            return np.asarray(centre_crop(image, self.width, self.height)), []
        if not self.crop:
            return self._resized(image, (self.width, self.height)), []
        tall, wide = int(256 / 224 * self.height), int(256 / 224 * self.width)
        if tall == wide:
            # torchvision's rule, truncation included: the shorter side exact, the longer one floored.
            short, long = min(image.size), max(image.size)
            other = int(tall * long / short)
            size = (tall, other) if image.width <= image.height else (other, tall)
        else:
            # Rectangular inputs are covered: neither side falls below its share.
            ratio = max(wide / image.width, tall / image.height)
            size = (max(wide, round(image.width * ratio)), max(tall, round(image.height * ratio)))
        image = image if image.size == size else Image.fromarray(self._resized(image, size))
        return np.asarray(centre_crop(image, self.width, self.height)), []

    def crop_box(self, width: int, height: int, rng: random.Random) -> None:
        """The fixed view looks at the whole image."""

    def _resized(self, image: Image.Image, size: tuple[int, int]) -> np.ndarray:
        return crop_resize(image, (0, 0, image.height, image.width), size, self.resample)
