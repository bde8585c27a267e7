"""The MoE layer that takes the place of a block's MLP."""

from collections.abc import Callable
from dataclasses import replace

from torch import Generator, Tensor, nn
from torch.distributed import ProcessGroup

from swin_scale.errors import UserError
from swin_scale.kernels import Mode
from swin_scale.moe.comm import Waiting, Waits
from swin_scale.moe.config import MoEConfig
from swin_scale.moe.dispatch import forward_experts
from swin_scale.moe.experts import Experts
from swin_scale.moe.router import Router
from swin_scale.moe.stats import RoutingStats


class MoEMlp(nn.Module):
    """(..., dim) to (..., dim) through a mixture of experts of `hidden` units each.

    `ep_group`: the ranks that share one set of experts, rank p holding the p-th run of num_experts / size of them; None
    keeps all here. `aux_group`: the ranks over whose tokens the auxiliary loss is taken, None for this rank's alone.
    Over a group, each rank's loss must carry the auxiliary loss at the same weight and gradients must be averaged, as
    data parallelism does; the gradient is then that of the loss over all tokens. `kernels`: what moves tokens to
    experts and back, see `swin_scale.kernels.choice`. `waiting`: entered while rows of other ranks are waited for.
    Parameters are named as Tutel's: `_moe_layer.experts.batched_fc1_w`, `_moe_layer.gates.0.wg.weight` and so on; see
    `Experts` and `Router`.
    """

    def __init__(
        self,
        config: MoEConfig,
        dim: int,
        hidden: int,
        *,
        ep_group: ProcessGroup | None = None,
        aux_group: ProcessGroup | None = None,
        kernels: Mode = "auto",
        waiting: Waiting | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.aux_group = aux_group
        self._moe_layer = MoELayer(config, dim, hidden, ep_group, kernels, waiting)

    def forward(
        self, x: Tensor, generator: Generator | None = None, norm: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Tensor, RoutingStats]:
        """The output in x's shape and dtype, the weighted auxiliary loss (0-d, fp32 or wider), and the routing.

        Gate noise comes from `generator` or, if None, torch's default one. `norm` is applied to each expert's output
        before the gate weighs it: a norm after the sum would undo the weight, and give a top-1 gate no gradient.
        """
        y, aux, stats = self._moe_layer(x.flatten(0, -2), self.aux_group, generator, norm)
        return y.view(x.shape), aux, replace(stats, shape=tuple(x.shape[:-1]))

    @property
    def experts(self) -> Experts:
        """The experts this rank holds."""
        return self._moe_layer.experts

    @property
    def num_local_experts(self) -> int:
        return self.experts.num_local


class MoELayer(nn.Module):
    """Gate and experts, under the names Tutel gives them."""

    def __init__(
        self,
        config: MoEConfig,
        dim: int,
        hidden: int,
        ep_group: ProcessGroup | None,
        kernels: Mode,
        waiting: Waiting | None,
    ) -> None:
        super().__init__()
        self.kernels, self.waiting = kernels, waiting
        size, rank = (1, 0) if ep_group is None else (ep_group.size(), ep_group.rank())
        num_local = local_experts(config.num_experts, size)
        self.chunks = config.a2a_chunks
        self.ep_group = ep_group if size > 1 else None
        self.experts = Experts(
            config.num_experts, num_local, rank * num_local, dim, hidden, config.drop, config.fc2_bias
        )
        self.gates = nn.ModuleList([Router(config, dim)])

    def forward(
        self,
        x_TD: Tensor,
        aux_group: ProcessGroup | None,
        generator: Generator | None,
        norm: Callable[[Tensor], Tensor] | None,
    ) -> tuple[Tensor, Tensor, RoutingStats]:
        routing, aux, stats = self.gates[0](x_TD, aux_group, generator)
        if self.ep_group is not None:
            stats = replace(stats, ep_size=self.ep_group.size(), waits=Waits(self.waiting))
        y_TD = forward_experts(x_TD, routing, self.experts, self.ep_group, self.chunks, stats.waits, norm, self.kernels)
        return y_TD, aux, stats


def local_experts(num_experts: int, ep_size: int) -> int:
    """Experts per rank; UserError where they do not divide."""
    if num_experts % ep_size:
        divisors = [n for n in range(1, num_experts + 1) if num_experts % n == 0]
        raise UserError(f"moe.ep_size {ep_size} does not divide moe.experts {num_experts}; choose one of {divisors}")
    return num_experts // ep_size
