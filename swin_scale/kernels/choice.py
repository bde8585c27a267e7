"""Whether a Triton kernel serves a call, and if not, why. Asking imports no Triton and waits for no device."""

import importlib.metadata
import os
import shutil
import sysconfig
from functools import cache
from pathlib import Path
from typing import Literal

import torch

from swin_scale.errors import UserError

Mode = Literal["auto", "triton", "reference"]
"""`auto`: Triton on a CUDA device that can run it, else torch. `triton`: Triton, or an error that says why not.
`reference`: torch."""

MIN_TRITON = (3, 6)
MIN_CAPABILITY = (8, 0)
BLACKWELL, BLACKWELL_TRITON = (10, 0), (3, 9)
"""On such GPUs older compilers (3.7.1 was tried) fail at a backward kernel of large windows in half precision."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HEAD_DIMS = range(16, 129, 8)
MAX_TOKENS = 1024


def why_not_triton(
    device: torch.device, dtype: torch.dtype, *, head_dim: int | None = None, tokens: int | None = None
) -> str | None:
    """One sentence that names what keeps Triton from serving such a call; None if nothing does.

    Args:
        device, dtype: of the activations.
        head_dim: channels of an attention head; None: not an attention.
        tokens: of an attention window; None: not an attention.
    """
    if dtype not in DTYPES:
        return f"the kernels compute in {', '.join(map(_name, DTYPES))}, not in {_name(dtype)}"
    if head_dim is not None and tokens is not None:
        reason = why_not_attention(head_dim, tokens)
        if reason is not None:
            return reason
    interpreted = os.environ.get("TRITON_INTERPRET", "") in ("1", "true", "True")
    return _why_not_here(device, dtype, interpreted)


def why_not_attention(head_dim: int, tokens: int) -> str | None:
    """What keeps Triton from attention of such heads and windows on any machine; None if nothing does."""
    if head_dim not in HEAD_DIMS:
        return f"heads have {head_dim} channels, and the kernels take multiples of 8 from 16 to 128"
    if tokens > MAX_TOKENS:
        return f"windows have {tokens} tokens, and the kernels take up to {MAX_TOKENS}"
    return None


def use_triton(
    mode: Mode,
    device: torch.device,
    dtype: torch.dtype,
    *,
    head_dim: int | None = None,
    tokens: int | None = None,
) -> bool:
    """Whether a call goes to Triton; raises UserError where `mode` is `triton` and it cannot.

    Never under `auto` on a CPU, not with Triton's interpreter either, which is for tests.
    """
    if mode == "reference" or (mode == "auto" and device.type != "cuda"):
        return False
    reason = why_not_triton(device, dtype, head_dim=head_dim, tokens=tokens)
    if reason is not None and mode == "triton":
        raise UserError(f"engine.kernels is triton, but {reason}; set engine.kernels=auto (or reference)")
    return reason is None


def _why_not_here(device: torch.device, dtype: torch.dtype, interpreted: bool) -> str | None:
    return _ask(device, dtype, interpreted)


# What `torch.compiler.assume_constant_result` does, without importing the compiler, which takes seconds.
_why_not_here._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _ask(device: torch.device, dtype: torch.dtype, interpreted: bool) -> str | None:
    if device.type == "cpu" and not interpreted:
        return "there is no CUDA device, and TRITON_INTERPRET=1, which runs kernels slowly on a CPU, is not set"
    if device.type not in ("cpu", "cuda"):
        return f"Triton runs on CUDA devices, not on {device.type}"
    if interpreted and dtype is torch.bfloat16:
        return "Triton's interpreter (TRITON_INTERPRET=1) multiplies bfloat16 matrices wrongly"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "the package triton is not installed (pip install triton)"
    seen = tuple(int(part) for part in version.split(".")[:2])
    if seen < MIN_TRITON:
        return f"triton {version} is too old; the kernels need {'.'.join(map(str, MIN_TRITON))} or later"
    if device.type == "cuda":
        if torch.version.hip is not None:
            return "the kernels are written for NVIDIA GPUs, and this build of torch is for AMD's"
        if not torch.cuda.is_available():
            return "no CUDA device is usable here"
        capability = torch.cuda.get_device_capability(device)
        if capability < MIN_CAPABILITY:
            return (
                f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}; the "
                f"kernels need {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} or later"
            )
        if capability >= BLACKWELL and seen < BLACKWELL_TRITON and dtype is not torch.float32:
            wanted = ".".join(map(str, BLACKWELL_TRITON))
            return (
                f"triton {version} cannot compile them for {torch.cuda.get_device_name(device)} in half precision; "
                f"triton {wanted} or later can"
            )
        return _why_no_stub()
    return None


def _why_no_stub() -> str | None:
    """What keeps Triton from compiling its part of the driver, in C, at the first launch; it looks in these places."""
    compiler = os.environ.get("CC")
    if not any(map(shutil.which, ("gcc", "clang") if compiler is None else (compiler,))):
        seen = "CC is not set" if compiler is None else f"CC={compiler} is none"
        return f"Triton needs a C compiler at its first launch and finds none ({seen}; install gcc or clang)"
    scheme = sysconfig.get_default_scheme()
    include = sysconfig.get_path("include", "posix_prefix" if scheme == "posix_local" else scheme)
    if not Path(include, "Python.h").is_file():
        return f"Triton needs {include}/Python.h at its first launch, which is not there (install python3-dev)"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
