"""Bytes of one rank: parameters, gradients, optimizer state, buffers and activations, under each ZeRO stage.

With P parameters over n ranks, e bytes each in the model and 4 in masters and each moment (Rajbhandari et al., 2020):

| stage | parameters | gradients | masters and moments (AdamW) | fp16, AdamW in all |
|---|---|---|---|---|
| 0 (fp32) | 4 P | 4 P | 8 P | - |
| 1 | e P | e P | 12 P / n | (4 + 12 / n) P |
| 2 | e P | e P / n | 12 P / n | (2 + 14 / n) P |
| 3 | e P / n | e P / n | 12 P / n | 16 P / n |

Gradients of half precision that are accumulated over micro-batches are kept in fp32. Experts count as their part of one
set: 1 / ep_size. Beside the table stand what DeepSpeed buffers and, at stage 3, gathers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from swin_scale.config import Config
from swin_scale.plan.activations import FP32, Layer, kept_bytes, peak_bytes

ITEMSIZE: Mapping[str, int] = {"fp32": 4, "bf16": 2, "fp16": 2}
STAGE3_REUSE = 500_000_000
"""Parameters that DeepSpeed keeps gathered: it frees none that is used again within 1e9, forward and backward."""
STAGE3_PREFETCH = 50_000_000
STAGE3_RESIDENT = 100_000
"""Smaller parameters stay gathered at stage 3; of `engine.ds_config`, a test compares them."""
EXPERTS = "._moe_layer.experts."


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """The parameters of a whole model, by name."""

    shapes: Mapping[str, tuple[int, ...]]
    trained: Mapping[str, bool]

    @cached_property
    def count(self) -> int:
        """All of them, the experts of all ranks included."""
        return sum(self._counts.values())

    @cached_property
    def experts(self) -> int:
        """Those of all experts of all ranks."""
        return sum(count for name, count in self._counts.items() if EXPERTS in name)

    @cached_property
    def _counts(self) -> dict[str, int]:
        return {name: math.prod(shape) for name, shape in self.shapes.items()}

    def held(self, ep_size: int) -> float:
        """Those that one rank computes with when `ep_size` ranks share the experts."""
        return self.count - self.experts + self.experts / ep_size

    def by_layer(self, layers: Sequence[Layer], ep_size: int) -> list[float]:
        """`held`, shared out to `layers` by the prefix of their names; what has none goes to the last layer."""
        dense, experts = self._by_prefix
        found = [dense.get(layer.name, 0) + experts.get(layer.name, 0) / ep_size for layer in layers]
        found[-1] += self.held(ep_size) - sum(found)
        return found

    @cached_property
    def _by_prefix(self) -> tuple[Counter[str], Counter[str]]:
        """Elements below every prefix of a name, up to a dot: those that are on every rank, and those of experts."""
        dense: Counter[str] = Counter()
        experts: Counter[str] = Counter()
        for name, count in self._counts.items():
            parts = name.split(".")
            for i in range(1, len(parts)):
                (experts if EXPERTS in name else dense)[".".join(parts[:i]) + "."] += count
        return dense, experts

    def table(self) -> dict[str, dict[str, object]]:
        """As `checkpoint.checkpoint_bytes` reads it."""
        return {name: {"shape": list(shape), "trained": self.trained[name]} for name, shape in self.shapes.items()}


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """How a run is cut over ranks, as far as memory and traffic go."""

    ranks: int
    micro: int
    accumulation: int
    stage: int
    ep_size: int
    precision: str
    offload: bool
    moments: int
    """Tensors that the optimizer keeps for each parameter."""
    ema: bool
    bucket_bytes: float
    overlap: bool
    """Reduction overlaps backward, with a second bucket; on GPUs."""

    @classmethod
    def of(
        cls, config: Config, *, ranks: int, micro: int, accumulation: int, moments: int, on_gpu: bool = True
    ) -> Sharding:
        """Of `config` on so many ranks."""
        return cls(
            ranks=ranks,
            micro=micro,
            accumulation=accumulation,
            stage=config.engine.zero_stage,
            ep_size=config.moe.ep_size,
            precision=config.engine.precision,
            offload=config.engine.offload == "optimizer",
            moments=moments,
            ema=config.optim.ema_decay > 0,
            bucket_bytes=config.engine.bucket_mb * 1e6,
            overlap=on_gpu,
        )

    @property
    def itemsize(self) -> int:
        """Bytes of a parameter and of an activation."""
        return ITEMSIZE[self.precision]

    @property
    def gradient_itemsize(self) -> int:
        """Bytes of a gradient that is kept."""
        return FP32 if self.accumulation > 1 else self.itemsize

    @property
    def reduced_itemsize(self) -> int:
        """Bytes of a gradient on its way: those of bf16 are summed over ranks in fp32."""
        return 2 if self.precision == "fp16" else FP32


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank, on its device unless said otherwise."""

    parameters: float
    gradients: float
    master: float
    moments: float
    ema: float
    buffers: float
    """Buckets of gradients under way."""
    gathered: float
    """Stage 3: whole parameters in use."""
    activations: float
    """Kept at the end of forward."""
    backward: float
    """Activations, and gradients that are not kept elsewhere, at the worst moment of backward."""
    update: float
    """fp32 gradients of this rank's part while the optimizer runs, when no activations are left."""
    host: float
    """In host memory, under offload."""

    @property
    def state(self) -> float:
        """Parameters, gradients, masters and moments: what the formulas of ZeRO count."""
        return self.parameters + self.gradients + self.master + self.moments

    @property
    def peak(self) -> float:
        """The most at any moment of a step."""
        lasting = self.parameters + self.master + self.moments + self.ema
        return lasting + max(self.backward + self.buffers + self.gathered, self.gradients + self.update)


