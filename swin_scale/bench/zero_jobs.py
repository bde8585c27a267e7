"""What `bench checkpoint` does in processes of its own: write a ZeRO checkpoint, and convert it, ours and theirs.

A job is started by `started`, says ``ready`` once all it needs is imported, works when it is told ``go``, and answers
with its seconds. Whatever else it or the libraries print goes to a file, which is shown when it fails.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from swin_scale.convert import convert
from swin_scale.engine.dist import init
from swin_scale.engine.fragments import import_deepspeed
from swin_scale.engine.layout import read_env
from swin_scale.errors import SwinScaleError
from swin_scale.models import create_model, variant
from swin_scale.models.geometry import pair

TAG = "global_step1"
TIMEOUT_S = 600.0
SIDE = 32
_PROGRAM = "from swin_scale.bench.zero_jobs import main; main()"


def main() -> None:
    """Do the job that the command line names; the protocol speaks through this process's first stdout."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    job, arguments = sys.argv[1], json.loads(sys.argv[2])
    work = JOBS[job](*arguments)
    answers.write("ready\n")
    answers.flush()
    sys.stdin.readline()
    gc.disable()  # as in every timing here
    began = time.perf_counter()
    work()
    answers.write(json.dumps({"seconds": time.perf_counter() - began}) + "\n")
    answers.flush()


def write(directory: str, name: str, overrides: dict[str, Any], stage: int, threads: int) -> Callable[[], None]:
    """One rank of a training job that takes one real step and saves with DeepSpeed's own `save_checkpoint`."""
    torch.set_num_threads(threads)
    layout = read_env(os.environ)
    deepspeed = import_deepspeed(False)

    def work() -> None:
        with init(layout, timeout_s=TIMEOUT_S, device="cpu"):
            torch.manual_seed(0)
            # Weights have the same shapes at any image size, 32 fits every window, and one image gives real gradients.
            size = min(SIDE, *pair(variant(name).img_size))
            model = create_model(name, **overrides, img_size=size)
            settings = {
                "train_micro_batch_size_per_gpu": 1,
                "bf16": {"enabled": True},
                "zero_optimization": {"stage": stage},
                "zero_allow_untested_optimizer": True,
            }
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
            engine, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=settings, dist_init_required=False
            )
            images = torch.randn(1, 3, size, size, dtype=torch.bfloat16)
            engine.backward(F.cross_entropy(engine(images).float(), torch.zeros(1, dtype=torch.long)))
            engine.step()
            engine.save_checkpoint(directory, tag=TAG)

    return work


def convert_ours(source: str, destination: str, name: str, threads: int) -> Callable[[], None]:
    """`swin_scale.convert`, which syncs what it writes."""
    torch.set_num_threads(threads)

    def work() -> None:
        convert(source, destination, to="safetensors", model=name)

    return work


def convert_theirs(source: str, destination: str, threads: int) -> Callable[[], None]:
    """`zero_to_fp32` to one safetensors file, synced."""
    torch.set_num_threads(threads)
    import_deepspeed(False)
    peer = importlib.import_module("deepspeed.utils.zero_to_fp32")

    def work() -> None:
        peer.convert_zero_checkpoint_to_fp32_state_dict(
            source, destination, max_shard_size=None, safe_serialization=True
        )
        fsync(Path(destination) / "model.safetensors")

    return work


JOBS: Mapping[str, Callable[..., Callable[[], None]]] = {
    "write": write,
    "convert": convert_ours,
    "zero_to_fp32": convert_theirs,
}
"""Name -> function that prepares and returns the work."""


@contextlib.contextmanager
def started(job: str, *arguments: Any, environment: Mapping[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
    """A process that has been told its job; it is ended on the way out."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, job, json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        try:
            yield process
        except SwinScaleError as error:
            log.seek(0)
            raise SwinScaleError(f"{error}: {log.read()[-2000:]}") from error
        finally:
            if process.poll() is None:
                process.kill()
            process.communicate()


def expect(process: subprocess.Popen[str], word: str) -> None:
    """Wait for a line that says `word`; raises SwinScaleError when the process ends instead."""
    assert process.stdout is not None
    if process.stdout.readline().strip() != word:
        raise SwinScaleError(f"process {process.pid} of a benchmark did not come up")


def answer(process: subprocess.Popen[str], line: str) -> float:
    """Seconds from a job's last line; raises SwinScaleError when it failed."""
    code = process.wait(TIMEOUT_S)
    if code or not line:
        raise SwinScaleError(f"a job of the benchmark ended with code {code}")
    return float(json.loads(line)["seconds"])


def run_ranks(world: int, job: str, *arguments: Any) -> None:
    """One job on `world` processes with torchrun's variables; raises SwinScaleError when one fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with contextlib.ExitStack() as stack:
        ranks = []
        for rank in range(world):
            environment = {
                "RANK": rank,
                "WORLD_SIZE": world,
                "LOCAL_RANK": rank,
                "LOCAL_WORLD_SIZE": world,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            texts = {key: str(value) for key, value in environment.items()}
            ranks.append(stack.enter_context(started(job, *arguments, environment=texts)))
        for process in ranks:
            expect(process, "ready")
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in ranks:
            assert process.stdout is not None
            answer(process, process.stdout.readline())


def fsync(path: Path) -> None:
    """Wait until a file and its name are on the disk."""
    for place, flags in ((path, os.O_RDWR), (path.parent, os.O_RDONLY)):
        descriptor = os.open(place, flags)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
