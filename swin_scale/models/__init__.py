"""Models by name. Importing this brings no torch; `create_model` does."""

from typing import TYPE_CHECKING, Any

from swin_scale.errors import UserError
from swin_scale.models.flops import flops
from swin_scale.models.variants import Variant, list_models, variant

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from swin_scale.models.swin import Swin
    from swin_scale.moe.layer import MoEMlp
    from swin_scale.moe.tutel import TutelMoEMlp

__all__ = ["Variant", "create_model", "flops", "list_models", "variant"]


def create_model(
    name: str,
    *,
    seed: int = 0,
    ep_group: "ProcessGroup | None" = None,
    aux_group: "ProcessGroup | None" = None,
    moe_backend: str = "native",
    **overrides: Any,
) -> "Swin":
    """The named model with `overrides` of any field of `Variant`: on the CPU in fp32, initialised from `seed`.

    Under `torch.device("meta")` nothing is allocated or initialised: call `to_empty` and `init_weights(seed)`, which
    gives the same weights. A model with experts also takes, for its MoE layers:

    Args:
        ep_group: the ranks that share the experts, each building its own num_experts / size of them; None: all here.
        aux_group: the ranks over whose tokens the auxiliary loss is taken; None: this rank's own.
        moe_backend: `native` or `tutel`.
        overrides: `moe` as a `MoEConfig` or as a mapping of its fields that change.

    Raises UserError for an unknown name or override, and for sizes that do not fit together.
    """
    from functools import partial

    from swin_scale.models.swin import Swin
    from swin_scale.models.swin_mlp import SwinMlp

    v = variant(name, **overrides)
    if v.family == "swin_mlp":
        return SwinMlp(v, seed)
    layer = partial(_moe_mlp(v, moe_backend), ep_group=ep_group, aux_group=aux_group, kernels=v.kernels)
    return Swin(v, seed, layer)


def _moe_mlp(v: Variant, backend: str) -> "type[MoEMlp] | type[TutelMoEMlp]":
    from swin_scale.moe.layer import MoEMlp

    if backend == "native":
        return MoEMlp
    if backend != "tutel":
        raise UserError(f"moe.backend: {backend!r} is not possible; choose native or tutel")
    if v.post_norm:
        raise UserError(
            "moe.backend tutel: SwinV2 norms an expert's output before the gate weighs it, for which Tutel's layer has "
            "no place; use moe.backend=native, or a model of swin_moe"
        )
    from swin_scale.moe.tutel import TutelMoEMlp

    return TutelMoEMlp
