"""Data sheets: what a GPU can hold, compute and move, and what lies between GPUs; each figure with its source."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from swin_scale.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One accelerator. `sheet` figures are the vendor's; `roof` figures are what a kernel reaches of them at best."""

    name: str
    memory: float
    """Bytes of HBM, by the data sheet."""
    sheet_flops: float
    """Dense bf16 and fp16 peak, FLOP/s, by the data sheet: what MFU is measured against."""
    roof_flops: float
    """The same for large matrix products in practice."""
    roof_bandwidth: float
    """HBM bytes/s of a copy in practice."""
    nvlink: float
    """Bytes/s of one GPU in a collective inside its node, in practice."""
    network: str
    """The interconnect between nodes of such GPUs that is usual, a key of `INTERCONNECTS`."""
    source: str


@dataclass(frozen=True, kw_only=True)
class Interconnect:
    """What lies between nodes."""

    name: str
    rate: float
    """Bytes/s of one GPU in a collective, in practice: 0.8 of the line rate of its share of the network cards."""
    source: str


_SHEETS = (
    Gpu(
        name="a100-40g",
        memory=40e9,
        sheet_flops=312e12,
        roof_flops=270e12,
        roof_bandwidth=1.35e12,
        nvlink=200e9,
        network="ib-200",
        source="NVIDIA A100 data sheet: 312 TFLOP/s, 1555 GB/s, NVLink 300 GB/s each way; roofs derated, not measured",
    ),
    Gpu(
        name="a100-80g",
        memory=80e9,
        sheet_flops=312e12,
        roof_flops=270e12,
        roof_bandwidth=1.75e12,
        nvlink=200e9,
        network="ib-200",
        source="NVIDIA A100 data sheet: 312 TFLOP/s, 2039 GB/s, NVLink 300 GB/s each way; roofs derated, not measured",
    ),
    Gpu(
        name="h100",
        memory=80e9,
        sheet_flops=989e12,
        roof_flops=720e12,
        roof_bandwidth=2.9e12,
        nvlink=360e9,
        network="ib-400",
        source="NVIDIA H100 SXM data sheet: 989 TFLOP/s, 3.35 TB/s, NVLink 450 GB/s each way; roofs derated",
    ),
    Gpu(
        name="h200",
        memory=141e9,
        sheet_flops=989e12,
        roof_flops=790e12,
        roof_bandwidth=4.3e12,
        nvlink=360e9,
        network="ib-400",
        source="NVIDIA H200 data sheet: 989 TFLOP/s, 4.8 TB/s, NVLink 450 GB/s each way; copy, product measured",
    ),
    Gpu(
        name="b200",
        memory=180e9,
        sheet_flops=2250e12,
        roof_flops=1700e12,
        roof_bandwidth=6.8e12,
        nvlink=720e9,
        network="ib-400",
        source="NVIDIA DGX B200 data sheet: 2.25 PFLOP/s, 8 TB/s, NVLink 900 GB/s each way; roofs derated",
    ),
)
GPUS: Mapping[str, Gpu] = {gpu.name: gpu for gpu in _SHEETS}
"""By the name that ``--gpu`` takes."""

_LINKS = (
    Interconnect(name="ib-800", rate=80e9, source="one 800 Gb/s InfiniBand card per GPU"),
    Interconnect(name="ib-400", rate=40e9, source="one 400 Gb/s InfiniBand card per GPU"),
    Interconnect(name="ib-200", rate=20e9, source="one 200 Gb/s InfiniBand card per GPU"),
    Interconnect(name="ib-100", rate=10e9, source="one 100 Gb/s InfiniBand card per GPU"),
    Interconnect(name="eth-100", rate=1.25e9, source="one 100 Gb/s Ethernet card per node of 8 GPUs"),
    Interconnect(name="nvlink", rate=360e9, source="one NVLink domain over all nodes, as in rack-scale systems"),
)
INTERCONNECTS: Mapping[str, Interconnect] = {link.name: link for link in _LINKS}
"""By the name that ``--interconnect`` takes."""


def find_gpu(name: str) -> Gpu:
    """The GPU called `name`; raises UserError that names the nearest and all."""
    return _find("--gpu", name, GPUS)


def find_interconnect(name: str | None, gpu: Gpu) -> Interconnect:
    """The interconnect called `name`; the one that is usual for `gpu` if None. Raises UserError."""
    return _find("--interconnect", gpu.network if name is None else name, INTERCONNECTS)


def _find(option: str, name: str, table: Mapping[str, T]) -> T:
    key = name.lower().replace("_", "-")
    if key in table:
        return table[key]
    near = difflib.get_close_matches(key, table, n=2, cutoff=0.5)
    near += [known for known in table if known.startswith(key) and known not in near]
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise UserError(f"{option} {name} is unknown; {hint}the known ones are {', '.join(table)}")
