"""Starts training processes: on this machine, and on clusters. Knows no torch."""
