"""The ops of the models. `reference` defines them in plain torch; what is exported here is the version to call."""

from swin_scale.kernels.chunked import ATTENTION_OP, window_attention
from swin_scale.kernels.reference import shift_mask, shift_regions, window_partition, window_reverse

__all__ = ["ATTENTION_OP", "shift_mask", "shift_regions", "window_attention", "window_partition", "window_reverse"]
