"""What a rank sends in one step, and how long that takes between GPUs of a node and between nodes.

Sizes are of what DeepSpeed 0.19 does: stages 1 and 2 sum each bucket of gradients over all ranks, which sends twice
what a reduce-scatter would, and bf16 gradients travel in fp32. `least` is what the stage needs in principle: 4 P bytes
of half precision at stages 1 and 2, 6 P at stage 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from swin_scale.models.geometry import stages
from swin_scale.models.variants import Variant
from swin_scale.plan.hardware import Gpu, Interconnect
from swin_scale.plan.memory import Parameters, Sharding


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """GPUs, how many of them a node has, and what lies between nodes."""

    gpu: Gpu
    gpus_per_node: int
    link: Interconnect

    def rate(self, ranks: int) -> float:
        """Bytes/s of one GPU in a collective over so many neighbouring ranks: that of the slowest way."""
        return self.gpu.nvlink if ranks <= self.gpus_per_node else min(self.link.rate, self.gpu.nvlink)


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """One kind of collective of a step."""

    what: str
    bytes: float
    """Sent by one rank in one step."""
    seconds: float
    hidden: float
    """Of the seconds, those that can pass while the GPU computes."""


def exchange_bytes(
    *, tokens: float, top_k: int, channels: int, itemsize: int, ranks: int, capacity: float = 1.0
) -> float:
    """Sent by a rank in one all-to-all of an MoE layer: tokens x top_k x channels, less what stays here.

    `capacity`: rows sent per choice. Ours are never padded, so it is at most 1; padded layers send their factor.
    """
    return tokens * top_k * capacity * channels * itemsize * (ranks - 1) / ranks


def all_to_all_bytes(v: Variant, *, batch: int, itemsize: int, ranks: int, capacity: float = 1.0) -> float:
    """Of all MoE layers in one forward and backward: rows there and back, and their gradients back and there."""
    if v.moe is None:
        return 0.0
    return sum(
        4
        * len(stage.moe_blocks)
        * exchange_bytes(
            tokens=batch * stage.resolution[0] * stage.resolution[1],
            top_k=v.moe.top_k,
            channels=stage.dim,
            itemsize=itemsize,
            ranks=ranks,
            capacity=capacity,
        )
        for stage in stages(v)
    )


def exchanges(v: Variant, parameters: Parameters, sharding: Sharding, cluster: Cluster, mode: str) -> list[Exchange]:
    """The collectives of one step; none on one rank. `mode`: of activation checkpointing."""
    s, n = sharding, sharding.ranks
    if n == 1:
        return []
    share = (n - 1) / n
    dense = parameters.count - parameters.experts
    shared, copies = parameters.experts / s.ep_size, n // s.ep_size
    rate = cluster.rate(n)
    reduced = s.reduced_itemsize * (dense * share + shared * (copies - 1) / copies)
    gathered = s.itemsize * (dense * share + shared * (copies - 1) / copies)
    found = []

    def add(what: str, size: float, hidden: float, at: float = rate) -> None:
        if size:
            found.append(Exchange(what=what, bytes=size, seconds=size / at, hidden=hidden * size / at))

    if s.stage == 3:
        add("parameters, all-gather, forward and backward", 2 * gathered * s.accumulation, 1.0)
        add("gradients, reduce-scatter", reduced * s.accumulation, 1.0)
    else:
        times = s.accumulation if s.stage == 2 else 1
        add("gradients, all-reduce", 2 * reduced * times, 1.0)
        if s.stage:
            add("parameters, all-gather after the update", gathered, 0.0)
    if v.moe is not None and s.ep_size > 1:
        there = all_to_all_bytes(v, batch=s.micro, itemsize=s.itemsize, ranks=s.ep_size) * s.accumulation
        # Recomputation sends the forward half once more. Pieces travel while others compute.
        pieces = v.moe.a2a_chunks
        size = there * (1.0 if mode == "off" else 1.5)
        add("tokens of experts, all-to-all", size, (pieces - 1) / pieces, cluster.rate(s.ep_size))
    return found


def least_bytes(parameters: Parameters, sharding: Sharding) -> float:
    """What the stage needs in principle with gradients in the model's dtype: 2 e P, and 3 e P at stage 3."""
    passes = 3 if sharding.stage == 3 else 2
    return passes * sharding.itemsize * parameters.held(sharding.ep_size)


def exposed(found: Sequence[Exchange], compute: float) -> tuple[float, float]:
    """(least, most) seconds of a step that pass with the GPU waiting, beside `compute` seconds: the hidden part fits
    behind two thirds of it, which is backward, or nothing is hidden."""
    hidden, whole = sum(e.hidden for e in found), sum(e.seconds for e in found)
    return whole - hidden + max(0.0, hidden - 2 / 3 * compute), whole
