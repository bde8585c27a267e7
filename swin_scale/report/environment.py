"""What a run ran on, as text: kept in its ``start`` events, so that a report can tell machines and versions apart."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import socket
import sys

import swin_scale

PACKAGES = ("torch", "deepspeed", "triton", "tutel", "webdataset", "numpy", "pillow")


def environment(*, ranks: int, nodes: int, device: str) -> dict[str, str]:
    """Versions of this package, Python and what a run may use (packages that are absent are left out), host of rank 0,
    operating system, cores this process may use, and the layout. `device`: as people call it."""
    facts = {"swin_scale": swin_scale.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        **facts,
        "ranks": str(ranks),
        "nodes": str(nodes),
        "device": device,
        "host of rank 0": socket.gethostname(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores of rank 0": str(cores),
        "command": " ".join(sys.argv),
    }
