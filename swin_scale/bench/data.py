"""The input pipeline against Pillow: images per CPU-second, on the same JPEGs, the same crops, one process.

The peer does what timm's transform does: open, convert, crop, resize. In this order: make the JPEGs -> gate, the mean
difference in pixels -> paired timings by CPU time, of decode + RandomResizedCrop and of the full training transform,
in which what follows the crop is the same for both.
"""

from __future__ import annotations

import importlib.util
import io
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, features

from swin_scale.bench.result import Result, describe, fixed_threads
from swin_scale.bench.timing import compare
from swin_scale.config import Augment
from swin_scale.data.augment import TrainTransform
from swin_scale.data.decode import decode_rgb, jpeg_size
from swin_scale.data.resample import Box, crop_resize, why_not_vectorised
from swin_scale.errors import SwinScaleError, UserError

WIDTH, HEIGHT = 500, 375
"""The commonest size of ImageNet's images."""

QUALITIES = (75, 80, 85, 90, 95)
CROPS = 60
"""Crops per call: what one time is measured over."""

LIMIT = 0.1
"""Mean absolute difference to Pillow's pixels, in grey levels, past which nothing is timed."""

PEER, CONTROL = "pillow", "ours again"
CROP, FULL = "decode + crop", "full train transform"


@dataclass(frozen=True)
class _Task:
    """One stored image and one of its random views."""

    jpeg: bytes
    seed: int


def bench_data(
    images: str | None = None,
    *,
    img_size: int = 224,
    rounds: int = 20,
    out: str | None = None,
) -> Result:
    """Ratio of our images per CPU-second to Pillow's, above 1 where ours are more.

    Args:
        images: folder of photographs, re-encoded as 500x375 JPEGs of quality 75 to 95 with 4:2:0 chroma; default: those
            of the package foolbox where it is installed, else smooth random pictures, as the result says.
        img_size: of the crops.
        rounds: see `timing.compare`; 20 give the 40 pairs that a claim needs.
        out: file for the result as JSON.

    Raises UserError for a folder without images, SwinScaleError when our pixels differ from Pillow's by more than 0.1.
    """
    photos, source = _photos(images)
    jpegs = [_encode(photo, QUALITIES[i % len(QUALITIES)]) for i, photo in enumerate(photos)]
    tasks = [_Task(jpegs[i % len(jpegs)], i) for i in range(CROPS)]
    transform = TrainTransform.create(Augment(crop="resized"), img_size)
    differences = [np.abs(ours(task, transform).astype(int) - peer(task, transform)) for task in tasks]
    gate = {"mean": float(np.mean(differences)), "max": int(np.max(differences))}
    if gate["mean"] > LIMIT:
        raise SwinScaleError(
            f"our pixels differ from Pillow's by {gate['mean']:.3g} grey levels on average, more than {LIMIT}; nothing "
            f"was timed"
        )
    modes = {}
    with fixed_threads(1):
        for mode, finish in ((CROP, None), (FULL, transform)):
            calls: dict[str, Callable[[], object]] = {
                "ours": _all(ours, tasks, transform, finish),
                PEER: _all(peer, tasks, transform, finish),
                CONTROL: _all(ours, tasks, transform, finish),
            }
            modes[mode] = compare(calls, rounds=rounds, control=CONTROL, clock=time.process_time).as_dict()
    command = f"swin-scale bench data --img-size {img_size} --rounds {rounds}" + " --images DIR" * (images is not None)
    figures = describe("data", command, torch.device("cpu"))
    figures["versions"] |= {name: features.version(name) for name in ("pil", "libjpeg_turbo")}
    figures |= {
        "settings": {
            "images": source,
            "jpegs": len(jpegs),
            "bytes_per_jpeg": round(float(np.mean([len(jpeg) for jpeg in jpegs]))),
            "width": WIDTH,
            "height": HEIGHT,
            "img_size": img_size,
            "crops_per_call": CROPS,
            "rounds": rounds,
            "resampling": "vectorised" if why_not_vectorised() is None else f"Pillow's: {why_not_vectorised()}",
        },
        "gate": gate,
        "modes": modes,
        "images_per_cpu_s": {
            mode: {name: CROPS / times["median"] for name, times in measured["seconds"].items()}
            for mode, measured in modes.items()
        },
    }
    result = Result(figures=figures, table=table(figures))
    if out is not None:
        result.write(out)
    return result


