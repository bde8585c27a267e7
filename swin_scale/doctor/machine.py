"""This process's machine: versions of what a run imports, its GPUs, how fast it multiplies, a free port."""

from __future__ import annotations

import importlib.metadata
import os
import re
import socket
import time
from collections.abc import Callable, Mapping

import torch

from launcher.processes import output_of
from swin_scale.config import Config
from swin_scale.doctor.finding import Finding, ok, refuse, warn
from swin_scale.kernels.apex import why_not_apex
from swin_scale.kernels.choice import MIN_TRITON, why_not_triton

DEEPSPEED = ((0, 19, 8), (0, 20))
"""From the first, below the second; of `engine.fragments`, which a test compares."""
MIN_TORCH = (2, 10)
LITTLE_MEMORY = 0.10
"""Share of a GPU's memory that others may hold without a warning."""
DRIVER_S = 20.0
"""A driver that does not say its version within this time hangs."""
MATMUL_SIDE = {"cuda": 8192, "cpu": 512}


def installed(name: str) -> str | None:
    """Version of a distribution, None where it is not installed. Nothing is imported."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def numbers(version: str) -> tuple[int, ...]:
    """``2.13.0+cpu`` as (2, 13, 0)."""
    digits = ("".join(c for c in part if c.isdigit()) for part in version.partition("+")[0].split(".")[:3])
    return tuple(int(d or 0) for d in digits)


def check_versions(config: Config | None, version_of: Callable[[str], str | None] = installed) -> list[Finding]:
    """torch, DeepSpeed, Triton, Tutel and Apex: what is needed, what is asked for by `config`, what is there."""
    found = []
    torch_version = version_of("torch") or torch.__version__
    if numbers(torch_version) < MIN_TORCH:
        wanted = ".".join(map(str, MIN_TORCH))
        found.append(refuse("torch", f"{torch_version} is too old", f"install torch {wanted} or later"))
    else:
        found.append(ok("torch", torch_version))
    deepspeed, pin = version_of("deepspeed"), "pip install 'deepspeed>=0.19.8,<0.20'"
    if deepspeed is None:
        found.append(refuse("deepspeed", "is not installed", pin))
    elif not DEEPSPEED[0] <= numbers(deepspeed) < DEEPSPEED[1]:
        found.append(refuse("deepspeed", f"{deepspeed} is outside of the versions this code knows", pin))
    else:
        found.append(ok("deepspeed", deepspeed))
    found += [
        _check_triton(config, version_of("triton")),
        *_check_tutel(config, version_of("tutel")),
        _check_apex(config),
    ]
    return found


def _check_triton(config: Config | None, version: str | None) -> Finding:
    if torch.cuda.is_available():
        reason = why_not_triton(torch.device("cuda"), torch.bfloat16)
        wanted = config is not None and config.engine.kernels == "triton"
        if reason is not None:
            fix = "set engine.kernels=auto" if wanted else f"pip install 'triton>={'.'.join(map(str, MIN_TRITON))}'"
            return (refuse if wanted else warn)("triton", f"kernels of torch will be used, as {reason}", fix)
    elif config is not None and config.engine.kernels == "triton":
        return refuse("triton", "engine.kernels is triton, and there is no GPU", "set engine.kernels=auto")
    return ok("triton", version or "not installed, and not needed without a GPU")


def _check_tutel(config: Config | None, version: str | None) -> list[Finding]:
    if config is None or config.moe.backend != "tutel":
        return []
    if version is None:
        fix = "build it from its source, https://github.com/microsoft/tutel, or set moe.backend=native"
        return [refuse("tutel", "moe.backend is tutel, and it is not installed", fix)]
    return [ok("tutel", version)]


def _check_apex(config: Config | None) -> Finding:
    reason = why_not_apex()
    wanted = config is not None and (config.engine.layer_norm == "apex" or config.optim.name.startswith("apex"))
    if reason is None:
        return ok("apex", "NVIDIA's")
    if wanted:
        return refuse("apex", reason, "set engine.layer_norm=torch and optim.name=adamw, or install it")
    if "not NVIDIA's" in reason:
        return warn("apex", reason, "uninstall it: whatever looks for NVIDIA's would find this one")
    return ok("apex", "not installed, and not asked for")


def check_gpus() -> list[Finding]:
    """The GPU of every index that this process sees: memory that is free, and its driver."""
    if not torch.cuda.is_available():
        if torch.version.cuda is None:
            return [ok("gpu", "none: this build of torch is for CPUs")]
        fix = "check nvidia-smi, CUDA_VISIBLE_DEVICES and that the driver is new enough"
        return [refuse("gpu", f"torch is built for CUDA {torch.version.cuda} and sees no GPU", fix)]
    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        text = f"{index}: {torch.cuda.get_device_name(index)}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
        taken = 1 - free / total
        fix = "end what holds it (nvidia-smi), or take another GPU"
        found.append(warn("gpu", text, fix) if taken > LITTLE_MEMORY else ok("gpu", text))
    driver = _driver()
    found.append(ok("driver", driver) if driver else warn("driver", "nvidia-smi gives none", "check the driver"))
    return found


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = output_of(command, DRIVER_S)
    except OSError:  # none, or none that answers
        return None
    # One that fails says why, perhaps with the version of its library.
    return ", ".join(sorted({line for line in said.splitlines() if re.fullmatch(r"\d+(\.\d+)+", line)})) or None


def matmul_seconds(device: torch.device, repeats: int = 5) -> float:
    """The shortest time of a product of random square matrices: `MATMUL_SIDE`, bf16 on a GPU, fp32 on a CPU."""
    side = MATMUL_SIDE[device.type]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a = torch.randn(side, side, device=device).to(dtype)
    out = torch.empty_like(a)
    best = float("inf")
    for _ in range(repeats + 1):
        _wait(device)
        start = time.perf_counter()
        torch.mm(a, a, out=out)
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check_port(environ: Mapping[str, str]) -> Finding:
    """Whether rank 0 could serve its peers here: MASTER_PORT where it is set, else any port."""
    text = environ.get("MASTER_PORT", "0")
    port = int(text) if text.isdecimal() else -1
    if not 0 <= port < 65536:
        return refuse("port", f"MASTER_PORT is {text!r}", "set a number from 1 to 65535")
    with socket.socket() as probe:
        # As the store does: a port that is only waiting for its last connection's end is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            reason = error.strerror or str(error)
            return refuse("port", f"{port} cannot be opened: {reason}", "set MASTER_PORT to a free one")
        return ok("port", f"{probe.getsockname()[1]} is free")


def check_cores(workers: int, local_world: int) -> Finding:
    """Whether each rank and each of its loaders has a core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = local_world * (workers + 1)
    text = f"{cores} here; {wanted} wanted by {local_world} training and {local_world * workers} loading processes"
    if cores < wanted:
        return warn("cores", text, f"set data.workers={max(0, cores // local_world - 1)}, or ask for {wanted} cores")
    return ok("cores", text)
