"""Labels, with names, for image files and PIL images."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from swin_scale.config import Augment
from swin_scale.convert import ModelInfo, model_from_weights
from swin_scale.data import BadSample, EvalTransform, decode_rgb, finish
from swin_scale.engine.kernel_choice import describe_kernels
from swin_scale.errors import DataError, UserError
from swin_scale.models.swin import Swin

logger = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
ImageLike = str | os.PathLike[str] | Image.Image


@dataclass(frozen=True, kw_only=True)
class Guess:
    """One class: its number, display name and probability."""

    label: int
    name: str
    probability: float

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def predict(
    model: Swin | str, images: Sequence[ImageLike] | ImageLike, topk: int = 5, *, classes: Sequence[str] = ()
) -> list[list[Guess]]:
    """The `topk` best classes per image.

    Args:
        model: a model of this package, or a path to weights (run or checkpoint directory, .pth, .safetensors).
        images: files or PIL images, one or several.
        classes: display names; default: the names stored with the weights, else the numbers.
    """
    if isinstance(model, Swin):
        predictor = _predictor(model, tuple(classes), Augment())
    else:
        predictor = load_predictor(model, classes=classes)
    several = images if isinstance(images, Sequence) and not isinstance(images, str) else [images]
    return [predictor(image, topk=topk) for image in several]


def load_predictor(
    weights: str,
    *,
    model: str | None = None,
    kind: str = "master",
    img_size: int | None = None,
    crop: bool | None = None,
    classes: Sequence[str] = (),
) -> Callable[..., list[Guess]]:
    """Load weights once; the result is called as ``predictor(image, topk=5)``.

    `crop`: whether to crop the centre or squash images to the size; None: as the run of the weights did.
    """
    overrides = {} if img_size is None else {"img_size": img_size}
    network, info = model_from_weights(weights, model=model, kind=kind, **overrides)
    if not network.variant.num_classes:
        raise UserError(
            f"{weights} has no classifier, such as an encoder of task simmim; fine-tune it with labels first"
        )
    return _predictor(network, tuple(classes) or class_names(info), info.fixed_view(crop))


def class_names(info: ModelInfo) -> tuple[str, ...]:
    """Display names that came with the weights, in label order; empty when there are none."""
    return tuple(info.classes or ())


def _predictor(network: Swin, classes: tuple[str, ...], augment: Augment) -> Callable[..., list[Guess]]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network.to(device).eval()
    dtype = network.patch_embed.proj.weight.dtype
    choice = describe_kernels(network.variant.kernels, network.variant, device, dtype)
    logger.info("kernels: %s", choice.text)
    transform = EvalTransform.create(augment, network.variant.img_size)
    count = network.variant.num_classes
    if classes and len(classes) != count:
        raise UserError(f"there are {len(classes)} class names for a model of {count} classes")

    @torch.no_grad()
    def predictor(image: ImageLike, *, topk: int = 5) -> list[Guess]:
        pixels, _ = transform(_open(image))
        inputs = finish(torch.tensor(pixels).permute(2, 0, 1).unsqueeze(0).to(device))
        output = network(inputs)
        # A model with experts returns their auxiliary loss as well.
        logits = output[0] if isinstance(output, tuple) else output
        probabilities = logits.float().softmax(-1)[0]
        best = probabilities.topk(min(topk, count))
        return [
            Guess(label=label, name=classes[label] if classes else str(label), probability=probability)
            for probability, label in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]

    return predictor


def _open(image: ImageLike) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    try:
        return decode_rgb(Path(image).read_bytes())
    except OSError as error:
        raise UserError(f"image {image} cannot be read: {error.strerror or error}") from error
    except BadSample as error:
        raise DataError(f"image {image} cannot be decoded: {error}") from error


def image_files(paths: Sequence[str]) -> list[Path]:
    """The files named and the images below the folders named, sorted within a folder; UserError when there are none."""
    found: list[Path] = []
    for name in paths:
        path = Path(name)
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
            if not inside:
                raise UserError(f"{path} holds no image ({', '.join(SUFFIXES)})")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"image {path} does not exist")
    return found