def ours(task: _Task, transform: TrainTransform) -> np.ndarray:
    """(H, W, 3) uint8: the crop as a loader worker makes it."""
    size = jpeg_size(task.jpeg)
    assert size is not None
    box = _box(task, transform, *size)
    image = decode_rgb(task.jpeg, rows=box[0] + box[2])
    return crop_resize(image, box, (transform.width, transform.height), transform.resample)


def peer(task: _Task, transform: TrainTransform) -> np.ndarray:
    """(H, W, 3) uint8: the crop with Pillow alone."""
    image = Image.open(io.BytesIO(task.jpeg)).convert("RGB")
    top, left, height, width = _box(task, transform, *image.size)
    image = image.crop((left, top, left + width, top + height))
    return np.asarray(image.resize((transform.width, transform.height), transform.resample))


def _box(task: _Task, transform: TrainTransform, width: int, height: int) -> Box:
    box = transform.crop_box(width, height, random.Random(task.seed))
    assert box is not None
    return box


def _all(
    crop: Callable[[_Task, TrainTransform], np.ndarray],
    tasks: list[_Task],
    transform: TrainTransform,
    finish: TrainTransform | None,
) -> Callable[[], object]:
    """What is timed: every task, with `finish` through the rest of the transform too."""

    def call() -> None:
        for task in tasks:
            pixels = crop(task, transform)
            if finish is not None:
                finish.vary(Image.fromarray(pixels), random.Random(task.seed))

    return call


def _photos(folder: str | None) -> tuple[list[Image.Image], str]:
    """(RGB pictures of 500x375, what they are)."""
    if folder is None:
        # Found, not imported: only its pictures are of use.
        spec = importlib.util.find_spec("foolbox")
        if spec is None or not spec.submodule_search_locations:
            return [_made_up(seed) for seed in range(20)], "made up: install foolbox or give --images for real ones"
        where = Path(spec.submodule_search_locations[0]) / "data"
    else:
        where = Path(folder)
    paths = sorted(path for path in where.glob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if folder is None:
        paths = [path for path in paths if path.name.startswith("imagenet")]
    if not paths:
        raise UserError(f"--images {where} holds no .jpg or .png; give a folder of photographs")
    photos = []
    for path in paths:
        picture = decode_rgb(path.read_bytes())
        photos.append(ImageOps.fit(picture, (WIDTH, HEIGHT), Image.Resampling.LANCZOS))
    return photos, "photographs of the package foolbox" if folder is None else "photographs given"


def _made_up(seed: int) -> Image.Image:
    """Smooth patches and grain, which compress about as a photograph does."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
    return Image.fromarray(np.clip(pixels + rng.normal(0, 6, (HEIGHT, WIDTH, 1)), 0, 255).astype(np.uint8))


def _encode(photo: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    photo.save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return buffer.getvalue()


def table(figures: dict[str, Any]) -> str:
    """One line per candidate and mode, then what was used."""
    settings = figures["settings"]
    lines = [
        f"{settings['jpegs']} JPEGs of {WIDTH}x{HEIGHT}, {settings['bytes_per_jpeg']} bytes each, to "
        f"{settings['img_size']}x{settings['img_size']}; {settings['images']}; {figures['hardware']['cpu']}",
        f"{'':<22}{'candidate':<12}{'images per CPU-s':>17}{'ours is':>9}  95 % interval",
    ]
    for mode, measured in figures["modes"].items():
        for name, rate in figures["images_per_cpu_s"][mode].items():
            line = f"{mode:<22}{name:<12}{rate:>17.1f}"
            if (ratio := measured["ratios"].get(name)) is not None:
                line += f"{ratio['median']:>8.3f}x  {ratio['lower']:.3f} to {ratio['upper']:.3f}"
            lines.append(line)
    lines.append(
        f"difference to Pillow's pixels: {figures['gate']['mean']:.4g} grey levels on average, "
        f"{figures['gate']['max']} at most; resampling {settings['resampling']}"
    )
    if not all(m["ratios"][PEER]["is_claim"] for m in figures["modes"].values()):
        lines.append("not a claim: fewer than 40 pairs (--rounds 20 gives them)")
    return "\n".join(lines)
