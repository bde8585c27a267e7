"""A SwinV2 of the largest sizes, uncut, through the command line: real steps, saved, resumed for as many again.

``python benchmarks/large_step.py --model swinv2_huge_patch4_window12_192 --out FILE``. Three runs on real digits: all
steps in one go, the first half, and that one resumed for the second. Loss, norm and samples of the last step must be
equal in both: bit for bit on a CPU, within 1e-3 of the loss on a GPU, whose kernels sum in any order. Prints and writes
seconds and peak memory of each. About 20 bytes of memory per parameter at ZeRO-0 in fp32, and 12 on disk for each of
two checkpoints; TMPDIR says where. On a GPU: ``--model swinv2_g3b_patch4_window12_192 --steps 10 --batch 32
engine.zero_stage=1 engine.precision=bf16`` (20 steps in all; 75 GB of files).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data_prep.digits import write_digit_folders  # noqa: E402
from data_prep.write import write_shards  # noqa: E402
from swin_scale.bench.result import Result, describe  # noqa: E402
from swin_scale.log import read_metrics  # noqa: E402

RUNS = {"in one go": ("whole", 2), "first half": ("parts", 1), "resumed": ("parts", 2)}
"""Name -> (directory, halves done at its end)."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="swinv2_huge_patch4_window12_192")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1, help="of each half")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="config values, such as engine.zero_stage=1")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="large_step.") as folder:
        root = Path(folder)
        train, _ = write_digit_folders(root / "images", val_per_class=490)
        write_shards(train, root / "shards", workers=1)
        figures, rows = {}, {}
        for name, (directory, halves) in RUNS.items():
            stop = halves * arguments.steps
            settings = config(arguments.model, arguments.batch, root, directory, stop) + arguments.overrides
            figures[name] = run(settings)
            rows[name] = read_metrics(root / directory / "metrics.jsonl")
            checkpoint = root / directory / "checkpoints" / f"step_{stop:08d}"
            figures[name]["checkpoint_gb"] = sum(f.stat().st_size for f in checkpoint.iterdir()) / 1e9
            figures[name] |= {key: rows[name][stop][key] for key in ("step_s", "images_per_s", "mem_gb")}
            if directory == "whole":
                shutil.rmtree(root / directory / "checkpoints")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kept = ("loss", "grad_norm", "batch_digest")
    straight, resumed = (
        {key: rows[name][2 * arguments.steps][key] for key in kept} for name in ("in one go", "resumed")
    )
    same = straight == resumed
    if device.type == "cuda":
        same = straight["batch_digest"] == resumed["batch_digest"] and abs(straight["loss"] - resumed["loss"]) < 1e-3
    result = Result(
        figures=describe("large_step", " ".join(["python benchmarks/large_step.py", *sys.argv[1:]]), device)
        | {"model": arguments.model, "runs": figures, "last_step": straight, "last_step_resumed": resumed}
        | {"equal": same},
        table="\n".join(
            f"{name:<10} {f['wall_s']:7.1f} s   step {f['step_s']:6.2f} s   {f['images_per_s']:6.1f} img/s   "
            f"host peak {f['peak_gb']:5.1f} GB   device {f['mem_gb']:5.1f} GB   checkpoint {f['checkpoint_gb']:5.2f} GB"
            for name, f in figures.items()
        )
        + f"\nlast step, straight and resumed: {straight} {'==' if same else '!='} {resumed}",
    )
    sys.stdout.write(f"{result}\n")
    if arguments.out:
        result.write(arguments.out)
    return int(not same)


def config(model: str, batch: int, root: Path, directory: str, stop: int) -> list[str]:
    """Arguments of ``swin-scale train`` for a run of `stop` steps."""
    empty = root / "config.yaml"
    empty.write_text("train: {}\n")
    values = {
        "run.dir": root / directory,
        "data.train": f"[{root / 'shards'}]",
        "data.workers": 1,
        "model.name": model,
        "engine.zero_stage": 0,
        "engine.precision": "fp32",
        "engine.activation_checkpointing": "block",
        "augment.mixup": 0.0,
        "augment.cutmix": 0.0,
        "optim.lr": 1e-4,
        "schedule.total_steps": 100,
        "schedule.warmup_steps": 10,
        "train.global_batch": batch,
        "train.max_steps": stop,
        "train.log_every": 1,
        "train.tensorboard": "false",
        "checkpoint.every_minutes": "null",
    }
    return [str(empty), *(f"{key}={value}" for key, value in values.items())]


def run(arguments: Sequence[str]) -> dict[str, Any]:
    """One ``swin-scale train``; seconds, and the peak of its private memory with its children's (GB)."""
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "swin_scale", "train", *arguments], cwd=ROOT)
    peak = 0
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(1.0):
            peak = max(peak, private_bytes(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    done.set()
    watcher.join()
    if code:
        raise SystemExit(f"the run ended with exit code {code}")
    return {"wall_s": round(time.monotonic() - start, 1), "peak_gb": round(peak / 1e9, 2)}


def private_bytes(pid: int) -> int:
    """Memory of `pid` that nobody else has mapped, swapped pages included; 0 when it has ended."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    kilobytes = [int(line.split()[1]) for line in text.splitlines() if line.startswith(("Private_", "Swap:"))]
    return 1024 * sum(kilobytes)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    sys.exit(main())
