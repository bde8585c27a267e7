"""Checks of the machine, the disk and the data before step 1: each finding with a reason, and a fix where needed.

finding (ok, warn, refuse) <- machine (versions, GPUs, speed) | storage (speed, space) | data (samples)
    | ranks (peers: the same versions, clocks, slow ones) -> examine (in this order) -> cli (text, JSON, exit code)
"""
