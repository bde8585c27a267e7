"""The engine's real `train_step` on one process, fed a batch that never leaves the device.

What is left out is the input pipeline; what is in is everything else of a step: loss scaling, ZeRO's buckets, the
global norm, AdamW on fp32 masters. Beside it stands the floor: forward + backward of the same model without an engine.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from swin_scale.bench.result import Result, describe, fixed_threads
from swin_scale.config import (
    Augment,
    BatchPlan,
    Checkpointing,
    Config,
    Data,
    EngineConfig,
    Model,
    Optim,
    Run,
    Train,
    batch_plan,
)
from swin_scale.config import (
    Schedule as ScheduleConfig,
)
from swin_scale.config_check import validate
from swin_scale.engine.construct import build_model
from swin_scale.engine.dist import Dist, init
from swin_scale.engine.engine import DTYPES, Engine, MicroBatch, StepResult
from swin_scale.engine.layout import Layout
from swin_scale.engine.losses import smooth_targets
from swin_scale.engine.metrics import memory_gb, peak_flops
from swin_scale.engine.schedule import Schedule
from swin_scale.errors import DivergedError, UserError
from swin_scale.models import create_model, flops, variant
from swin_scale.models.geometry import pair
from swin_scale.tasks.classify import losses

TIMEOUT_S = 600.0
TRAIN_FLOPS = 6
"""FLOP of forward and backward per multiply-add of a forward."""


def bench_train(
    name: str,
    *,
    precision: str = "bf16",
    batch: int = 64,
    steps: int = 20,
    warmup: int = 5,
    zero_stage: int = 1,
    accumulation: int = 1,
    activation_checkpointing: str = "off",
    threads: int = 2,
    device: str | None = None,
    out: str | None = None,
) -> Result:
    """Images per second, step time, peak memory and MFU of the engine on one process.

    Args:
        name: of `list_models()`.
        precision: of the engine; `fp32`, `bf16` or `fp16`.
        batch: images per micro-batch; a step takes `accumulation` of them.
        steps: timed steps, after `warmup` untimed ones (in which fp16 finds its loss scale).
        activation_checkpointing: `off`, `block` or `selective`.
        device: `cuda` (NCCL) or `cpu` (gloo); default: a GPU if there is one.
        out: file for the result as JSON.

    MFU counts 6 FLOP per multiply-add of a forward, whatever is recomputed; it is None on the CPU, in fp32, and on
    devices without a known peak. Raises DivergedError when a loss of the timed steps is not finite.
    """
    if steps < 1 or warmup < 0:
        raise UserError(f"--steps is {steps} and --warmup {warmup}; time at least 1 step after 0 or more untimed ones")
    config = _config(name, precision, batch, accumulation, zero_stage, activation_checkpointing, steps + warmup)
    validate(config)
    plan = batch_plan(config, 1)
    with fixed_threads(threads), init(Layout(), timeout_s=TIMEOUT_S, device=device) as dist:
        micro = _micro_batch(name, plan.micro, DTYPES[precision], dist.device)
        alone = _model_alone(name, activation_checkpointing, micro, steps, warmup)
        if dist.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(dist.device)
        engine_figures = _engine(name, config, plan, dist, micro, steps, warmup)
        command = (
            f"swin-scale bench train --model {name} --precision {precision} --batch {batch} --steps {steps} "
            f"--warmup {warmup} --zero-stage {zero_stage} --accumulation {accumulation} "
            f"--activation-checkpointing {activation_checkpointing} --threads {threads}"
        )
        figures = describe("train", command, dist.device)
        peak = peak_flops(dist.device) if precision != "fp32" else None
        backend = dist.backend
    per_image = TRAIN_FLOPS * flops(variant(name))
    step_s = engine_figures["step_s"]["median"]
    figures |= {
        "settings": {
            "model": name,
            "precision": precision,
            "micro_batch": batch,
            "accumulation": accumulation,
            "zero_stage": zero_stage,
            "activation_checkpointing": activation_checkpointing,
            "steps": steps,
            "backend": backend,
        },
        "images_per_s": plan.global_batch / step_s,
        "mfu": per_image * plan.global_batch / step_s / peak if peak else None,
        "flop_per_image": per_image,
        "engine": engine_figures,
        "model_alone": {**alone, "images_per_s": batch / alone["step_s"]["median"]},
        # The engine's step against as many forwards and backwards of the bare model.
        "engine_over_model": step_s / (accumulation * alone["step_s"]["median"]),
    }
    result = Result(figures=figures, table=table(figures))
    if out is not None:
        result.write(out)
    return result


def _engine(
    name: str, config: Config, plan: BatchPlan, dist: Dist, micro: MicroBatch, steps: int, warmup: int
) -> dict[str, Any]:
    model, values = build_model(config, dist, {})
    schedule = Schedule.from_config(config, steps + warmup)
    engine = Engine(model, config, plan, schedule, dist, values, losses=losses)
    results: list[StepResult] = []

    def step() -> None:
        results.append(engine.train_step(len(results), [micro] * plan.accumulation, plan.per_rank))

    seconds = _seconds(step, steps, warmup, dist.device)
    timed = results[warmup:]
    values_seen = torch.stack([result.loss for result in timed]).tolist()
    if not all(map(math.isfinite, values_seen)):
        raise DivergedError(f"the loss of a timed step is not finite: {values_seen}; the figures would mean nothing")
    return {
        **_summary(seconds, dist.device),
        "loss_first": values_seen[0],
        "loss_last": values_seen[-1],
        "loss_scale": timed[-1].loss_scale,
        "skipped": sum(result.skipped for result in timed),
    }


def _model_alone(name: str, checkpointing: str, micro: MicroBatch, steps: int, warmup: int) -> dict[str, Any]:
    """Forward + backward in the dtype of `micro`, no engine and no optimizer."""
    device = micro.inputs.device
    model = create_model(name, activation_checkpointing=checkpointing).to(device, micro.inputs.dtype)
    model.train()

    def step() -> None:
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model(micro.inputs).float(), micro.targets).backward()

    return _summary(_seconds(step, steps, warmup, device), device)


def _seconds(step: Callable[[], None], steps: int, warmup: int, device: torch.device) -> list[float]:
    """Of each of `steps` calls, by the wall clock with the device idle before and after: what a user waits."""
    seconds = []
    for i in range(warmup + steps):
        began = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if i >= warmup:
            seconds.append(time.perf_counter() - began)
    return seconds


def _summary(seconds: list[float], device: torch.device) -> dict[str, Any]:
    times = {"median": float(np.median(seconds)), "min": min(seconds), "max": max(seconds), "steps": len(seconds)}
    return {"step_s": times, "memory_gb": memory_gb(device)}


def _micro_batch(name: str, batch: int, dtype: torch.dtype, device: torch.device) -> MicroBatch:
    v = variant(name)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, v.in_chans, *pair(v.img_size), generator=generator)
    labels = torch.randint(v.num_classes, (batch,), generator=generator)
    return MicroBatch(
        inputs=images.to(device, dtype),
        targets=smooth_targets(labels.to(device), v.num_classes, 0.1),
        valid=torch.ones(batch, dtype=torch.bool, device=device),
    )


def _config(
    name: str, precision: Any, batch: int, accumulation: int, zero_stage: Any, checkpointing: Any, total: int
) -> Config:
    return Config(
        run=Run(dir="bench"),
        data=Data(train=("synthetic",)),
        # Unmixed, so that an odd batch is allowed.
        augment=Augment(mixup_prob=0.0),
        model=Model(name=name),
        optim=Optim(lr=1e-4),
        schedule=ScheduleConfig(warmup_steps=0, total_steps=total),
        train=Train(global_batch=batch * accumulation, micro_batch=batch),
        engine=EngineConfig(zero_stage=zero_stage, precision=precision, activation_checkpointing=checkpointing),
        checkpoint=Checkpointing(),
    )


def table(figures: dict[str, Any]) -> str:
    """A few lines to read."""
    settings, engine, alone = figures["settings"], figures["engine"], figures["model_alone"]
    machine = figures["hardware"]
    where = machine["gpu"]["name"] if machine["gpu"] else f"{machine['cpu']}, {machine['threads']} threads"
    mfu = "" if figures["mfu"] is None else f"  mfu {figures['mfu']:.1%}"
    return "\n".join(
        [
            f"{settings['model']}  {settings['precision']}  micro-batch {settings['micro_batch']} x "
            f"{settings['accumulation']}  ZeRO-{settings['zero_stage']}  {settings['backend']}  {where}",
            f"engine step    {engine['step_s']['median'] * 1e3:9.1f} ms {figures['images_per_s']:9.1f} img/s "
            f"{engine['memory_gb']:7.2f} GB{mfu}  loss {engine['loss_first']:.3f} to {engine['loss_last']:.3f}"
            f"  skipped {engine['skipped']}",
            f"model alone    {alone['step_s']['median'] * 1e3:9.1f} ms {alone['images_per_s']:9.1f} img/s "
            f"{alone['memory_gb']:7.2f} GB  (forward + backward; the step takes "
            f"{figures['engine_over_model']:.3f} times as long)",
        ]
    )
