"""Memory of one pass of an MoE layer: ours and the one-hot form, each in a process of its own (or on the GPU).

On the CPU it is the peak of resident pages less what was resident before, read from /proc; a warm-up with few tokens
has loaded what torch loads lazily. On a GPU it is the allocator's peak less what inputs and weights hold.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swin_scale.bench import moe_peers
from swin_scale.bench.moe_peers import MODES, Layer, Sizes
from swin_scale.errors import SwinScaleError

EXPERTS, FACTOR = 8, 1.25
WARM_TOKENS = 256
ROOM = 3.3
"""The one-hot form holds so many (tokens, experts, capacity) tensors at a time (3.15 as measured); they have to fit."""

LAYERS = {"ours": moe_peers.ours, "one-hot": moe_peers.one_hot}
STATUS = Path("/proc/self/status")
_PROGRAM = "from swin_scale.bench.moe_memory import main; main()"


def compare(dim: int, tokens: int, precision: str, threads: int, device: torch.device) -> dict[str, Any]:
    """Peak bytes of both forms in both modes, and our share; a form that does not fit is under `missing`."""
    peaks: dict[str, dict[str, int]] = {}
    missing: dict[str, str] = {}
    need = ROOM * tokens * FACTOR * tokens * 4
    for name in LAYERS:
        free = _free(device)
        if name == "one-hot" and need > free:
            missing[name] = f"{tokens} tokens need up to {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        elif device.type == "cuda":
            peaks[name] = _peaks(name, dim, tokens, precision, device)
        else:
            peaks[name] = _in_process(name, dim, tokens, precision, threads)
    both = len(peaks) == len(LAYERS)
    return {
        "experts": EXPERTS,
        "tokens": tokens,
        "capacity_factor": FACTOR,
        "bytes": peaks,
        "share": {mode: peaks["ours"][mode] / peaks["one-hot"][mode] for mode in MODES} if both else {},
        "missing": missing,
    }


def main() -> None:
    """Answer with the peaks of one form on the CPU; the program of `_in_process`."""
    name, dim, tokens, precision, threads = json.loads(sys.argv[1])
    # The first to go where memory runs out, rather than somebody else's process.
    Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    torch.set_num_threads(threads)
    sys.stdout.write(json.dumps(_peaks(name, dim, tokens, precision, torch.device("cpu"))))


def table(memory: Mapping[str, Any]) -> list[str]:
    """A line per mode, the bar, and what is missing."""
    factor = memory["capacity_factor"]
    lines = [f"memory of a pass: {memory['experts']} experts, {memory['tokens']} tokens, capacity factor {factor}"]
    for mode in MODES:
        sizes = ", ".join(f"{name} {peaks[mode] / 1e9:.3f} GB" for name, peaks in memory["bytes"].items())
        share = f", ours is {memory['share'][mode]:.3f} of it" if memory["share"] else ""
        lines.append(f"  {mode:<30}{sizes}{share}")
    if memory["share"]:
        lines.append(f"  wanted at most {memory['at_most']:g}: {'reached' if memory['reached'] else 'NOT reached'}")
    return lines + [f"  missing: {name}: {reason}" for name, reason in memory["missing"].items()]


def _in_process(name: str, dim: int, tokens: int, precision: str, threads: int) -> dict[str, int]:
    """`_peaks` of a fresh process. Raises SwinScaleError when it ends early."""
    arguments = json.dumps([name, dim, tokens, precision, threads])
    done = subprocess.run([sys.executable, "-c", _PROGRAM, arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SwinScaleError(f"the passes of {name} ended with code {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout)


def _peaks(name: str, dim: int, tokens: int, precision: str, device: torch.device) -> dict[str, int]:
    """Bytes a pass of each mode needs beside its inputs and weights."""
    sizes = Sizes(experts=EXPERTS, dim=dim, hidden=4 * dim, factor=FACTOR)
    generator = torch.Generator().manual_seed(0)
    weights = moe_peers.random_weights(sizes, generator)
    layer = LAYERS[name](sizes)
    layer.take(weights)
    layer.module.to(device, moe_peers.DTYPES[precision])
    load_E = moe_peers.loads(tokens, EXPERTS, 0.0)
    x = moe_peers.tokens_for(weights["gate"], load_E, generator).to(device, moe_peers.DTYPES[precision])
    upstream = torch.randn(x.shape, generator=generator).to(x)
    _once(layer, MODES[1], x[:WARM_TOKENS], upstream[:WARM_TOKENS])
    peaks = {}
    for mode in MODES:
        layer.module.zero_grad(set_to_none=True)
        layer.module.train(mode != MODES[0])
        before = _reset(device)
        _once(layer, mode, x, upstream)
        peak = _kib(STATUS, "VmHWM") if device.type == "cpu" else torch.cuda.max_memory_allocated(device)
        peaks[mode] = peak - before
    return peaks


def _once(layer: Layer, mode: str, x: Tensor, upstream: Tensor) -> None:
    if mode == MODES[0]:
        with torch.inference_mode():
            layer.forward(x)
    else:
        moe_peers.backward(layer, x.detach().requires_grad_(), upstream)


def _reset(device: torch.device) -> int:
    """Bytes in use now, from which the peak counts anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM starts again
    return _kib(STATUS, "VmRSS")


def _free(device: torch.device) -> int:
    """Bytes one may still take."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _kib(Path("/proc/meminfo"), "MemAvailable")


def _kib(path: Path, key: str) -> int:
    """Bytes under a key of a file of /proc."""
    found = re.search(rf"^{key}:\s+(\d+) kB$", path.read_text(encoding="ascii"), re.MULTILINE)
    assert found is not None, f"{path} has no {key}"
    return 1024 * int(found[1])
