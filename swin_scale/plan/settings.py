"""A setting's forecast, and the search for settings that fit: ZeRO stage, micro-batch, recomputation, offload."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from swin_scale.checkpoint.space import SMALL_FILES, checkpoint_bytes
from swin_scale.config import BatchPlan, Config, batch_plan
from swin_scale.config_check import validate
from swin_scale.errors import UserError
from swin_scale.plan.activations import Backend, Checkpointing, layers
from swin_scale.plan.hardware import Gpu
from swin_scale.plan.memory import Memory, Sharding, rank_memory
from swin_scale.plan.request import Request
from swin_scale.plan.times import StepTime, step_time
from swin_scale.plan.traffic import Cluster, Exchange, exchanges, least_bytes

ZeroStage = Literal[0, 1, 2, 3]
RESERVED = 1e9
"""Bytes of a GPU that CUDA's context, NCCL's buffers and libraries take."""
FRAGMENTS = 0.06
"""Share of a GPU that the caching allocator loses to fragments."""
STORAGE = 1e9
"""Bytes/s at which a node writes checkpoints where nothing is said."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What one setting needs on one cluster."""

    batch: BatchPlan
    stage: int
    mode: str
    offload: str
    memory: Memory
    usable: float
    """Bytes of the GPU that a run may have."""
    traffic: tuple[Exchange, ...]
    least_traffic: float
    time: StepTime

    @property
    def fits(self) -> bool:
        """Whether a rank's peak is within its GPU."""
        return self.memory.peak <= self.usable

    @property
    def keys(self) -> str:
        """As overrides for the command line."""
        return (
            f"engine.zero_stage={self.stage} train.micro_batch={self.batch.micro} "
            f"engine.activation_checkpointing={self.mode} engine.offload={self.offload}"
        )


@dataclass(frozen=True, kw_only=True)
class Saving:
    """Checkpoints of the run."""

    bytes: float
    files: int
    seconds: float
    """Of one save, every node writing its ranks' part."""
    disk: float
    """Bytes that those kept and the one being written take."""


def usable_bytes(gpu: Gpu) -> float:
    """Of `gpu` for tensors."""
    return gpu.memory * (1 - FRAGMENTS) - RESERVED


def forecast(
    request: Request, cluster: Cluster, ranks: int, *, config: Config | None = None, backend: Backend = "triton"
) -> Forecast:
    """Of `config` (the request's own by default) on `ranks` GPUs; raises UserError where they do not divide."""
    config = request.config if config is None else config
    plan = batch_plan(config, ranks)
    kernels: Backend = "torch" if config.engine.kernels == "reference" and backend == "triton" else backend
    sharding = Sharding.of(
        config, ranks=ranks, micro=plan.micro, accumulation=plan.accumulation, moments=request.moments,
        on_gpu=backend != "cpu",
    )  # fmt: skip
    mode = config.engine.activation_checkpointing
    found = layers(
        request.network, batch=plan.micro, itemsize=sharding.itemsize, mode=mode, backend=kernels, simmim=request.simmim
    )
    memory = rank_memory(request.parameters, found, sharding)
    traffic = exchanges(request.network, request.parameters, sharding, cluster, mode)
    time = step_time(found, sharding, cluster.gpu, traffic, mode=mode, parameters=request.parameters)
    return Forecast(
        batch=plan,
        stage=sharding.stage,
        mode=mode,
        offload=config.engine.offload,
        memory=memory,
        usable=usable_bytes(cluster.gpu),
        traffic=tuple(traffic),
        least_traffic=least_bytes(request.parameters, sharding),
        time=time,
    )


def search(request: Request, cluster: Cluster, ranks: int) -> list[Forecast]:
    """Every setting that fits `ranks` GPUs, the one with the fewest expected GPU-hours first; then by less machinery.

    Of settings that differ in the micro-batch alone, the fastest.
    """
    best: dict[tuple[int, str, str], Forecast] = {}
    for config in _candidates(request.config, _micros(request.config, ranks)):
        found = forecast(request, cluster, ranks, config=config)
        key = (found.stage, found.mode, found.offload)
        if found.fits and (key not in best or found.time.middle < best[key].time.middle * 0.999):
            best[key] = found
    order = ("off", "selective", "block")
    return sorted(best.values(), key=lambda f: (round(f.time.middle, 5), f.stage, order.index(f.mode), f.offload))


def fewest_gpus(request: Request, cluster: Cluster, ranks: int) -> int | None:
    """The first of 2, 4, ... 64 times `ranks` GPUs on which some setting fits; None where none does."""
    batch = request.config.train.global_batch
    more = (ranks << k for k in range(1, 7))
    return next((n for n in more if batch % n == 0 and _something_fits(request, cluster, n)), None)


def _something_fits(request: Request, cluster: Cluster, ranks: int) -> bool:
    # The smallest keeps the fewest activations, the largest no sums of gradients in fp32.
    micros = _micros(request.config, ranks)
    ends = dict.fromkeys([*micros[:1], *micros[-1:]])
    return any(forecast(request, cluster, ranks, config=c).fits for c in _candidates(request.config, list(ends)))


def _micros(config: Config, ranks: int) -> list[int]:
    """Micro-batches that are possible, the largest first."""
    per_rank = config.train.global_batch // ranks
    return [m for m in range(per_rank, 0, -1) if per_rank % m == 0 and not (config.augment.mixes and m % 2)]


def _candidates(config: Config, micros: Sequence[int]) -> Iterator[Config]:
    stages: tuple[ZeroStage, ...] = (0, 1) if config.engine.zero_stage == 0 else (1, 2, 3)
    modes: tuple[Checkpointing, ...] = ("off", "selective", "block")
    offloads: tuple[Literal["none", "optimizer"], ...] = ("none", "optimizer")
    for stage in stages:
        for mode in modes:
            for offload in offloads:
                for micro in micros:
                    engine = dataclasses.replace(
                        config.engine, zero_stage=stage, activation_checkpointing=mode, offload=offload
                    )
                    train = dataclasses.replace(config.train, micro_batch=micro)
                    candidate = dataclasses.replace(config, engine=engine, train=train)
                    try:
                        validate(candidate)
                    except UserError:  # such as experts under stage 3
                        break
                    yield candidate


def saving(request: Request, *, ranks: int, nodes: int, storage: float = STORAGE) -> Saving:
    """Size and time of a checkpoint; `storage`: bytes/s of one node."""
    size = float(
        checkpoint_bytes(request.parameters.table(), moments=request.moments, ema=request.config.optim.ema_decay > 0)
    )
    kept = request.config.checkpoint.keep + 1
    return Saving(bytes=size, files=ranks + SMALL_FILES, seconds=size / (nodes * storage), disk=kept * size)
