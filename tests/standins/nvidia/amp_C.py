"""Presence tells that the optimizers were compiled."""
