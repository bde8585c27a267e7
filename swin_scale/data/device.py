"""The part of augmentation that runs on the device: normalise uint8 images, then erase boxes with keyed noise."""

from __future__ import annotations

import math
from functools import cache

import torch

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""Of ImageNet, in units of 255."""


def finish(
    images: torch.Tensor,
    boxes: torch.Tensor | None = None,
    noise_keys: torch.Tensor | None = None,
    *,
    mode: str = "pixel",
    mean: tuple[float, ...] = MEAN,
    std: tuple[float, ...] = STD,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """(B, 3, H, W) uint8 to normalised `dtype`, boxes filled with N(0, 1) noise (mode "pixel") or 0 ("const").

    boxes: (B, n, 4) on the CPU, rows (top, left, height, width), zero where unused. noise_keys: (B,) int64. A sample's
    noise depends on its key and the place in the image alone, so neither the batch around it nor the device changes it
    (beyond the device's rounding of log and cos). Arithmetic is fp32. Random erasing in normalised space follows timm.
    """
    out = images.to(torch.float32).div_(255)
    out.sub_(_per_channel(mean, out.device)).div_(_per_channel(std, out.device))
    if boxes is not None and boxes.any():
        assert mode == "const" or noise_keys is not None
        _erase(out, boxes, noise_keys if mode == "pixel" else None)
    return out.to(dtype)


@cache
def _per_channel(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """(C, 1, 1), kept: the host would wait for the device at every copy."""
    return torch.tensor(values, device=device).view(-1, 1, 1)


def _send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On `device`, through pinned memory: a copy from elsewhere is waited for."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _erase(images: torch.Tensor, boxes: torch.Tensor, noise_keys: torch.Tensor | None) -> None:
    """Overwrite the boxes in place. Sizes are known on the host, so the device is never waited for."""
    channels, height, width = images.shape[1:]
    sample, which = torch.nonzero(boxes[..., 2], as_tuple=True)
    top, left, tall, wide = boxes[sample, which].long().unbind(1)
    area = tall * wide
    # One entry per erased place: its box, then its row and column there.
    box = torch.repeat_interleave(area)
    within = torch.arange(len(box)) - (area.cumsum(0) - area)[box]
    place = (top[box] + within // wide[box]) * width + left[box] + within % wide[box]
    place, sample = _send(place, images.device), _send(sample[box], images.device)
    channel = torch.arange(channels, device=images.device)[:, None] * (height * width)
    position = channel + place
    if noise_keys is None:
        values = images.new_zeros(())
    else:
        values = keyed_normal(_send(noise_keys, images.device)[sample] + _GOLDEN * position)
    images.view(-1)[sample * (channels * height * width) + position] = values


def _signed(value: int) -> int:
    """The int64 with the bits of an unsigned 64-bit constant."""
    return value - (1 << 64) if value >> 63 else value


_GOLDEN, _MIX_1, _MIX_2 = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def keyed_normal(counters: torch.Tensor) -> torch.Tensor:
    """fp32 N(0, 1) as a pure function of each int64 counter: SplitMix64 (Steele et al., 2014), then Box-Muller."""
    z = counters
    for shift, factor in ((30, _MIX_1), (27, _MIX_2), (31, 1)):
        # int64 shifts are arithmetic: mask off the copies of the sign bit.
        z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * factor
    # 24 bits each, all a float holds; the first is never 0.
    radius = (((z >> 40) & 0xFFFFFF) + 1).to(torch.float32).mul_(2.0**-24).log_().mul_(-2).sqrt_()
    return (z & 0xFFFFFF).to(torch.float32).mul_(2 * math.pi * 2.0**-24).cos_().mul_(radius)
