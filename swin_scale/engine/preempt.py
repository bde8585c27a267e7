"""A request to save and end that reaches one rank, agreed on by all of them at the same point of the run.

It comes as one of `END_SIGNALS`, or as the stop file in the run directory. Handlers only remember. Ranks compare notes
at every step and evaluation batch, in truth about once a second (`Poll`), after every save, and in between the parts of
set-up, since Slurm may signal one rank long before another, and a rank that left alone would leave the others waiting.

A rank that waits for its data cannot compare notes: the others are in the middle of the step, where they wait for it,
and where no signal handler of Python's runs. So a rank that is asked passes it on through the store, from a thread; the
one that waits looks there, and no longer waits: it goes along with empty batches (`Attended`) to the next agreement.
Training makes sure that such a step updates nothing. All of it costs nothing while every batch comes in time.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

from swin_scale.data import Batch, Batches
from swin_scale.end_signals import END_SIGNALS, EndSignals
from swin_scale.engine.dist import Dist
from swin_scale.errors import PreemptedError
from swin_scale.run_dir import stop_file

logger = logging.getLogger(__name__)

PERIOD_S = 1.0
"""About how long a request waits until the ranks compare notes; never shorter than a step."""
MAX_STEPS = 1000
PATIENCE_S = 1.0
"""A longer wait for data may be given up, if somebody asks; and how often to look whether somebody does."""
Attend = Callable[[Batches], Iterator[Batch]]
"""Goes through the batches of a loop, and may end it by an error, on all ranks after the same one."""
_ASKED = "swin_scale/asked to end"


class EndAgreedError(PreemptedError):
    """Raised on all ranks at the same point: they agreed to end; the message is the reason."""


class EndRequests:
    """What this rank was asked for since its process began, and what the others were. A context manager."""

    def __init__(self, run_dir: Path, dist: Dist, signals: EndSignals) -> None:
        """`run_dir`: where the stop file is left, and where the launcher tells the deadline."""
        self.directory = run_dir
        self._file, self._dist, self._signals = stop_file(run_dir), dist, signals
        self._file_seen = False
        self._waker: tuple[socket.socket, socket.socket] | None = None
        self._thread: threading.Thread | None = None
        self._fd_before = -1

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self._dist.world

    def agreed(self) -> str | None:
        """Why to save and end now, the same words on every rank; None to go on. All ranks call this together."""
        return self.agreed_and_summed(0)[0]

    def agreed_and_summed(self, value: int) -> tuple[str | None, int]:
        """`agreed`, and the sum of all ranks' `value` from the same exchange."""
        mine = [int(count > 0) for count in self._signals.received]
        filed = int(self._file_seen or (self._dist.is_main and self._file.exists()))
        *signalled, file, total = self._dist.sum_ints([*mine, filed, value])
        self._signals.ending = self._signals.ending or any([*signalled, file])
        reasons = [
            f"{signal.Signals(number).name} on {count} ranks" for number, count in zip(END_SIGNALS, signalled) if count
        ]
        return ", ".join([*reasons, *(["the stop file"] if file else [])]) or None, total

    def raise_if_agreed(self) -> None:
        """Raise EndAgreedError on all ranks, which call this together, if any of them was asked to end."""
        reason = self.agreed()
        if reason is not None:
            raise EndAgreedError(reason)

    def known(self) -> bool:
        """Whether this rank can tell by itself that some rank was asked; for waits that the others cannot share."""
        self._file_seen = self._file_seen or self._file.exists()
        if self._file_seen or any(self._signals.received):
            return True
        return self._dist.world > 1 and self._dist.store.check([_ASKED])

    def attend(self, batches: Batches) -> Iterator[Batch]:
        """Batches of an evaluation, of which all ranks have equally many.

        Raises EndAgreedError on all ranks after the same batch, or at the end, when they agree to end.
        """
        poll = Poll(self)
        for batch in Attended(self, batches):
            yield batch
            reason = poll()
            if reason is not None:
                raise EndAgreedError(reason)
        self.raise_if_agreed()  # the last batches may have been empty ones

    def __enter__(self) -> EndRequests:
        if self._dist.world == 1:
            return self
        reader, writer = self._waker = socket.socketpair()
        writer.setblocking(False)
        # Written to by the C side of signal handling, whatever the main thread is in.
        self._fd_before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._pass_on, args=(reader,), name="requests to end", daemon=True)
        self._thread.start()
        if any(self._signals.received):  # before anybody could pass it on
            self._tell()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._waker is None or self._thread is None:
            return
        signal.set_wakeup_fd(self._fd_before)
        reader, writer = self._waker
        writer.close()  # the thread reads an end of file
        self._thread.join(1.0)
        reader.close()

    def _pass_on(self, reader: socket.socket) -> None:
        with contextlib.suppress(OSError):  # closed at the end of the process
            while numbers := reader.recv(64):
                if any(number in END_SIGNALS for number in numbers):
                    self._tell()
                    return

    def _tell(self) -> None:
        try:
            self._dist.store.set(_ASKED, "1")
        except RuntimeError as error:  # rank 0 is gone, and with it all that this was for
            logger.debug("the store is gone: %s", error)


class Poll:
    """`EndRequests.agreed` about once a second, for loops in which all ranks call it after every step or batch."""

    def __init__(self, requests: EndRequests) -> None:
        self._requests = requests
        self._steps_between = 1
        self._steps = 0
        self._last = time.monotonic()

    def __call__(self) -> str | None:
        """Why to end, the same on every rank; None to go on."""
        self._steps += 1
        if self._steps < self._steps_between:
            return None
        now = time.monotonic()
        reason, microseconds = self._requests.agreed_and_summed(round(1e6 * (now - self._last)))
        # The mean over ranks of the time since the last time: every rank sums the same numbers.
        step_s = microseconds / 1e6 / self._requests.world / self._steps
        self._steps_between = max(1, min(MAX_STEPS, int(PERIOD_S / max(step_s, 1e-6))))
        self._steps, self._last = 0, now
        return reason


class Attended(Iterator[Batch]):
    """This rank's batches; after a long wait while somebody asks to end, as many empty ones instead of the rest."""

    def __init__(self, requests: EndRequests, batches: Batches) -> None:
        self._requests, self._batches = requests, batches
        self._stand_ins: Iterator[Batch] | None = None

    @property
    def given_up(self) -> bool:
        """The batches that come now are empty."""
        return self._stand_ins is not None

    def __next__(self) -> Batch:
        while self._stand_ins is None and not self._batches.arrives(PATIENCE_S):
            if self._requests.known():
                logger.warning("the wait for data is given up, since the run is asked to end")
                self._stand_ins = self._batches.stand_ins()
        return next(self._batches if self._stand_ins is None else self._stand_ins)
