"""The arithmetic of a picture: cells of steps with their extremes, a smooth line through them, axes and their ticks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LOG_RATIO = 50.0
"""Values whose largest is this many times the smallest are drawn on a logarithmic axis."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """The steps `first` to `last`, cut into cells of equal width: one a step, or `most` where there are more steps."""

    first: int
    last: int
    most: int

    @property
    def cells(self) -> int:
        return min(self.last - self.first + 1, self.most)

    def at(self, steps: np.ndarray) -> np.ndarray:
        """Cell of each step, int64; steps outside are brought to the ends."""
        width = (self.last - self.first + 1) / self.cells
        cell = np.floor((np.asarray(steps, dtype=np.int64) - self.first + 0.5) / width).astype(np.int64)
        return np.clip(cell, 0, self.cells - 1)

    def fraction(self, step: float) -> float:
        """Place of a step, 0 at the left edge and 1 at the right one, in the middle of its own width."""
        return min(max((step - self.first + 0.5) / (self.last - self.first + 1), 0.0), 1.0)


@dataclass(frozen=True, kw_only=True)
class Envelope:
    """(cells,) each, NaN in a cell without a finite value: nothing between `low` and `high` is lost, however short."""

    low: np.ndarray
    high: np.ndarray
    mean: np.ndarray


def envelope(steps: np.ndarray, values: np.ndarray, span: Span) -> Envelope:
    """Smallest, largest and mean value of every cell. `steps` (n,) rising int64, `values` (n,) float64."""
    found = Envelope(**{name: np.full(span.cells, np.nan) for name in ("low", "high", "mean")})
    here = np.isfinite(values)
    if not here.any():
        return found
    values = values[here]
    cell = span.at(steps[here])
    starts = np.flatnonzero(np.diff(cell, prepend=-1))
    filled = cell[starts]
    found.low[filled] = np.minimum.reduceat(values, starts)
    found.high[filled] = np.maximum.reduceat(values, starts)
    found.mean[filled] = np.add.reduceat(values, starts) / np.diff(np.append(starts, len(values)))
    return found


def smooth(values: np.ndarray, reach: int) -> np.ndarray:
    """Weighted mean over `reach` cells to each side (a Hann window); NaN counts for nothing and stays NaN."""
    window = np.hanning(2 * reach + 3)[1:-1]
    here = np.isfinite(values)
    total = np.convolve(np.where(here, values, 0.0), window)[reach : reach + len(values)]
    weight = np.convolve(here.astype(np.float64), window)[reach : reach + len(values)]
    return np.where(here, total / np.where(here, weight, 1.0), np.nan)


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A vertical axis from `low` to `high`, in the values themselves, linear or logarithmic."""

    low: float
    high: float
    log: bool

    def fraction(self, values: np.ndarray) -> np.ndarray:
        """Place of each value, 0 at the bottom and 1 at the top; NaN stays, and what is below a log axis is at 0."""
        low, high = self._scaled(np.array([self.low, self.high]))
        return np.clip((self._scaled(np.asarray(values, dtype=np.float64)) - low) / (high - low), 0.0, 1.0)

    def _scaled(self, values: np.ndarray) -> np.ndarray:
        return np.log10(np.where(values < self.low, self.low, values)) if self.log else values

    def ticks(self) -> list[float]:
        """Four to seven round values inside."""
        return log_ticks(self.low, self.high) if self.log else linear_ticks(self.low, self.high)


def axis_for(values: Sequence[np.ndarray], *, log: bool = True, from_zero: bool = False, top: float = math.inf) -> Axis:
    """The axis on which all `values` have room; nothing is cut off.

    Args:
        log: take a logarithmic axis when positive values span more than `LOG_RATIO`.
        from_zero: a linear axis starts at 0 where no value is below.
        top: a linear axis ends here where no value is above.
    """
    every = np.concatenate([array[np.isfinite(array)] for array in values] or [np.empty(0)])
    if not len(every):
        return Axis(low=0.0, high=1.0, log=False)
    low, high = float(every.min()), float(every.max())
    positive = every[every > 0]
    if log and low >= 0 and len(positive) and high / float(positive.min()) > LOG_RATIO:
        low = float(positive.min())
        room = (high / low) ** 0.04
        return Axis(low=low / room, high=high * room, log=True)
    if from_zero and low >= 0:
        return Axis(low=0.0, high=min(high * 1.06, max(top, high)) or 1.0, log=False)
    room = (high - low) * 0.06 or abs(high) * 0.05 or 1.0
    return Axis(low=low - room if low < 0 else max(low - room, 0.0), high=min(high + room, max(top, high)), log=False)


def linear_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """`count` or down to half as many multiples of 1, 2, 2.5 or 5 times a power of ten, from `low` to `high`."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten from `low` to `high`, thinned; where there are few, 2 and 5 times them too, or a linear set."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    decades = [e for e in range(first, last + 1) if low <= 10.0**e <= high]
    fine = [f * 10.0**e for e in range(first, last + 1) for f in (1, 2, 5) if low <= f * 10.0**e <= high]
    if len(fine) <= 7:
        return fine if len(fine) >= 2 else linear_ticks(low, high)
    return [10.0**e for e in decades if e % -(-len(decades) // 7) == 0]


def short(value: float) -> str:
    """A number for people, about four digits: 0.0004, 5e-7, 12.35, 1.2M."""
    if not math.isfinite(value):
        return "none"
    size = abs(value)
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if limit <= size < 1e15:
            return f"{value / (1e3 if unit == 'k' else limit):.4g}{unit}"
    if size >= 1e15 or 0 < size < 1e-3:
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"
