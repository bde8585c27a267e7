"""Models by name. Importing this brings no torch; `create_model` does."""

from typing import TYPE_CHECKING, Any

from swin_scale.errors import UserError
from swin_scale.models.flops import flops
from swin_scale.models.variants import Variant, list_models, variant

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from swin_scale.models.simmim import SimMIM
    from swin_scale.models.swin import Swin
    from swin_scale.moe.comm import Waiting
    from swin_scale.moe.layer import MoEMlp
    from swin_scale.moe.tutel import TutelMoEMlp

__all__ = ["Variant", "create_model", "create_simmim", "flops", "list_models", "variant"]


def create_model(
    name: str,
    *,
    seed: int = 0,
    ep_group: "ProcessGroup | None" = None,
    aux_group: "ProcessGroup | None" = None,
    moe_backend: str = "native",
    waiting: "Waiting | None" = None,
    **overrides: Any,
) -> "Swin":
    """The named model with `overrides` of any field of `Variant`: on the CPU in fp32, initialised from `seed`.

    Under `torch.device("meta")` nothing is allocated or initialised: call `to_empty` and `init_weights(seed)`, which
    gives the same weights. A model with experts also takes, for its MoE layers:

    Args:
        ep_group: the ranks that share the experts, each building its own num_experts / size of them; None: all here.
        aux_group: the ranks over whose tokens the auxiliary loss is taken; None: this rank's own.
        moe_backend: `native` or `tutel`.
        waiting: makes what is entered while tokens of other ranks are waited for.
        overrides: `moe` as a `MoEConfig` or as a mapping of its fields that change.

    Raises UserError for an unknown name or override, and for sizes that do not fit together.
    """
    from functools import partial

    from swin_scale.models.swin import Swin
    from swin_scale.models.swin_mlp import SwinMlp

    v = variant(name, **overrides)
    if v.family == "swin_mlp":
        return SwinMlp(v, seed)
    layer = partial(
        _moe_mlp(v, moe_backend), ep_group=ep_group, aux_group=aux_group, kernels=v.kernels, waiting=waiting
    )
    return Swin(v, seed, layer)


def create_simmim(
    encoder_name: str,
    *,
    mask_patch_size: int = 32,
    norm_target: int | None = None,
    seed: int = 0,
    **overrides: Any,
) -> "SimMIM":
    """SimMIM over the named encoder, as `create_model` makes it of `overrides`, but without a head.

    Args:
        mask_patch_size: side in pixels of the cells that masks are made of, a multiple of the decoder's stride.
        norm_target: side in pixels of the neighbourhood that targets are standardised by (47 in the recipes), or None.

    Raises UserError for these, for `num_classes`, for Swin-MLP, and as `create_model`.
    """
    import torch

    from swin_scale.models.simmim import SimMIM
    from swin_scale.models.swin import Swin

    if "num_classes" in overrides:
        raise UserError(
            f"num_classes: {overrides['num_classes']} for a SimMIM encoder, which has no head; leave it out"
        )
    device = torch.get_default_device()
    # Drawn once, when the whole stands.
    with torch.device("meta"):
        encoder = create_model(encoder_name, num_classes=0, **overrides)
        if encoder.variant.family == "swin_mlp":
            raise UserError(f"{encoder_name}: SimMIM is defined for Swin V1, V2 and their mixtures of experts")
        assert isinstance(encoder, Swin)
        model = SimMIM(encoder, norm_target)
    if mask_patch_size < 1 or mask_patch_size % model.stride:
        raise UserError(
            f"mask_patch_size: {mask_patch_size} is not a multiple of {model.stride}, the pixels of a token of the "
            f"encoder's last map"
        )
    if device.type != "meta":
        model.to_empty(device=device)
        model.init_weights(seed)
    return model


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
