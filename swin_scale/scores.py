"""How good the weights were after which step, from a run's evaluations: what the best checkpoints are chosen by."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any


class Scores:
    """One figure per evaluated step, higher is better: ``top1``, or the loss, negative, where there is no top-1.

    Of trained weights and their moving average the better one counts. A step that is evaluated again, as after a resume
    from before it, forgets what it was.
    """

    def __init__(self, events: Iterable[Mapping[str, Any]] = ()) -> None:
        """`events`: rows of ``metrics.jsonl``, in their order; those of other kinds are passed over."""
        self._figures: dict[int, dict[str, float]] = {}
        for row in events:
            if row.get("event") == "eval" and type(row.get("step")) is int:
                self.rate(row["step"], str(row.get("weights", "master")), row)

    def rate(self, step: int, weights: str, figures: Mapping[str, Any]) -> None:
        """Take in one evaluation of `weights` (``master`` or ``ema``)."""
        known = self._figures.setdefault(step, {})
        known.pop(weights, None)
        for key, sign in (("loss", -1.0), ("top1", 1.0)):
            value = figures.get(key)
            if isinstance(value, int | float) and math.isfinite(value):
                known[weights] = sign * value

    def forget_after(self, step: int) -> None:
        """The run was put back: later steps come again, and may go another way."""
        self._figures = {known: values for known, values in self._figures.items() if known <= step}

    def figures(self) -> dict[int, float]:
        """Step to figure."""
        return {step: max(values.values()) for step, values in self._figures.items() if values}

    def is_among_best(self, step: int, count: int) -> bool:
        """Whether `step` is one of the `count` best so far; of equal ones the earlier are better."""
        figures = self.figures()
        if step not in figures:
            return False
        mine = (-figures[step], step)
        return sum((-figure, other) < mine for other, figure in figures.items()) < count
