"""What the machine at hand can do at best: the rates that give a kernel its floor, measured in the same run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swin_scale.bench.timing import seconds_of
from swin_scale.engine.metrics import peak_flops

COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}
"""Of the buffer copied: far more than any cache holds."""

MATMUL_SIDE = {"cuda": 8192, "cpu": 512}
EXP_VALUES = {"cuda": 1 << 26, "cpu": 1 << 18}
EXP_CHAIN = 64
"""Exponentials of each value, one after the other in registers, so that memory is no part of it."""

REPEATS = 5
L2_BYTES = 60 << 20
"""Taken where torch does not know: that of an H200."""


def ceilings(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Rates of this machine: `copy_bytes_per_s` (read and written), `matmul_flops` in `dtype`, `exp_per_s` (None
    where the compiler that keeps a chain of them in registers is not at hand), the data sheet's `peak_flops`."""
    kind = device.type
    source = torch.empty(COPY_BYTES[kind], dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    side = MATMUL_SIDE[kind]
    # Random values: on zeros a GPU draws less power and runs faster than it ever does in use.
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    copying = _best(partial(target.copy_, source), device)
    multiplying = _best(partial(torch.mm, a, b, out=product), device)
    return {
        "copy_bytes_per_s": 2 * COPY_BYTES[kind] / copying,
        "matmul_flops": 2 * side**3 / multiplying,
        "exp_per_s": _exp_rate(device),
        "peak_flops": peak_flops(device) if dtype is not torch.float32 else None,
        "l2_bytes": l2_bytes(device),
    }


def l2_bytes(device: torch.device) -> int | None:
    """Of the GPU's second cache; None on a CPU."""
    if device.type != "cuda":
        return None
    return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", L2_BYTES)


def _best(call: Callable[[], object], device: torch.device) -> float:
    """Median seconds, after a call that is not counted: what memory and clocks give repeatedly, not their luck."""
    call()
    return float(np.median([seconds_of(call, 3 if device.type == "cuda" else 1, device) for _ in range(REPEATS)]))


def _exp_rate(device: torch.device) -> float | None:
    count = EXP_VALUES[device.type]
    if device.type != "cuda":
        x = torch.full((count,), 0.5)
        return count / _best(lambda: torch.exp(x), device)

    def chain(x: Tensor) -> Tensor:
        for _ in range(EXP_CHAIN):
            x = torch.exp(-x)
        return x

    compiled, x = torch.compile(chain, dynamic=False), torch.full((count,), 0.5, device=device)
    try:
        return count * EXP_CHAIN / _best(lambda: compiled(x), device)
    except (RuntimeError, ImportError):
        # The compiler's back end is not on every machine; the floor of softmax is then not stated.
        return None
