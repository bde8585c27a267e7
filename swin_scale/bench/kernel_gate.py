"""Whether codes compute the same window attention: output and gradients against fp64, before anything is timed."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from swin_scale.bench.kernel_peers import Region, eager, mask_of
from swin_scale.bench.measure import failure, peer_errors
from swin_scale.bench.region import QUANTITIES, Inputs, Shape, judged_images, outcome
from swin_scale.kernels.reference import window_partition

GATE_FACTOR = {torch.float16: 1.0, torch.bfloat16: 1.0, torch.float32: 2.0}
"""Our error may be this many times the official code's: under AMP in half precision, where fp32 is its arithmetic
between the products, and its own in fp32, where both are at rounding."""

PEER_LIMIT = {torch.float32: 1e-4, torch.bfloat16: 0.2, torch.float16: 0.05}
"""Relative error past which a peer does not compute the same function."""


def gate(shape: Shape, regions: Sequence[Region], inputs: Inputs) -> dict[str, dict[str, Any]]:
    """Relative errors of each code against fp64, ||x - reference|| / ||reference|| for each of `region.QUANTITIES`.

    All run on the whole batch. Only a few images, the first and the last, have an upstream gradient, so that fp64 has
    room for them and gradients of scale and bias are those of these images. Who raises has the error under `failed`.
    """
    images = judged_images(shape, len(inputs.qkv))
    wanted = outcome(shape, inputs, images)
    upstream = torch.zeros_like(inputs.upstream)
    upstream[images] = inputs.upstream[images]
    found: dict[str, dict[str, Any]] = {}
    for region in regions:
        try:
            got = region.quantities(shape, inputs, upstream, images)
        except peer_errors() as error:
            found[region.name] = {"failed": failure(error)}
            continue
        found[region.name] = {name: float((got[name] - value).norm() / value.norm()) for name, value in wanted.items()}
    return found


def luck_of_scale(shape: Shape, inputs: Inputs) -> float:
    """Error, relative, that the gradient of the scale may have, whatever the official chain's own happens to be.

    It is one number a head, a sum of terms of either sign: which of two equally exact codes comes nearer is luck. So it
    gets twice two standard deviations of the chain's error, which are known from the errors of its addends, one for
    each row of logits.
    """
    at = torch.tensor(judged_images(shape, len(inputs.qkv)), device=inputs.qkv.device)
    x, qkv, upstream = (part.index_select(0, at) for part in (inputs.x, inputs.qkv, inputs.upstream))
    windows = window_partition(qkv, shape.window, shape.shift)

    def addends(wide: torch.dtype, narrow: torch.dtype) -> Tensor:
        rows = inputs.scale.to(wide).expand(len(windows), -1, shape.tokens, 1).clone().requires_grad_()
        mask = mask_of(shape, wide, qkv.device)
        is_amp = narrow.itemsize < 4
        with torch.autocast(qkv.device.type, narrow) if is_amp else contextlib.nullcontext():
            _, y = eager(shape, mask, x.to(wide), windows.to(narrow), rows, inputs.bias.to(wide))
        return torch.autograd.grad(y, rows, upstream.to(y.dtype))[0].double()

    own, exact = addends(torch.float32, qkv.dtype), addends(torch.float64, torch.float64)
    spread = (own - exact).square().sum((0, 2)).sqrt()
    return float(4 * spread.norm() / exact.sum((0, 2)).norm())


def allowance(errors: Mapping[str, Mapping[str, Any]], dtype: torch.dtype, luck: float) -> dict[str, float]:
    """The error that ours may have in each quantity: a multiple of the official chain's, or a limit without it.

    `luck` is that of the gradient of the scale, see `luck_of_scale`.
    """
    judge = next((name for name in ("official-amp", "official") if "output" in errors.get(name, {})), None)
    if judge is None:
        return dict.fromkeys(QUANTITIES, PEER_LIMIT[dtype])
    return {name: GATE_FACTOR[dtype] * error for name, error in errors[judge].items()} | {"scale": luck}


def excess(errors: Mapping[str, float], allowed: Mapping[str, float]) -> str | None:
    """The first quantity in which `errors` are larger than `allowed`, in words; NaN is larger than anything."""
    for name, most in allowed.items():
        if not errors[name] <= most:
            return (
                f"the {'gradient of ' * (name != 'output')}{name} is off by {errors[name]:.3g}, allowed is {most:.3g}"
            )
    return None