def rank_memory(parameters: Parameters, layers: Sequence[Layer], sharding: Sharding) -> Memory:
    """What one rank holds; `layers` are those of its micro-batch."""
    s, n = sharding, sharding.ranks
    held, whole = parameters.held(s.ep_size), float(parameters.count)
    # Experts: 1 / ep_size of them, over the ranks / ep_size that hold the same.
    part = whole / n if s.stage else held
    master = FP32 * part if s.stage else 0.0
    moments = FP32 * s.moments * part
    ema = FP32 * part if s.ema else 0.0
    gradients = s.gradient_itemsize * (part if s.stage >= 2 else held)
    bucket = min(s.bucket_bytes / s.itemsize, held) if s.stage else 0.0
    # The bucket, unless it holds all gradients anyway; a second one under overlap; and a copy in the dtype of the sum.
    copy = FP32 if s.reduced_itemsize > s.itemsize else 0
    buffers = bucket * (s.itemsize * ((bucket < held) + s.overlap) + copy)
    gathered = (min(held, STAGE3_REUSE) + min(held, STAGE3_PREFETCH)) * s.itemsize if s.stage == 3 else 0.0
    host = 0.0
    if s.offload:
        # Masters, moments, fp32 gradients and the updated half-precision part on its way back.
        host = master + moments + ema + (FP32 + s.itemsize) * part
        master = moments = ema = 0.0
    accumulated = s.accumulation > 1 or s.stage >= 2
    growing = [s.itemsize * count for count in parameters.by_layer(layers, s.ep_size)]
    backward = peak_bytes(layers, () if accumulated else growing) + (gradients if accumulated else 0.0)
    update = 0.0 if s.offload or s.stage == 0 else FP32 * part + (s.itemsize * part if s.itemsize < FP32 else 0.0)
    return Memory(
        parameters=s.itemsize * (part if s.stage == 3 else held),
        gradients=gradients,
        master=master,
        moments=moments,
        ema=ema,
        buffers=buffers,
        gathered=gathered,
        activations=kept_bytes(layers),
        backward=backward,
        update=update,
        host=host,
    )
