"""Run directories as a run would leave them, written by hand: any length, any fault."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from swin_scale.report.history import ROUTING

START = 1_790_000_000.0
CONFIG = """\
model:
  name: "swinv2_tiny"    # a.yaml
  depths: null    # default
task: "a # b"    # command line
"""


def row(step: int, **values: Any) -> dict[str, Any]:
    """A step row of a run whose loss falls from 7 to 1."""
    return {
        "step": step,
        "epoch": step // 500,
        "samples": 256 * step,
        "loss": 1 + 6 * math.exp(-step / 200) + 0.05 * math.sin(7.3 * step),
        "lr": 1e-3 * min(step / 50, 1.0),
        "grad_norm": 2 + math.cos(3.1 * step),
        "loss_scale": 1.0,
        "skipped": False,
        "images_per_s": 900 + 40 * math.sin(step),
        "mfu": None,
        "data_wait_s": 0.004 + 0.003 * math.sin(5 * step),
        "step_s": 0.28,
        "mem_gb": 1.5,
        "batch_digest": "00",
        **values,
    }


def event(name: str, step: int, **fields: Any) -> dict[str, Any]:
    return {"event": name, "step": step, "time": START + step, **fields}


def write(directory: Path, rows: list[dict[str, Any]], *, tail: str = "") -> Path:
    """A run directory with these rows in metrics.jsonl, a config and an end."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + tail)
    (directory / "config.yaml").write_text(CONFIG)
    (directory / "exit.json").write_text(json.dumps({"code": 0, "rank": 0, "cause": "done", "time": START + 9000}))
    return directory


def full(directory: Path, steps: int = 600) -> Path:
    """A run with something for every picture, a resume, a fall-back, skipped updates and samples."""
    rows: list[dict[str, Any]] = [event("start", 0, environment={"python": "3.12", "ranks": "2"}, checkpoint=None)]
    for step in range(1, steps + 1):
        skipped = step in (40, 41)
        rows.append(row(step, loss_scale=65536.0 if step < 40 else 16384.0, skipped=skipped, aux_loss=0.01, mfu=0.4,
                        grad_norm=None if skipped else 2 + math.cos(3.1 * step)))  # fmt: skip
        if step % 100 == 0:
            for weights, plus in (("master", 0), ("ema", 3)):
                rows.append(event("eval", step, weights=weights, top1=40 + step / 20 + plus, top5=60 + step / 20 + plus,
                                  loss=2.5 - step / 600 - plus / 10, samples=500, unusable=0))  # fmt: skip
            rows.append(event("checkpoint", step, path=f"step_{step:08d}", seconds=1.5))
        if step == 300:
            rows.append(event("start", 250, environment={"python": "3.12", "ranks": "4"}, checkpoint="step_00000250"))
            rows.append(event("fell_back", 250, problem="step_00000300 is damaged"))
            rows += [row(again) for again in range(251, 301)]
    write(directory, rows)
    skips = [
        {"step": 3 * i, "epoch": 0, "id": i, "source": "d", "shard": f"{i % 2:06d}.tar", "key": f"k{i}"}
        for i in range(1, 8)
    ]
    (directory / "skipped.jsonl").write_text("".join(json.dumps({**r, "reason": "torn"}) + "\n" for r in skips))
    for step in (500, 600):
        (directory / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    return directory


def routed(directory: Path, steps: int = 200, every: int = 10, layers: int = 2) -> Path:
    """A run with MoE layers: figures at the end of each log interval, maps at every second one, a collapse at 100."""
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        figures = {}
        for at in range(layers if step % every == 0 else 0):
            for name in ROUTING:
                figures[f"moe/layers.2.blocks.{2 * at + 1}/{name}"] = 0.1 + at + 0.05 * math.sin(step + at)
        figures |= {"moe/a2a_share": 0.1, "moe/telemetry_s": 0.001} if figures else {}
        rows.append(row(step, aux_loss=0.01, **figures))
        if step % (2 * every) == 0:
            load = [(1 + math.sin(step / 30 + e)) / 8 for e in range(8)]
            maps = {"experts": 8, "load": load, "dropped": [[0.1 * i * j / 9 for j in range(4)] for i in range(4)]}
            names = [f"layers.2.blocks.{2 * at + 1}" for at in range(layers)]
            rows.append(event("routing", step, steps=[step - 2 * every + 1, step], layers=dict.fromkeys(names, maps)))
        if step == 100:
            rows.append(event("router_collapse", step, layer="layers.2.blocks.1", problem="it has collapsed"))
    return write(directory, rows)
