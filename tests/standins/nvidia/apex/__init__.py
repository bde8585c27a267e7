"""NVIDIA Apex."""
