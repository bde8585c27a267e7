"""A plan as text for people, and as plain values for programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from swin_scale.models import flops
from swin_scale.plan.invariants import invariants
from swin_scale.plan.request import Request
from swin_scale.plan.settings import Forecast, Saving
from swin_scale.plan.times import FAST, SLOW
from swin_scale.plan.traffic import Cluster

SHOWN = 8
"""Rows of a search."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that is told of one config on one cluster."""

    request: Request
    cluster: Cluster
    ranks: int
    nodes: int
    chosen: Forecast
    saving: Saving
    found: Sequence[Forecast]
    """Settings that fit, cheapest first; empty where no search was asked for."""

    def gpu_hours(self, seconds: float) -> float | None:
        """Of the whole run at so many seconds a step."""
        steps = self.request.steps
        return None if steps is None else steps * seconds * self.ranks / 3600

    def as_dict(self) -> dict[str, Any]:
        """Bytes, seconds and counts, ready for JSON."""
        request, time = self.request, self.chosen.time
        return {
            "model": request.config.model.name,
            "task": request.config.task,
            "parameters": request.parameters.count,
            "macs_per_image": flops(request.network),
            "gpus": self.ranks,
            "nodes": self.nodes,
            "gpu": dataclasses.asdict(self.cluster.gpu),
            "interconnect": dataclasses.asdict(self.cluster.link),
            "setting": self._setting(self.chosen),
            "traffic": [dataclasses.asdict(exchange) for exchange in self.chosen.traffic],
            "least_traffic_bytes": self.chosen.least_traffic,
            "checkpoint": dataclasses.asdict(self.saving),
            "samples": request.samples,
            "samples_from": request.samples_from,
            "steps_per_epoch": request.steps_per_epoch,
            "steps": request.steps,
            "gpu_hours": {"fast": self.gpu_hours(time.fast), "slow": self.gpu_hours(time.slow)},
            "invariants": invariants(request.config, self.ranks, request.steps),
            "search": [self._setting(found) for found in self.found],
        }

    def _setting(self, f: Forecast) -> dict[str, Any]:
        memory = {**dataclasses.asdict(f.memory), "state": f.memory.state, "peak": f.memory.peak}
        return {
            "zero_stage": f.stage,
            "activation_checkpointing": f.mode,
            "offload": f.offload,
            "batch": dataclasses.asdict(f.batch),
            "memory": memory,
            "usable": f.usable,
            "fits": f.fits,
            "step_s": {"fast": f.time.fast, "slow": f.time.slow, "floor": f.time.floor},
            "mfu": {"fast": f.time.mfu_fast, "slow": f.time.mfu_slow},
        }

    def __str__(self) -> str:
        return "\n".join([*self._head(), "", *self._memory(), "", *self._traffic(), "", *self._time(), *self._search(),
                          "", "what changes together:", *(f"  {line}" for line in self._invariants())])  # fmt: skip

    def _invariants(self) -> list[str]:
        return invariants(self.request.config, self.ranks, self.request.steps)

    def _head(self) -> list[str]:
        r, f, gpu = self.request, self.chosen, self.cluster.gpu
        experts = f", {r.network.moe.num_experts} experts a layer" if r.network.moe else ""
        task = "SimMIM, " if r.simmim else ""
        return [
            f"{r.config.model.name}: {task}{_count(r.parameters.count)} parameters{experts}, "
            f"{flops(r.network) / 1e9:.1f} GMACs an image forward",
            f"on {self.ranks} x {gpu.name}, {self.nodes} node{'s' * (self.nodes > 1)} ({gpu.source})"
            + (f"; between nodes {self.cluster.link.source}" if self.nodes > 1 else ""),
            f"batch {f.batch.global_batch} = {f.batch.ranks} ranks x {f.batch.accumulation} x {f.batch.micro}; "
            f"{r.config.engine.precision}, ZeRO-{f.stage}, activation checkpointing {f.mode}, offload {f.offload}"
            + (f", experts over {r.config.moe.ep_size} ranks" if r.network.moe else ""),
        ]

    def _memory(self) -> list[str]:
        f, m = self.chosen, self.chosen.memory
        rows = [
            ("parameters", m.parameters),
            ("gradients", m.gradients),
            ("fp32 masters", m.master),
            ("optimizer moments", m.moments),
            ("= state", m.state),
            ("moving average", m.ema),
            ("buckets of gradients", m.buffers),
            ("gathered parameters", m.gathered),
            ("activations kept by forward", m.activations),
            ("activations and growing gradients, worst moment", m.backward),
            ("fp32 gradients of the update", m.update),
            ("= peak", m.peak),
            ("usable of the GPU", f.usable),
            ("in host memory", m.host),
        ]
        verdict = "fits" if f.fits else "DOES NOT FIT"
        return [
            f"memory of a rank: {verdict}",
            *(f"  {name:<50}{_size(size):>12}" for name, size in rows if size),
        ]

    def _traffic(self) -> list[str]:
        f = self.chosen
        lines = [f"sent by a rank in a step ({_size(f.least_traffic)} are needed in principle)"]
        for e in f.traffic:
            times = f"{_seconds(e.seconds):>12}, {_seconds(e.hidden)} of them can be hidden"
            lines.append(f"  {e.what:<50}{_size(e.bytes):>12}{times}")
        return lines if f.traffic else ["one rank: nothing is sent"]

    def _time(self) -> list[str]:
        r, t, s = self.request, self.chosen.time, self.saving
        batch = self.chosen.batch.global_batch
        lines = [
            f"a step takes {_seconds(t.fast)} to {_seconds(t.slow)}, a RANGE: {FAST:.0%} to {SLOW:.0%} of the roofline "
            f"floor ({_seconds(t.floor)} of compute); MFU {t.mfu_slow:.0%} to {t.mfu_fast:.0%}, "
            f"{batch / t.slow:,.0f} to {batch / t.fast:,.0f} images/s",
        ]
        if r.steps is None:
            lines.append(f"days and GPU-hours: samples of an epoch are {r.samples_from}, or set train.max_steps")
        else:
            fast, slow = (self.gpu_hours(x) or 0.0 for x in (t.fast, t.slow))
            epoch = f"{r.steps_per_epoch} an epoch of {r.samples} samples ({r.samples_from})"
            lines.append(
                f"{r.steps} steps, {epoch}: {fast / self.ranks / 24:.2f} to {slow / self.ranks / 24:.2f} days, "
                f"{fast:,.0f} to {slow:,.0f} GPU-hours"
            )
        lines.append(
            f"a checkpoint is {_size(s.bytes)} in {s.files} files, about {_seconds(s.seconds)} to write; "
            f"keep {_size(s.disk)} free"
        )
        return lines

    def _search(self) -> list[str]:
        if not self.found:
            return []
        lines = ["", f"settings that fit, cheapest first ({len(self.found)}; by the middle of the range)"]
        lines.append(f"  {'step':>17}  {'GPU-hours':>17}  {'GB':>6}  overrides")
        for f in self.found[:SHOWN]:
            hours = [self.gpu_hours(x) for x in (f.time.fast, f.time.slow)]
            cost = " to ".join(f"{h:,.0f}" for h in hours if h is not None) or "-"
            step = f"{_seconds(f.time.fast)} to {_seconds(f.time.slow)}"
            host = f" ({f.memory.host / 1e9:.0f} GB of host memory a rank)" if f.memory.host else ""
            lines.append(f"  {step:>17}  {cost:>17}  {f.memory.peak / 1e9:6.1f}  {f.keys}{host}")
        return lines


def _count(n: int) -> str:
    return f"{n / 1e9:.2f} B" if n >= 1e9 else f"{n / 1e6:.1f} M"


def _size(n: float) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 1e8 else f"{n / 1e6:.2f} MB"


def _seconds(s: float) -> str:
    return f"{s:.2f} s" if s >= 1 else f"{s * 1e3:.0f} ms" if s >= 0.01 else f"{s * 1e3:.2g} ms"
