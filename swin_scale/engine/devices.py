"""What a rank computes on, and whether what the ranks of a run compute on goes together."""

from __future__ import annotations

import socket
from collections.abc import Sequence

import torch

from swin_scale.engine.layout import Layout
from swin_scale.errors import PeerLostError, UserError


def choose_device(layout: Layout, device: str | None) -> torch.device:
    """The device of this rank, made the current one; `device` is `cuda`, `cpu` or unset, which prefers CUDA."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device is visible; check the driver and CUDA_VISIBLE_DEVICES")
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    chosen = torch.device("cuda", device_index(layout.local_rank, torch.cuda.device_count()))
    torch.cuda.set_device(chosen)
    # cuDNN would round a convolution's fp32 to TF32, and sum its gradients in an order that changes from run to run.
    # The only one here embeds the patches: being exact costs next to nothing.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    return chosen


def device_index(local_rank: int, visible: int) -> int:
    """CUDA device of a local rank: its own one when the launcher shows each task a single GPU; raises UserError."""
    if visible == 1:
        return 0
    if local_rank >= visible:
        raise UserError(
            f"local rank {local_rank} needs a GPU of its own, but {visible} are visible; start at most {visible} "
            "processes on this machine"
        )
    return local_rank


def place(device: torch.device) -> tuple[str, str]:
    """(host, `cpu` or the GPU's UUID), which is the same by whatever number a process sees the GPU."""
    name = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else "cpu"
    return socket.gethostname(), name


def mismatch(places: Sequence[tuple[str, str]]) -> UserError | PeerLostError | None:
    """What keeps the ranks, given by their `place` in rank order, from training together; None if nothing does.

    NCCL says "invalid usage" of ranks that share a GPU, and ranks without one wait for the others' backend in vain.
    """
    without = [rank for rank, (_, name) in enumerate(places) if name == "cpu"]
    if len(without) == len(places):
        return None
    if without:
        rank = without[0]
        more = f", nor do {len(without) - 1} more" if len(without) > 1 else ""
        return PeerLostError(
            f"rank {rank} on {places[rank][0]} sees no GPU{more}, while other ranks have one; check nvidia-smi there "
            "and start the same command again, without that machine if it stays so"
        )
    first: dict[tuple[str, str], int] = {}
    for rank, (host, name) in enumerate(places):
        other = first.setdefault((host, name), rank)
        if other != rank:
            return UserError(f"ranks {other} and {rank} on {host} share one GPU; start one process per GPU")
    return None
