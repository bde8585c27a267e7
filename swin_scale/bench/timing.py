"""Paired timings of several callables in one process, and what may be claimed from them.

The first candidate A is measured against every other one. A round of three, B and C beside A, runs A BB A CC A: each
other candidate sits in an ABBA, so that a slow drift of the machine cancels within it, and gives two pairs. Odd rounds
go through the others in reverse. The speed ratio of a pair is seconds(B) / seconds(A): above 1, A is the faster one.

The estimate is the median over the pairs; its bounds are the 2.5 and 97.5 % quantiles of the medians of 10,000
bootstrap samples of whole rounds (Efron and Tibshirani, 1993, percentile intervals), since pairs of one round are not
independent. An A against a second, equal A, the control, shows what the machine's noise alone looks like; it takes part
in every other round only, since no claim rests on it.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

CLAIM_PAIRS = 40
"""Pairs below which a ratio is reported, but is no basis for a claim."""

BOOTSTRAPS = 10_000


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """How much faster the first candidate is than another one."""

    median: float
    lower: float
    """Lower end of the 95 % interval."""
    upper: float
    pairs: int

    @property
    def is_claim(self) -> bool:
        """Whether there are enough pairs to quote the ratio."""
        return self.pairs >= CLAIM_PAIRS

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "is_claim": self.is_claim}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Seconds per call: of every candidate, and of every pair (first candidate, other) in the order measured."""

    seconds: dict[str, list[float]]
    pairs: dict[str, list[tuple[float, float]]]

    def ratio(self, name: str) -> Ratio:
        """Of candidate `name` to the first one."""
        return ratio_of(self.pairs[name])

    def as_dict(self) -> dict[str, Any]:
        """For a result file: summary of each candidate, ratio and every pair of each other one (s)."""
        return {
            "seconds": {
                name: {
                    "median": float(np.median(values)),
                    "min": min(values),
                    "max": max(values),
                    "calls": len(values),
                }
                for name, values in self.seconds.items()
            },
            "ratios": {name: self.ratio(name).as_dict() for name in self.pairs},
            "pairs": {name: [[round(t, 7) for t in pair] for pair in pairs] for name, pairs in self.pairs.items()},
        }


def compare(
    candidates: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 1,
    inner: int | Mapping[str, int] = 1,
    units: int = 1,
    device: torch.device | None = None,
    control: str | None = None,
    clock: Callable[[], float] | None = None,
    timed: bool = False,
) -> Comparison:
    """Time the first of `candidates` against each other one, paired as the module says.

    Args:
        rounds: each gives every other candidate two pairs.
        warmup: untimed calls of each candidate before the first round.
        inner: calls per measurement, whose mean is one time; above 1 where a call is too short to time. For all alike,
            or for each by its name.
        units: repetitions of what is timed that one call makes; times are those of one of them.
        device: what the calls run on; a CUDA device is timed by its events, everything else by the wall clock.
        control: a candidate for even rounds only.
        clock: what is read (s) before and after a call, such as `time.process_time`; default: the wall clock.
        timed: a call returns the seconds that count, of what it does.
    """
    first, *others = candidates
    for call in candidates.values():
        for _ in range(warmup):
            call()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in others}

    def measure(name: str) -> float:
        repeats = inner if isinstance(inner, int) else inner[name]
        if timed:
            seconds[name].append(sum(candidates[name]() for _ in range(repeats)) / repeats)  # type: ignore[misc]
        else:
            seconds[name].append(seconds_of(candidates[name], repeats, device, clock) / units)
        return seconds[name][-1]

    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for i in range(rounds):
            gc.collect()
            before = measure(first)
            for name in [name for name in reversed(others) if name != control] if i % 2 else others:
                here, again = measure(name), measure(name)
                after = measure(first)
                pairs[name] += [(before, here), (after, again)]
                before = after
    finally:
        if was_enabled:
            gc.enable()
    return Comparison(seconds=seconds, pairs=pairs)


def seconds_of(
    call: Callable[[], object],
    inner: int = 1,
    device: torch.device | None = None,
    clock: Callable[[], float] | None = None,
) -> float:
    """Mean seconds of `inner` calls on `device`, by `clock` (default: the wall clock) unless that is a GPU."""
    if device is not None and device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(inner):
            call()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1e3 / inner
    now = clock or time.perf_counter
    began = now()
    for _ in range(inner):
        call()
    return (now() - began) / inner


def ratio_of(pairs: Sequence[tuple[float, float]]) -> Ratio:
    """Median of b / a over `pairs` (a, b), two consecutive ones to a round, with its bootstrap interval."""
    logs = np.log([[b / a for a, b in pairs[i : i + 2]] for i in range(0, len(pairs), 2)])
    generator = np.random.default_rng(0)
    picks = generator.integers(len(logs), size=(BOOTSTRAPS, len(logs)))
    medians = np.median(logs[picks].reshape(BOOTSTRAPS, -1), axis=1)
    low, high = np.quantile(medians, (0.025, 0.975))
    return Ratio(
        median=float(np.exp(np.median(logs))), lower=float(np.exp(low)), upper=float(np.exp(high)), pairs=len(pairs)
    )
