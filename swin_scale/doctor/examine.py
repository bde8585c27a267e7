"""All checks in order: of this process alone, of several together, and the few that come before every run's step 1."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from swin_scale.checkpoint.space import checkpoint_bytes
from swin_scale.config import Config
from swin_scale.data.reader import RETRY_DELAYS_S
from swin_scale.doctor.data import check_data
from swin_scale.doctor.finding import Finding, raise_refusals, refuse
from swin_scale.doctor.machine import check_cores, check_gpus, check_port, check_versions
from swin_scale.doctor.ranks import judge, judge_devices, report
from swin_scale.doctor.storage import check_storage
from swin_scale.engine.dist import Dist
from swin_scale.errors import UserError
from swin_scale.plan.request import read_request
from swin_scale.tasks import TASKS

QUICK_SAMPLES = 8
QUICK_PROBE = 8 << 20
"""Bytes; not more than a checkpoint has, which a small disk need not hold."""


def examine(
    configs: Sequence[Config],
    *,
    run_dir: Path | None = None,
    environ: Mapping[str, str] = os.environ,
    dist: Dist | None = None,
) -> list[Finding]:
    """Every check that `configs`, a run directory and the peers in `dist` allow; all ranks call this together.

    `configs`: one, none, or those of a run's stages, of which the first says how it runs and each where its data are.
    Ranks above 0 look at themselves and their GPU; what is one for all, rank 0 looks at. Rank 0 gets all findings,
    the others their own.
    """
    config = configs[0] if configs else None
    world, local_world = (1, 1) if dist is None else (dist.world, dist.local_world)
    findings = [*check_versions(config), *check_gpus()]
    if config is not None:
        findings.append(check_cores(config.data.workers, local_world))
    if dist is None or dist.is_main:
        if world == 1:
            findings += judge_devices()
            findings.append(check_port(environ))  # of several ranks, rank 0 serves it already
        where = run_dir or (Path(config.run.dir) if config is not None else None)
        if where is not None:
            findings += _storage(config, where, world, world // local_world)
        places = [
            (key, paths, TASKS[c.task].labelled, c.data.max_bad_rate)
            for c in configs
            for key, paths in (("data.train", c.data.train), ("data.val", c.data.val))
        ]
        for key, paths, labelled, rate in dict.fromkeys(places):
            if paths:
                findings += check_data(paths, key=key, labelled=labelled, max_bad_rate=rate)
    if dist is None or world == 1:
        return findings
    reports = dist.gather_json("reports", report(dist))
    others = dist.gather_json("findings", [dataclasses.asdict(f) for f in findings])
    if reports is None or others is None:
        return findings
    return [*findings, *judge(reports), *_of_others(others)]


def before_step_one(config: Config, dist: Dist, *, size: float) -> list[Finding]:
    """The few checks worth a second or two before every run: speed and space of the disk, a few samples, the peers'
    versions and clocks. All ranks call this together and get the same findings; all raise where one is a refusal.

    `size`: bytes of a checkpoint.
    """
    found: list[Finding] = []
    if dist.is_main:
        found += check_storage(
            Path(config.run.dir), size=size, keep=config.checkpoint.keep, ranks=dist.world,
            nodes=max(1, dist.world // dist.local_world), probe=min(QUICK_PROBE, max(1 << 20, round(size))),
        )  # fmt: skip
        found += check_data(
            config.data.train, labelled=TASKS[config.task].labelled, samples=QUICK_SAMPLES,
            max_bad_rate=config.data.max_bad_rate, retry_delays_s=RETRY_DELAYS_S,
        )  # fmt: skip
    reports = dist.gather_json("doctor", report(dist, speed=False))
    if reports is not None:
        found += judge(reports)
    told = dist.broadcast_json("doctor findings", [dataclasses.asdict(f) for f in found])
    found = [Finding(**values) for values in told]
    raise_refusals(found)
    return found


def _storage(config: Config | None, where: Path, ranks: int, nodes: int) -> list[Finding]:
    if config is None:
        return check_storage(where, size=None, keep=0)
    try:
        request = read_request(config)
    except UserError as error:
        what, _, fix = str(error).partition("; ")
        return [refuse("config", what, fix or "change it"), *check_storage(where, size=None, keep=0)]
    size = checkpoint_bytes(request.parameters.table(), moments=request.moments, ema=config.optim.ema_decay > 0)
    return check_storage(where, size=float(size), keep=config.checkpoint.keep, ranks=ranks, nodes=max(1, nodes))


def _of_others(found: Sequence[Sequence[Mapping[str, str]]]) -> list[Finding]:
    """Warnings and refusals of ranks above 0 that rank 0 does not have too, once each, with the rank that has it."""
    known = {(f["check"], f["text"]) for f in found[0]}
    result = []
    for rank, findings in enumerate(found[1:], 1):
        for values in findings:
            key = (values["check"], values["text"])
            if values["verdict"] != "ok" and key not in known:
                known.add(key)
                result.append(Finding(**{**values, "text": f"rank {rank}: {values['text']}"}))  # type: ignore[arg-type]
    return result
