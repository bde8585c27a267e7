"""Models by name. Importing this brings no torch; `create_model` does."""

from typing import TYPE_CHECKING, Any

from swin_scale.models.flops import flops
from swin_scale.models.variants import Variant, list_models, variant

if TYPE_CHECKING:
    from swin_scale.models.swin import Swin

__all__ = ["Variant", "create_model", "flops", "list_models", "variant"]


def create_model(name: str, *, seed: int = 0, **overrides: Any) -> "Swin":
    """The named model with `overrides` of any field of `Variant`: on the CPU in fp32, initialised from `seed`.

    Under `torch.device("meta")` nothing is allocated or initialised: call `to_empty` and `init_weights(seed)`, which
    gives the same weights. Raises UserError for an unknown name or override, and for sizes that do not fit together.
    """
    from swin_scale.models.swin import Swin
    from swin_scale.models.swin_mlp import SwinMlp

    v = variant(name, **overrides)
    return (SwinMlp if v.family == "swin_mlp" else Swin)(v, seed)
