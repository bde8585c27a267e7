"""What one MoE layer does, apart from its width and its process groups."""

from dataclasses import dataclass

from swin_scale.errors import UserError

ROUTERS = ("linear", "cosine")
BALANCE_LOSSES = ("load_importance", "gshard")


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Options of an MoE layer; the defaults are those of the published Swin-MoE models, but for evaluation."""

    num_experts: int
    """Experts of the whole layer, over all ranks."""
    top_k: int = 1
    """Experts each token goes to."""
    router: str = "linear"
    """`linear`: a bias-free projection. `cosine`: similarity to expert embeddings, with a learnt temperature."""
    capacity_factor: float = 1.25
    """In training, an expert takes top_k * int(|f| * ceil(tokens / experts)) tokens of a rank; 0 takes all.

    Nothing is ever padded to the capacity, so a negative factor, in Tutel the maximum of an adaptive capacity, drops
    exactly the tokens that the positive one drops.
    """
    eval_capacity_factor: float = 0.0
    """The same in evaluation. At 0 the result for an image does not depend on the others of its batch."""
    gate_noise: float = 1.0
    """Standard deviation, times num_experts, of the normal noise on the logits in training."""
    batch_prioritized: bool = True
    """Where capacity is short, tokens with the highest gate score go first (V-MoE, section 4), not the earliest."""
    normalize_gate: bool = False
    """With top_k > 1, divide a token's gate values by their sum."""
    balance: str = "load_importance"
    """`load_importance` (V-MoE, appendix A; with gate_noise 0 importance alone, as load is then a count without
    gradient) or `gshard` (GShard, section 2.2)."""
    aux_weight: float = 0.01
    """Weight of the balance loss in the layer's auxiliary loss."""
    z_weight: float = 0.0
    """Weight of the mean squared log-partition of the logits (ST-MoE, section 3.1)."""
    cosine_dim: int = 256
    """Width of the cosine router's space."""
    cosine_init_t: float = 0.5
    """Initial temperature of the cosine router."""
    drop: float = 0.1
    """Dropout rate between the two products of an expert."""
    fc2_bias: bool = True
    """False freezes the experts' second bias, which then stays 0."""
    a2a_chunks: int = 2
    """Pieces in which tokens travel between ranks, so that experts compute on one while the next is under way."""

    def __post_init__(self) -> None:
        _require(self.num_experts >= 1, "experts", self.num_experts, "set at least 1")
        _require(1 <= self.top_k <= self.num_experts, "top_k", self.top_k, f"choose 1 to {self.num_experts}")
        _require(self.router in ROUTERS, "router", self.router, f"choose one of {', '.join(ROUTERS)}")
        _require(self.balance in BALANCE_LOSSES, "balance", self.balance, f"choose one of {', '.join(BALANCE_LOSSES)}")
        _require(self.gate_noise >= 0, "gate_noise", self.gate_noise, "set 0 or more")
        _require(0 <= self.drop < 1, "drop", self.drop, "set at least 0 and less than 1")
        _require(self.a2a_chunks >= 1, "a2a_chunks", self.a2a_chunks, "set at least 1")


def _require(good: bool, key: str, value: object, fix: str) -> None:
    if not good:
        raise UserError(f"moe.{key}: {value!r} is not possible; {fix}")
