"""How often to save: the interval that costs least between the stall of every save and the steps that a failure loses.

Young (1974) and Daly (2006): with saves that stop the run for `stall` seconds and failures every `mtbf` seconds on
average, the best time between two saves is sqrt(2 stall mtbf). Both are measured where they can be. Until a run has
seen enough failures, its rate is that of the Llama 3 herd of models (2024, table 5): 419 unexpected interruptions of
16,384 GPUs in 54 days, one in 51,000 GPU-hours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

PRIOR_PER_GPU_DAY = 419 / (16_384 * 54)
DAY_S = 86_400.0
LONGEST_MTBF_S = 7 * DAY_S
"""However few its GPUs are, a machine is not believed to run longer untouched: there are reboots, power, people."""
SHORTEST_S, LONGEST_S = 300.0, 7200.0
"""Limits of the interval: below, saves are what a disk does all day; above, a kill costs more than anybody expects."""

RECENT_SAVES = 20
"""So many tell how long the next one takes: what an hour of a bad disk took is forgotten."""


def save_took_s(event: Mapping[str, Any]) -> float:
    """Seconds from a save's beginning to its commit, by its ``checkpoint`` event, whose ``seconds`` the step waited:
    without the time that it had to wait for the save before it, with that which it went on in the background."""
    seconds, waited, written = (float(event.get(key) or 0.0) for key in ("seconds", "waited_seconds", "write_seconds"))
    return seconds - waited + written


def young_daly_s(stall_s: float, mtbf_s: float) -> float:
    """The best time between two saves, in seconds."""
    return math.sqrt(2 * stall_s * mtbf_s)


def prior_mtbf_s(gpus: int) -> float:
    """Time between failures of so many GPUs, in seconds, of which nothing is known yet."""
    return min(DAY_S / (PRIOR_PER_GPU_DAY * gpus), LONGEST_MTBF_S)


def expected_mtbf_s(gpus: int, failures: int, uptime_s: float) -> float:
    """Time between failures to expect after `failures` in `uptime_s` seconds of running.

    The prior counts as one failure in the time that it foretells. A machine that is far worse must not have to fail for
    weeks to be believed: what was seen counts as if over a day more, whatever the prior, if that is more often.
    """
    rate = max((1 + failures) / (prior_mtbf_s(gpus) + uptime_s), failures / (DAY_S + uptime_s))
    return 1 / rate


def save_interval_s(stall_s: float | None, mtbf_s: float) -> float:
    """Seconds between two saves, within the limits; before any was measured the first comes soon, to measure it."""
    if stall_s is None:
        return SHORTEST_S
    return min(max(young_daly_s(stall_s, mtbf_s), SHORTEST_S), LONGEST_S)
