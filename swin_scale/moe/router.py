"""The gate: which experts a token goes to, in which order experts serve tokens, and the losses that keep it balanced.

Shapes: T tokens of this rank, K choices per token, E experts of the whole layer, R = rows kept of the T * K choices,
D channels. Order: `Router` -> `choose` -> `plan`; the losses are functions of sums over tokens, so that they can be
taken over one rank or, `aux_group` given, over all tokens of a group.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.distributed import ProcessGroup

from swin_scale.moe.comm import all_reduce_sum
from swin_scale.moe.config import MoEConfig
from swin_scale.moe.stats import RoutingStats, observe

MAX_LOGIT_SCALE = math.log(100.0)


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Where each choice of each token goes: R rows sorted by expert, in the order in which experts took them."""

    gate_TK: Tensor
    """(T, K): what an expert's output is multiplied by; 0 where the choice was dropped. Carries the gate's gradient."""
    choice_R: Tensor
    """(R,) int64: the choice, as token * K + k, that a row serves."""
    slot_TK: Tensor
    """(T, K) int64: the row that serves a choice; -1 where it was dropped. The inverse of `choice_R`."""
    count_E: Tensor
    """(E,) int64: rows of each expert."""
    routed_E: Tensor
    """(E,) int64: choices that fell on each expert, dropped ones included; `count_E` itself where nothing can drop."""


