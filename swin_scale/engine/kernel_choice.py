"""Which kernels a run computes with: judged before ranks join, agreed by all of them after, told in one line."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from swin_scale.config import Config
from swin_scale.engine.dist import Dist
from swin_scale.engine.engine import DTYPES
from swin_scale.errors import UserError
from swin_scale.kernels import Mode, why_not_attention, why_not_triton
from swin_scale.models import Variant
from swin_scale.models.geometry import stages


@dataclass(frozen=True, kw_only=True)
class KernelChoice:
    """What a model is built with, and why, for the log and the record of the run."""

    mode: Mode
    text: str


def check_kernels(config: Config, network: Variant) -> None:
    """Refuse engine.kernels=triton where it is certain, before ranks join, that it cannot be; raises UserError."""
    if config.engine.kernels != "triton":
        return
    dtype = DTYPES[config.engine.precision]
    if not torch.cuda.is_available():
        _refuse(why_not_triton(torch.device("cpu"), dtype))
    for stage, reason in _stages_without(network).items():
        _refuse(f"{reason} (stage {stage})")


def choose_kernels(config: Config, dist: Dist, network: Variant) -> KernelChoice:
    """`engine.kernels` made concrete, the same on all ranks, which call this together.

    A rank that cannot run Triton makes all use torch under `auto`, so that they compute alike; under `triton` all raise
    UserError.
    """
    mode, dtype = config.engine.kernels, DTYPES[config.engine.precision]
    if mode == "reference":
        return describe_kernels(mode, network, dist.device, dtype)
    here = _why_not(mode, dist.device, dtype)
    reasons = dist.broadcast_json("kernels", dist.gather_json("kernels", here))
    for rank, reason in enumerate(reasons):
        if reason is None:
            continue
        where = f" (rank {rank})" if dist.world > 1 and any(other != reason for other in reasons) else ""
        if mode == "triton":
            _refuse(f"{reason}{where}")
        return KernelChoice(mode="reference", text=f"torch, as {reason}{where}")
    return describe_kernels(mode, network, dist.device, dtype)


def describe_kernels(mode: Mode, network: Variant, device: torch.device, dtype: torch.dtype) -> KernelChoice:
    """What `mode` comes to for `network` with activations of `dtype` on `device` of this process."""
    if mode == "reference":
        return KernelChoice(mode=mode, text="torch, as engine.kernels is reference")
    if (reason := _why_not(mode, device, dtype)) is not None:
        return KernelChoice(mode=mode, text=f"torch, as {reason}")
    rest = [f"; torch for attention in stage {i}, as {reason}" for i, reason in _stages_without(network).items()]
    return KernelChoice(mode=mode, text=f"Triton{''.join(rest)}")


def _why_not(mode: Mode, device: torch.device, dtype: torch.dtype) -> str | None:
    # Its interpreter, of which the full answer speaks, is never used unasked.
    return "there is no CUDA device" if mode == "auto" and device.type == "cpu" else why_not_triton(device, dtype)


def _stages_without(network: Variant) -> dict[int, str]:
    """By stage, what keeps its attention from Triton on any machine."""
    found = {}
    for i, stage in enumerate(stages(network) if network.family != "swin_mlp" else []):
        height, width = stage.window_size
        if (reason := why_not_attention(stage.dim // stage.heads, height * width)) is not None:
            found[i] = reason
    return found


def _refuse(reason: str | None) -> None:
    if reason is not None:
        raise UserError(f"engine.kernels is triton, but {reason}; set engine.kernels=auto (or reference)")
