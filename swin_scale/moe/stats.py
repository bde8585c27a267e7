"""What a layer did with the tokens of one batch, for whoever wants to see it, and sums of it over many batches."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from swin_scale.moe.comm import Waits


@dataclass(frozen=True, kw_only=True)
class RoutingStats:
    """Routing of the tokens of one rank in one pass: T tokens, K choices each, E experts of the whole layer.

    All tensors are detached. Those that are sums over tokens may be added over ranks and micro-batches; divide by
    `tokens` for means. `slot_TK` and `expert_TK`, viewed as (*shape, K), say where in an image tokens were dropped and
    which expert saw which place.
    """

    routed_E: Tensor
    """(E,) int64: choices that fell on each expert, dropped ones included; sums to tokens * K."""
    kept_E: Tensor
    """(E,) int64: choices each expert really computed."""
    importance_E: Tensor
    """(E,): sum over tokens of the gate's probability for each expert, without noise."""
    confidence_T: Tensor
    """(T,): the largest gate probability of each token, with the noise by which it was chosen in training."""
    entropy: Tensor
    """(): sum over tokens of the entropy of the gate's distribution (nats), without noise."""
    z: Tensor
    """(): sum over tokens of the squared log-partition of the logits."""
    balance_loss: Tensor
    """(): the balance loss, unweighted, over the scope the layer was built with; not a sum over tokens."""
    expert_TK: Tensor
    """(T, K) int64: the chosen experts, best first."""
    slot_TK: Tensor
    """(T, K) int64: the row that served the choice; -1 where it was dropped for want of capacity."""
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
    def kept_TK(self) -> Tensor:
        """(T, K) bool: False where the choice was dropped."""
        return self.slot_TK >= 0

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
        return (self.slot_TK < 0).view(*self.shape, -1).sum((0, -1))


@torch.no_grad()
def observe(
    logit_TE: Tensor,
    prob_TE: Tensor,
    z_T: Tensor,
    *,
    z: Tensor,
    importance_E: Tensor,
    balance: Tensor,
    confidence_T: Tensor,
    expert_TK: Tensor,
    slot_TK: Tensor,
    routed_E: Tensor,
    kept_E: Tensor,
) -> RoutingStats:
    """Statistics of one pass, from the noiseless logits, their softmax, its sum over tokens `importance_E`, their
    log-partition `z_T` and its sum of squares `z`. Nearly all was computed for routing anyway."""
    start = time.perf_counter()
    # As z - sum(p * logit) for each token, added up without a tensor of their products.
    entropy = z_T.sum() - torch.vdot(prob_TE.flatten(), logit_TE.flatten())
    return RoutingStats(
        routed_E=routed_E,
        kept_E=kept_E,
        importance_E=importance_E.detach(),
        confidence_T=confidence_T,
        entropy=entropy,
        z=z.detach(),
        balance_loss=balance.detach(),
        expert_TK=expert_TK,
        slot_TK=slot_TK,
        seconds=time.perf_counter() - start,
    )


@dataclass(frozen=True, kw_only=True)
class LayerTally:
    """Figures of one layer over several passes, as small tensors that still wait to be added: see `collect`."""

    num_experts: int
    top_k: int
    ep_size: int
    grid: tuple[int, ...]
    """(H, W) of the images' tokens; empty where the layer saw no images."""
    tokens: list[int] = field(default_factory=list)
    scalars: list[Tensor] = field(default_factory=list)
    """Four a pass, 0-d: sums over its tokens of confidence, entropy, z; balance loss."""
    loads: list[Tensor] = field(default_factory=list)
    """Two a pass, (E,): choices routed, choices kept."""
    importance: list[Tensor] = field(default_factory=list)
    dropped: list[Tensor] = field(default_factory=list)
    """(H * W,) for each pass that had a capacity."""
    waits: list[Waits] = field(default_factory=list)

    @classmethod
    def like(cls, stats: RoutingStats) -> LayerTally:
        """An empty one for the layer of `stats`."""
        return cls(
            num_experts=len(stats.kept_E),
            top_k=stats.expert_TK.shape[1],
            ep_size=stats.ep_size,
            grid=stats.shape[1:] if len(stats.shape) == 3 else (),
        )

    def add(self, stats: RoutingStats) -> None:
        """Take up one pass."""
        self.tokens.append(stats.tokens)
        self.scalars.extend((stats.confidence, stats.entropy, stats.z, stats.balance_loss))
        self.loads.extend((stats.routed_E, stats.kept_E))
        self.importance.append(stats.importance_E)
        if self.grid and stats.kept_E is not stats.routed_E:
            self.dropped.append(stats.dropped_by_position().flatten())
        if stats.waits is not None:
            self.waits.append(stats.waits)


def collect(tallies: Sequence[LayerTally]) -> tuple[Tensor, Tensor]:
    """The sums of one layer over S steps, float64 on its device; they may be added over ranks too.

    Returns (S, 5 + 2E): tokens; sums over them of confidence, entropy, z, balance loss; choices routed; choices kept.
    And, over all steps, (E + H * W,): importance; dropped choices by position. Steps must have equally many passes.
    """
    first, S = tallies[0], len(tallies)
    device = first.loads[0].device
    tokens = torch.tensor([tally.tokens for tally in tallies], dtype=torch.float64, device=device)
    scalars = torch.stack([value for tally in tallies for value in tally.scalars]).double().view(S, -1, 4)
    scalars[..., 3] *= tokens
    loads = torch.stack([value for tally in tallies for value in tally.loads]).view(S, -1, 2 * first.num_experts).sum(1)
    maps = [torch.stack([value for tally in tallies for value in tally.importance]).double().sum(0)]
    if first.grid:
        dropped = [value for tally in tallies for value in tally.dropped]
        nothing = torch.zeros(math.prod(first.grid), dtype=torch.int64, device=device)
        maps.append(torch.stack(dropped or [nothing]).sum(0).double())
    return torch.cat([tokens.sum(1, keepdim=True), scalars.sum(1), loads.double()], 1), torch.cat(maps)


@dataclass
class RoutingTally:
    """The routing of one step, over its micro-batches, by the name of the block."""

    layers: dict[str, LayerTally] = field(default_factory=dict)
    seconds: float = 0.0
    """What telemetry took of this process's time."""

    def add(self, routing: Mapping[str, RoutingStats]) -> None:
        """Take up one micro-batch; the per-token tensors are let go. Nothing is read back to the host."""
        start = time.perf_counter()
        with torch.no_grad():
            for name, stats in routing.items():
                if name not in self.layers:
                    self.layers[name] = LayerTally.like(stats)
                self.layers[name].add(stats)
                self.seconds += stats.seconds
        self.seconds += time.perf_counter() - start


def largest_variation(num_experts: int, top_k: int) -> float:
    """The largest coefficient of variation that loads can have: each token's K choices are distinct, so at worst K
    experts share everything, and sqrt(E / K - 1) is left of sqrt(E * sum(share^2) - 1)."""
    return math.sqrt(num_experts / top_k - 1)
