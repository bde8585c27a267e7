"""What a benchmark hands back: figures as JSON, with the machine and versions they belong to, and a table to read."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import swin_scale
from swin_scale.files import write_atomic

SCHEMA = 1
"""Raised when a key of the result files changes its meaning."""

PACKAGES = ("torch", "timm", "transformers", "deepspeed", "tutel", "triton", "numpy")


@dataclass(frozen=True, kw_only=True)
class Result:
    """Figures of one benchmark; `str` gives the table."""

    figures: dict[str, Any]
    table: str

    def __str__(self) -> str:
        return self.table

    def write(self, path: str | Path) -> None:
        """As JSON, whole or not at all."""
        text = json.dumps(self.figures, indent=1)
        # A pair of times to a line, not a number.
        text = re.sub(r"\[\s+([-+.\de]+),\s+([-+.\de]+)\s+\]", r"[\1, \2]", text)
        write_atomic(Path(path), (text + "\n").encode())


def describe(bench: str, command: str, device: torch.device) -> dict[str, Any]:
    """The keys that every result starts with: what ran, on what hardware, with which versions."""
    return {
        "schema": SCHEMA,
        "bench": bench,
        "command": command,
        "hardware": hardware(device),
        "versions": versions(),
    }


def hardware(device: torch.device) -> dict[str, Any]:
    """CPU model, cores this process may use, torch's threads, and the GPU (None on a CPU)."""
    gpu = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu = {"name": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)}
    return {"cpu": _cpu(), "cores": _cores(), "threads": torch.get_num_threads(), "gpu": gpu}


def versions() -> dict[str, str | None]:
    """Of this package, Python, CUDA, and the packages a comparison may involve; None for one that is not there."""
    found: dict[str, str | None] = {
        "swin_scale": swin_scale.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
    }
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


@contextlib.contextmanager
def fixed_threads(threads: int) -> Iterator[None]:
    """torch on this many CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