def capacity(tokens: int, num_experts: int, top_k: int, factor: float) -> int | None:
    """Choices one expert takes from `tokens` tokens of one rank: top_k * int(|factor| * ceil(tokens / experts)).

    None, without limit, at factor 0. A batch so small that this is 0 passes all its tokens by.
    """
    return top_k * int(abs(factor) * -(-tokens // num_experts)) if factor else None


def choose(score_TE: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """The `top_k` best experts of each token, (T, K) int64, and their scores, divided by their sum if `normalize`."""
    gate_TK, expert_TK = torch.topk(score_TE, top_k, dim=1)
    if normalize and top_k > 1:
        gate_TK = gate_TK / gate_TK.sum(1, keepdim=True).clamp_min(torch.finfo(gate_TK.dtype).eps)
    return expert_TK, gate_TK


def plan(expert_TK: Tensor, gate_TK: Tensor, num_experts: int, limit: int | None, priority_T: Tensor | None) -> Routing:
    """Rows of the experts, at most `limit` each (None: all).

    All first choices come before any second choice; among equals, tokens come by descending `priority_T`, or in their
    own order if that is None. Reads the number of kept rows back to the host where `limit` is set.
    """
    T, K = expert_TK.shape
    device = expert_TK.device
    token_T = torch.arange(T, device=device) if priority_T is None else priority_T.argsort(descending=True, stable=True)
    expert_KT = expert_TK[token_T].t().flatten()
    expert_R, order = expert_KT.sort(stable=True)
    choice_R = token_T[order % max(T, 1)] * K + order // max(T, 1)
    # Where each expert's part begins, instead of a bincount: that waits for a GPU, to see how long its answer is.
    count_E = routed_E = torch.searchsorted(expert_R, torch.arange(num_experts + 1, device=device)).diff()
    if limit is not None:
        place_R = torch.arange(T * K, device=device) - (count_E.cumsum(0) - count_E)[expert_R]
        choice_R, count_E = choice_R[place_R < limit], count_E.clamp_max(limit)
    slot_TK = choice_R.new_full((T * K,), -1)
    slot_TK[choice_R] = torch.arange(len(choice_R), device=device)
    slot_TK = slot_TK.view(T, K)
    if limit is not None:
        gate_TK = gate_TK.masked_fill(slot_TK < 0, 0)
    return Routing(gate_TK=gate_TK, choice_R=choice_R, slot_TK=slot_TK, count_E=count_E, routed_E=routed_E)


def load(prob_TE: Tensor, threshold_T: Tensor, std: float) -> Tensor:
    """(E,): expected number of tokens per expert if the noise were drawn again (V-MoE, appendix A.2).

    As in Tutel, `prob_TE` are probabilities while `threshold_T` is the noisy logit of the last chosen expert: a mixing
    of units, kept because published models were trained with it.
    """
    return torch.special.ndtr((prob_TE - threshold_T[:, None]) / std).sum(0)


def variation(x_E: Tensor) -> Tensor:
    """Squared coefficient of variation, var / (mean^2 + 1e-10), of (E,) values; 0 for one expert."""
    return x_E.var() / (x_E.mean() ** 2 + 1e-10) if len(x_E) > 1 else x_E.sum() * 0


def gshard(score_E: Tensor, first_E: Tensor, tokens: Tensor) -> Tensor:
    """E * sum over experts of mean score times share of first choices, from sums over `tokens` tokens."""
    return len(score_E) * (score_E * first_E).sum() / tokens**2


class GateLinear(nn.Linear):
    """A Linear that leaves its parameters to whoever initialises the model."""

    def reset_parameters(self) -> None:
        """Nothing: building a layer draws from no generator."""


class Router(nn.Module):
    """The gate of one layer; parameter names are those of a Tutel gate, values are left to `initial.initial_value`.

    linear: `wg.weight` (E, D). cosine: `cosine_projector.weight` (P, D) and `.bias` (P,), `sim_matrix` (P, E),
    `temperature` (1,), a log-scale held at most ln 100 (Chi et al., 2022).
    """

    def __init__(self, config: MoEConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        if config.router == "linear":
            self.wg = GateLinear(dim, config.num_experts, bias=False)
        else:
            self.cosine_projector = GateLinear(dim, config.cosine_dim)
            self.sim_matrix = nn.Parameter(torch.empty(config.cosine_dim, config.num_experts))
            self.temperature = nn.Parameter(torch.empty(1))

    def forward(
        self, x_TD: Tensor, aux_group: ProcessGroup | None = None, generator: Generator | None = None
    ) -> tuple[Routing, Tensor, RoutingStats]:
        """The routing of x_TD (T, D), the weighted auxiliary loss (0-d, fp32 or wider), and what is worth seeing.

        Computes in fp32 at least, whatever the parameters' dtype. Noise comes from `generator`, or from torch's default
        one, which activation checkpointing restores for its recomputation.
        """
        with torch.autocast(x_TD.device.type, enabled=False):
            return self._route(x_TD, aux_group, generator)

    def logits(self, x_TD: Tensor) -> Tensor:
        """(T, E), in fp32 at least."""
        x_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
        if self.config.router == "linear":
            return F.linear(x_TD, self.wg.weight.to(x_TD.dtype))
        projector = self.cosine_projector
        point_TP = F.linear(x_TD, projector.weight.to(x_TD.dtype), projector.bias.to(x_TD.dtype))
        scale = self.temperature.to(x_TD.dtype).clamp(max=MAX_LOGIT_SCALE).exp()
        return F.normalize(point_TP, dim=1) @ F.normalize(self.sim_matrix.to(x_TD.dtype), dim=0) * scale

    def _route(
        self, x_TD: Tensor, aux_group: ProcessGroup | None, generator: Generator | None
    ) -> tuple[Routing, Tensor, RoutingStats]:
        c = self.config
        logit_TE = noisy_TE = self.logits(x_TD)
        prob_TE = score_TE = logit_TE.softmax(1)
        std = c.gate_noise / c.num_experts
        if self.training and std:
            noise_TE = torch.randn(logit_TE.shape, generator=generator, dtype=logit_TE.dtype, device=logit_TE.device)
            noisy_TE = logit_TE + std * noise_TE
            score_TE = noisy_TE.softmax(1)
        expert_TK, gate_TK = choose(score_TE, c.top_k, c.normalize_gate)
        factor = c.capacity_factor if self.training else c.eval_capacity_factor
        limit = capacity(len(x_TD), c.num_experts, c.top_k, factor)
        best_T = score_TE.detach().gather(1, expert_TK[:, :1]).squeeze(1)
        priority_T = best_T if c.batch_prioritized and limit is not None else None
        routing = plan(expert_TK, gate_TK, c.num_experts, limit, priority_T)

        z_T = logit_TE.logsumexp(1)
        importance_E = prob_TE.sum(0)
        sums = [z_T.square().sum()[None], z_T.new_full((1,), len(z_T))]
        if c.balance == "gshard":
            first_T = expert_TK[:, 0]
            first_E = first_T.new_zeros(c.num_experts).scatter_add_(0, first_T, torch.ones_like(first_T))
            sums += [score_TE.sum(0), first_E.to(score_TE.dtype)]
        else:
            sums.append(importance_E)
            if std:
                sums.append(load(prob_TE, noisy_TE.gather(1, expert_TK[:, -1:]).squeeze(1), std))
        vector = torch.cat(sums)
        z, tokens, *rest = (vector if aux_group is None else all_reduce_sum(vector, aux_group)).split(
            [len(part) for part in sums]
        )
        tokens = tokens[0].clamp_min(1)
        balance = (
            gshard(rest[0], rest[1], tokens) if c.balance == "gshard" else torch.stack([*map(variation, rest)]).mean()
        )
        aux = c.aux_weight * balance + c.z_weight * z[0] / tokens
        stats = observe(
            logit_TE,
            prob_TE,
            z_T,
            z=sums[0][0],
            importance_E=importance_E,
            balance=balance,
            confidence_T=best_T,
            expert_TK=expert_TK,
            slot_TK=routing.slot_TK,
            routed_E=routing.routed_E,
            kept_E=routing.count_E,
        )
        return routing, aux, stats
