"""One training process, run to be weighed: `python -m tests.plan.measure '{"name": ..., "batch": ..., ...}'`.

Prints, as JSON, the bytes by which the process's memory grew at most from before the model was built, through set-up
and some steps. malloc gives every large block back at once (see `ENVIRONMENT`), so that this is what is alive, not what
the allocator has kept. On processors that multiply bf16 themselves, oneDNN would keep weights in layouts of its own.
"""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "OMP_NUM_THREADS": "1",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}
STEPS = 2


def measure(**job: Any) -> float:
    """Peak bytes of a job in a process of its own: model name, batch, precision, config overrides."""
    command = [sys.executable, "-m", "tests.plan.measure", json.dumps(job)]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, env={**os.environ, **ENVIRONMENT}, cwd=root, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def status(key: str) -> int:
    """Bytes, from /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def run(job: dict[str, Any]) -> int:
    """Train for `STEPS` global batches; the growth of resident memory at its highest."""
    import torch

    from swin_scale.config import batch_plan
    from swin_scale.engine.construct import build_model
    from swin_scale.engine.dist import Layout, init
    from swin_scale.engine.engine import DTYPES, Engine, MicroBatch
    from swin_scale.engine.schedule import Schedule
    from swin_scale.models import variant
    from swin_scale.tasks.classify import losses
    from tests.plan.configs import make_config

    torch.set_num_threads(1)
    with init(Layout(), timeout_s=60, device="cpu") as dist:

        def train(config, steps):
            v = variant(config.model.name)
            plan = batch_plan(config, 1)
            model, values = build_model(config, dist, {})
            engine = Engine(model, config, plan, Schedule.from_config(config, 10), dist, values, losses=losses)
            for step in range(steps):
                x = torch.randn(plan.micro, 3, v.img_size, v.img_size).to(DTYPES[config.engine.precision])
                y = torch.full((plan.micro, v.num_classes), 1 / v.num_classes)
                valid = torch.ones(plan.micro, dtype=torch.bool)
                batches = [MicroBatch(inputs=x, targets=y, valid=valid)] * plan.accumulation
                engine.train_step(step, batches, plan.per_rank)

        # Libraries, thread pools and code are loaded by a small one.
        small = {"name": "swinv2_nano_patch4_window4_32", "batch": 4, "accumulation": job.get("accumulation", 1)}
        train(make_config(**{**job, **small}), 1)
        gc.collect()
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        train(make_config(**job), STEPS)
        return status("VmHWM") - before


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.argv[1]))))  # noqa: T201
