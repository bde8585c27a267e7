"""Start real training runs through the command line, and read what they left; `kills` ends them before their time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from swin_scale.checkpoint import list_steps
from swin_scale.log import read_events, read_metrics
from tests import warm
from tests.spawn import free_port, torchrun_environment

NANO = {
    "augment.auto_augment": "none",
    "augment.mixup": 0.0,
    "augment.cutmix": 0.0,
    "checkpoint.every_steps": 4,
    "checkpoint.every_minutes": "null",
    "data.workers": 1,
    "engine.precision": "fp32",
    "engine.threads": 1,
    "engine.timeout_s": 60,
    "model.name": "swinv2_nano_patch4_window4_32",
    "optim.lr": 1e-3,
    "schedule.total_steps": 100,
    "schedule.warmup_steps": 2,
    "train.eval_every_epochs": 0,
    "train.global_batch": 24,
    "train.log_every": 2,
    "train.max_steps": 12,
    "train.tensorboard": "false",
}


def command(
    run_dir: Path, train: Path, *, nproc: int = 2, flags: tuple[str, ...] = (), **settings: object
) -> list[str]:
    """The command line of a nano run; `settings` are config keys with ``__`` for the dot."""
    config = run_dir.parent / f"{run_dir.name}.yaml"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text("train: {}\n")
    values = {**NANO, "run.dir": run_dir, "data.train": f"[{train}]"}
    values.update({key.replace("__", "."): value for key, value in settings.items()})
    start = ["launch", "local", "--nproc", str(nproc)] if nproc > 1 else ["train"]
    return [sys.executable, "-m", "swin_scale", *start, str(config), *(f"{k}={v}" for k, v in values.items()), *flags]


def environment(fault: str = "") -> dict[str, str]:
    """This process's, less what an engine built in it has left there for DeepSpeed; `fault`: see tests/injected."""
    kept = {k: v for k, v in os.environ.items() if k != "LOCAL_RANK"}
    injected = {"FAULT": fault, "PYTHONPATH": str(warm.INJECTED)} if fault else {}
    return {**kept, "OMP_NUM_THREADS": "1", **injected}


def run(
    run_dir: Path, train: Path, *, nproc: int = 2, timeout: float = 240, fault: str = "", cold: bool = False,
    program: str = warm.CLI, **options: object,
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """Run to the end, in forked processes (see `warm`), or `cold`: through the launcher, as a user does."""
    if cold:
        argv = command(run_dir, train, nproc=nproc, **options)
        return subprocess.run(argv, env=environment(fault), capture_output=True, text=True, timeout=timeout)
    arguments, ranks = ranks_of(run_dir, train, nproc=nproc, fault=fault, **options)
    return warm.run(arguments, ranks, program=program, timeout=timeout)


def ranks_of(
    run_dir: Path, train: Path, *, nproc: int = 2, fault: str = "", **options: object
) -> tuple[list[str], list[dict[str, str]]]:
    """What `warm` starts a run with: the arguments of the command, and the environment of each rank."""
    _, _, _, *arguments = command(run_dir, train, nproc=1, **options)
    port, env = free_port(), {**environment(fault), "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [{**env, **torchrun_environment(rank, nproc, port)} for rank in range(nproc)] if nproc > 1 else [env]
    return arguments, ranks


def start(run_dir: Path, train: Path, *, fault: str = "", **options: object) -> subprocess.Popen[str]:
    """Start a run and leave it to the caller; its output goes to a file beside the run directory."""
    with open(run_dir.parent / f"{run_dir.name}.log", "ab") as log:
        return subprocess.Popen(
            command(run_dir, train, **options), env=environment(fault), stdout=log, stderr=log, start_new_session=True
        )


def run_nodes(run_dir: Path, train: Path, nodes: Sequence[int], *, fault: str = "", **options: object) -> int:
    """Run to the end as a cluster would start it, with `nodes` ranks on each node; the exit code."""
    _, _, _, *arguments = command(run_dir, train, nproc=1, **options)
    port, ranks = free_port(), []
    for local in nodes:
        for local_rank in range(local):
            variables = torchrun_environment(len(ranks), sum(nodes), port)
            variables.update(LOCAL_RANK=str(local_rank), LOCAL_WORLD_SIZE=str(local), GLOO_SOCKET_IFNAME="lo")
            ranks.append({**environment(fault), **variables})
    return warm.run(arguments, ranks).returncode


def trajectory(run_dir: Path) -> list[tuple[int, float, float, str]]:
    """(step, loss, gradient norm, batch digest) of every step, the last row of a step winning."""
    rows = read_metrics(run_dir / "metrics.jsonl")
    return [(step, row["loss"], row["grad_norm"], row["batch_digest"]) for step, row in sorted(rows.items())]


def events(run_dir: Path, name: str) -> list[dict]:
    return [row for row in read_events(run_dir / "metrics.jsonl") if row["event"] == name]


def steps(run_dir: Path) -> list[int]:
    return list_steps(run_dir / "checkpoints")


def exit_record(run_dir: Path) -> dict:
    return json.loads((run_dir / "exit.json").read_text())
