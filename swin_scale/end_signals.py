"""Signals that ask a run to save and end, remembered from the first moment of its process.

SIGUSR1 is Slurm's warning and that of `swin-scale stop`, SIGUSR2 what other launchers warn with, SIGTERM the time
limit, a requeue, the end of an allocation. One that came while torch is imported, or while the ranks join, would end
this process by default, and the others would wait for it; one that nobody remembers is a save that never happens.
"""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Mapping
from types import FrameType, TracebackType
from typing import Any

END_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
"""A launcher may block them until its process listens (`launcher.child`): blocked signals wait."""


class EndSignals:
    """Remembers `END_SIGNALS` between `__enter__` and `__exit__`; for the main thread."""

    def __init__(self) -> None:
        self._received: Counter[int] = Counter()
        self._before: Mapping[int, Any] = {}
        self.ending = False
        """The run ends because it was asked to: signals that still come are of no use, and must not hurt."""

    @property
    def received(self) -> list[int]:
        """How often each of `END_SIGNALS` came, in their order."""
        return [self._received[number] for number in END_SIGNALS]

    def __enter__(self) -> EndSignals:
        self._before = {number: signal.signal(number, self._remember) for number in END_SIGNALS}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, END_SIGNALS)
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self.ending:
            return  # a launcher may signal those that are still leaving, once one has left
        for number, handler in self._before.items():
            # A warning that comes while a finished run writes its report must not end it: there is nothing to repeat.
            warning = number != signal.SIGTERM and handler == signal.SIG_DFL
            signal.signal(number, signal.SIG_IGN if warning else handler)

    def _remember(self, number: int, _: FrameType | None) -> None:
        self._received[number] += 1
