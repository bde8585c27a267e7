"""What a layer did with the tokens of one batch, for whoever wants to see it."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RoutingStats:
    """Routing of the tokens of one rank in one pass: T tokens, K choices each, E experts of the whole layer.

    All tensors are detached. Those that are sums over tokens may be added over ranks and micro-batches; divide by
    `tokens` for means. `kept_TK` and `expert_TK`, viewed as (B, H, W, K), say where in an image tokens were dropped and
    which expert saw which place.
    """

    tokens: Tensor
    """(): number of tokens."""
    routed_E: Tensor
    """(E,) int64: choices that fell on each expert, dropped ones included; sums to tokens * K."""
    kept_E: Tensor
    """(E,) int64: choices each expert really computed."""
    importance_E: Tensor
    """(E,): sum over tokens of the gate's probability for each expert, without noise."""
    confidence: Tensor
    """(): sum over tokens of the largest gate probability, without noise."""
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

    @property
    def dropped(self) -> Tensor:
        """(): choices dropped."""
        return (self.routed_E - self.kept_E).sum()
