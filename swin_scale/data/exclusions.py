"""Samples that are left out on purpose: their slots stay empty, and no other sample moves. No torch is imported here.

Who leaves them out: `data.exclude`, by hand, and the loss guard, from the step on in which it found them. Which slots
are empty is a function of the step and the sample id alone, so a run that resumes anywhere sees what it saw before.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from swin_scale.data.order import as_bad


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """Some samples from one step on, or all samples of one step."""

    step: int
    """Global step, from 0."""
    ids: tuple[int, ...] | None
    """Left out in this step and in all later ones; None: every sample of this step, and of no other."""
    reason: str
    """For ``skipped.jsonl``."""


class Exclusions:
    """What is left out of every global step of a run."""

    def __init__(self, entries: Iterable[LeftOut] = ()) -> None:
        self._since: dict[int, LeftOut] = {}
        self._steps: dict[int, LeftOut] = {}
        for entry in sorted(entries, key=lambda entry: entry.step):
            if entry.ids is None:
                self._steps.setdefault(entry.step, entry)
            for sample in entry.ids or ():
                self._since.setdefault(sample, entry)
        self._ids = np.array(sorted(self._since), np.int64)

    def apply(self, step: int, ids: np.ndarray) -> tuple[np.ndarray, dict[int, str]]:
        """The (n,) int64 slot ids of `step` with those left out coded by `as_bad`, and why, by sample id."""
        whole = self._steps.get(step)
        if whole is not None:
            reasons = dict.fromkeys(ids[ids >= 0].tolist(), whole.reason)
        else:
            found = {sample: self._since[sample] for sample in ids[np.isin(ids, self._ids)].tolist()}
            reasons = {sample: entry.reason for sample, entry in found.items() if entry.step <= step}
        if not reasons:
            return ids, {}
        return np.where(np.isin(ids, list(reasons)), as_bad(ids), ids), reasons
