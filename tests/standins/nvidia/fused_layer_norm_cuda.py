"""Presence tells that FusedLayerNorm was compiled."""
