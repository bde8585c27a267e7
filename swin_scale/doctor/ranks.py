"""What only several processes together can tell: one that is slow, differs, or has another time."""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed

from swin_scale.doctor.finding import Finding, ok, refuse, warn
from swin_scale.doctor.machine import installed, matmul_seconds
from swin_scale.engine.dist import Dist

PACKAGES = ("torch", "deepspeed", "triton", "numpy", "swin-scale")
SLOW = {"cuda": 1.15, "cpu": 2.0}
"""Times the median from which a rank or a node is an outlier; GPUs repeat to a few percent, shared cores do not."""
CLOCK_S = 2.0
"""Between the fastest and the slowest clock, from which on logs and leases of several machines cannot be compared."""
REDUCED_BYTES = {"cuda": 256 << 20, "cpu": 4 << 20}

Report = Mapping[str, Any]
"""Of one rank: `rank`, `host`, `device`, `versions`, `time` (two readings, before and after a moment
that is the same for all), and with a speed test `matmul_s` and `all_reduce_s`."""


def report(dist: Dist, *, speed: bool = True) -> dict[str, Any]:
    """This rank's; all ranks call this together. The all-reduce is among the ranks of a machine."""
    own: dict[str, Any] = {
        "rank": dist.rank,
        "host": socket.gethostname(),
        "device": torch.cuda.get_device_name(dist.device) if dist.device.type == "cuda" else "cpu",
        "versions": {name: installed(name) for name in PACKAGES},
    }
    if speed:
        own["matmul_s"] = matmul_seconds(dist.device)
        if dist.local_world > 1 and dist.world % dist.local_world == 0:
            own["all_reduce_s"] = _all_reduce_seconds(dist)
    # All read their clocks twice, and are in the second barrier together in between, however long one stands still.
    torch.distributed.barrier(group=dist.cpu_group)
    before = time.time()
    torch.distributed.barrier(group=dist.cpu_group)
    own["time"] = before, time.time()
    return own


def _all_reduce_seconds(dist: Dist, repeats: int = 3) -> float:
    group, _ = torch.distributed.new_subgroups(group_size=dist.local_world)
    values = torch.ones(REDUCED_BYTES[dist.device.type] // 4, device=dist.device)
    best = float("inf")
    for _ in range(repeats + 1):
        torch.distributed.barrier(group=dist.cpu_group)
        start = time.perf_counter()
        torch.distributed.all_reduce(values, group=group)
        float(values[0])  # waits for the device
        best = min(best, time.perf_counter() - start)
    return best


def judge_devices(seconds: Sequence[float] | None = None) -> list[Finding]:
    """Of one process: a product of matrices on each GPU it sees, or on the CPU; `seconds` of them, if known."""
    gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] or [torch.device("cpu")]
    kind = gpus[0].type
    timed = [matmul_seconds(gpu) for gpu in gpus] if seconds is None else seconds
    found = [{"rank": i, "device": kind, "matmul_s": s} for i, s in enumerate(timed)]
    return _outliers("matmul", found, "matmul_s", lambda r: f"GPU {r['rank']}")


def judge(reports: Sequence[Report]) -> list[Finding]:
    """What the reports of all ranks, rank 0 first, say of each other."""
    hosts = sorted({r["host"] for r in reports})
    found = [ok("ranks", f"{len(reports)} on {len(hosts)} machine{'s' * (len(hosts) > 1)}")]
    found += _same("versions", reports, lambda r: tuple(sorted(r["versions"].items(), key=str)), _differing, refuse)
    found += _same("devices", reports, lambda r: r["device"], lambda a, b: f"{a['device']} and {b['device']}", warn)
    found += _outliers("matmul", reports, "matmul_s", lambda r: f"rank {r['rank']} on {r['host']}")
    firsts = {r["host"]: r for r in reversed(reports)}
    found += _outliers("all-reduce", list(firsts.values()), "all_reduce_s", lambda r: f"machine {r['host']}")
    times = [r["time"] for r in reports]
    # At least so much lies between two clocks that read these before and after the same moment.
    skew = max(0.0, max(before for before, _ in times) - min(after for _, after in times))
    ahead = max(reports, key=lambda r: r["time"][0])
    if skew > CLOCK_S:
        text = f"at least {skew:.1f} s between ranks; rank {ahead['rank']} on {ahead['host']} is the furthest ahead"
        found.append(warn("clocks", text, "start chrony or ntpd there"))
    else:
        found.append(ok("clocks", f"none seen to be more than {CLOCK_S:g} s from another"))
    return found


def _same(
    check: str,
    reports: Sequence[Report],
    key: Callable[[Report], Hashable],
    describe: Callable[[Report, Report], str],
    verdict: Callable[[str, str, str], Finding],
) -> list[Finding]:
    odd = next((r for r in reports if key(r) != key(reports[0])), None)
    if odd is None:
        return [ok(check, "the same on all ranks")]
    text = f"rank 0 on {reports[0]['host']} and rank {odd['rank']} on {odd['host']} differ: {describe(reports[0], odd)}"
    return [verdict(check, text, "give all ranks one kind")]


def _differing(a: Report, b: Report) -> str:
    names = [name for name in a["versions"] if a["versions"][name] != b["versions"].get(name)]
    return ", ".join(f"{name} {a['versions'][name]} and {b['versions'].get(name)}" for name in names)


def _outliers(check: str, reports: Sequence[Report], key: str, name: Callable[[Report], str]) -> list[Finding]:
    timed = [r for r in reports if key in r]
    if not timed:
        return []
    middle = statistics.median_low([r[key] for r in timed])
    limit = SLOW["cpu" if timed[0]["device"] == "cpu" else "cuda"]
    slow = sorted((r for r in timed if r[key] > limit * middle), key=lambda r: -r[key])
    if not slow:
        return [ok(check, f"{middle * 1e3:.1f} ms, at most {max(r[key] for r in timed) / middle:.2f} times that")]
    worst = ", ".join(f"{name(r)} {r[key] / middle:.2f} times" for r in slow[:4])
    text = f"{len(slow)} of {len(timed)} slower than {limit:g} times the median {middle * 1e3:.1f} ms: {worst}"
    return [warn(check, text, "look for other work, heat or a lost link there; every step waits for the slowest")]
