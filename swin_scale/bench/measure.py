"""Timing kernels: passes over several sets of inputs, with launches from Python and as CUDA graphs, and their memory.

A pass calls a kernel once on each set of inputs. The sets together exceed the GPU's second cache several times, so what
a call reads is in memory, as it is between the layers of a model. Launched from Python, a short kernel may wait for its
launch, and codes of many kernels do; a CUDA graph takes that away from all.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from swin_scale.bench.timing import Comparison, compare, seconds_of

MODES = ("forward", "forward+backward")
LAUNCHES = ("calls", "graphs")
CONTROL = "ours again"

SAMPLE_S = 0.01
"""On a GPU, what is shorter is repeated within one measurement."""

Call = Callable[[int], object]
"""One call on the set of inputs of that number."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A code with its call in each of `MODES`."""

    name: str
    calls: Mapping[str, Call]

    def run_pass(self, mode: str, sets: int) -> Callable[[], object]:
        call = self.calls[mode]

        def run() -> None:
            for i in range(sets):
                call(i)

        if mode == "forward":
            return torch.inference_mode()(run)
        return run


def peer_errors() -> tuple[type[Exception], ...]:
    """What code of others may raise where it does not support a shape, a dtype, a version or this much memory."""
    # Triton's own errors derive from nothing more telling; it is loaded by whoever raises one.
    triton = getattr(sys.modules.get("triton"), "TritonError", RuntimeError)
    return (RuntimeError, ValueError, TypeError, AssertionError, AttributeError, LookupError, ImportError, triton)


def failure(error: BaseException) -> str:
    """The first line of an error, for lists of who could not take part."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"


def measure(
    candidates: Sequence[Candidate],
    *,
    modes: Sequence[str],
    launches: Sequence[str],
    sets: int,
    rounds: int,
    device: torch.device,
    warmup: int = 1,
    inner: int | None = None,
) -> tuple[dict[str, dict[str, Comparison]], dict[str, str]]:
    """Launch -> mode -> comparison of the first candidate (and of itself, as `CONTROL`) with the others.

    Also who could not be timed in which way, and why: not everything can be captured in a graph. Without the first
    candidate there is no comparison.

    Args:
        sets: of inputs, in a pass; times are those of one call.
        rounds, warmup: see `timing.compare`.
        inner: passes per measurement; None: as many as `SAMPLE_S` needs.
    """
    found: dict[str, dict[str, Comparison]] = {}
    missing: dict[str, str] = {}
    for launch in launches:
        found[launch] = {}
        for mode in modes:
            pool = torch.cuda.graph_pool_handle() if launch == "graphs" else None
            calls: dict[str, Callable[[], object]] = {}
            for candidate in candidates:
                call = candidate.run_pass(mode, sets)
                try:
                    # Once untimed: it may compile, or turn out to have no room.
                    call()
                    calls[candidate.name] = call if pool is None else captured(call, pool)
                except peer_errors() as error:
                    missing[f"{candidate.name}, {mode}, {launch}"] = failure(error)
            if candidates[0].name not in calls:
                continue
            calls[CONTROL] = calls[candidates[0].name]
            found[launch][mode] = compare(
                calls,
                rounds=rounds,
                warmup=warmup,
                inner=inner or _repeats(calls, device),
                units=sets,
                device=device,
                control=CONTROL,
            )
            del calls
    return found, missing


def _repeats(calls: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, int]:
    if device.type != "cuda":
        return dict.fromkeys(calls, 1)
    repeats = {}
    for name, call in calls.items():
        call()
        repeats[name] = max(1, round(SAMPLE_S / seconds_of(call, 2, device)))
    return repeats


def captured(call: Callable[[], object], pool: Any = None) -> Callable[[], object]:
    """`call` as a CUDA graph.

    Graphs of one `pool` overwrite each other's results and must not be replayed at the same time; nobody reads them.
    Raises RuntimeError where something in `call` cannot be captured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        call()
    return graph.replay


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Memory that `call` takes at its peak above what is there before, its results included; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
