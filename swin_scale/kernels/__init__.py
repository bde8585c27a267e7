"""The ops of the models. `reference` defines them in plain torch; what is exported here are the versions to call.

`ops` sends each call to Triton (`attention`, `norms`, `permutation`, with tiles from `tuning`) or to torch
(`chunked`), as `choice` decides. Importing this imports no Triton.
"""

from swin_scale.kernels.choice import Mode, use_triton, why_not_attention, why_not_triton
from swin_scale.kernels.ops import (
    ATTENTION_OPS,
    LayerNormBy,
    add_norm,
    layer_norm,
    patch_merge,
    permute,
    residual,
    residual_norm,
    unpermute,
    window_attention,
)
from swin_scale.kernels.reference import shift_mask, shift_regions, window_partition, window_reverse

__all__ = [
    "ATTENTION_OPS",
    "LayerNormBy",
    "Mode",
    "add_norm",
    "layer_norm",
    "patch_merge",
    "permute",
    "residual",
    "residual_norm",
    "shift_mask",
    "shift_regions",
    "unpermute",
    "use_triton",
    "why_not_attention",
    "why_not_triton",
    "window_attention",
    "window_partition",
    "window_reverse",
]
