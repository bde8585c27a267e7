"""Tutel behind the native layer's constructor and results; the only file that imports it.

Where Tutel's results depend on a slip of its own, it is called so that the slip has no effect:
- It counts the capacity that factor <= 0 needs in token order even under batch-prioritised routing, so "dropless"
  drops. Without a limit the order is of no consequence, so prioritising is off at 0; a negative factor is given as
  positive, which drops the same tokens.
- A factor of 0 passed to its forward is taken for "not given", so the factor is set on the gate.
- It takes a missing group for the world, so a layer on several processes needs a group.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.distributed import ProcessGroup

from swin_scale.errors import UserError
from swin_scale.kernels import Mode
from swin_scale.moe.comm import Waiting
from swin_scale.moe.config import MoEConfig
from swin_scale.moe.experts import Experts
from swin_scale.moe.layer import local_experts
from swin_scale.moe.router import Router
from swin_scale.moe.stats import RoutingStats

COUNT = "_moe_layer._num_global_experts"
"""A buffer of Tutel's that repeats the constructor; left out of the state dict, which is then the native layer's."""


class TutelMoEMlp(nn.Module):
    """As `layer.MoEMlp`: constructor, results, parameter names, state dict. Raises UserError where Tutel cannot follow.

    Routing is computed a second time for the statistics, as Tutel keeps its own to itself. `kernels` and `waiting`
    have no effect: Tutel moves tokens by its own.
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
        moe_layer = _import_tutel()
        _refuse_what_tutel_cannot(config, dim, ep_group, aux_group)
        self.config = config
        size = 1 if ep_group is None else ep_group.size()
        gate = {"type": "top", "k": config.top_k, "fp32_gate": True, "gate_noise": config.gate_noise}
        if config.router == "cosine":
            gate |= {"type": "cosine_top", "proj_dim": config.cosine_dim, "init_t": config.cosine_init_t}
        self._moe_layer = moe_layer(
            gate_type=gate,
            model_dim=dim,
            experts={
                "type": "ffn",
                "num_experts_per_device": local_experts(config.num_experts, size),
                "hidden_size_per_expert": hidden,
                "activation_fn": self._activation,
            },
            group=ep_group,
            batch_prioritized_routing=config.batch_prioritized,
            normalize_gate=config.normalize_gate,
            is_gshard_loss=config.balance == "gshard",
            a2a_ffn_overlap_degree=1,
        )
        self._ep_size, self._ep_rank = size, 0 if ep_group is None else ep_group.rank()
        self._moe_layer.experts.batched_fc2_bias.requires_grad_(config.fc2_bias)
        # Only its arithmetic is used, on Tutel's parameters: kept out of the module tree.
        self._router = (_router_over(config, dim, self._moe_layer.gates[0]),)
        self.register_state_dict_post_hook(_without_count)
        self.register_load_state_dict_pre_hook(_with_count)

    def forward(self, x: Tensor, generator: Generator | None = None) -> tuple[Tensor, Tensor, RoutingStats]:
        """As `layer.MoEMlp.forward`; `generator` must be None, as Tutel draws noise from torch's default one."""
        if generator is not None:
            raise UserError(
                "moe.backend tutel: gate noise cannot come from an explicit generator; use moe.backend=native"
            )
        layer, c = self._moe_layer, self.config
        factor = c.capacity_factor if self.training else c.eval_capacity_factor
        layer.gates[0].capacity_factor = abs(factor)
        layer.batch_prioritized_routing = c.batch_prioritized and factor != 0
        x_TD = x.reshape(-1, x.shape[-1])
        (router,) = self._router
        router.train(self.training)
        with torch.no_grad(), torch.random.fork_rng([x.device] if x.device.type == "cuda" else []):
            stats = router(x_TD)[2]  # draws the noise that Tutel is about to draw
        stats = replace(stats, shape=tuple(x.shape[:-1]), ep_size=self._ep_size)
        y = layer(x_TD)
        return y.view(x.shape), c.aux_weight * layer.l_aux, stats

    def natives(self) -> dict[nn.Module, nn.Module]:
        """Tutel's modules and the native ones, without values of their own, that say how their parameters start."""
        experts, (router,), c = self._moe_layer.experts, self._router, self.config
        local, hidden, dim = experts.batched_fc1_w.shape
        with torch.device("meta"):
            twin = Experts(c.num_experts, local, self._ep_rank * local, dim, hidden, c.drop, c.fc2_bias)
        return {experts: twin, self._moe_layer.gates[0]: router}

    def _activation(self, h: Tensor) -> Tensor:
        return F.dropout(F.gelu(h), self.config.drop, self.training)


def _import_tutel() -> Any:
    try:
        from tutel.moe import moe_layer
    except ImportError as error:
        raise UserError(
            f"moe.backend tutel: Tutel cannot be imported ({error}). It is not on PyPI: build it from its source, "
            "https://github.com/microsoft/tutel, with `pip install --no-build-isolation .` (with NO_CUDA=1 set where "
            "there is no CUDA toolkit), or use moe.backend=native"
        ) from error
    return moe_layer


def _refuse_what_tutel_cannot(
    config: MoEConfig, dim: int, ep_group: ProcessGroup | None, aux_group: ProcessGroup | None
) -> None:
    if aux_group is not None:
        raise UserError("moe.aux_scope global: Tutel balances each rank by itself; set rank, or moe.backend=native")
    if config.z_weight:
        raise UserError(f"moe.z_weight {config.z_weight}: Tutel has no z-loss; set 0, or moe.backend=native")
    if config.balance == "load_importance" and not config.gate_noise:
        raise UserError("moe.gate_noise 0: Tutel's load needs noise; set moe.balance=gshard, or moe.backend=native")
    if dim % 2:
        raise UserError(f"width {dim}: Tutel wants an even one; use moe.backend=native")
    if ep_group is None and dist.is_initialized() and dist.get_world_size() > 1:
        raise UserError("moe.backend tutel: on several processes a layer needs a group, if only of its own rank")


def _router_over(config: MoEConfig, dim: int, gate: nn.Module) -> Router:
    """A native router that owns nothing: its parameters are those of a Tutel gate."""
    router = Router(config, dim)
    for name, _ in list(router.named_parameters(recurse=False)):
        setattr(router, name, getattr(gate, name))
    for name, _ in list(router.named_children()):
        setattr(router, name, getattr(gate, name))
    return router


def _without_count(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    del state[prefix + COUNT]


def _with_count(module: nn.Module, state: dict[str, Any], prefix: str, *unused: Any) -> None:
    state.setdefault(prefix + COUNT, module.get_buffer(COUNT))
