"""RandAugment (Cubuk et al., arXiv 1909.13719) as timm spells it: `rand-m9-mstd0.5-inc1`.

Every operation is a pure function of (image, argument); `RandAugment` draws which and how strong from the generator it
is given. Only the variants whose severity grows with the magnitude (inc1, the official recipe) exist here.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageEnhance, ImageOps

from swin_scale.errors import UserError

MAX_MAGNITUDE = 10.0
FILL = (124, 116, 104)
"""255 x ImageNet mean, for pixels that a geometric operation brings in from outside."""
_AFFINE = Image.Transform.AFFINE

Operation = Callable[[Image.Image, float, Image.Resampling], Image.Image]


def auto_contrast(image: Image.Image, _: float, __: Image.Resampling) -> Image.Image:
    return ImageOps.autocontrast(image)


def equalize(image: Image.Image, _: float, __: Image.Resampling) -> Image.Image:
    return ImageOps.equalize(image)


def invert(image: Image.Image, _: float, __: Image.Resampling) -> Image.Image:
    return ImageOps.invert(image)


def rotate(image: Image.Image, degrees: float, resample: Image.Resampling) -> Image.Image:
    return image.rotate(degrees, resample=resample, fillcolor=FILL)


def posterize(image: Image.Image, bits: float, _: Image.Resampling) -> Image.Image:
    """Keep the upper `bits` of each value. Magnitude 10 keeps none: black, where newer Pillow releases would raise."""
    return ImageOps.posterize(image, int(bits)) if bits >= 1 else Image.new("RGB", image.size)


def solarize(image: Image.Image, threshold: float, _: Image.Resampling) -> Image.Image:
    return ImageOps.solarize(image, int(threshold))


def solarize_add(image: Image.Image, amount: float, _: Image.Resampling) -> Image.Image:
    """Add `amount` to all values below 128."""
    table = [min(255, value + int(amount)) if value < 128 else value for value in range(256)]
    return image.point(table * 3)


def color(image: Image.Image, factor: float, _: Image.Resampling) -> Image.Image:
    return ImageEnhance.Color(image).enhance(factor)


def contrast(image: Image.Image, factor: float, _: Image.Resampling) -> Image.Image:
    return ImageEnhance.Contrast(image).enhance(factor)


def brightness(image: Image.Image, factor: float, _: Image.Resampling) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(factor)


def sharpness(image: Image.Image, factor: float, _: Image.Resampling) -> Image.Image:
    return ImageEnhance.Sharpness(image).enhance(factor)


def shear_x(image: Image.Image, factor: float, resample: Image.Resampling) -> Image.Image:
    return image.transform(image.size, _AFFINE, (1, factor, 0, 0, 1, 0), resample=resample, fillcolor=FILL)


def shear_y(image: Image.Image, factor: float, resample: Image.Resampling) -> Image.Image:
    return image.transform(image.size, _AFFINE, (1, 0, 0, factor, 1, 0), resample=resample, fillcolor=FILL)


def translate_x(image: Image.Image, part: float, resample: Image.Resampling) -> Image.Image:
    """Shift by a part of the width."""
    pixels = part * image.size[0]
    return image.transform(image.size, _AFFINE, (1, 0, pixels, 0, 1, 0), resample=resample, fillcolor=FILL)


def translate_y(image: Image.Image, part: float, resample: Image.Resampling) -> Image.Image:
    """Shift by a part of the height."""
    pixels = part * image.size[1]
    return image.transform(image.size, _AFFINE, (1, 0, 0, 0, 1, pixels), resample=resample, fillcolor=FILL)


def _either_sign(value: float, rng: random.Random) -> float:
    return -value if rng.random() > 0.5 else value


def _nothing(_: float, __: random.Random) -> float:
    return 0.0


def _signed(largest: float) -> Callable[[float, random.Random], float]:
    return lambda magnitude, rng: _either_sign(magnitude / MAX_MAGNITUDE * largest, rng)


def _enhance(magnitude: float, rng: random.Random) -> float:
    """A factor around 1, which changes nothing, in [0.1, 1.9]."""
    return max(0.1, 1.0 + _either_sign(magnitude / MAX_MAGNITUDE * 0.9, rng))


def _bits(magnitude: float, _: random.Random) -> float:
    return 4 - int(magnitude / MAX_MAGNITUDE * 4)


def _threshold(magnitude: float, _: random.Random) -> float:
    return 256 - min(256, int(magnitude / MAX_MAGNITUDE * 256))


def _amount(magnitude: float, _: random.Random) -> float:
    return min(128, int(magnitude / MAX_MAGNITUDE * 110))


# timm's name: (operation, argument as a function of magnitude in [0, 10]), in timm's order.
OPERATIONS: dict[str, tuple[Operation, Callable[[float, random.Random], float]]] = {
    "AutoContrast": (auto_contrast, _nothing),
    "Equalize": (equalize, _nothing),
    "Invert": (invert, _nothing),
    "Rotate": (rotate, _signed(30.0)),
    "PosterizeIncreasing": (posterize, _bits),
    "SolarizeIncreasing": (solarize, _threshold),
    "SolarizeAdd": (solarize_add, _amount),
    "ColorIncreasing": (color, _enhance),
    "ContrastIncreasing": (contrast, _enhance),
    "BrightnessIncreasing": (brightness, _enhance),
    "SharpnessIncreasing": (sharpness, _enhance),
    "ShearX": (shear_x, _signed(0.3)),
    "ShearY": (shear_y, _signed(0.3)),
    "TranslateXRel": (translate_x, _signed(0.45)),
    "TranslateYRel": (translate_y, _signed(0.45)),
}
_NAMES = tuple(OPERATIONS)


@dataclass(frozen=True)
class RandAugment:
    """`layers` operations, each applied with probability `prob` at a magnitude drawn from N(magnitude, std)."""

    magnitude: float = 9.0
    magnitude_std: float = 0.5
    layers: int = 2
    prob: float = 0.5
    resample: Image.Resampling = Image.Resampling.BICUBIC

    @classmethod
    def parse(cls, recipe: str, resample: Image.Resampling = Image.Resampling.BICUBIC) -> RandAugment:
        """From timm's notation, such as ``rand-m9-mstd0.5-inc1`` (keys m, mstd, n, p, inc). Raises UserError."""
        name, *parts = recipe.split("-")
        values: dict[str, float] = {}
        for part in parts:
            found = re.fullmatch(r"(m|mstd|n|p|inc)(\d+(?:\.\d+)?)", part)
            if found is None:
                raise UserError(f"augment.auto_augment: cannot read {part!r} in {recipe!r}; known: m, mstd, n, p, inc1")
            values[found[1]] = float(found[2])
        if name != "rand" or values.get("inc") != 1:
            raise UserError(f"augment.auto_augment is {recipe!r}; use rand-m9-mstd0.5-inc1 (with inc1) or none")
        return cls(
            magnitude=values.get("m", MAX_MAGNITUDE),
            magnitude_std=values.get("mstd", 0.0),
            layers=int(values.get("n", 2)),
            prob=values.get("p", 0.5),
            resample=resample,
        )

    def __call__(self, image: Image.Image, rng: random.Random) -> Image.Image:
        for name in [_NAMES[rng.randrange(len(_NAMES))] for _ in range(self.layers)]:
            if self.prob < 1.0 and rng.random() > self.prob:
                continue
            magnitude = rng.gauss(self.magnitude, self.magnitude_std) if self.magnitude_std > 0 else self.magnitude
            operation, argument = OPERATIONS[name]
            image = operation(image, argument(min(max(magnitude, 0.0), MAX_MAGNITUDE), rng), self.resample)
        return image
