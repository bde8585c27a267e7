"""How long a step takes, as a range: the floor of fused kernels on the data sheet's GPU, times what is reached of it.

The floor of a layer joins the time of moving its bytes at the HBM roof with that of its products at the compute roof:
nearly the longer of the two, and more where they are alike, as some parts are bound by one and some by the other.
Eager official Swin reaches a fifth to a half of it; three fifths is the aim of this code's kernels; what timm measures
is three quarters of such floors. So the range is `SLOW` to `FAST` of the floor, and it is a range, no promise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from swin_scale.plan.activations import Layer
from swin_scale.plan.hardware import Gpu
from swin_scale.plan.memory import STAGE3_RESIDENT, Parameters, Sharding
from swin_scale.plan.traffic import Exchange, exposed

FAST, SLOW = 0.75, 0.30
BLEND = 4
"""Exponent of the norm that joins the two times: 1 would add them, infinity take the longer."""
BACKWARD = 2
"""Forwards that a backward costs."""
UPDATE_BYTES = 28
"""Of HBM traffic per parameter in an AdamW update: master and moments read and written, gradient read, copy written."""
HOST_BANDWIDTH = 20e9
"""Bytes/s between a GPU and its share of host memory, for offloaded optimizers (PCIe 4 x16 less overheads, shared)."""
HOST_UPDATE = 5e9
"""Bytes/s at which a rank's share of the cores updates offloaded state; an assumption, taken low."""
UPDATE_TRANSFER = 6
"""Bytes per parameter over that bus: fp32 gradients to the host, half-precision values back."""
GATHER_S = 100e-6
"""Of the host's time for one gather of a parameter under stage 3; an assumption."""
LAUNCH_S = 300e-6
"""Of the host's time to launch forward and backward of one layer from Python, below which none comes; an assumption."""
FP32_FLOPS = 16
"""Cost of a product in fp32 against half precision, as it has no tensor cores here."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one step, fastest and slowest."""

    floor: float
    """Compute alone at the roofs."""
    fast: float
    slow: float
    mfu_fast: float
    """Model FLOPs (6 per multiply-add and image, recomputation not counted) over the data sheet's peak."""
    mfu_slow: float

    @property
    def middle(self) -> float:
        """Geometric mean of the range, to rank settings by."""
        return (self.fast * self.slow) ** 0.5


def floor_seconds(layers: Sequence[Layer], gpu: Gpu, *, mode: str = "off", flop_scale: float = 1.0) -> float:
    """Forward and backward of one micro-batch at the roofs of `gpu`; recomputation is one more forward of blocks.

    `flop_scale`: cost of a multiply-add against half precision.
    """
    total = 0.0
    for layer in layers:
        again = 1 if mode != "off" and layer.recomputed else 0
        flops = 2 * layer.macs * (1 + BACKWARD + again) * flop_scale
        moved = layer.moved * (1 + again / 3)
        total += ((flops / gpu.roof_flops) ** BLEND + (moved / gpu.roof_bandwidth) ** BLEND) ** (1 / BLEND)
    return total


def step_time(
    layers: Sequence[Layer],
    sharding: Sharding,
    gpu: Gpu,
    traffic: Sequence[Exchange],
    *,
    mode: str,
    parameters: Parameters,
) -> StepTime:
    """Of one global batch; `parameters`: of the whole model."""
    s = sharding
    scale = FP32_FLOPS if s.precision == "fp32" else 1.0
    floor = s.accumulation * floor_seconds(layers, gpu, mode=mode, flop_scale=scale)
    least = s.accumulation * LAUNCH_S * len(layers)
    part = parameters.count / s.ranks
    update = UPDATE_BYTES * part / gpu.roof_bandwidth
    if s.offload:
        update = UPDATE_TRANSFER * part / HOST_BANDWIDTH + UPDATE_BYTES * part / HOST_UPDATE
    fast, slow = max(floor / FAST, least), max(floor / SLOW, 2 * least)
    if s.stage == 3:
        gathers = sum(math.prod(shape) > STAGE3_RESIDENT for shape in parameters.shapes.values())
        update += 2 * s.accumulation * gathers * GATHER_S
    fast += update + exposed(traffic, fast)[0]
    slow += update + exposed(traffic, slow)[1]
    work = 6 * sum(layer.macs for layer in layers) * s.accumulation / gpu.sheet_flops
    return StepTime(floor=floor, fast=fast, slow=slow, mfu_fast=work / fast, mfu_slow=work / slow)
