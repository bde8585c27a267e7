from apex.normalization.fused_layer_norm import FusedLayerNorm

__all__ = ["FusedLayerNorm"]
