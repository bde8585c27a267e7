"""Mixup (Zhang et al., arXiv 1710.09412) and CutMix (Yun et al., arXiv 1905.04899) over fixed pairs of slots.

One draw per global step, keyed by (seed, step), serves the whole global batch; slot i is mixed with slot i ^ 1. Any cut
of the global batch into even micro-batches therefore gives the same images. A slot without a sample mixes with nobody:
its partner keeps its own image and its own target.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from swin_scale.config import Augment
from swin_scale.data.keyed import scalar_rng

Region = tuple[int, int, int, int]
"""(top, bottom, left, right), ends exclusive."""


@dataclass(frozen=True)
class Mix:
    """How one global step is mixed: `lam` is the weight of a slot's own image. Region None means mixup, else CutMix."""

    lam: float = 1.0
    region: Region | None = None


def draw_mix(config: Augment, *, seed: int, step: int, height: int, width: int) -> Mix:
    """The mix of global step `step`, 0-based: mixup or CutMix with lambda from Beta(alpha, alpha)."""
    rng = scalar_rng("mix", seed, step)
    if not config.mixes or rng.random() >= config.mixup_prob:
        return Mix()
    cut = config.cutmix > 0 and (config.mixup <= 0 or rng.random() < config.mixup_switch_prob)
    alpha = config.cutmix if cut else config.mixup
    lam = rng.betavariate(alpha, alpha)
    if not cut:
        return Mix(lam)
    return cut_mix(height, width, lam, rng.randrange(height), rng.randrange(width))


def cut_mix(height: int, width: int, lam: float, centre_y: int, centre_x: int) -> Mix:
    """The CutMix of a region of area 1 - lam around a centre, clipped to the image; lambda follows what is left."""
    ratio = math.sqrt(1 - lam)
    tall, wide = int(height * ratio), int(width * ratio)
    top, bottom = max(centre_y - tall // 2, 0), min(centre_y + (tall + 1) // 2, height)
    left, right = max(centre_x - wide // 2, 0), min(centre_x + (wide + 1) // 2, width)
    return Mix(1.0 - (bottom - top) * (right - left) / (height * width), (top, bottom, left, right))


def mix_batch(
    images: torch.Tensor, targets: torch.Tensor, valid: torch.Tensor, mix: Mix
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix slots i and i ^ 1. images: (B, 3, H, W) float; targets: (B, K); valid: (B,) bool; B even. Not in place."""
    assert len(images) % 2 == 0, f"mixing needs an even micro-batch, got {len(images)}"
    if mix.lam == 1.0:
        return images, targets
    both = valid & _partners(valid)
    lam = torch.where(both, mix.lam, 1.0)
    mixed_targets = torch.lerp(_partners(targets), targets, lam[:, None].to(targets.dtype))
    if mix.region is None:
        return torch.lerp(_partners(images), images, lam.to(images.dtype).view(-1, 1, 1, 1)), mixed_targets
    top, bottom, left, right = mix.region
    own = images[:, :, top:bottom, left:right]
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = torch.where(both.view(-1, 1, 1, 1), _partners(own), own)
    return mixed, mixed_targets


def _partners(x: torch.Tensor) -> torch.Tensor:
    """Row i ^ 1 in row i."""
    return x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
