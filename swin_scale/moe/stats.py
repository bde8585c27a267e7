"""What a layer did with the tokens of one batch, for whoever wants to see it, and sums of it over many batches."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from swin_scale.moe.comm import Waits


@dataclass(frozen=True, kw_only=True)
class RoutingStats:
    """Routing of the tokens of one rank in one pass: T tokens, K choices each, E experts of the whole layer.

    All tensors are detached. Those that are sums over tokens may be added over ranks and micro-batches; divide by
    `tokens` for means. `kept_TK` and `expert_TK`, viewed as (*shape, K), say where in an image tokens were dropped and
    which expert saw which place.
    """

    routed_E: Tensor
    """(E,) int64: choices that fell on each expert, dropped ones included; sums to tokens * K."""
    kept_E: Tensor
    """(E,) int64: choices each expert really computed."""
    importance_E: Tensor
    """(E,): sum over tokens of the gate's probability for each expert, without noise."""
    confidence_T: Tensor
    """(T,): the largest gate probability of each token, without noise."""
    entropy: Tensor
    """(): sum over tokens of the entropy of the gate's distribution (nats), without noise."""
    z: Tensor
    """(): sum over tokens of the squared log-partition of the logits."""
    balance_loss: Tensor
    """(): the balance loss, unweighted, over the scope the layer was built with; not a sum over tokens."""
    expert_TK: Tensor
    """(T, K) int64: the chosen experts, best first."""
    kept_TK: Tensor
    """(T, K) bool: False where the choice was dropped for want of capacity."""
    shape: tuple[int, ...] = ()
    """Of the tokens before they were made one row, (B, H, W) in an image model; empty where the layer was not told."""
    ep_size: int = 1
    """Ranks that share the experts; the p-th of them holds the p-th run of E / ep_size."""
    waits: Waits | None = None
    """Time spent waiting in all-to-alls, the backward's included once it has run; None on one process."""
    seconds: float = 0.0
    """What making these figures took of this process's time; on a GPU only their launch."""

    @property
    def tokens(self) -> int:
        """T."""
        return len(self.expert_TK)

    @property
    def confidence(self) -> Tensor:
        """(): sum over tokens of the largest gate probability."""
        return self.confidence_T.sum()

    @property
    def dropped(self) -> Tensor:
        """(): choices dropped."""
        return (self.routed_E - self.kept_E).sum()

    def dropped_by_position(self) -> Tensor:
        """Choices dropped at each place of an image, summed over the batch: `shape` without its first entry."""
        return (~self.kept_TK).view(*self.shape, -1).sum((0, -1))


def observe(
    logit_TE: Tensor,
    prob_TE: Tensor,
    z_T: Tensor,
    balance: Tensor,
    expert_TK: Tensor,
    kept_TK: Tensor,
    routed_E: Tensor,
    kept_E: Tensor,
) -> RoutingStats:
    """Statistics of one pass, from the noiseless logits, their softmax and their log-partition `z_T`."""
    start = time.perf_counter()
    with torch.no_grad():
        stats = RoutingStats(
            routed_E=routed_E,
            kept_E=kept_E,
            importance_E=prob_TE.sum(0),
            confidence_T=prob_TE.amax(1),
            entropy=z_T.sum() - torch.vdot(prob_TE.flatten(), logit_TE.flatten()),
            z=torch.vdot(z_T, z_T),
            balance_loss=balance.detach(),
            expert_TK=expert_TK,
            kept_TK=kept_TK,
        )
    return replace(stats, seconds=time.perf_counter() - start)


@dataclass(frozen=True, kw_only=True)
class LayerTally:
    """Sums of one layer's `RoutingStats`, float64 on the layer's device. They may be added over ranks too."""

    num_experts: int
    top_k: int
    ep_size: int
    grid: tuple[int, ...]
    """(H, W) of the images' tokens; empty where the layer saw no images."""
    sums: Tensor
    """(5 + 2E,): tokens; sums of confidence, entropy, z, and balance loss times tokens; `routed_E`; `kept_E`."""
    maps: Tensor
    """(E + H * W,): `importance_E`; dropped choices by position."""
    waits: tuple[Waits, ...]

    @classmethod
    def of(cls, stats: RoutingStats) -> LayerTally:
        """The sums of one pass."""
        scalars = torch.stack(
            [stats.confidence, stats.entropy, stats.z, stats.balance_loss.to(stats.z.dtype) * stats.tokens]
        )
        tokens = scalars.new_full((1,), stats.tokens, dtype=torch.float64)
        grid = stats.shape[1:] if len(stats.shape) == 3 else ()
        dropped = stats.dropped_by_position().flatten() if grid else stats.kept_E[:0]
        return cls(
            num_experts=len(stats.kept_E),
            top_k=stats.expert_TK.shape[1],
            ep_size=stats.ep_size,
            grid=grid,
            sums=torch.cat([tokens, scalars, stats.routed_E, stats.kept_E]),
            maps=torch.cat([stats.importance_E.double(), dropped]),
            waits=() if stats.waits is None else (stats.waits,),
        )

    def plus(self, other: LayerTally) -> LayerTally:
        """Both together."""
        return replace(
            self, sums=self.sums + other.sums, maps=self.maps + other.maps, waits=(*self.waits, *other.waits)
        )


@dataclass
class RoutingTally:
    """Sums of the routing of one step, over its micro-batches, by the name of the block."""

    layers: dict[str, LayerTally] = field(default_factory=dict)
    seconds: float = 0.0
    """What telemetry took of this process's time."""

    def add(self, routing: Mapping[str, RoutingStats]) -> None:
        """Take up one micro-batch; the per-token tensors are let go. Nothing is read back to the host."""
        start = time.perf_counter()
        with torch.no_grad():
            for name, stats in routing.items():
                tally, before = LayerTally.of(stats), self.layers.get(name)
                self.layers[name] = tally if before is None else before.plus(tally)
                self.seconds += stats.seconds
        self.seconds += time.perf_counter() - start


def largest_variation(num_experts: int, top_k: int) -> float:
    """The largest coefficient of variation that loads can have: each token's K choices are distinct, so at worst K
    experts share everything, and sqrt(E / K - 1) is left of sqrt(E * sum(share^2) - 1)."""
    return math.sqrt(num_experts / top_k - 1)
